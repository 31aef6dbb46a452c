"""Anti-aliased resampling by binomial blurs (Zhang 2019, "Making Convolutional Networks Shift-Invariant Again")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BINOMIAL = {3: (1.0, 2.0, 1.0), 4: (1.0, 3.0, 3.0, 1.0)}


def _blur_kernel_c1kk(channels: int, size: int) -> Tensor:
    """The binomial kernel as a depthwise weight, (channels, 1, size, size), that sums to 1."""
    row = torch.tensor(_BINOMIAL[size])
    kernel = torch.outer(row, row)
    return (kernel / kernel.sum()).repeat(channels, 1, 1, 1)


class BlurDownsample(nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)): reflection padding, binomial blur, every second pixel.

    size: 3 for [1, 2, 1] (the published networks), 4 for [1, 3, 3, 1].
    """

    filt: Tensor

    def __init__(self, channels: int, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("filt", _blur_kernel_c1kk(channels, size))
        before, after = (size - 1) // 2, size // 2
        self.pad = nn.ReflectionPad2d((before, after, before, after))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class BlurUpsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): zeros in between, replication padding, binomial blur of gain 4.

    size: 4 for [1, 3, 3, 1] (the published networks), 3 for [1, 2, 1].
    """

    filt: Tensor

    def __init__(self, channels: int, size: int = 4) -> None:
        super().__init__()
        self.register_buffer("filt", 4 * _blur_kernel_c1kk(channels, size))
        self.pad = nn.ReplicationPad2d(1)
        # The transposed convolution crops its own border: 2 pixels made by the padding, 1 by the kernel's half width.
        # A kernel of odd size is off centre, so it keeps one pixel more at the far end.
        self.output_padding = size % 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(
            self.pad(x), self.filt, stride=2, padding=3, output_padding=self.output_padding, groups=x.shape[1]
        )
