"""What a segmenter sees, against the true labels: the confusion matrix and the scores that come from it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.errors import UserError
from trainer.segmentation.segmenter import IGNORE

NONE = "none"  # what the last column of a confusion matrix is called


class ConfusionMatrix:
    """Pixels by true class and seen class, over any number of images.

    counts: int64 (C, C + 1); row t holds the pixels of true class t, column p those seen as class p, and the last
    column those seen as none of the classes, which is wrong for every t. Counts are whole numbers, so parts merged in
    any order, e.g. over ranks, give the same scores to the last bit.

    classes: the names of the C classes, in the order of their trainIds 0..C-1.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.counts = np.zeros((len(self.classes), len(self.classes) + 1), np.int64)

    def update(self, truth_HW: np.ndarray, predicted_HW: np.ndarray) -> None:
        """Count one image; both uint8 (H, W) trainIds. Pixels of true label 255 are ignored; a predicted 255 is none of
        the classes. UserError for two different sizes, and for values that are neither a trainId nor 255."""
        assert truth_HW.dtype == predicted_HW.dtype == np.uint8
        if truth_HW.shape != predicted_HW.shape:
            raise UserError(
                f"true labels of {_size(truth_HW)} pixels and predicted labels of {_size(predicted_HW)} cannot be "
                "compared: prepare images and labels in one size"
            )
        pairs = truth_HW.ravel().astype(np.intp) * 256 + predicted_HW.ravel()
        joint = np.bincount(pairs, minlength=256 * 256).reshape(256, 256)
        self._refuse_unknown("a true label", joint.sum(axis=1), "convert the label files to trainIds")
        self._refuse_unknown("a predicted label", joint.sum(axis=0), "map the segmenter's outputs to trainIds")
        count = len(self.classes)
        self.counts[:, :count] += joint[:count, :count]
        self.counts[:, count] += joint[:count, IGNORE]

    def _refuse_unknown(self, what: str, pixels: np.ndarray, remedy: str) -> None:
        count = len(self.classes)
        unknown = np.flatnonzero(pixels[count:IGNORE])
        if unknown.size:
            raise UserError(
                f"{what} is {count + unknown[0]}, which is neither a trainId of the {count} classes "
                f"(0 to {count - 1}) nor {IGNORE} (no class): {remedy}"
            )

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add what another part of the images gave."""
        assert self.classes == other.classes
        self.counts += other.counts

    def rates(self) -> np.ndarray:
        """P(seen class | true class), float64 (C, C + 1): rows sum to 1; NaN in rows of classes that never occur."""
        with np.errstate(invalid="ignore"):
            return self.counts / self.counts.sum(axis=1, keepdims=True)

    def drift(self) -> float:
        """The total variation between the shares of the seen classes and those of the true ones, in [0, 1]:

            sum over p, "none" included, of |sum_t n[t, p] - sum_s n[p, s]| / (2 sum_tp n[t, p])

        How far the classes as a whole have moved, wherever they are. UserError if no pixel was counted.
        """
        true = np.append(self.counts.sum(axis=1), 0)
        self._refuse_none(true)
        return float(np.abs(self.counts.sum(axis=0) - true).sum() / (2 * true.sum()))

    def _refuse_none(self, pixels: np.ndarray) -> None:
        if not pixels.any():
            raise UserError("no pixel of the evaluated images has a true class: evaluate on a labelled split")

    def scores(self) -> dict[str, Any]:
        """pxAcc, clsAcc and mIoU in [0, 1], as SRUNIT defines them (Sec. 5.1.1; supplement, Appendix B).

        With n[t, p] pixels of true class t seen as p:
            pxAcc   sum_t n[t, t] / sum_tp n[t, p]
            clsAcc  mean over t of n[t, t] / sum_p n[t, p]
            mIoU    mean over t of n[t, t] / (sum_p n[t, p] + sum_s n[s, t] - n[t, t])
        A class without a true pixel has no accuracy, and its IoU would be 0 or undefined according to whether a single
        pixel was seen as it: it is no part of both means and of "per_class". A pixel wrongly seen as such a class still
        counts against its true class. (The Cityscapes benchmark's script takes the IoU of such a class as 0 if it was
        seen somewhere. Where all classes occur, as in the benchmark's validation images, both are the same.)

        Returns {"pxAcc", "clsAcc", "mIoU", "per_class": {name: {"accuracy", "IoU", "share"}}}, share being that of the
        class among the counted pixels. UserError if no pixel was counted.
        """
        count = len(self.classes)
        true, seen = self.counts.sum(axis=1), self.counts[:, :count].sum(axis=0)
        right = self.counts.diagonal()
        occurring = np.flatnonzero(true)
        self._refuse_none(true)
        accuracy = right[occurring] / true[occurring]
        iou = right[occurring] / (true + seen - right)[occurring]
        share = true[occurring] / true.sum()
        return {
            "pxAcc": float(right.sum() / true.sum()),
            "clsAcc": float(accuracy.mean()),
            "mIoU": float(iou.mean()),
            "per_class": {
                self.classes[t]: {"accuracy": float(accuracy[i]), "IoU": float(iou[i]), "share": float(share[i])}
                for i, t in enumerate(occurring)
            },
        }


def _size(label_HW: np.ndarray) -> str:
    height, width = label_HW.shape
    return f"{width}x{height}"
