"""All metrics of one set of images, and of translations compared with untranslated sources and real target images."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from trainer.evaluation.base import Example, Metric
from trainer.evaluation.distribution import class_distributions
from trainer.evaluation.fidelity import Features
from trainer.evaluation.paired import PairedDistance
from trainer.evaluation.segmentation import SegmentationScores


class MetricCollection:
    """Metrics of one set of images: translations, untranslated sources, or real target images.

    classes: names of the labels' classes, in the order of the trainIds. deltas: thresholds of Acc, in levels of 255.
    extractor: Inception; None: no FID and no KID.
    """

    def __init__(self, classes: Sequence[str], deltas: tuple[int, ...], extractor: nn.Module | None) -> None:
        self.segmentation = SegmentationScores(classes)
        self.metrics: list[Metric] = [self.segmentation, PairedDistance(deltas), Features(extractor)]

    def update(self, example: Example) -> None:
        for metric in self.metrics:
            metric.update(example)

    def merge(self, other: "MetricCollection") -> None:
        for metric, part in zip(self.metrics, other.metrics, strict=True):
            metric.merge(part)

    def compute(self, real: "MetricCollection") -> dict[str, Any]:
        result: dict[str, Any] = {}
        for metric, of_real in zip(self.metrics, real.metrics, strict=True):
            result |= metric.compute(of_real)
        return result


def compute_metrics(
    translated: MetricCollection,
    untranslated: MetricCollection,
    real: MetricCollection,
    target_histogram: Sequence[int] | None = None,
) -> dict[str, Any]:
    """All metrics of the translations, as plain numbers by name.

    untranslated: the same of the sources as they are, under "baseline". real: the same of real target images, under
    "ceiling": no translation can be expected to score higher. target_histogram: labelled pixels per class of the training
    target images. Only what applies is there: Dist and Acc where there are pairs; pxAcc, clsAcc, mIoU, per_class and
    drift where there are labels and a segmenter; flip_rate, flips by name, flips, skipped, class_distribution and
    total_variation where the real images have labels too. FID and KID are always there, in words where they are not available.
    """
    result = {**translated.compute(real), "baseline": untranslated.compute(real)}
    if real.segmentation:
        result["ceiling"] = real.segmentation.scores()
        if translated.segmentation:
            seen, seen_in_real = translated.segmentation.confusion, real.segmentation.confusion
            found = class_distributions(seen, seen_in_real, target_histogram)
            result |= found.metrics()
    return result
