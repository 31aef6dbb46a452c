"""Where a drawn scene is sampled: once in a pixel that shows one surface, at every raster point elsewhere.

Most pixels of a street are inside one surface; those on an edge carry the anti-aliasing. (The patterns inside a
surface, windows and joints, are smoothed by the materials.)
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.street_scenes.draw import OVERSAMPLE, Drawn


@dataclass(frozen=True)
class RasterSamples:
    """n points of the raster. table: of the surfaces. ids: intp (n,), rows of the table. places: intp (n,), raster
    pixels, flat. x, y: float32 (n,), raster coordinates. single, mixed: flat picture pixels with one sample and with
    OVERSAMPLE² of them; the samples come in this order, those of the mixed pixels as (OVERSAMPLE², mixed)."""

    table: np.ndarray
    ids: np.ndarray
    places: np.ndarray
    x: np.ndarray
    y: np.ndarray
    single: np.ndarray
    mixed: np.ndarray

    def resolve(self, values: np.ndarray, out: np.ndarray) -> None:
        """RasterSamples (n,) to picture pixels, into the flat array out: the mean where a pixel has several."""
        parts = values[self.single.size :].reshape(OVERSAMPLE**2, -1)
        out[self.single] = values[: self.single.size]
        out[self.mixed] = parts.sum(axis=0) * np.float32(1 / OVERSAMPLE**2)


def take_samples(drawn: Drawn) -> RasterSamples:
    ids = drawn.ids
    corners = [ids[dy::OVERSAMPLE, dx::OVERSAMPLE] for dy in range(OVERSAMPLE) for dx in range(OVERSAMPLE)]
    is_mixed = corners[1] != corners[0]
    for corner in corners[2:]:
        is_mixed |= corner != corners[0]
    single, mixed = np.flatnonzero(~is_mixed), np.flatnonzero(is_mixed)
    height, width = ids.shape
    first, offsets = _places(height, width)
    places = np.concatenate([first.take(single), *(first.take(mixed) + offset for offset in offsets)])
    x, y = _coordinates(height, width)
    x, y = x.take(places), y.take(places)
    for axis in (x, y):  # one sample stands for the pixel's centre
        axis[: single.size] += (OVERSAMPLE - 1) / 2
    return RasterSamples(drawn.table, ids.ravel().take(places), places, x, y, single, mixed)


@lru_cache(maxsize=4)
def _places(height: int, width: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The first raster pixel of every picture pixel, flat, and the steps from there to the others."""
    flat = np.arange(height * width).reshape(height, width)
    steps = tuple(dy * width + dx for dy in range(OVERSAMPLE) for dx in range(OVERSAMPLE))
    return flat[::OVERSAMPLE, ::OVERSAMPLE].ravel(), steps


@lru_cache(maxsize=4)
def _coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the centre of every raster pixel, float32 (height * width,)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return x.ravel() + 0.5, y.ravel() + 0.5
