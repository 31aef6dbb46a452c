"""Sample grids."""

from collections.abc import Callable, Sequence

import numpy as np

Image = np.ndarray  # (H, W, 3) uint8 RGB
GAP = 4  # white pixels between pictures


def sample_grid(translate: Callable[[Image], Image], sources: Sequence[Image], targets: Sequence[Image]) -> Image:
    """One row per source: source | its translation | another target image. All of one size (H, W, 3) uint8."""
    rows = [[source, translate(source), target] for source, target in zip(sources, targets, strict=True)]
    return stack([stack(row, axis=1) for row in rows], axis=0)


def stack(images: Sequence[Image], axis: int) -> Image:
    """Images side by side (axis 1) or below each other (axis 0) with a white gap; smaller ones are padded with white."""
    other = 1 - axis
    extent = max(image.shape[other] for image in images)
    parts: list[Image] = []
    for image in images:
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[other] = (0, extent - image.shape[other])
        gap = list(image.shape)
        gap[axis], gap[other] = GAP, extent
        parts += [np.pad(image, padding, constant_values=255), np.full(gap, 255, np.uint8)]
    return np.concatenate(parts[:-1], axis=axis)
