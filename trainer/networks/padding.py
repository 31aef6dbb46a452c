"""Padding that keeps the dtype under autocast, and nothing for the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn

_FORWARD = {"reflect": torch.ops.aten.reflection_pad2d, "replicate": torch.ops.aten.replication_pad2d}
_BACKWARD = {
    "reflect": torch.ops.aten.reflection_pad2d_backward,
    "replicate": torch.ops.aten.replication_pad2d_backward,
}


class Pad2d(nn.Module):
    """(B, C, H, W) -> (B, C, H + top + bottom, W + left + right), same dtype and layout.

    widths: left, right, top, bottom in pixels, at least 1 each; one number for all four. mode: reflect or replicate.
    torch's modules keep their input for its shape, and a CPU's autocast has them compute in float32.
    """

    def __init__(self, widths: int | tuple[int, int, int, int], mode: str = "reflect") -> None:
        super().__init__()
        self.widths = (widths,) * 4 if isinstance(widths, int) else widths
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return _Pad.apply(x, self.widths, self.mode)

    def extra_repr(self) -> str:
        return f"{self.widths}, {self.mode}"


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, int, int, int], mode: str) -> Tensor:
        ctx.widths, ctx.mode = widths, mode
        with torch.autocast(x.device.type, enabled=False):
            return _FORWARD[mode](x, widths)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        left, right, top, bottom = ctx.widths
        inner = gradient[:, :, top:-bottom, left:-right]  # the operator takes the input for its shape
        return _BACKWARD[ctx.mode](gradient, inner, ctx.widths), None, None
