"""The sizes of the networks that several methods use, and the networks of those sizes."""

from dataclasses import dataclass

from infra.config import option
from infra.errors import UserError
from trainer.networks.discriminator import PatchDiscriminator
from trainer.networks.generator import ResnetGenerator
from trainer.networks.multi_scale import MultiScaleDiscriminator
from trainer.networks.stylegan2 import StyleDiscriminator, StyleGenerator


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    ngf: int = option(64, "channels of the generator's first convolution", flag="--ngf")
    blocks: int = option(9, "residual blocks", choices=(6, 9))
    antialias: bool = option(True, "blur before resampling, as CUT does (CycleGAN does not)")
    checkpointing: bool = option(
        False, "run residual blocks once more in the backward pass instead of keeping their features", resumable=True
    )

    def __post_init__(self) -> None:
        if self.ngf < 1:
            raise UserError(f"--ngf {self.ngf} counts channels: it must be 1 or more")

    def build(self, *, zero_padding: bool = False, affine: bool = False) -> ResnetGenerator:
        return ResnetGenerator(
            ngf=self.ngf, blocks=self.blocks, antialias=self.antialias, checkpointing=self.checkpointing,
            zero_padding=zero_padding, affine=affine,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StridedGeneratorConfig(GeneratorConfig):
    """CycleGAN's."""

    antialias: bool = option(False, "blur before resampling, as CUT does (CycleGAN does not)")


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    ndf: int = option(64, "channels of the discriminator's first convolution", flag="--ndf")
    layers: int = option(3, "strided layers of the PatchGAN (3: it sees 70x70 pixels)")
    antialias: bool = option(True, "blur before resampling, as CUT does (CycleGAN does not)")

    def __post_init__(self) -> None:
        if min(self.ndf, self.layers) < 1:
            raise UserError("--ndf and method.discriminator.layers are counts: they must be 1 or more")

    def build(self, *, affine: bool = False) -> PatchDiscriminator:
        return PatchDiscriminator(ndf=self.ndf, layers=self.layers, antialias=self.antialias, affine=affine)


@dataclass(frozen=True, kw_only=True)
class StridedDiscriminatorConfig(DiscriminatorConfig):
    """CycleGAN's."""

    antialias: bool = option(False, "blur before resampling, as CUT does (CycleGAN does not)")


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig:
    ndf: int = option(64, "channels of the discriminators' first convolutions", flag="--ndf")
    scales: int = option(3, "scales that a discriminator sees: the image, its half, its quarter, …")

    def __post_init__(self) -> None:
        if min(self.ndf, self.scales) < 1:
            raise UserError("--ndf and method.discriminator.scales are counts: they must be 1 or more")

    def build(self, *, slope: float) -> MultiScaleDiscriminator:
        """slope: of the LeakyReLU."""
        return MultiScaleDiscriminator(ndf=self.ndf, scales=self.scales, slope=slope)


@dataclass(frozen=True, kw_only=True)
class StyleGeneratorConfig:
    ngf: int = option(10, "picks the generator's widths: 8 ngf channels, then 16 ngf", flag="--ngf")
    blocks: int = option(6, "residual blocks, half of them in the encoder", choices=(2, 4, 6, 8))
    size: int = option(64, "resolution of StyleGAN2 whose widths it has: twice as large, half as many channels")

    def __post_init__(self) -> None:
        if self.ngf < 1:
            raise UserError(f"--ngf {self.ngf} picks numbers of channels: it must be 1 or more")
        _check_power("generator", self.size)

    def build(self) -> StyleGenerator:
        return StyleGenerator(ngf=self.ngf, blocks=self.blocks, size=self.size)


@dataclass(frozen=True, kw_only=True)
class StyleDiscriminatorConfig:
    ndf: int = option(
        8, "picks the discriminator's widths: 4 ndf channels, then twice as many at each halving", flag="--ndf"
    )
    size: int = option(64, "side in pixels of what it scores: larger crops are cut into tiles of this size")

    def __post_init__(self) -> None:
        if self.ndf < 1:
            raise UserError(f"--ndf {self.ndf} picks numbers of channels: it must be 1 or more")
        _check_power("discriminator", self.size)

    def build(self) -> StyleDiscriminator:
        return StyleDiscriminator(ndf=self.ndf, size=self.size)


def _check_power(network: str, size: int) -> None:
    if size not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise UserError(f"method.{network}.size = {size} is no power of two from 8 to 1024: 64 is usual")
