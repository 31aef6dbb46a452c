"""What a run leaves behind while it trains: metrics, sample grids, checkpoints; in its folder and in MLflow."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from infra.console import ProgressLine
from infra.storage import replacing
from infra.tracking import Journal, Status, Tracker
from launch.run_folder import RunFolder
from pipelines.dataset import Samples
from pipelines.manifest import DOMAINS
from trainer.checkpoint import Checkpointer
from trainer.loop import Observer, Trainer
from trainer.samples import sample_grid
from trainer.state import TrainingState
from trainer.translator import Translator, save_pyfunc_model

log = logging.getLogger(__name__)

SMALL_PRESET = "launch/demo.yaml"
LONG_SECONDS = 3600.0  # a run on a CPU that takes longer gets a word about it
NOT_LOSSES = ("step", "epoch", "lr", "pairs_per_s", "memory_gib")


class RunObserver(Observer):
    """Rank 0's. grid: makes the sample grid with a translator. state: what a checkpoint says beside the trainer's own."""

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker,
        trainer: Trainer,
        checkpointer: Checkpointer,
        grid: Callable[[Translator], np.ndarray],
        *,
        first_step: int,
        state: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.tracker = tracker
        self.trainer = trainer
        self.checkpointer = checkpointer
        self.grid = grid
        self.state = state
        self.line = ProgressLine(trainer.total_steps, first_step, pairs_per_step=trainer.schedule.optim.global_batch)
        self.journal = Journal(folder.metrics_file)
        self.journal.truncate_after(first_step)
        self.logged: list[int] = []

    def progress(self, rows: Sequence[dict[str, float]]) -> None:
        for row in rows:
            self.journal.append(row)
            self.tracker.metrics(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        losses = {name: value for name, value in rows[-1].items() if name not in NOT_LOSSES} if rows else None
        self.line.advance(losses)

    def estimate(self, seconds: float) -> None:
        if self.trainer.engine.device.type == "cpu" and seconds > LONG_SECONDS:
            log.warning(
                "at this pace the run takes %s on this CPU: for one of minutes use --config %s, as `make demo` does",
                _duration(seconds), SMALL_PRESET,
            )  # fmt: skip

    def sample(self, step: int) -> None:
        engine = self.trainer.engine
        with engine.autocast():
            picture = self.grid(Translator(self.trainer.translator, engine.device))
        with replacing(self.folder.samples / f"step_{step}.png") as file:
            Image.fromarray(picture).save(file, format="png")
        self.tracker.image("samples", step, picture)

    def save(self, state: TrainingState) -> None:
        about = {"step": state.step, "scalers": state.scalers, **self.state}
        path = self.checkpointer.save(state.step, state.tensors, about)
        log.info("saved %s", path)
        keep = self.trainer.config.keep_logged
        if keep:
            self.tracker.artifacts(path, f"checkpoints/{path.name}")
            self.logged.append(state.step)
            while len(self.logged) > keep:
                self.tracker.delete_artifacts(f"checkpoints/step_{self.logged.pop(0)}")

    def close(self, status: Status) -> None:
        self.line.close()
        self.journal.close()
        newest = self.checkpointer.latest()
        if status == "FINISHED" and newest is not None:
            save_pyfunc_model(self.folder.model, newest)
            self.tracker.model("generator", self.folder.model)
        self.tracker.finish(status)


def fixed_grid(root: str, rows: int, cache_dir: str | None) -> Callable[[Translator], np.ndarray]:
    """A sample grid of test sources (train, where there are no test images) from all over the split, each beside a
    target image of another scene. Reads the images once."""
    sources, targets = (Samples(root, "test", domain, fallback="train", cache_dir=cache_dir) for domain in DOMAINS)
    rows = min(rows, len(sources))
    source_images = [sources.read(row * len(sources) // rows)[0] for row in range(rows)]
    # Half a split further on: in paired data the target in the same place is the same scene.
    places = [(row * len(targets) // rows + len(targets) // 2) % len(targets) for row in range(rows)]
    target_images = [targets.read(place)[0] for place in places]
    return lambda translator: sample_grid(translator, source_images, target_images)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds / 60:.0f} minutes"
