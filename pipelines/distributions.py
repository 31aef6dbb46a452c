"""What the images of a split show, as numbers: the shares of the 19 classes, or of the grey levels of maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.labels import CLASSES
from pipelines.manifest import Manifest, Split

CHART = "distributions.png"  # in the root of a data set, beside its manifest
GREY_BINS = 51  # of five grey levels each (SRUNIT, supplement, Appendix C)
GREY_NAMES = (*(f"{first}-{first + 4}" for first in range(0, 250, 5)), "250-255")


@dataclass(frozen=True)
class Distribution:
    """names: of the classes, or of the bins of grey levels. shares: float64 (len(names),), which sum to 1; 0 for a
    split without a counted pixel."""

    names: tuple[str, ...]
    shares: np.ndarray


def grey_histogram(image: Image.Image) -> np.ndarray:
    """Pixels per bin of five grey levels (ITU-R 601 luma), int64 (51,). 255, which is left over, is in the last bin."""
    bins = np.minimum(np.asarray(image.convert("L")) // 5, GREY_BINS - 1)
    return np.bincount(bins.ravel(), minlength=GREY_BINS)


def distributions(manifest: Manifest) -> dict[str, Distribution]:
    """By split, where it was counted what its images show: labelled pixels by class, or the maps' by grey level."""
    found = {name: _distribution(split) for name, split in manifest.splits.items()}
    return {name: each for name, each in found.items() if each is not None}


def _distribution(split: Split) -> Distribution | None:
    if split.class_histogram is not None:
        return Distribution(CLASSES, _shares(split.class_histogram))
    if split.grey_histogram is not None:
        return Distribution(GREY_NAMES, _shares(split.grey_histogram))
    return None


def _shares(histogram: Sequence[int]) -> np.ndarray:
    counts = np.asarray(histogram, np.float64)
    return counts / max(1.0, counts.sum())


def total_variation(one: Distribution, other: Distribution) -> float:
    """Half the sum of the differences: the share of pixels that would have to change, 0 (alike) to 1 (disjoint)."""
    assert one.names == other.names
    return float(np.abs(one.shares - other.shares).sum() / 2)


def training_mismatch(found: dict[str, Distribution]) -> float | None:
    """Total variation between the training sources and targets; None where they were not counted alike."""
    source, target = found.get("train/source"), found.get("train/target")
    if source is None or target is None or source.names != target.names:
        return None
    return total_variation(source, target)
