"""DRIT's networks (Lee et al. 2018, "Diverse Image-to-Image Translation via Disentangled Representations"), each one module for
both domains, a and b. Attributes enter the generator as constant planes ("concat") or by 1x1 convolutions ("feature-wise").

Contents are (B, 4 ngf, H/4, W/4), attributes (B, code); H and W are multiples of 4. Compiled passes take the layers of a domain
and not its name, so that both domains share the code.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.networks.blocks import GlobalMean, LayerNorm2d, conv_block, style_encoder
from trainer.networks.compiling import Compilable, whole
from trainer.networks.generator import ResnetBlock
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.padding import Pad2d
from trainer.networks.sizes import Sizes, smallest_side

SLOPE = 0.01  # of LeakyReLU


class ContentEncoder(Compilable):
    def __init__(self, *, ngf: int) -> None:
        super().__init__()
        self.shared = ResnetBlock(4 * ngf)
        self.of_a, self.of_b = (
            nn.Sequential(
                *conv_block(3, ngf, 7, slope=SLOPE),
                *conv_block(ngf, 2 * ngf, 3, stride=2, norm="instance"),
                *conv_block(2 * ngf, 4 * ngf, 3, stride=2, norm="instance"),
                *(ResnetBlock(4 * ngf) for _ in range(3)),
            )
            for _ in "ab"
        )

    def forward(self, x: Tensor, domain: str) -> Tensor:
        return self._through(self.get_submodule(f"of_{domain}"), x)

    @whole
    def _through(self, own: nn.Module, x: Tensor) -> Tensor:
        return self.shared(own(x))

    def sizes(self, after: int) -> Sizes:
        """The images whose content is so large each way, or larger."""
        return Sizes(multiple=4, smallest=smallest_side([*self.of_a, self.shared], after))


class Attribute(NamedTuple):
    """mean: the attribute. log_variance: of what is drawn around it; None where nothing is (feature-wise)."""

    mean: Tensor
    log_variance: Tensor | None = None

    def drawn(self, normal: Tensor) -> Tensor:
        """normal: draws of N(0, 1), where there is a variance."""
        assert self.log_variance is not None
        return self.mean + (self.log_variance / 2).exp() * normal


class HalvingBlock(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H/2, W/2): two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.LeakyReLU(0.2),
            *conv_block(inputs, inputs, 3, slope=0.2),
            *conv_block(inputs, outputs, 3, slope=1.0),
            nn.AvgPool2d(2),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class _Gaussian(nn.Module):
    def __init__(self, ngf: int, code: int) -> None:
        super().__init__()
        self.mean, self.log_variance = (nn.Linear(4 * ngf, code) for _ in range(2))
        self.features = nn.Sequential(
            *conv_block(3, ngf, 4, stride=2, slope=1.0),
            *(HalvingBlock(each * ngf, (each + 1) * ngf) for each in (1, 2, 3)),
            nn.LeakyReLU(0.2, inplace=True),
            GlobalMean(),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Attribute:
        features = self.features(x)
        return Attribute(_wide(self.mean(features)), _wide(self.log_variance(features)))


class AttributeEncoder(Compilable):
    def __init__(self, *, ngf: int, code: int, concat: bool) -> None:
        super().__init__()
        self.concat = concat
        self.of_a, self.of_b = (_Gaussian(ngf, code) if concat else style_encoder(ngf, code) for _ in "ab")

    def forward(self, x: Tensor, domain: str) -> Attribute:
        return self._through(self.get_submodule(f"of_{domain}"), x)

    @whole
    def _through(self, own: nn.Module, x: Tensor) -> Attribute:
        found = own(x)
        return found if self.concat else Attribute(_wide(found))

    @property
    def sizes(self) -> Sizes:
        layers = self.of_a.features if isinstance(self.of_a, _Gaussian) else self.of_a
        # A shortcut leaves as much as what it passes over.
        chain = [layer.main if isinstance(layer, HalvingBlock) else layer for layer in layers]
        return Sizes(smallest=smallest_side(chain))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_planes(x: Tensor, vector: Tensor) -> Tensor:
    """(B, C, H, W) and (B, D) -> (B, C + D, H, W): each number of a vector as a constant plane, in the layout of x."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    planes = vector.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, planes.contiguous(memory_format=layout)], dim=1)


def _doubled(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1),
        LayerNorm2d(outputs, sample=False),
        nn.ReLU(inplace=True),
    )


class _ConcatDecoder(nn.Module):
    def __init__(self, ngf: int, code: int) -> None:
        super().__init__()
        wide = 4 * ngf + code
        self.blocks = nn.Sequential(*(ResnetBlock(wide) for _ in range(3)))
        half, quarter = (wide + code) // 2, ((wide + code) // 2 + code) // 2
        self.up, self.up_again = _doubled(wide + code, half), _doubled(half + code, quarter)
        self.image = nn.ConvTranspose2d(quarter + code, 3, 1)

    def forward(self, content: Tensor, code: Tensor) -> Tensor:
        for layer in (self.blocks, self.up, self.up_again, self.image):
            content = layer(with_planes(content, code))
        return content.tanh()


class ConcatGenerator(Compilable):
    """A block that both domains share, then each domain's own decoder."""

    def __init__(self, *, ngf: int, code: int) -> None:
        super().__init__()
        self.shared = ResnetBlock(4 * ngf)
        self.to_a, self.to_b = (_ConcatDecoder(ngf, code) for _ in "ab")

    def forward(self, content: Tensor, code: Tensor, domain: str) -> Tensor:
        """(B, 3, H, W) in (-1, 1), of this domain."""
        return self._through(self.get_submodule(f"to_{domain}"), content, code)

    @whole
    def _through(self, own: nn.Module, content: Tensor, code: Tensor) -> Tensor:
        return own(self.shared(content), code)


class FeatureBlock(nn.Module):
    """A residual block that mixes a vector into its features: (B, C, H, W), (B, C) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(Pad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm2d(channels, guarded=True))
            for _ in range(2)
        )
        self.mix_first, self.mix_second = (
            nn.Sequential(*conv_block(2 * channels, 2 * channels, 1), *conv_block(2 * channels, channels, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        y = self.mix_first(with_planes(self.first(x), vector))
        return x + self.mix_second(with_planes(self.second(y), vector))


class _FeatureDecoder(nn.Module):
    def __init__(self, ngf: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeatureBlock(4 * ngf) for _ in range(4))
        self.image = nn.Sequential(
            _doubled(4 * ngf, 2 * ngf), _doubled(2 * ngf, ngf), nn.ConvTranspose2d(ngf, 3, 1), nn.Tanh()
        )

    def forward(self, content: Tensor, vectors: Tensor) -> Tensor:
        for block, vector in zip(self.blocks, vectors.chunk(4, dim=1), strict=True):
            content = block(content, vector)
        return self.image(content)


class FeatureGenerator(Compilable):
    """Each domain's own decoder, with an MLP that makes of an attribute a vector for each block."""

    def __init__(self, *, ngf: int, code: int) -> None:
        super().__init__()
        self.to_a, self.to_b = (_FeatureDecoder(ngf) for _ in "ab")
        wide = 4 * ngf
        self.mlp_a, self.mlp_b = (
            nn.Sequential(
                nn.Linear(code, wide), nn.ReLU(inplace=True), nn.Linear(wide, wide), nn.ReLU(inplace=True),
                nn.Linear(wide, 4 * wide),
            )
            for _ in "ab"
        )  # fmt: skip

    def forward(self, content: Tensor, code: Tensor, domain: str) -> Tensor:
        """(B, 3, H, W) in (-1, 1), of this domain."""
        return self._through(self.get_submodule(f"to_{domain}"), self.get_submodule(f"mlp_{domain}"), content, code)

    @whole
    def _through(self, own: nn.Module, mlp: nn.Module, content: Tensor, code: Tensor) -> Tensor:
        return own(content, mlp(code))


class ContentDiscriminator(Compilable):
    """Contents (B, channels, h, w) -> (B, 1, ., .) raw scores: whose content is it? With the published three layers h and w
    are 53 or more."""

    def __init__(self, channels: int, layers: int = 3) -> None:
        super().__init__()
        halved = [conv_block(channels, channels, 7, stride=2, padding=1, slope=SLOPE) for _ in range(layers)]
        self.model = nn.Sequential(
            *itertools.chain.from_iterable(halved),
            *conv_block(channels, channels, 4, padding=0, slope=SLOPE),
            nn.Conv2d(channels, 1, 1),
        )

    @property
    def smallest(self) -> int:
        return smallest_side(self.model)

    @whole
    def forward(self, content: Tensor) -> Tensor:
        return self.model(content)
