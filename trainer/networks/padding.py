"""Padding that keeps dtype and layout on every device, and nothing for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where the mirror stands: on the outermost pixel, which is not repeated, or outside it.
_FIRST = {"reflect": 1, "replicate": 0}


def mirrored(at: int, extent: int, first: int) -> int:
    """The pixel of a side of `extent` pixels that is shown at this place, which may lie outside. first: see _FIRST."""
    if at < 0:
        return first - 1 - at
    return at if at < extent else 2 * extent - 1 - first - at


class Pad2d(nn.Module):
    """(B, C, H, W) -> (B, C, H + top + bottom, W + left + right), same dtype and layout, forward and backward.

    widths: left, right, top, bottom in pixels, at least 1 each; one number for all four. mode: reflect, for which the
    map must be larger than the widths (RuntimeError otherwise), or replicate, for widths of 1 (ValueError otherwise).
    torch's modules keep their input for its shape, a CPU's autocast has them compute in float32, and CUDA's kernels
    return contiguous maps whatever they are given, with a gradient that is summed in any order.
    """

    def __init__(self, widths: int | tuple[int, int, int, int], mode: str = "reflect") -> None:
        super().__init__()
        self.widths = (widths,) * 4 if isinstance(widths, int) else widths
        self.mode, self.first = mode, _FIRST[mode]
        if mode == "replicate" and max(self.widths) > 1:
            raise ValueError(f"replication by {self.widths} pixels: only a border of 1 is supported")

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # one operator, which other programs have
            return F.pad(x, self.widths, self.mode)
        height, width = x.shape[2:]
        left, right, top, bottom = self.widths
        if self.mode == "reflect" and (max(left, right) >= width or max(top, bottom) >= height):
            raise RuntimeError(f"a map of {width}x{height} pixels is too small for reflection padding by {self.widths}")
        return _Pad.apply(x, self.widths, self.first)

    def extra_repr(self) -> str:
        return f"{self.widths}, {self.mode}"


class _Pad(torch.autograd.Function):
    """Copies the map into the middle of a larger one, then its columns into the border, then rows of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, int, int, int], first: int) -> Tensor:
        ctx.widths, ctx.first = widths, first
        left, right, top, bottom = widths
        height, width = x.shape[2:]
        y = _empty(x, height + top + bottom, width + left + right)
        (rows, _), *outer_rows = _runs(height, top, bottom, first)
        (columns, _), *outer_columns = _runs(width, left, right, first)
        y[:, :, rows, columns] = x
        for outer, inner in outer_columns:
            y[:, :, rows, outer] = _mirrored(x[..., inner], 3)
        for outer, inner in outer_rows:
            y[:, :, outer] = _mirrored(y[:, :, rows][:, :, inner], 2)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Fold.apply(gradient, ctx.widths, ctx.first), None, None


class _Fold(torch.autograd.Function):
    """Its transpose: adds what stands in the border to the pixels that it came from, always in the same order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, widths: tuple[int, int, int, int], first: int) -> Tensor:
        ctx.widths, ctx.first = widths, first
        left, right, top, bottom = widths
        height, width = y.shape[2] - top - bottom, y.shape[3] - left - right
        x = _empty(y, height, width)
        (rows, _), *outer_rows = _runs(height, top, bottom, first)
        (columns, _), *outer_columns = _runs(width, left, right, first)
        x.copy_(y[:, :, rows, columns])
        for outer, inner in outer_columns:
            x[..., inner] += _mirrored(y[:, :, rows, outer], 3)
        for outer, inner in outer_rows:
            border = _mirrored(y[:, :, outer], 2)
            x[:, :, inner] += border[..., columns]
            for corner, inner_corner in outer_columns:
                x[:, :, inner, inner_corner] += _mirrored(border[..., corner], 3)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Pad.apply(gradient, ctx.widths, ctx.first), None, None


def _runs(size: int, before: int, after: int, first: int) -> tuple[tuple[slice, slice], ...]:
    """Along one side of a map of `size` pixels: the run of the padded map that is the map itself, and those of the border
    before and after it; each with the run of the map that it shows, the border's mirrored."""
    return (
        (slice(before, before + size), slice(0, size)),
        (slice(0, before), slice(first, first + before)),
        (slice(before + size, None), slice(size - first - after, size - first)),
    )


def _mirrored(strip: Tensor, dim: int) -> Tensor:
    return strip.flip(dim) if strip.shape[dim] > 1 else strip


def _empty(like: Tensor, height: int, width: int) -> Tensor:
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return torch.empty((*like.shape[:2], height, width), dtype=like.dtype, device=like.device, memory_format=layout)
