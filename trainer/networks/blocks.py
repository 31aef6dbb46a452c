"""Convolutions with reflection padding, a norm and an activation: what the encoders, decoders and discriminators of MUNIT
and DRIT are made of."""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.norm import EPSILON, InstanceNorm2d
from trainer.networks.padding import Pad2d

Norm = Literal["none", "instance", "sample deviation", "variance"]


class LayerNorm2d(nn.Module):
    """Over channels and pixels of each image, then a gain and a shift for each channel: (B, C, H, W) to the same shape and
    dtype; the statistics are float32 or wider.

    sample: divide by the unbiased standard deviation + 1e-5, as MUNIT does; otherwise by the root of the biased variance +
    1e-5, as DRIT and torch do.
    """

    def __init__(self, channels: int, *, sample: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.sample = sample

    def forward(self, x: Tensor) -> Tensor:
        wide, places = x.to(torch.promote_types(x.dtype, torch.float32)), x[0].numel()
        # Sums, since torch makes the gradient of a mean contiguous.
        centred = wide - wide.sum(dim=(1, 2, 3), keepdim=True) / places
        variance = centred.square().sum(dim=(1, 2, 3), keepdim=True) / (places - self.sample)
        deviation = variance.sqrt() + EPSILON if self.sample else (variance + EPSILON).sqrt()
        return torch.addcmul(self.shift[:, None, None], centred, self.gain[:, None, None] / deviation).to(x.dtype)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix of outputs, is divided by its largest singular value (Miyato et al. 2018).

    u: the left singular vector, nearer by one power iteration after each pass. Gradients flow through the weight alone.
    """

    u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        self.register_buffer("u", torch.full((outputs,), outputs**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                v = F.normalize(matrix.T @ self.u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
                self.u.copy_(u)
            weight = self.weight / (u @ (matrix @ v))
        return self._conv_forward(x, weight, self.bias)


def activation(slope: float) -> nn.Module:
    """slope: below 0; 1: none."""
    if slope == 1:
        return nn.Identity()
    return nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)


def conv_block(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    norm: Norm = "none",
    slope: float = 0.0,
    spectral: bool = False,
) -> list[nn.Module]:
    """Reflection padding, a convolution with biases, a norm, an activation.

    padding: None: so much that a stride of 1 and an odd kernel keep the size, or a stride of 2 and a kernel of 4 halve it.
    norm: none; instance (without affine); the layer norm by the unbiased deviation or by the biased variance. slope: of the
    activation below 0: 1 for none, 0 for ReLU. spectral: with spectral norm.
    """
    width = (kernel - 1) // 2 if padding is None else padding
    layers: list[nn.Module] = [Pad2d(width)] if width else []
    layers += [(SpectralConv2d if spectral else nn.Conv2d)(inputs, outputs, kernel, stride)]
    if norm == "instance":
        return [*layers, InstanceNorm2d(outputs, slope=slope, guarded=True)]
    if norm != "none":
        layers += [LayerNorm2d(outputs, sample=norm == "sample deviation")]
    return [*layers, activation(slope)]


def style_encoder(ngf: int, length: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, length): MUNIT's, and that of DRIT's feature-wise setting. No norm, which would take the style away."""
    widths = [ngf, 2 * ngf, 4 * ngf, 4 * ngf, 4 * ngf]
    halved = [layer for pair in itertools.pairwise(widths) for layer in conv_block(*pair, 4, stride=2)]
    return nn.Sequential(*conv_block(3, ngf, 7), *halved, GlobalMean(), nn.Conv2d(4 * ngf, length, 1), nn.Flatten())


class GlobalMean(nn.Module):
    """(B, C, H, W) -> (B, C, 1, 1). Pooling, since torch makes the gradient of a mean contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (x.shape[2], x.shape[3]))
