"""Class distributions of source, target and translation: the mismatch that the discriminator pushes against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from trainer.evaluation.confusion import NONE, ConfusionMatrix


@dataclass(frozen=True)
class ClassDistributions:
    """Shares of the labelled pixels by class (SRUNIT, Fig. 1; CUT, supplement, Fig. 6).

    All are float64 (C + 1,) and sum to 1; the last entry is the share seen as none of the classes, 0 in true labels.
    source, target: by the true labels. translation, target_seen: as the segmenter sees the translations and the real
    target images.
    """

    names: tuple[str, ...]
    source: np.ndarray
    translation: np.ndarray
    target: np.ndarray
    target_seen: np.ndarray

    def metrics(self) -> dict[str, Any]:
        """Ready for JSON: under "class_distribution" each of the four by class name, without names that are 0 in all
        four; under "total_variation" how far they are apart:

            source_target       the mismatch in the data: what there is to flip
            translation_target  the same after translation; smaller, if classes were flipped towards the target
            source_translation  how far the translation has moved in any direction
            target_seen_target  the size of the segmenter's own error (and of the difference between test and training
                                images), below which the others mean nothing
        """
        shown = np.flatnonzero(self.source + self.translation + self.target + self.target_seen)
        parts = ("source", "translation", "target", "target_seen")
        return {
            "class_distribution": {
                part: {self.names[c]: float(getattr(self, part)[c]) for c in shown} for part in parts
            },
            "total_variation": {
                "source_target": total_variation(self.source, self.target),
                "translation_target": total_variation(self.translation, self.target),
                "source_translation": total_variation(self.source, self.translation),
                "target_seen_target": total_variation(self.target_seen, self.target),
            },
        }


def class_distributions(
    translated: ConfusionMatrix, real: ConfusionMatrix, target_histogram: Sequence[int] | None = None
) -> ClassDistributions:
    """The distributions that two confusion matrices hold: true classes in their rows, seen classes in their columns.

    translated, real: as for `flips`.
    target_histogram: labelled pixels of each of the C classes in the training target images, which are what the
    discriminator pushes towards; without it the target's distribution is that of the real images evaluated.
    UserError if one of them has no labelled pixel.
    """
    assert translated.classes == real.classes
    true_target = real.counts.sum(axis=1) if target_histogram is None else np.asarray(target_histogram, np.int64)
    assert true_target.shape == (len(real.classes),)
    return ClassDistributions(
        names=(*translated.classes, NONE),
        source=_shares("source images", np.append(translated.counts.sum(axis=1), 0)),
        translation=_shares("source images", translated.counts.sum(axis=0)),
        target=_shares("target images", np.append(true_target, 0)),
        target_seen=_shares("target images", real.counts.sum(axis=0)),
    )


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the L1 distance of two distributions, in [0, 1]: the least share of the pixels that must change class to turn
    one into the other."""
    return float(np.abs(p - q).sum() / 2)


def _shares(whose: str, counts: np.ndarray) -> np.ndarray:
    if not counts.any():
        raise UserError(f"no pixel of the {whose} has a true class: evaluate on labelled splits")
    return counts / counts.sum()
