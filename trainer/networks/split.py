"""Parting a batch without touching the layout of its gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split_batch(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Runs of so many images of (B, C, H, W), in order, as views.

    Slices and Tensor.split do the same, but their gradients are contiguous whatever the layout of x, and everything
    before then has its gradient copied.
    """
    return _Split.apply(x, tuple(sizes))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.shape = sizes, x.shape
        ctx.layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return x.split(sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        given = next(gradient for gradient in gradients if gradient is not None)
        whole = torch.empty(ctx.shape, dtype=given.dtype, device=given.device, memory_format=ctx.layout)
        for part, gradient in zip(whole.split(ctx.sizes), gradients, strict=True):
            part.zero_() if gradient is None else part.copy_(gradient)
        return whole, None
