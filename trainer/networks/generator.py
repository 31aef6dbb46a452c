"""The ResNet generator of CycleGAN and CUT, with taps: places where its features are read or perturbed."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.networks.compiling import whole
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.padding import Pad2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.networks.sizes import Sizes, smallest_side
from trainer.networks.split import split_batch
from trainer.networks.tapped import TappedGenerator


def _convolution(channels: int, width: int, kernel: int, zero_padding: bool) -> list[nn.Module]:
    """One that keeps the size."""
    if zero_padding:
        return [nn.Conv2d(channels, width, kernel, padding=kernel // 2)]
    return [Pad2d(kernel // 2), nn.Conv2d(channels, width, kernel)]


def _instance_norm_relu(channels: int, affine: bool) -> list[nn.Module]:
    # The published ReLU has a place of its own.
    return [InstanceNorm2d(channels, slope=0.0, guarded=True, affine=affine), nn.Identity()]


class ResnetBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))), normalised again: (B, C, H, W) -> (B, C, H, W).

    checkpointing: keep the block's input only, and run it once more in the backward pass (Chen et al. 2016, "Training
    Deep Nets with Sublinear Memory Cost"): the same numbers for less memory and more time.
    """

    def __init__(
        self, channels: int, checkpointing: bool = False, *, zero_padding: bool = False, affine: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.conv_block = nn.Sequential(
            *_convolution(channels, channels, 3, zero_padding),
            *_instance_norm_relu(channels, affine),
            *_convolution(channels, channels, 3, zero_padding),
            InstanceNorm2d(channels, guarded=True, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return x + checkpoint(self.conv_block, x, use_reentrant=False, preserve_rng_state=False)
        return x + self.conv_block(x)


class ResnetGenerator(TappedGenerator):
    """(B, in_channels, H, W) in [-1, 1] -> (B, out_channels, H, W) in (-1, 1); H and W multiples of 4, at least 8.

    Johnson et al. 2016 with the anti-aliased resampling of Park et al. 2020 (CUT), or with strided and transposed
    convolutions (`antialias=False`, CycleGAN). `self.model` has the module order of the published code, so
    checkpoints exchange by name and a tap is the index of a module:

        antialias      0 padded image | 4, 8 convolutions before their norm | 12, 13, … residual blocks
        not antialias  0 padded image | 4, 7 convolutions before their norm | 10, 11, … residual blocks

    A tap at an instance norm reads it with its ReLU: the published ReLU works in place and overwrites the norm's output
    (tap 8 of the generator that is not anti-aliased).
    zero_padding, affine: of an older form, which has no reflections (nor their modules) and whose norms have weights, as
    DistanceGAN's code has it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        blocks: int = 9,
        antialias: bool = True,
        checkpointing: bool = False,
        *,
        zero_padding: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__()
        layers = [*_convolution(in_channels, ngf, 7, zero_padding), *_instance_norm_relu(ngf, affine)]
        for width in (2 * ngf, 4 * ngf):
            stride = 1 if antialias else 2
            layers += [nn.Conv2d(width // 2, width, 3, stride, padding=1), *_instance_norm_relu(width, affine)]
            if antialias:
                layers += [BlurDownsample(width)]
        layers += [ResnetBlock(4 * ngf, checkpointing, zero_padding=zero_padding, affine=affine) for _ in range(blocks)]
        for width in (2 * ngf, ngf):
            if antialias:
                layers += [BlurUpsample(2 * width), nn.Conv2d(2 * width, width, 3, padding=1)]
            else:
                layers += [nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1)]
            layers += _instance_norm_relu(width, affine)
        layers += [*_convolution(ngf, out_channels, 7, zero_padding), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        self.valid_taps = range(len(layers))
        self.in_channels = in_channels

    @property
    def sizes(self) -> Sizes:
        """The images whose translation has their size: what is halved twice and doubled twice. Where H and W are no
        multiples of 4, they only have to be large enough for the reflection padding."""
        return Sizes(multiple=4, smallest=smallest_side(self.model))

    def tap_channels(self, taps: Sequence[int]) -> list[int]:
        self._check(taps)
        channels, at = self.in_channels, []
        for layer in self.model:
            channels = layer.out_channels if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else channels
            at.append(channels)
        return [at[tap] for tap in taps]

    def compiled_parts(self) -> list[nn.Module]:
        return [self]

    @whole
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    @whole
    def forward_with_features(self, x: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        self._check(taps)
        return self._walk(x, taps, len(self.model))

    @whole
    def encode(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        self._check(taps)
        return self._walk(x, taps, max(taps) + 1)[1]

    def copy_encoder(self, taps: Sequence[int]) -> "ResnetGenerator":
        self._check(taps)
        part = copy.deepcopy(self)
        del part.model[max(taps) + 1 :]
        return part

    @whole
    def perturbed_features(self, perturbed: Sequence[Tensor], taps: Sequence[int]) -> list[Tensor]:
        """G_1^k(G_k^{K+1}(f_k)) for each tap k: finish the translation from perturbed features, then encode it.

        This goes into the second F_k of L_k, Eqn. 3 of SRUNIT. perturbed: f_k = G_1^k(x) + tau_k, one tensor
        (B, C_k, H_k, W_k) for each tap. All taps share two passes in place of two each: on the first, f_k joins the
        batch after module k; on the second, its group leaves there. Nothing in the generator mixes images.
        """
        self._check(taps)
        feature = dict(zip(taps, perturbed, strict=True))
        order = sorted(taps)
        batch = feature[order[0]]
        images = len(batch)
        for index in range(order[0] + 1, len(self.model)):
            batch = self.model[index](batch)
            if index in feature:
                batch = torch.cat([batch, feature[index]])
        result: dict[int, Tensor] = {}
        for index in range(order[-1] + 1):
            batch = self.model[index](batch)
            if index in feature:
                result[index], batch = split_batch(batch, [images, len(batch) - images])
        return [result[tap] for tap in taps]

    def _walk(self, x: Tensor, taps: Sequence[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        features: dict[int, Tensor] = {}
        for index in range(stop):
            x = self.model[index](x)
            if index in taps:
                features[index] = x
        return x, [features[tap] for tap in taps]

    def blocks(self) -> list[nn.Module]:
        return [layer for layer in self.model if isinstance(layer, ResnetBlock)]
