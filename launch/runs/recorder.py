"""What a run leaves behind while it trains: metrics, sample pictures, checkpoints; in its folder and in MLflow."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from infra.console import ProgressLine
from infra.storage import replacing
from infra.tracking import Journal, Status, Tracker
from launch.runs.evaluation import Outcome
from launch.runs.folder import RunFolder
from launch.runs.report import log_outcome, summary
from pipelines.health import DataHealth
from trainer.checkpointer import Checkpointer
from trainer.evaluation.config import BETTER, value_of
from trainer.loop import Observer, Trainer
from trainer.state import TrainingState

log = logging.getLogger(__name__)

LONG_SECONDS = 3600.0  # a run on a CPU that takes longer gets a word about it
Draw = Callable[[nn.Module, torch.device], np.ndarray]
Publish = Callable[[Path, Tracker], None]
Listener = Callable[[dict[str, Any]], None]
NAMED = 10  # names in the sentence about what was left out
NOT_LOSSES = ("step", "epoch", "lr", "pairs_per_s", "memory_gib")


@dataclass(frozen=True)
class Judging:
    """How a run evaluates itself. every: epochs between evaluations. evaluate: judges a network in evaluation mode on a
    device, all ranks at once; what came out, on rank 0. better: names the figure that the best checkpoint is best in."""

    every: float
    evaluate: Callable[[nn.Module, torch.device], Outcome | None]
    better: str


class RankObserver(Observer):
    """Any rank's, which takes its part in evaluations and tells what happened to its data (health)."""

    def __init__(self, trainer: Trainer, judging: Judging | None, health: DataHealth) -> None:
        self.trainer = trainer
        self.judging = judging
        self.health = health

    def progress(self, rows: Sequence[dict[str, float]]) -> None:
        if rows:
            self._data_figures()

    def _data_figures(self) -> dict[str, float]:
        """On rank 0 what happened to the data of all ranks, zeros left out. Its own health gets to know, and logs, every
        shard and sample that another rank left out: several may have met the same one."""
        health = self.health
        ranks = self.trainer.engine.gather((health.figures(), dict(health.bad_shards), dict(health.bad_samples)))
        if ranks is None:
            return {}
        for _, shards, samples in ranks[1:]:
            for name, reason in shards.items():
                health.bad_shard(name, reason)
            for name, reason in samples.items():
                health.bad_sample(name, reason)
        own = health.figures()
        figures = {name: sum(rank[name] for rank, _, _ in ranks) for name in own}
        figures |= {name: own[name] for name in ("data/bad_shards", "data/bad_samples")}
        return {name: value for name, value in figures.items() if value}

    def evaluate(self, step: int) -> bool:
        engine = self.trainer.engine
        assert self.judging is not None
        with _evaluating(self.trainer.product) as network:
            outcome = self.judging.evaluate(network, engine.device)
        return bool(engine.broadcast(outcome and self._is_worth_keeping(step, outcome)))

    def _is_worth_keeping(self, step: int, outcome: Outcome) -> bool:
        """Write an evaluation down; whether what was evaluated deserves a checkpoint. Only rank 0 has an outcome."""
        return False


class RunObserver(RankObserver):
    """Rank 0's.

    draw: makes the sample picture, uint8 (H, W, 3), with a network in evaluation mode on a device. publish: leaves the
    finished model behind, given its checkpoint and the tracker. unit: what a batch counts. shorter: how to have a run
    that takes minutes. listener: is told of each evaluation but the last, once its checkpoint is saved. begun: what the
    checkpoint says that the run goes on from, nothing at its beginning. state: what a checkpoint says beside the trainer's
    own.
    """

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker,
        trainer: Trainer,
        checkpointer: Checkpointer,
        *,
        judging: Judging | None,
        health: DataHealth,
        draw: Draw,
        publish: Publish,
        unit: str,
        shorter: str,
        listener: Listener | None,
        begun: Mapping[str, Any],
        state: Mapping[str, Any],
    ) -> None:
        super().__init__(trainer, judging, health)
        first_step = begun.get("step", 0)
        self.folder = folder
        self.tracker = tracker
        self.checkpointer = checkpointer
        self.draw, self.publish, self.shorter = draw, publish, shorter
        self.listener = listener
        self.state = state
        self.line = ProgressLine(trainer.total_steps, first_step, batch=trainer.schedule.optim.global_batch, unit=unit)
        self.journal = Journal(folder.metrics_file)
        self.journal.truncate_after(first_step)
        self.evaluations = Journal(folder.evaluations_file) if judging else None
        if self.evaluations:
            self.evaluations.truncate_after(first_step)
        # The best evaluation so far, whose file a run that was restored from a mirror has lost.
        self.best: dict[str, Any] | None = begun.get("best")
        self.best_step: int | None = None  # of the checkpoint about to be saved as the best
        self.news: dict[str, Any] | None = None  # an evaluation of which the listener is not told yet
        self.logged: list[int] = []

    def progress(self, rows: Sequence[dict[str, float]]) -> None:
        data = self._data_figures() if rows else {}
        for row in ({**row, **data} for row in rows):
            self.journal.append(row)
            self.tracker.metrics(int(row["step"]), grouped(row))
        losses = {name: value for name, value in rows[-1].items() if name not in NOT_LOSSES} if rows else None
        self.line.advance(losses)

    def estimate(self, seconds: float) -> None:
        if self.trainer.engine.device.type == "cpu" and seconds > LONG_SECONDS:
            log.warning(
                "at this pace the run takes %s on this CPU: for one of minutes %s", _duration(seconds), self.shorter
            )

    def sample(self, step: int) -> None:
        engine = self.trainer.engine
        with engine.autocast(), _evaluating(self.trainer.product) as network:
            picture = self.draw(network, engine.device)
        with replacing(self.folder.samples / f"step_{step}.png") as file:
            Image.fromarray(picture).save(file, format="png")
        self.tracker.image("samples", step, picture)

    def _is_worth_keeping(self, step: int, outcome: Outcome) -> bool:
        assert self.judging is not None and self.evaluations is not None
        better = self.judging.better
        before = [value_of(figures, better) for figures in (*self.evaluations.read(), self.best or {})]
        value = value_of(outcome.figures, better)
        row = {"step": step, **outcome.figures}
        self.evaluations.append(row)
        self.news = row if self.listener else None
        log_outcome(self.tracker, step, outcome)
        log.info("step %d: %s", step, summary(outcome.figures))
        if value is not None and not any(other is not None and other <= value for other in before):
            self.best_step = step
            self.best = {name: figure for name, figure in row.items() if name in ("step", *BETTER)}
            self.tracker.tags({"best_step": str(step), f"best_{better}": f"{outcome.figures[better]:.6g}"})
        return self.best_step == step or self.listener is not None

    def save(self, state: TrainingState) -> None:
        about = {"step": state.step, "scalers": state.scalers, "best": self.best, **self.state}
        is_best = self.best_step == state.step
        path = self.checkpointer.save(state.step, state.tensors, about, best=is_best)
        log.info("saved %s%s", path, f", the best by {self.judging.better} so far" if is_best and self.judging else "")
        keep = self.trainer.config.keep_logged
        if keep:
            self.tracker.artifacts(path, f"checkpoints/{path.name}")
            self.logged.append(state.step)
            while len(self.logged) > keep:
                self.tracker.delete_artifacts(f"checkpoints/step_{self.logged.pop(0)}")
        if self.listener and self.news and state.step < self.trainer.total_steps:
            row, self.news = self.news, None
            self.listener(row)

    def close(self, status: Status) -> None:
        self.line.close()
        if words := left_out(self.health):
            log.warning("%s", words)
        self.journal.close()
        if self.evaluations:
            self.evaluations.close()
        newest = self.checkpointer.latest()
        if status == "FINISHED" and newest is not None:
            self.publish(newest, self.tracker)
        self.tracker.finish(status)


def grouped(row: Mapping[str, float]) -> dict[str, float]:
    """A row of metrics by their names in MLflow, whose UI makes a section of each prefix, sections with a capital first:
    "Loss/NCE", "train/lr"; "data/…" stays."""
    names = {name: name if "/" in name else f"{'train' if name in NOT_LOSSES else 'Loss'}/{name}" for name in row}
    return {names[name]: value for name, value in row.items() if name != "step"}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network as it is used after training: batch norm takes its running statistics and leaves them as they are."""
    network.eval()
    try:
        yield network
    finally:
        network.train()


def left_out(health: DataHealth) -> str:
    """What the training did without, in a sentence; empty if nothing."""
    kinds = {"sample": health.bad_samples, "shard": health.bad_shards}
    counts = [f"{len(names)} {kind}{'s' if len(names) > 1 else ''}" for kind, names in kinds.items() if names]
    named = [name for names in kinds.values() for name in names]
    if not named:
        return ""
    shown = ", ".join(named[:NAMED]) + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")
    return (
        f"{' and '.join(counts)} {'was' if len(named) == 1 else 'were'} left out, others took their places: {shown}; "
        "the warnings above say why"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds / 60:.0f} minutes"
