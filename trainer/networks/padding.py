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
        if torch.compiler.is_compiling():
            return self._compiled(x)
        height, width = x.shape[2:]
        left, right, top, bottom = self.widths
        if self.mode == "reflect" and (max(left, right) >= width or max(top, bottom) >= height):
            raise RuntimeError(f"a map of {width}x{height} pixels is too small for reflection padding by {self.widths}")
        return _Pad.apply(x, self.widths, self.first)

    def _compiled(self, x: Tensor) -> Tensor:
        """By operators that a compiler fuses with their neighbours, forward and backward. It mistakes writes to windows, and
        takes a replication's gradient for contiguous whatever it is."""
        if self.mode == "replicate":
            for dim in (2, 3):
                x = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)
            return x
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(x, self.widths, self.mode)

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
        middle = y[:, :, top : top + height]
        middle[..., left : left + width] = x
        for outer, inner in _borders(middle, x, 3, left, right, first):
            outer.copy_(_mirrored(inner))
        for outer, inner in _borders(y, middle, 2, top, bottom, first):
            outer.copy_(_mirrored(inner))
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
        middle, columns = y[:, :, top : top + height], slice(left, left + width)
        x.copy_(middle[..., columns])
        for outer, inner in _borders(middle, x, 3, left, right, first):
            inner.add_(_mirrored(outer))
        for outer, inner in _borders(y, x, 2, top, bottom, first):
            border = _mirrored(outer)
            inner.add_(border[:, :, :, columns])
            for corner, inner_corner in _borders(border, inner, 3, left, right, first):
                inner_corner.add_(_mirrored(corner))
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Pad.apply(gradient, ctx.widths, ctx.first), None, None


def _borders(
    padded: Tensor, inside: Tensor, dim: int, before: int, after: int, first: int
) -> list[tuple[Tensor, Tensor]]:
    """Along one side of a map `inside` and of its padded form: the borders of the latter, and the runs of pixels of the map that
    they mirror. Each has a new last dimension along the run. Two of one width are one view, (…, 2, …, width), unless they
    mirror pixels in common."""
    size = inside.shape[dim]
    apart = size - 2 * first - before  # from the first mirrored run to the last
    if before == after and apart >= before:
        outer = padded.unfold(dim, before, size + before)
        return [(outer, inside.narrow(dim, first, size - 2 * first).unfold(dim, before, apart))]
    places = (0, first, before), (before + size, size - first - after, after)
    return [
        (padded.narrow(dim, outer, width).unfold(dim, width, 1), inside.narrow(dim, inner, width).unfold(dim, width, 1))
        for outer, inner, width in places
    ]


def _mirrored(runs: Tensor) -> Tensor:
    return runs.flip(-1) if runs.shape[-1] > 1 else runs


def _empty(like: Tensor, height: int, width: int) -> Tensor:
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return torch.empty((*like.shape[:2], height, width), dtype=like.dtype, device=like.device, memory_format=layout)
