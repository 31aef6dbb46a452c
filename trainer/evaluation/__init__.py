"""What a translation is worth: metrics fed with one test image after another.

All pictures are (H, W, 3) uint8 RGB, labels (H, W) uint8 trainIds.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from trainer.evaluation.paired import MAP_DELTAS, PHOTO_DELTAS, PairedDistance

__all__ = ["Evaluation", "Metric", "PairedDistance", "metrics_for"]


class Metric(Protocol):
    def add(
        self, source: np.ndarray, translation: np.ndarray, target: np.ndarray | None, label: np.ndarray | None
    ) -> None:
        """Count one image. target: the source's scene in the target domain, None where the data has no pairs;
        label: the source's classes, None where it is unlabelled."""

    def figures(self) -> dict[str, Any]:
        """The results over everything added, by name; a name may hold a further mapping of figures."""


def metrics_for(task: str, *, paired: bool) -> list[Metric]:
    """Fresh metrics: those that the SRUNIT paper reports for the task, as far as the data allows them."""
    return [PairedDistance(MAP_DELTAS if task == "photo2map" else PHOTO_DELTAS)] if paired else []


class Evaluation:
    """The same metrics on the translations and on the untouched sources, which are the figures to beat.

    make_metrics: gives fresh metrics at each call, e.g. those of `metrics_for`.
    """

    def __init__(self, make_metrics: Callable[[], Sequence[Metric]]) -> None:
        self.translated, self.untranslated = make_metrics(), make_metrics()

    def add(
        self, source: np.ndarray, translation: np.ndarray, target: np.ndarray | None, label: np.ndarray | None
    ) -> None:
        """Feed one image to every metric; the arguments are those of `Metric.add`."""
        for metric in self.translated:
            metric.add(source, translation, target, label)
        for metric in self.untranslated:
            metric.add(source, source, target, label)

    def figures(self) -> dict[str, Any]:
        """The translations' figures by name and, under "baseline", the same of the untranslated sources."""
        return {**_merged(self.translated), "baseline": _merged(self.untranslated)}


def _merged(metrics: Sequence[Metric]) -> dict[str, Any]:
    return {name: figure for metric in metrics for name, figure in metric.figures().items()}
