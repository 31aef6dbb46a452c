"""Looking at pictures with everything at hand, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from trainer.evaluation.distribution import class_distributions
from trainer.evaluation.fidelity import Features, fidelity
from trainer.evaluation.flips import flips
from trainer.evaluation.paired import PairedDistance
from trainer.evaluation.segmentation import ConfusionMatrix
from trainer.segmentation import Segmenter


class Tally:
    """What was counted over one set of pictures: translations, untranslated sources, or real target images."""

    def __init__(self, classes: Sequence[str], deltas: tuple[int, ...], extractor: nn.Module | None) -> None:
        self.distance = PairedDistance(deltas)
        self.confusion = ConfusionMatrix(classes)
        self.features = Features(extractor)

    def merge(self, other: "Tally") -> None:
        """Add what another part of the pictures gave."""
        self.distance.merge(other.distance)
        self.confusion.merge(other.confusion)
        self.features.merge(other.features)


@dataclass(frozen=True)
class Judge:
    """What pictures are looked at with.

    classes: names of the labels' classes, in the order of the trainIds. deltas: thresholds of Acc, in levels of 255.
    segmenter: None: nothing is said of classes. extractor: Inception; None: no FID and no KID.
    """

    classes: Sequence[str]
    deltas: tuple[int, ...]
    segmenter: Segmenter | None = None
    extractor: nn.Module | None = None

    def tally(self) -> Tally:
        """An empty one."""
        return Tally(self.classes, self.deltas, self.extractor)

    def look(
        self, tally: Tally, index: int, picture: np.ndarray, *, target: np.ndarray | None, label: np.ndarray | None
    ) -> np.ndarray | None:
        """Count one picture, uint8 (H, W, 3) RGB, the index-th of its set.

        target: the same scene in a true picture of the target domain, None where the data has no pairs. label: the
        scene's true classes, uint8 (H, W) trainIds, None where it is unlabelled. Returns the classes that the segmenter
        sees, if there is one and a label to compare them with.
        """
        tally.features.add(index, picture)
        if target is not None:
            tally.distance.add(picture, target)
        if label is None or self.segmenter is None:
            return None
        seen = self.segmenter(picture)
        tally.confusion.add(label, seen)
        return seen


def figures(
    translated: Tally, untranslated: Tally, real: Tally, target_histogram: Sequence[int] | None = None
) -> dict[str, Any]:
    """Everything that can be said of the translations, as plain numbers by name.

    untranslated: the same of the sources as they are, under "baseline": the figures to beat. real: the same of real
    target images, under "ceiling": no translation can be expected to score higher. target_histogram: labelled pixels
    per class of the training target images. Only what applies is there: Dist and Acc where there are pairs; pxAcc,
    clsAcc, mIoU and per_class where there are labels and a segmenter; flip_rate, flips, left_out, class_distribution
    and total_variation where the real images have labels too. FID and KID are always there, in words where they are not
    available.
    """
    result = {**_of_one(translated, real), "baseline": _of_one(untranslated, real)}
    if real.confusion.counts.any():
        result["ceiling"] = real.confusion.scores()
        if translated.confusion.counts.any():
            result |= class_distributions(translated.confusion, real.confusion, target_histogram).figures()
    return result


def _of_one(pictures: Tally, real: Tally) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if pictures.confusion.counts.any():
        result |= pictures.confusion.scores()
        if real.confusion.counts.any():
            result |= flips(pictures.confusion, real.confusion).figures()
    if pictures.distance.pixels:
        result |= pictures.distance.figures()
    return result | fidelity(pictures.features, real.features)
