"""Evaluation during training: what was measured is written down, and the best checkpoint is told from the others."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infra.json_lines import JsonLines
from launch.runs.evaluation import Outcome
from launch.runs.folder import RunFolder, write_png
from launch.runs.report import summary
from trainer.evaluation.config import BETTER, value_of
from trainer.loop import Evaluation, Trainer

JUDGE = "judge"  # in a row of evaluations.jsonl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """How a run evaluates itself. every: epochs between evaluations. evaluate: evaluates a network in evaluation mode on a
    device, all ranks at once; its outcome on rank 0. metric: the one that the best checkpoint is best in. judge: what
    evaluates, as a text; by other ones evaluations do not compare."""

    every: float
    evaluate: Callable[[nn.Module, torch.device], Outcome | None]
    metric: str
    judge: str = ""


class Validator:
    """Of all ranks; rank 0 writes evaluations.jsonl and evaluations/step_N/.

    keep_all: every evaluation is to have its checkpoint. state: of the checkpoint that the run goes on from, if any. told: on
    rank 0, the metrics after so many steps, once they are written.
    """

    def __init__(
        self, folder: RunFolder, trainer: Trainer, validation: Validation, state: Mapping[str, Any], keep_all: bool,
        told: Callable[[int, Mapping[str, Any]], None] = lambda step, metrics: None,
    ) -> None:  # fmt: skip
        self.folder, self.trainer, self.validation, self.keep_all, self.told = (
            folder,
            trainer,
            validation,
            keep_all,
            told,
        )
        if trainer.engine.rank == 0:
            file = JsonLines(folder.evaluations_file)
            file.truncate_after(state.get("step", 0))
            best = state.get("best")
            if best and not file.read():  # the checkpoint is from a mirror, which has no such file
                file.append(best)
            file.close()

    def __call__(self, step: int) -> Evaluation:
        engine = self.trainer.engine
        with self.trainer.evaluating() as network:
            outcome = self.validation.evaluate(network, engine.device)
        best = bool(engine.broadcast(outcome and self._write(step, outcome)))
        return Evaluation(step, outcome.metrics if outcome else {}, best, keep=best or self.keep_all)

    def _write(self, step: int, outcome: Outcome) -> bool:
        """Whether it is the best so far: the first of equals."""
        for name, picture in outcome.pictures.items():
            write_png(self.folder.evaluation_pictures / f"step_{step}" / f"{name}.png", picture)
        file = JsonLines(self.folder.evaluations_file)
        file.append({"step": step, "time": time.time(), JUDGE: self.validation.judge, **outcome.metrics})
        file.close()
        log.info("step %d: %s", step, summary(outcome.metrics))
        self.told(step, outcome.metrics)
        best = best_of(self.folder, self.validation.metric)
        return best is not None and best["step"] == step


def best_of(folder: RunFolder, metric: str) -> dict[str, Any] | None:
    """Of the evaluations by the last one's judge so far the best, by "step" and the metrics that runs are compared by; None if
    there is none."""
    rows = folder.evaluations()
    judges = {rows[-1].get(JUDGE), None} if rows else set()  # None: of a version that did not say
    rows = [row for row in rows if row.get(JUDGE) in judges and value_of(row, metric) is not None]
    best = min(rows, key=lambda row: (value_of(row, metric), row["step"]), default=None)
    return best and {name: value for name, value in best.items() if name in ("step", JUDGE, *BETTER)}
