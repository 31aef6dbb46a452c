"""What a metric is: it counts images, is merged with the counts of other ranks, and computes numbers at the end."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Example:
    """One evaluated image, uint8 (H, W, 3) RGB, the index-th of its set, and what is known of it.

    target: the same scene in a true image of the target domain; None where the data has no pairs. label: the scene's true
    classes, uint8 (H, W) trainIds; None where it is unlabelled. predicted: the classes that the segmenter sees in the
    image, like label; None without a label or a segmenter.
    """

    index: int
    image: np.ndarray
    target: np.ndarray | None = None
    label: np.ndarray | None = None
    predicted: np.ndarray | None = None


class Metric(ABC):
    """Counts over one set of images, so that parts of the set, merged in any order, give the same numbers."""

    @abstractmethod
    def update(self, example: Example) -> None:
        """Count one image; one that lacks what this metric needs is passed over."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the counts of another part of the images."""

    @abstractmethod
    def compute(self, real: Self) -> dict[str, Any]:
        """Plain numbers by name, ready for JSON; empty where nothing was counted. real: the counts of real target images."""
