"""The networks of StyleGAN2 without styles, as SinCUT has them (Karras et al. 2020, "Analyzing and Improving the Image Quality of
StyleGAN"; Park et al. 2020, CUT, Appendix B).

Weights have the names and numbers of CUT's published code; there, biases of maps are (1, C, 1, 1), and the weight of the
up-sampling convolution has a leading dimension of 1.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.resample import Blur
from trainer.networks.sizes import Sizes
from trainer.networks.tapped import TappedGenerator

SLOPE = 0.2
GAIN = math.sqrt(2)  # of an activation: what it takes from the variance of N(0, 1), nearly


class Equalised(nn.Module):
    """A weight that is drawn from N(0, 1) and multiplied by 1 / sqrt(fan in) whenever it is used, so that Adam's steps are as
    large for every layer (Karras et al. 2018, "Progressive Growing of GANs", Sec. 4.1)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def scaled(self, gain: float = 1.0) -> Tensor:
        return self.weight * (gain / math.sqrt(self.weight[0].numel()))


class Bias(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


class Conv(nn.Sequential):
    """Convolution and sqrt(2) leaky_relu(x + b, 0.2): (B, inputs, H, W) -> (B, outputs, H, W), zero padding. down: blurred
    first, to (B, outputs, H / 2, W / 2); H and W even. active: false: neither bias nor activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, down: bool = False, active: bool = True) -> None:
        layers: list[nn.Module] = [Equalised(outputs, inputs, kernel, kernel)]
        self.stride, self.padding = 1, kernel // 2
        if down and kernel == 1:  # takes every second pixel as well after the blur as in it
            layers = [Blur(1, stride=2), *layers]
        elif down:
            self.stride, self.padding = 2, 0
            layers = [Blur(2), *layers]
        super().__init__(*layers, *([Bias(outputs)] if active else []))
        self.down = down

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """The result times `gain`, which an activation lets through, so that weights and biases may have it."""
        layers: list[Any] = list(self)
        if self.down:
            x = layers.pop(0)(x)
        convolution, *bias = layers
        if not bias:
            return F.conv2d(x, convolution.scaled(gain), None, self.stride, self.padding)
        gain *= GAIN
        y = F.conv2d(x, convolution.scaled(gain), bias[0].bias * gain, self.stride, self.padding)
        return F.leaky_relu(y, SLOPE, inplace=True)


class ResBlock(nn.Module):
    """(conv(conv(x)) + skip(x)) / sqrt(2): (B, inputs, H, W) -> (B, outputs, H, W), or half the size."""

    def __init__(self, inputs: int, outputs: int, *, down: bool = False) -> None:
        super().__init__()
        self.conv1 = Conv(inputs, inputs, 3)
        self.conv2 = Conv(inputs, outputs, 3, down=down)
        changes = down or inputs != outputs
        self.skip = Conv(inputs, outputs, 1, down=down, active=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x), 1 / GAIN)
        return y + self.skip(x, 1 / GAIN) if self.skip is not None else torch.add(y, x, alpha=1 / GAIN)


class UpConv(Equalised):
    """(B, inputs, H, W) -> (B, outputs, 2 H, 2 W), with weights of length 1 for each output: StyleGAN2's demodulation (its
    Eqn. 3), all styles being 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs, 3, 3)
        self.blur = Blur(1, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scaled()
        weight = weight * torch.rsqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8)
        return self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class StyledConv(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, 2 H, 2 W): convolution, noise with a learned weight, bias and activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.noise, self.activate = UpConv(inputs, outputs), Noise(), Bias(outputs)

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """noise: (B, 1, 2 H, 2 W); none: without."""
        y = self.conv(x)
        if noise is not None:
            y = y + (self.noise.weight * noise).to(y.dtype)
        return GAIN * F.leaky_relu(y + self.activate.bias[:, None, None].to(y.dtype), SLOPE)


class Linear(Equalised):
    """(N, inputs) -> (N, outputs). active: with sqrt(2) leaky_relu(x, 0.2)."""

    def __init__(self, inputs: int, outputs: int, *, active: bool = False) -> None:
        super().__init__(outputs, inputs)
        self.bias, self.active = nn.Parameter(torch.zeros(outputs)), active

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.scaled(), self.bias)
        return GAIN * F.leaky_relu(y, SLOPE) if self.active else y


class Chain(nn.Module):
    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)


class StyleGenerator(TappedGenerator):
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H, W), H and W even; what comes is not bounded, as the published network ends in an
    activation.

    Halved once, residual blocks, doubled once. ngf, size: pick the widths, those of StyleGAN2 at `size` x `size` pixels and
    at half of that. blocks: residual blocks beside the one that halves, half of them before the decoder. A tap is the index of
    a module of the encoder: 0 the image, 1 a convolution, 2 the block that halves, 3, 4, … blocks.
    """

    def __init__(self, ngf: int = 10, blocks: int = 6, size: int = 64) -> None:
        super().__init__()
        wide, deep = width(size, ngf / 32, 512), width(size // 2, ngf / 32, 512)
        half = [ResBlock(deep, deep) for _ in range(blocks)]
        self.encoder = Chain(nn.Identity(), Conv(3, wide, 1), ResBlock(wide, deep, down=True), *half[: blocks // 2])
        self.decoder = Chain(*half[blocks // 2 :], StyledConv(deep, wide), Conv(wide, 3, 1))
        self.widths = [3, wide, *[deep] * (1 + blocks // 2)]
        self.valid_taps = range(len(self.widths))

    @property
    def sizes(self) -> Sizes:
        return Sizes(multiple=2, smallest=2)

    def tap_channels(self, taps: Sequence[int]) -> list[int]:
        self._check(taps)
        return [self.widths[tap] for tap in taps]

    def blocks(self) -> list[nn.Module]:
        return [layer for layer in self.modules() if isinstance(layer, ResBlock)]

    def copy_encoder(self, taps: Sequence[int]) -> "StyleGenerator":
        self._check(taps)
        part = copy.deepcopy(self)
        del part.encoder.convs[max(taps) + 1 :], part.decoder
        return part

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise: N(0, 1), (B, 1, H, W), which a learned weight scales; none: without."""
        return self.forward_with_features(x, (), noise)[0]

    def forward_with_features(
        self, x: Tensor, taps: Sequence[int], noise: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        self._check(taps)
        x, features = self._encode(x, taps, len(self.encoder.convs))
        for layer in self.decoder.convs:
            x = layer(x, noise) if isinstance(layer, StyledConv) else layer(x)
        return x, features

    def encode(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        self._check(taps)
        return self._encode(x, taps, max(taps) + 1)[1]

    def _encode(self, x: Tensor, taps: Sequence[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        features: dict[int, Tensor] = {}
        for index in range(stop):
            x = self.encoder.convs[index](x)
            if index in taps:
                features[index] = x
        return x, [features[tap] for tap in taps]


class StyleDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B tiles, 1) raw scores, of the tiles of `size` x `size` pixels that each image consists of, in
    the order image, row, column; H and W are multiples of `size`.

    ndf: picks the widths, those of StyleGAN2's. Its minibatch standard deviation is left out, as in the published code.
    Its passes are not marked for torch.compile: R1 takes the gradient of its gradient, which compiled code has not.
    """

    def __init__(self, ndf: int = 8, size: int = 64) -> None:
        super().__init__()
        sides = [size >> halvings for halvings in range(size.bit_length() - 2)]  # down to 4
        widths = [width(side, ndf / 64, 384) for side in sides]
        blocks = [ResBlock(*pair, down=True) for pair in itertools.pairwise(widths)]
        self.size, last = size, widths[-1]
        self.convs = nn.Sequential(Conv(3, widths[0], 1), *blocks)
        self.final_conv = Conv(last, last, 3)
        self.final_linear = nn.Sequential(Linear(16 * last, last, active=True), Linear(last, 1))

    @property
    def sizes(self) -> Sizes:
        return Sizes(multiple=self.size, smallest=self.size)

    def forward(self, x: Tensor) -> Tensor:
        features = self.final_conv(self.convs(into_tiles(x, self.size)))
        return self.final_linear(features.flatten(1))


def width(side: int, scale: float, most: int) -> int:
    """Channels of maps of so many pixels each way; there is a limit for those of up to 32."""
    channels = max(1, int(2**14 / side * scale))
    return min(most, channels) if side <= 32 else channels


def into_tiles(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) as their tiles (B H/size W/size, C, size, size), in the order image, row, column."""
    if x.shape[2:] == (size, size):
        return x
    tiles_BRCchw = x.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
    return tiles_BRCchw.flatten(0, 2).contiguous(memory_format=torch.channels_last)
