"""What a crop looks like in a few hundred numbers, whose squared distance says how unlike two crops are.

Descriptors are uint8, so that distances are whole numbers below 2^24: float32 holds them exactly, and the search finds the
same on any machine, by any number of threads, on a CPU or a GPU.
"""

from functools import cached_property

import numpy as np

from pipelines.labels import CLASSES
from pipelines.matching.lattice import Lattice

Grid = tuple[int, int]  # columns and rows

MOST_SQUARES = 64  # of a grid, for the whole numbers to stay below 2^24 (`search.nearest`)
THUMBNAIL: Grid = (8, 8)
_EDGE_GAIN = (
    4.0  # gradients are weaker than colours: their variation over the crops of a data set is brought near to theirs
)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601


class Squares:
    """Sums over the squares of a grid, laid over every cell of a lattice.

    The edges of all squares cut the image into blocks, over which each image is summed once. grid: no finer than the crop.
    """

    def __init__(self, lattice: Lattice, grid: Grid) -> None:
        self.lattice, self.grid = lattice, grid
        # of each axis: int64 (places, squares + 1), the edges of the squares at each place
        edges = [
            places[:, None] + np.arange(count + 1) * side // count
            for places, side, count in zip(lattice.axes, lattice.crop, grid, strict=True)
        ]
        found = [np.unique(each, return_inverse=True) for each in edges]
        (self._xs, x_of), (self._ys, y_of) = ((unique, inverse.reshape(-1)) for unique, inverse in found)
        self._x_of, self._y_of = x_of.reshape(edges[0].shape), y_of.reshape(edges[1].shape)

    def count(self, classes_HW: np.ndarray) -> np.ndarray:
        """Pixels by class: of trainIds uint8 (H, W) int64 (cells, rows, columns, 19); those of no class are not counted."""
        (rows, columns), kinds = (len(self._ys) - 1, len(self._xs) - 1), len(CLASSES) + 1
        inside = np.minimum(classes_HW[: self._ys[-1], : self._xs[-1]].astype(np.int64), len(CLASSES))
        block = np.repeat(np.arange(rows), np.diff(self._ys))[:, None] * columns
        block = (block + np.repeat(np.arange(columns), np.diff(self._xs))) * kinds
        counts = np.bincount((block + inside).ravel(), minlength=rows * columns * kinds)
        return self._squares(counts.reshape(rows, columns, kinds)[..., : len(CLASSES)])

    def sum(self, values_HWC: np.ndarray) -> np.ndarray:
        """Of float64 (H, W, C) the sums (cells, rows, columns, C)."""
        inside = values_HWC[: self._ys[-1], : self._xs[-1]]
        return self._squares(np.add.reduceat(np.add.reduceat(inside, self._ys[:-1], 0), self._xs[:-1], 1))

    @cached_property
    def areas(self) -> np.ndarray:
        """Pixels of each square, int64 (cells, rows, columns, 1)."""
        return self.sum(np.ones((int(self._ys[-1]), int(self._xs[-1]), 1), np.int64))

    def _squares(self, blocks: np.ndarray) -> np.ndarray:
        """Sums over blocks (rows of blocks, columns of blocks, C) to those over squares (cells, rows, columns, C)."""
        table = np.zeros((blocks.shape[0] + 1, blocks.shape[1] + 1, blocks.shape[2]), blocks.dtype)
        table[1:, 1:] = blocks.cumsum(0).cumsum(1)
        by_rows = table[self._y_of[:, 1:]] - table[self._y_of[:, :-1]]  # (places, squares) of y, then x edges, C
        sums = by_rows[:, :, self._x_of[:, 1:]] - by_rows[:, :, self._x_of[:, :-1]]
        columns, rows = self.grid
        return sums.transpose(0, 2, 1, 3, 4).reshape(self.lattice.cells, rows, columns, -1)


def of_classes(counts: np.ndarray) -> np.ndarray:
    """From pixels by class (cells, rows, columns, 19): 255 times the roots of the shares of a square's labelled pixels,
    uint8 (cells, rows x columns x 19). The squared distance of two such is that of Hellinger, summed over the squares."""
    shares = counts / np.maximum(1, counts.sum(-1, keepdims=True))
    return np.round(255 * np.sqrt(shares)).astype(np.uint8).reshape(len(counts), -1)


def of_pixels(image_HWC: np.ndarray, squares: Squares) -> np.ndarray:
    """From an RGB image uint8 (H, W, 3): the mean colour of each square and the root mean square of the gradient of its
    luma, each in [0, 127], uint8 (cells, rows x columns x 4)."""
    luma = image_HWC @ _LUMA
    energy = sum(np.square(np.gradient(luma, axis=axis)) for axis in (0, 1))
    values = np.concatenate([image_HWC.astype(np.float64), np.asarray(energy, np.float64)[..., None]], axis=2)
    means = squares.sum(values) / squares.areas
    means[..., 3] = _EDGE_GAIN * np.sqrt(np.maximum(0, means[..., 3]))  # differences of sums may fall just below 0
    return np.round(np.minimum(means, 255) * (127 / 255)).astype(np.uint8).reshape(len(means), -1)


def mirrored(descriptors: np.ndarray, grid: Grid) -> np.ndarray:
    """The descriptors (n, d) of the same crops mirrored left to right."""
    columns, rows = grid
    return descriptors.reshape(len(descriptors), rows, columns, -1)[:, :, ::-1].reshape(descriptors.shape)
