"""The crop positions that are matched: a lattice over the images of one size.

A size is (width, height) in pixels. A cell is a place of the lattice in one image; the cells of an image are counted row by
row, and those of a domain image by image in the order of its shards.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipelines.cuts import Size

STEPS = 4  # places in the length of a crop


@dataclass(frozen=True)
class Lattice:
    """image_size: of all images. crop: of all crops, no larger."""

    image_size: Size
    crop: Size

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """The places' x and y, int64, ascending: a quarter of a crop apart, the last one flush with the border."""
        rooms = (whole - part for whole, part in zip(self.image_size, self.crop, strict=True))
        steps = (max(1, part // STEPS) for part in self.crop)
        xs, ys = (np.append(np.arange(0, room, step), room) for room, step in zip(rooms, steps, strict=True))
        return xs, ys

    @property
    def cells(self) -> int:
        """Of one image."""
        xs, ys = self.axes
        return len(xs) * len(ys)

    def place(self, cell: int) -> tuple[int, int]:
        """(x, y) of the left upper corner of a cell of one image, in pixels."""
        xs, ys = self.axes
        row, column = divmod(cell, len(xs))
        return int(xs[column]), int(ys[row])

    def nearest(self, x: int, y: int) -> int:
        """The cell of one image that is nearest to a crop at (x, y); the lower one of two as near."""
        column, row = (_nearest(axis, np.array(value)) for axis, value in zip(self.axes, (x, y), strict=True))
        return int(row) * len(self.axes[0]) + int(column)

    def shares(self) -> np.ndarray:
        """The share of random crops of an image that are nearest to each cell: float64 (cells,), which sum to 1."""
        of_x, of_y = (
            np.bincount(_nearest(axis, np.arange(axis[-1] + 1)), minlength=len(axis)) / (axis[-1] + 1)
            for axis in self.axes
        )
        return np.outer(of_y, of_x).ravel()


def _nearest(axis: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.searchsorted((axis[1:] + axis[:-1]) / 2, values, side="left")
