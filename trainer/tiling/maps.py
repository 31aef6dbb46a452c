"""Maps of features of which parts are computed when they are asked for, and the sweeps over all tiles of them.

C channels, H height, W width of a map.
"""

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError

KEPT = 128  # bytes for each pixel of the image: larger maps are computed anew
SMALLEST = 64  # pixels: below, more is computed beyond the tiles' edges than in them

Span = tuple[int, int]  # from the first up to, but without, the last
Part = Callable[[Span, Span], Tensor]
POINTWISE = {
    "add", "add_", "sub", "mul", "mul_", "div", "addcmul", "relu", "relu_", "leaky_relu", "leaky_relu_", "tanh", "sigmoid",
    "clamp",
}  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """side: of the tiles, in pixels. scratch: the folder of the files, which have no names there; None: the system's.
    on_tile: called after each tile of each sweep with how many are done and how many there will be."""

    side: int
    scratch: Path | None = None
    on_tile: Callable[[int, int], object] = lambda done, total: None

    def __post_init__(self) -> None:
        if self.side < SMALLEST:
            raise UserError(f"tiles of {self.side} pixels are mostly edge: give {SMALLEST} or more")

    def needed(self, height: int, width: int) -> bool:
        """Whether an image is larger than a tile."""
        return max(height, width) > self.side


class Sweep:
    """Goes over maps tile by tile. image: the size of the one that they come from, of this type. planned: only counts tiles."""

    def __init__(
        self, tiles: Tiles, image: tuple[int, int], dtype: torch.dtype, *, planned: bool, total: int = 0
    ) -> None:
        self.tiles, self.image, self.dtype, self.planned, self.total, self.done = tiles, image, dtype, planned, total, 0

    def over(self, x: "Map") -> Iterator[tuple[Span, Span]]:
        """The tiles of a map, each of `tiles.side` pixels of the image."""
        sides = [max(1, self.tiles.side * extent // whole) for extent, whole in zip(x.size, self.image, strict=True)]
        spans = [
            [(first, min(first + side, extent)) for first in range(0, extent, side)]
            for extent, side in zip(x.size, sides, strict=True)
        ]
        for rows, columns in itertools.product(*spans):
            self.done += 1
            if not self.planned:
                yield rows, columns
                self.tiles.on_tile(self.done, self.total)

    def keeps(self, x: "Map") -> bool:
        return 4 * x.channels * x.size[0] * x.size[1] <= KEPT * self.image[0] * self.image[1]

    def kept(self, x: "Map") -> "Map":
        """The same map from a file, if it is small enough."""
        if not self.keeps(x):
            return x
        store = Store(self.tiles.scratch, x.size)
        for rows, columns in self.over(x):
            store.write(rows, columns, x.part(rows, columns))
        return Map(self, x.channels, x.size, store.read)

    def statistics(self, x: "Map") -> tuple["Map", Tensor, Tensor]:
        """The map, kept if it is small enough, and the mean and the sum of squared deviations of each channel, float64 (C,)."""
        store = Store(self.tiles.scratch, x.size) if self.keeps(x) else None
        count, mean, squares = (
            0,
            torch.zeros(x.channels, dtype=torch.float64),
            torch.zeros(x.channels, dtype=torch.float64),
        )
        for rows, columns in self.over(x):
            part = x.part(rows, columns)
            if store:
                store.write(rows, columns, part)
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            variance, of_part = (each[0].double().cpu() for each in torch.var_mean(wide, dim=(2, 3), correction=0))
            # Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance", Eqn. 1.5.
            pixels = part.shape[2] * part.shape[3]
            apart = of_part - mean
            squares += pixels * variance + apart.square() * count * pixels / (count + pixels)
            mean += apart * pixels / (count + pixels)
            count += pixels
        return Map(self, x.channels, x.size, store.read if store else x.part), mean, squares


_add: Any = torch.add
_mul: Any = torch.mul


class Map:
    """Features (1, C, H, W) of which parts are computed when they are asked for. Takes torch's functions as a tensor does.

    part: computes the part of these rows and columns, all within the map, in memory of its own.
    """

    def __init__(self, sweep: Sweep, channels: int, size: tuple[int, int], part: Part) -> None:
        self.sweep, self.channels, self.size, self.part = sweep, channels, size, part

    @property
    def shape(self) -> torch.Size:
        return torch.Size((1, self.channels, *self.size))

    @property
    def dtype(self) -> torch.dtype:
        return self.sweep.dtype

    def __len__(self) -> int:
        return 1

    def __add__(self, other: Any) -> "Map":
        return _add(self, other)

    def __mul__(self, other: Any) -> "Map":
        return _mul(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def to(self, dtype: torch.dtype) -> "Map":
        return self

    def __getattr__(self, name: str) -> Any:
        if name in POINTWISE:
            return functools.partial(getattr(torch, name), self)
        raise AttributeError(name) if name.startswith("__") else unsupported(name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> "Map":
        name, kwargs = function.__name__, kwargs or {}
        if name in RULES:
            return RULES[name](*args, **kwargs)
        if name not in POINTWISE:
            raise unsupported(name)
        return _pointwise(function, args, kwargs)


RULES: dict[str, Callable[..., Map]] = {}  # of torch's functions that see more than a pixel, by their names


def unsupported(name: str) -> UserError:
    return UserError(f"the networks of this method cannot work in tiles ({name}): leave out --tile")


def _pointwise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Map:
    maps = [each for each in args if isinstance(each, Map)]
    size = maps[0].size

    def part(rows: Span, columns: Span) -> Tensor:
        def of(value: Any) -> Any:
            if isinstance(value, Map):
                return value.part(rows, columns)
            if isinstance(value, Tensor) and value.shape[-2:] == size:
                return value[..., slice(*rows), slice(*columns)]
            return value

        return function(*map(of, args), **kwargs)

    result = Map(maps[0].sweep, max(each.channels for each in maps), size, part)
    # A sum of two maps is the end of a residual block, and both would be computed again for the next one.
    return result.sweep.kept(result) if len(maps) > 1 else result


class Store:
    """A map in a file without a name, channels last, which goes with the object."""

    def __init__(self, scratch: Path | None, size: tuple[int, int]) -> None:
        self.size, self.scratch = size, scratch
        self._like: Tensor | None = None  # no pixels, but channels, type and device

    def write(self, rows: Span, columns: Span, part: Tensor) -> None:
        if self._like is None:
            self._file = tempfile.TemporaryFile(dir=self.scratch)  # noqa: SIM115, as long as this object
            self._like = part[:, :, :0, :0]
        pixels = part[0].permute(1, 2, 0).contiguous().cpu().view(torch.uint8).numpy()  # (h, w, bytes)
        for row, content in zip(range(*rows), pixels, strict=True):
            view = memoryview(content).cast("B")
            at = (row * self.size[1] + columns[0]) * pixels.shape[2]
            while view:
                written = os.pwrite(self._file.fileno(), view, at)
                view, at = view[written:], at + written

    def read(self, rows: Span, columns: Span) -> Tensor:
        assert self._like is not None
        per_pixel = self._like.shape[1] * self._like.element_size()
        pixels: Any = np.empty((rows[1] - rows[0], columns[1] - columns[0], per_pixel), np.uint8)
        for row, content in zip(range(*rows), pixels, strict=True):
            os.preadv(
                self._file.fileno(), [memoryview(content).cast("B")], (row * self.size[1] + columns[0]) * per_pixel
            )
        return torch.from_numpy(pixels).view(self._like.dtype).to(self._like.device).permute(2, 0, 1)[None]
