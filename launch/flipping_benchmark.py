"""The flipping benchmark: data, a judge, and many trainings alike, which `launch/flipping.py` runs.

OUT/data/{none,middle,strong}        street scenes (launch/flipping_data.py), where no data are given
OUT/data/segmenter                   more scenes, whose target images train the judge
OUT/segmenter                        its run
OUT/source-segmenter                 the run of S, trained on the translators' sources, which all strengths have alike
OUT/rounds/MISMATCH-ARM              later rounds of S (launch/runs/rounds.py), for all seeds and steps of an arm that wants one
OUT/runs/MISMATCH-ARM-SEED-STEPS     run folders of the translators
OUT/logs                             output of each training
OUT/runs.json                        what all runs found, unless another file is named (launch/flipping_results.py)
OUT/pictures.png                     test scenes as each arm translates them
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from infra.config import as_arguments, read_yaml
from infra.console import setup_logging
from infra.disk import why_unwritable
from infra.errors import UserError
from infra.storage import open_storage, replacing
from launch.flipping_arms import MATCH, SEGMENTER, Arm
from launch.flipping_data import BenchmarkData
from launch.flipping_results import Run, add_runs, read_runs, run_of
from launch.matching import matched
from launch.runs.config import make_config
from launch.runs.embedded import GUIDE, LARGE_SEGMENTER, OWN_SEED, QUIET, SMALL_SEGMENTER, Setup
from launch.runs.evaluation import check_judged_by, weights_of
from launch.runs.folder import RunFolder
from launch.runs.processes import one_at_a_time
from launch.runs.resume import has_finished
from launch.runs.rounds import Rounds
from launch.runs.trainings import Training, train_all
from pipelines.dataset import ImageDataset
from pipelines.manifest import load_manifest
from trainer.samples import stack
from trainer.translator import load_translator

LAUNCH = Path(__file__).parent
PICTURE_ROWS = 3  # test images of each root
JUDGE_DIGITS = 8  # of the hash of its weights, by which tables name it
LONG = 4000  # steps from which on every quarter is evaluated, and not the half alone

TIERS = {
    "small": Setup(
        LAUNCH / "flipping-small.yaml",
        (128, 64),
        (1000, 2000, 100),
        {**SMALL_SEGMENTER, "optim.epochs": 6.0},
        {"optim.epochs": 12.0},  # as many steps
    ),
    "gpu": Setup(LAUNCH / "flipping-gpu.yaml", (256, 128), (4000, 10000, 500), LARGE_SEGMENTER),
}


@dataclass(frozen=True, eq=False)
class Cell:
    """One training."""

    arm: Arm
    mismatch: str
    seed: int

    def name(self, steps: int) -> str:
        return _run_name(self.mismatch, self.arm, str(self.seed), steps)


def _run_name(mismatch: str, arm: Arm, seed: str, steps: int) -> str:
    return f"{mismatch}-{arm.name}-{seed}-{steps}"


def _half(pairs: int, images: int) -> float:
    """The epochs of so many images that are half of so many pairs. Rounded down: `Schedule` takes the decimals at their word and
    rounds steps up, so anything above would be one step more."""
    digits = 10**10
    return pairs * digits // (2 * images) / digits


@dataclass(frozen=True)
class _Aids:
    """What a training is helped by. match: its name."""

    segmenter: Path | None = None
    match: str | None = None


class Benchmark:
    """tier: options of all trainings, and of segmenters. mismatches: names of roots of the data, which exist. steps: of each
    training; None: as many as the tier's file says. parallel: trainings at once, which share the cores. compiled: have the
    networks of the translators compiled."""

    def __init__(
        self, tier: Setup, data: BenchmarkData, out: Path, arms: Sequence[Arm], mismatches: Sequence[str],
        seeds: Sequence[int], steps: int | None, parallel: int, compiled: bool = False,
    ) -> None:  # fmt: skip
        """UserError for arms whose options are impossible, and numbers that are."""
        if parallel < 1:
            raise UserError(f"{parallel} trainings at once are impossible: give 1 or more")
        if steps is not None and steps < 2:
            raise UserError(f"{steps} steps have no two halves: give 2 or more")
        for what, given in (("strengths of the mismatch", mismatches), ("seeds", seeds)):
            if len(set(given)) < len(given):
                raise UserError(f"the {what} {' '.join(map(str, given))} name one twice: name each once")
        self.tier, self.data, self.out, self.parallel, self.compiled = tier, data, out, parallel, compiled
        self.arms, self.mismatches, self.seeds = arms, mismatches, seeds
        self.cells = [Cell(arm, mismatch, seed) for seed in seeds for mismatch in mismatches for arm in arms]
        self.usual_steps = self._usual_steps()
        self.steps = steps or self.usual_steps
        self._aids: dict[tuple[str, str], _Aids] = {}
        for cell in self.cells:
            cell.arm.config(tier.config, self._options(cell))

    def _usual_steps(self) -> int:
        """Of the tier on its own scenes, whatever the arms and the data."""
        optim = make_config(read_yaml(self.tier.config)).optim
        return round(optim.total_epochs * self.tier.counts[0] / optim.global_batch)

    def run_dir(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.name(self.steps)

    def runs_of(self, arm: Arm, mismatch: str) -> str:
        """The run folders of an arm: a path with {seed} in the place of the seed."""
        return str(self.out / "runs" / _run_name(mismatch, arm, "{seed}", self.steps))

    def _options(self, cell: Cell) -> dict[str, Any]:
        """Of a training, over the tier's file; before the segmenter and the match are there, with words in their places."""
        aids = self._aids.get((cell.arm.name, cell.mismatch), _Aids())
        own = {name: str(aids.segmenter) if value == SEGMENTER else value for name, value in cell.arm.options.items()}
        if aids.match:
            own[MATCH] = aids.match
        given = {"seed": cell.seed, "run_dir": str(self.run_dir(cell))}
        return own | self._shared(cell.arm, cell.mismatch, self.steps) | given

    def _shared(self, arm: Arm, mismatch: str, steps: int) -> dict[str, Any]:
        """Half of the steps have the full learning rate, half a falling one."""
        batch = arm.config(self.tier.config, arm.options).optim.global_batch
        half = _half(steps * batch, self.data.training_images)
        return {
            "task": self.data.task, "data.root": self.data.root(mismatch), "optim.epochs": half,
            "optim.decay_epochs": half, "evaluation.every": half / 2 if steps >= LONG else half,
            "evaluation.segmenter": str(self.data.judge),
        }  # fmt: skip

    # ---- doing it ---------------------------------------------------------------------------------------------------

    def run(self, file: Path) -> None:
        """Do whatever is not done yet, and add each finished run to the file. UserError, when all others have ended, if a
        training failed, and before anything is made for a folder or file that takes nothing."""
        for folder, named in ((self.out, "--out"), (file.parent, "--json")):
            if reason := why_unwritable(folder):
                raise UserError(f"cannot write to {folder} ({reason}): name another {named}")
        read_runs(file)
        self.data.check()
        with one_at_a_time(self.out / "data"):
            self._prepare()
        done = [cell for cell in self.cells if self._is_done(cell)]
        add_runs(file, [self._found(cell) for cell in done])
        cells = {cell.name(self.steps): cell for cell in self.cells if cell not in done}
        trainings = {
            name: Training(self._command(cell), self.run_dir(cell), self.steps) for name, cell in cells.items()
        }
        train_all(trainings, self.out / "logs", self.parallel, lambda name: add_runs(file, [self._found(cells[name])]))

    def _prepare(self) -> None:
        self.data.prepare(self.mismatches)
        setup_logging(None)
        for arm in self.arms:
            for mismatch in self.mismatches:
                self._aids[arm.name, mismatch] = self._prepare_aids(arm, mismatch)

    def _prepare_aids(self, arm: Arm, mismatch: str) -> "_Aids":
        segmenter = self._source_segmenter(arm, mismatch) if arm.uses_segmenter else None
        if segmenter and weights_of(segmenter) == self._judge_weights:
            raise UserError(f"the judge {self.data.judge} is the segmenter that the arm {arm.name} trains with: give another "
                            "--judge, such as one of launch/train_segmenter.py --domain target")  # fmt: skip
        if arm.way is None:
            return _Aids(segmenter)
        crop = arm.config(self.tier.config, arm.options).data.crop
        by = segmenter if arm.way == "segmenter" else None
        return _Aids(segmenter, matched(self.data.root(mismatch), arm.way, crop, by))

    def _source_segmenter(self, arm: Arm, mismatch: str) -> Path:
        """S of the arm's round. All roots have the same sources, so the first S is one."""
        first = self.tier.train_source_segmenter(self.data.sources(), self.out / "source-segmenter")
        setup_logging(None)
        if arm.rounds == 0:
            return first
        options = {**arm.options, **self._shared(arm, mismatch, self.usual_steps), "seed": OWN_SEED}
        translator = arm.config(self.tier.config, options)
        out = self.out / "rounds" / f"{mismatch}-{arm.name}"
        return Rounds(out, translator, {**QUIET, **self.tier.segmenter, **GUIDE}, first=first).segmenter(arm.rounds)

    @functools.cached_property
    def _judge_weights(self) -> str:
        """The hash of the judge's weights, once it is there."""
        return weights_of(self.data.judge)

    def _is_done(self, cell: Cell) -> bool:
        """UserError if the run is there with other options, or another judge evaluated it."""
        folder = RunFolder(self.run_dir(cell))
        finished = has_finished(folder, cell.arm.config(self.tier.config, self._options(cell)))
        if finished:
            check_judged_by(folder, self.data.judge)
        return finished

    def _command(self, cell: Cell) -> list[Any]:
        engine = {"engine.compile": "true"} if self.compiled else {}
        options = as_arguments(self._options(cell) | engine)
        return [LAUNCH / "train.py", "--config", self.tier.config, *options]

    def _found(self, cell: Cell) -> Run:
        key = (cell.arm.name, cell.mismatch, cell.seed, self.steps)
        folder = RunFolder(self.run_dir(cell))
        evaluations = folder.evaluations()
        if not evaluations:
            raise UserError(f"{folder.evaluations_file} holds no evaluation: delete {folder.path} to train it again")
        return run_of(key, self._judge_weights[:JUDGE_DIGITS], evaluations)

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def write_pictures(self) -> Path:
        """Rows of test images: source | each arm, by its first seed | the true target where there is one; a block for each
        root."""
        rows = []
        for mismatch in self.mismatches:
            root = self.data.root(mismatch)
            sources = ImageDataset(root, "test", "source")
            targets = ImageDataset(root, "test", "target") if load_manifest(open_storage(root)).paired else None
            translators = [load_translator(self.run_dir(Cell(arm, mismatch, self.seeds[0]))) for arm in self.arms]
            for place in range(0, len(sources), max(1, len(sources) // PICTURE_ROWS))[:PICTURE_ROWS]:
                source = sources.read(place)[0]
                translations = [translator(source) for translator in translators]
                true = [targets.read(place)[0]] if targets else []
                rows.append(stack([source, *translations, *true], axis=1))
        path = self.out / "pictures.png"
        with replacing(path) as file:
            Image.fromarray(stack(rows, axis=0)).save(file, format="png")
        return path
