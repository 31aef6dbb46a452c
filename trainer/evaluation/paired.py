"""How far a translation is from the true picture, where the data has pairs (SRUNIT, Sec. 5.1.3 and 5.1.4)."""

from typing import Any

import numpy as np

from trainer.evaluation.base import Example, Metric

PHOTO_DELTAS = (30, 50)  # Sec. 5.1.3: photos are diverse
MAP_DELTAS = (3, 5)  # Sec. 5.1.4: maps are not

LEVELS = 256
LARGEST_SQUARE = 3 * (LEVELS - 1) ** 2


def deltas_of(task: str) -> tuple[int, ...]:
    """The thresholds of Acc that the paper takes for a task's translations."""
    return MAP_DELTAS if task == "photo2map" else PHOTO_DELTAS


class PairedDistance(Metric):
    """Dist and Acc(delta) between translations and their true targets, pixel by pixel.

    Dist is the paper's "average pixel L2 distance", read as the Euclidean distance of two pixels in RGB, each channel
    in [0, 255], averaged over the pixels of all images: 0 at best, 441.7 at worst. (The images of a split are of one
    size, so this is also the average over images.)
    Acc(delta) is the share, in [0, 1], of pixels with max(|r - r'|, |g - g'|, |b - b'|) < delta.

    Pixels are counted by their distance, in whole numbers, so the metrics are exact and the same in whatever order
    the images come and over however many parts they are spread.

    deltas: the thresholds of Acc, in levels of 255.
    """

    def __init__(self, deltas: tuple[int, ...] = PHOTO_DELTAS) -> None:
        self.deltas = deltas
        self.by_square = np.zeros(LARGEST_SQUARE + 1, np.int64)  # pixels at each squared distance
        self.by_largest = np.zeros(LEVELS, np.int64)  # pixels at each largest difference of a channel

    def update(self, example: Example) -> None:
        if example.target is None:
            return
        assert example.target.shape == example.image.shape
        difference_HWC = example.image.astype(np.int32) - example.target
        square_HW = (difference_HWC**2).sum(axis=2)
        largest_HW = np.abs(difference_HWC).max(axis=2)
        self.by_square += np.bincount(square_HW.ravel(), minlength=LARGEST_SQUARE + 1)
        self.by_largest += np.bincount(largest_HW.ravel(), minlength=LEVELS)

    def merge(self, other: "PairedDistance") -> None:
        self.by_square += other.by_square
        self.by_largest += other.by_largest

    def compute(self, real: Metric) -> dict[str, Any]:
        """{"Dist": …, "Acc": {"30": …, "50": …}}; needs nothing of the real images."""
        if not (pixels := int(self.by_largest.sum())):
            return {}
        distances = np.sqrt(np.arange(LARGEST_SQUARE + 1, dtype=np.float64))
        return {
            "Dist": float(self.by_square @ distances) / pixels,
            "Acc": {str(delta): int(self.by_largest[:delta].sum()) / pixels for delta in self.deltas},
        }
