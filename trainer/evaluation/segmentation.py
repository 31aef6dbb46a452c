"""What a segmenter sees in translations: the scores of its labels, and which classes were flipped."""

from collections.abc import Sequence
from typing import Any

from trainer.evaluation.base import Example, Metric
from trainer.evaluation.confusion import ConfusionMatrix
from trainer.evaluation.flips import flips


class SegmentationScores(Metric):
    """pxAcc, clsAcc, mIoU, per_class and drift (`ConfusionMatrix`); flip_rate, flips by name, flips and skipped
    (`Flips.metrics`) where the real images have labels, too. classes: names of the labels' classes, in the order of the
    trainIds."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.confusion = ConfusionMatrix(classes)

    def __bool__(self) -> bool:
        """Whether anything was counted."""
        return bool(self.confusion.counts.any())

    def update(self, example: Example) -> None:
        if example.label is not None and example.predicted is not None:
            self.confusion.update(example.label, example.predicted)

    def merge(self, other: "SegmentationScores") -> None:
        self.confusion.merge(other.confusion)

    def scores(self) -> dict[str, Any]:
        """Those that need no other images."""
        return {**self.confusion.scores(), "drift": self.confusion.drift()}

    def compute(self, real: "SegmentationScores") -> dict[str, Any]:
        if not self:
            return {}
        return self.scores() | (flips(self.confusion, real.confusion).metrics() if real else {})
