"""One evaluation, wired: checkpoint and test images -> metrics -> run folder and MLflow. `launch/evaluate.py` runs it."""

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from infra.errors import UserError
from infra.storage import open_storage, replacing
from infra.tracking import Tracker
from launch.run_folder import RunFolder
from pipelines.dataset import Samples
from pipelines.manifest import load_manifest
from trainer.checkpoint import Checkpoint
from trainer.evaluation import Evaluation, metrics_for
from trainer.samples import stack
from trainer.translator import Translator, find_checkpoint, load_translator

SHEET_ROWS = 8


@dataclass(frozen=True)
class Result:
    """figures: as `Evaluation.figures` gives them. images: how many test images were translated. data: their root.
    json_file, picture_file: where the figures and the sample sheet were written."""

    figures: dict[str, Any]
    images: int
    data: str
    checkpoint: Path
    json_file: Path
    picture_file: Path


class HeldOut:
    """The first `limit` test images of a data root (all if None), and of pairs their true targets.

    UserError if there are none, or if the pairs do not fit together.
    """

    def __init__(self, root: str, limit: int | None, cache_dir: str | None) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"--limit {limit} leaves no image: give 1 or more, or leave it out")
        self.paired = load_manifest(open_storage(root)).paired
        self.sources = Samples(root, "test", "source", cache_dir=cache_dir)
        self.targets = Samples(root, "test", "target", cache_dir=cache_dir) if self.paired else None
        if self.targets and (len(self.targets), self.targets.split.image_size) != (
            len(self.sources), self.sources.split.image_size,
        ):  # fmt: skip
            raise UserError(f"the test pairs of {root} differ in number or size between source and target: "
                            "prepare the data again")  # fmt: skip
        # Without pairs there is nothing to measure, only to look at.
        wanted = limit or (len(self.sources) if self.paired else SHEET_ROWS)
        self.count = min(wanted, len(self.sources))

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(source, target, label) of image i in [0, count), as `Metric.add` takes them."""
        source, label = self.sources.read(i)
        return source, self.targets.read(i)[0] if self.targets else None, label


def evaluate(run: Path, *, data: str | None = None, limit: int | None = None, json_file: Path | None = None) -> Result:
    """Evaluate a run (its newest checkpoint) or a checkpoint; write the figures and a sample sheet, and log both.

    data: another data root than the one trained on. limit: only the first so many test images. json_file: instead of
    evaluation.json in the run folder. Raises UserError before anything is written for what cannot work.
    """
    checkpoint_folder = find_checkpoint(run)
    checkpoint = Checkpoint(checkpoint_folder)
    config = checkpoint.state["config"]
    root = data or config["data.root"]
    images = HeldOut(root, limit, config["data.cache_dir"])
    translator = load_translator(checkpoint_folder, "cuda" if torch.cuda.is_available() else "cpu")

    evaluation = Evaluation(functools.partial(metrics_for, config["task"], paired=images.paired))
    sheet = _translate_all(translator, images, evaluation)

    folder = _folder_of(checkpoint_folder)
    result = Result(
        evaluation.figures(), images.count, root, checkpoint_folder,
        json_file or folder.path / "evaluation.json", folder.samples / "evaluation.png",
    )  # fmt: skip
    with replacing(result.picture_file) as file:
        Image.fromarray(sheet).save(file, format="png")
    report = {**result.figures, "images": result.images, "data": root, "checkpoint": str(checkpoint_folder)}
    with replacing(result.json_file) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    _track(folder, checkpoint, result.figures, sheet)
    return result


def _translate_all(translator: Translator, images: HeldOut, evaluation: Evaluation) -> np.ndarray:
    """Feed every image to the metrics; returns the sheet of the first ones, source | translation | true target."""
    rows = []
    # Figures must repeat and be comparable, so the GPU neither rounds to TF32 nor picks kernels by their speed.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for i in tqdm(range(images.count), "evaluating", unit="image"):
            source, target, label = images.read(i)
            translation = translator(source)
            evaluation.add(source, translation, target, label)
            if i < SHEET_ROWS:
                rows.append([picture for picture in (source, translation, target) if picture is not None])
    return stack([stack(row, axis=1) for row in rows], axis=0)


def _folder_of(checkpoint: Path) -> RunFolder:
    """The run folder that a checkpoint lies in; of one that was moved elsewhere, the folder around it."""
    run = RunFolder(checkpoint.resolve().parents[1])
    return run if run.config_file.is_file() else RunFolder(checkpoint.resolve().parent)


def _track(folder: RunFolder, checkpoint: Checkpoint, figures: dict[str, Any], sheet: np.ndarray) -> None:
    """Log to the run's MLflow run, if it has one, at the checkpoint's step."""
    if not folder.run_id_file.is_file():
        return
    step, config = checkpoint.state["step"], checkpoint.state["config"]
    with tempfile.TemporaryDirectory() as scratch:
        # A copy: a store that does not know the run makes another, whose id must not displace the training run's.
        run_id_file = Path(shutil.copy(folder.run_id_file, scratch))
        tracker = Tracker.start(config["task"], folder.path.name, config, run_id_file=run_id_file)
        tracker.metrics(step, dict(_flat(figures, "eval/")))
        tracker.image("evaluation", step, sheet)
        # A finished training left its model; any other is still to be continued.
        tracker.finish("FINISHED" if folder.model.is_dir() else "KILLED")


def _flat(figures: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """{"Acc": {"30": x}} as ("eval/Acc/30", x)."""
    flat: list[tuple[str, float]] = []
    for name, figure in figures.items():
        flat += _flat(figure, f"{prefix}{name}/") if isinstance(figure, dict) else [(prefix + name, figure)]
    return flat


def table(figures: dict[str, Any]) -> str:
    """The figures as aligned lines, accuracies in percent; empty where the data has no pairs."""
    if "Dist" not in figures:
        return ""
    lines = [f"{'':22}{'Dist':>8}" + "".join(f"{f'Acc({delta})':>11}" for delta in figures["Acc"])]
    for name, row in (("source, untranslated", figures["baseline"]), ("translation", figures)):
        lines.append(f"{name:22}{row['Dist']:8.2f}" + "".join(f"{share:9.1%}  " for share in row["Acc"].values()))
    return "\n".join(line.rstrip() for line in lines)
