"""Resampling, anti-aliased by binomial blurs (Zhang 2019, "Making Convolutional Networks Shift-Invariant Again") or by copies."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.padding import Pad2d

_BINOMIAL = {3: (1.0, 2.0, 1.0), 4: (1.0, 3.0, 3.0, 1.0)}


def _blur_kernel_c1kk(channels: int, size: int) -> Tensor:
    """The binomial kernel as a depthwise weight, (channels, 1, size, size), that sums to 1."""
    row = torch.tensor(_BINOMIAL[size])
    kernel = torch.outer(row, row)
    return (kernel / kernel.sum()).repeat(channels, 1, 1, 1)


def blurred(x: Tensor, filt: Tensor, padding: int, stride: int) -> Tensor:
    """x (B, C, H, W) through a depthwise kernel (C, 1, k, k) that reads the same backwards, with zero padding."""
    if torch.compiler.is_exporting():  # one operator, which other programs have
        return F.conv2d(x, filt.to(x.dtype), stride=stride, padding=padding, groups=x.shape[1])
    return _Blur.apply(x, filt, padding, stride)


def spread(x: Tensor, filt: Tensor, padding: int, output_padding: tuple[int, int]) -> Tensor:
    """The transpose of `blurred` with a stride of 2."""
    if torch.compiler.is_exporting():
        return F.conv_transpose2d(
            x, filt.to(x.dtype), stride=2, padding=padding, output_padding=output_padding, groups=x.shape[1]
        )
    return _Spread.apply(x, filt, padding, output_padding)


class BlurDownsample(nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)): reflection padding, binomial blur, every second pixel.

    size: 3 for [1, 2, 1] (the published networks), 4 for [1, 3, 3, 1].
    """

    filt: Tensor

    def __init__(self, channels: int, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("filt", _blur_kernel_c1kk(channels, size))
        before, after = (size - 1) // 2, size // 2
        self.pad = Pad2d((before, after, before, after))

    def forward(self, x: Tensor) -> Tensor:
        return blurred(self.pad(x), self.filt, 0, 2)


class Doubled(nn.Upsample):
    """(B, C, H, W) -> (B, C, 2 H, 2 W), each pixel four times. In the features' own type, which a GPU's autocast would widen."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # one operator, which other programs have
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class BlurUpsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): zeros in between, replication padding, binomial blur of gain 4.

    size: 4 for [1, 3, 3, 1] (the published networks), 3 for [1, 2, 1].
    """

    filt: Tensor

    def __init__(self, channels: int, size: int = 4) -> None:
        super().__init__()
        self.register_buffer("filt", 4 * _blur_kernel_c1kk(channels, size))
        self.pad = Pad2d(1, "replicate")
        # The transposed convolution crops its own border: 2 pixels made by the padding, 1 by the kernel's half width.
        # A kernel of odd size is off centre, so it keeps one pixel more at the far end.
        self.output_padding = (size % 2, size % 2)

    def forward(self, x: Tensor) -> Tensor:
        return spread(self.pad(x), self.filt, 3, self.output_padding)


class Blur(nn.Module):
    """(B, C, H, W) -> (B, C, (H + 2 padding - 4) // stride + 1, likewise): zero padding and the blur [1, 3, 3, 1] of this gain,
    as StyleGAN2 has it; stride: 1 or 2."""

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        self.register_buffer("kernel", gain * _blur_kernel_c1kk(1, 4)[0, 0])

    def forward(self, x: Tensor) -> Tensor:
        return blurred(x, self.kernel.repeat(x.shape[1], 1, 1, 1), self.padding, self.stride)


class _Blur(torch.autograd.Function):
    """A depthwise convolution of stride 1 or 2 with a constant kernel that reads the same backwards, which keeps no features
    for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filt: Tensor, padding: int, stride: int) -> Tensor:
        ctx.save_for_backward(filt)
        ctx.padding, ctx.stride = padding, stride
        ctx.left_over = tuple((side + 2 * padding - filt.shape[2]) % 2 for side in x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, filt.to(x.dtype), stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (filt,) = ctx.saved_tensors
        if ctx.stride == 1:
            return _Blur.apply(gradient, filt, filt.shape[2] - 1 - ctx.padding, 1), None, None, None
        return _Spread.apply(gradient, filt, ctx.padding, ctx.left_over), None, None, None


class _Spread(torch.autograd.Function):
    """Its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filt: Tensor, padding: int, output_padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(filt)
        ctx.padding = padding
        # A CPU has no fast transposed depthwise convolution in bf16: float32 takes an eighth of its time.
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.conv_transpose2d(
                x.to(dtype), filt.to(dtype), stride=2, padding=padding, output_padding=output_padding, groups=x.shape[1]
            ).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (filt,) = ctx.saved_tensors
        return _Blur.apply(gradient, filt, ctx.padding, 2), None, None, None
