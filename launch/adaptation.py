"""Domain adaptation by translation: segmenters trained on translated sources, which `launch/adapt.py` compares.

OUT/data/ARM[-SEED]        the data as a translator makes them, with the sources' labels
OUT/data/streets           of the embedded scenes: those of the flipping benchmark, with test images of their own
OUT/segmenters/ARM-SEED    run folders of the segmenters
OUT/logs                   output of each training
OUT/adaptation.json        what all runs found (launch/adaptation_results.py)
OUT/adaptation.png         the classes of each arm
OUT/segmentations.png      test images: photo | true labels | as the first segmenter of each arm sees them
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.config import as_arguments, fixed, to_yaml
from infra.devices import usual_device
from infra.errors import UserError
from infra.json_lines import read_json
from infra.storage import open_storage
from launch.adaptation_results import FLIPS, SOURCE, TARGET, add, examples_picture, iou_picture, read
from launch.flipping_benchmark import LAUNCH, Benchmark
from launch.flipping_results import STRENGTHS
from launch.runs.data import data_identity
from launch.runs.embedded import QUIET
from launch.runs.folder import RunFolder, run_around
from launch.runs.processes import one_at_a_time
from launch.runs.results import Result
from launch.runs.resume import has_finished
from launch.runs.segmenter import SegmenterConfig, make_config
from launch.runs.trainings import Training, train_all
from launch.translating.roots import translate_root
from pipelines.dataset import ImageDataset
from pipelines.derived import Part, derive, encoding_of
from pipelines.manifest import load_manifest
from trainer.optim import OptimConfig
from trainer.schedule import Schedule
from trainer.segmentation.trained import load_trained
from trainer.translator import find_translation, load_translator

STRENGTH = "strong"  # of the embedded scenes' mismatch
TESTS = 500  # embedded scenes to score on
SETTING = "setting"  # of a run in the file: what all of them have alike, data and options
SEED = "{seed}"  # in the path of a translator's runs
PICTURE_ROWS = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One segmenter."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


class Adaptation:
    """Source only, each translator's data, and the targets' own labels, under one schedule, scored on the target's test images.

    root: prepared data whose sources and target test images have labels; the targets' own are trained on where there are some.
    translators: by arm the path of a run or a checkpoint, with SEED in the place of the seed where each seed has one of its own.
    segmenter: options over the recipe of its network. UserError for what cannot work.
    """

    def __init__(
        self, root: str, translators: Mapping[str, str], segmenter: Mapping[str, Any], out: Path, seeds: Sequence[int],
        parallel: int,
    ) -> None:  # fmt: skip
        self.root, self.translators, self.segmenter = root, translators, segmenter
        self.out, self.seeds, self.parallel = out, seeds, parallel
        self.file = out / "adaptation.json"
        if parallel < 1:
            raise UserError(f"{parallel} trainings at once are impossible: give 1 or more")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"the seeds {' '.join(map(str, seeds))} name one twice: name each once")
        for name in translators:
            if name in (SOURCE, TARGET) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise UserError(
                    f"a translator cannot be called {name!r}: give letters and digits, but not {SOURCE} or {TARGET}"
                )
        self.splits = load_manifest(open_storage(root)).splits
        for split, why in (("train/source", "to train on"), ("test/target", "to score segmenters on")):
            if split not in self.splits or self.splits[split].label_space is None:
                raise UserError(f"{root} has no labelled images {split} {why}: prepare it with them")
        arms = [SOURCE, *translators]
        if "train/target" in self.splits and self.splits["train/target"].label_space:
            arms.append(TARGET)
        else:
            log.info("the training targets of %s have no labels: there is no ceiling", root)
        self.arms = arms
        recipe = to_yaml(fixed(make_config({**segmenter, "seed": 0, "domain": "source"})))
        self.setting = hashlib.sha256(f"{data_identity(root)}\n{recipe}".encode()).hexdigest()
        self.cells = [Cell(arm, seed) for seed in seeds for arm in arms]
        for cell in self.cells:
            self._config(cell)
            if cell.arm in translators:
                find_translation(self._translator(cell))

    def run(self) -> None:
        """Do whatever is not done yet, and add each finished run to the file. UserError, when all others have ended, if a
        training failed, and before anything is made for a file with runs on other data or by other segmenters."""
        own = [(cell.arm, cell.seed) for cell in self.cells]
        others = [row for row in read(self.file) if (row["arm"], row["seed"]) not in own]
        if any(row.get(SETTING, self.setting) != self.setting for row in others):
            raise UserError(f"{self.file} has segmenters with other options, or of other data, which do not compare with these: "
                            "name another --out")  # fmt: skip
        with one_at_a_time(self.out / "data"):
            for cell in self.cells:
                if cell.arm in self.translators:
                    self._translate(cell)
        done = [cell for cell in self.cells if has_finished(self._folder(cell), self._config(cell))]
        add(self.file, [self._found(cell) for cell in done])
        cells = {cell.name: cell for cell in self.cells if cell not in done}
        trainings = {name: self._training(cell) for name, cell in cells.items()}
        train_all(trainings, self.out / "logs", self.parallel, lambda name: add(self.file, [self._found(cells[name])]))

    def _translator(self, cell: Cell) -> Path:
        return Path(self.translators[cell.arm].replace(SEED, str(cell.seed)))

    def _data(self, cell: Cell) -> str:
        """The root that a segmenter is trained on."""
        if cell.arm not in self.translators:
            return self.root
        return str(self.out / "data" / (cell.name if SEED in self.translators[cell.arm] else cell.arm))

    def _translate(self, cell: Cell) -> None:
        """By the newest checkpoint: the best one would be chosen by a segmenter that knows the targets' labels."""
        translator = load_translator(self._translator(cell), usual_device())
        log.info("%s: translations by %s", cell.name, self._translator(cell))
        translate_root(translator, self.root, self._data(cell))

    def _options(self, cell: Cell) -> dict[str, Any]:
        given = {
            "domain": "target" if cell.arm == TARGET else "source", "test_domain": "target", "seed": cell.seed,
            "data.root": self._data(cell), "run_dir": str(self._folder(cell).path),
        }  # fmt: skip
        options = QUIET | dict(self.segmenter) | given
        if cell.arm == TARGET:
            options |= _as_long(make_config(options).optim, self._images(SOURCE) / self._images(TARGET))
        return options

    def _images(self, arm: str) -> int:
        """That a segmenter of this arm is trained on."""
        return self.splits["train/target" if arm == TARGET else "train/source"].samples

    def _config(self, cell: Cell) -> SegmenterConfig:
        return make_config(self._options(cell))

    def _training(self, cell: Cell) -> Training:
        command = [LAUNCH / "train_segmenter.py", *as_arguments(self._options(cell))]
        steps = Schedule(self._config(cell).optim, self._images(cell.arm)).steps
        return Training(command, self._folder(cell).path, steps)

    def _folder(self, cell: Cell) -> RunFolder:
        return RunFolder(self.out / "segmenters" / cell.name)

    def _found(self, cell: Cell) -> Result:
        scores = read_json(self._folder(cell).evaluation_file, dict)
        row = {"arm": cell.arm, "seed": cell.seed, SETTING: self.setting, **scores}
        if cell.arm in self.translators:
            checkpoint = find_translation(self._translator(cell))
            row |= {
                name: value for name, value in run_around(checkpoint).evaluation_of(checkpoint).items() if name == FLIPS
            }
        return row

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def write_pictures(self, titles: Mapping[str, str]) -> tuple[Path, Path]:
        """titles: of arms; one without is called by its name."""
        chart, examples = self.out / "adaptation.png", self.out / "segmentations.png"
        iou_picture(chart, [run for run in read(self.file) if run["arm"] in self.arms], titles)
        tests = ImageDataset(self.root, "test", "target")
        shown = [tests.read(place) for place in range(0, len(tests), -(-len(tests) // PICTURE_ROWS))]
        seen = {
            arm: [segmenter(image) for image, _ in shown]
            for arm in self.arms
            for segmenter in (load_trained(self._folder(Cell(arm, self.seeds[0])).path, usual_device()),)
        }
        examples_picture(examples, shown, seen)
        return chart, examples


def street_root(benchmark: Benchmark, out: Path) -> str:
    """The training data of the flipping benchmark, and test images whose statistics are the targets' own: its test scenes, which
    are drawn in both looks, have the sources'."""
    storage = open_storage(str(benchmark.data.root(STRENGTH)))
    tests = open_storage(str(benchmark.tier.draw_tests(out / "data" / "tests", TESTS, STRENGTHS[STRENGTH])))
    manifest, other = load_manifest(storage), load_manifest(tests)
    parts = {name: [Part(storage, manifest.splits[name], None, "copied")] for name in ("train/source", "train/target")}
    parts["test/target"] = [Part(tests, other.splits["test/target"], None, "copied")]
    root = str(out / "data" / "streets")
    derive(parts, open_storage(root), encoding_of(manifest), {"source": "adaptation"})
    return root


def _as_long(optim: OptimConfig, times: float) -> dict[str, Any]:
    """A schedule that takes as many steps on data with so many `times` fewer images."""
    if times == 1:
        return {}

    def rounded(epochs: float) -> float:
        return math.floor(epochs * times * 1e6) / 1e6  # down, so that no step is added

    return {
        "optim.epochs": rounded(optim.epochs), "optim.decay_epochs": rounded(optim.decay_epochs),
        "optim.step_epochs": max(1, round(optim.step_epochs * times)),
    }  # fmt: skip
