"""Warnings of a training that has collapsed, each with the checkpoint to go back to."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.runs.folder import RunFolder
from launch.runs.validation import best_of
from trainer.checkpoint import step_of
from trainer.checkpointer import Checkpointer
from trainer.collapse import Watch
from trainer.evaluation.config import value_of
from trainer.methods.base import Guesses

log = logging.getLogger(__name__)


class CollapseWarnings:
    """On rank 0. metric: by which the run's evaluations are compared; None: it makes none.

    There is a third sign beside the two of `trainer.collapse`: an evaluation finds the translations worse than the untranslated
    images.
    """

    def __init__(self, folder: RunFolder, checkpointer: Checkpointer, guesses: Guesses, metric: str | None) -> None:
        self._folder, self._checkpointer, self._metric = folder, checkpointer, metric
        self._watch = Watch(guesses)
        self._worse = False

    def see(self, rows: Sequence[Mapping[str, float]]) -> None:
        for sign in self._watch.see(rows):
            self._warn(sign.words, sign.began)

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Once they are written down."""
        worse = self._metric is not None and _is_worse(metrics, metrics, self._metric)
        if worse and not self._worse:
            self._warn(
                f"after step {step} {self._metric} of the translations is worse than of the untranslated images", step
            )
        self._worse = worse

    def _warn(self, words: str, began: int) -> None:
        log.warning("collapse: %s; %s", words, self._advice(began))

    def _advice(self, began: int) -> str:
        if self._metric is not None and (best := best_of(self._folder, self._metric)):
            if not _is_worse(best, self._folder.evaluations()[-1], self._metric):
                path = self._folder.checkpoints / f"step_{best['step']}"
                return f"the checkpoint to go back to is {path}, the best by {self._metric}"
            return f"no checkpoint is to be advised yet: none is better than doing nothing by {self._metric}"
        older = last_before(self._checkpointer.all(), began)
        return f"the checkpoint to go back to is {older}" if older else "no checkpoint is older than that"


def last_before(checkpoints: Sequence[Path], step: int) -> Path | None:
    """The newest of complete checkpoints, given oldest first, that was made before this step (counted from 1) began."""
    return next((path for path in reversed(checkpoints) if step_of(path) < step), None)


def _is_worse(translation: Mapping[str, Any], evaluation: Mapping[str, Any], metric: str) -> bool:
    """Whether by the metric the images as they are, of which an evaluation has the same, are better."""
    found = value_of(dict(translation), metric)
    untranslated = value_of(evaluation.get("baseline", {}), metric)
    return found is not None and untranslated is not None and found > untranslated
