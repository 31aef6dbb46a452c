"""The sizes of the networks, and the networks of those sizes."""

from dataclasses import dataclass

from infra.config import option
from infra.errors import UserError
from trainer.networks.discriminator import PatchDiscriminator
from trainer.networks.generator import ResnetGenerator


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    ngf: int = option(64, "channels of the generator's first convolution", flag="--ngf")
    ndf: int = option(64, "channels of the discriminator's first convolution")
    blocks: int = option(9, "residual blocks of the generator", choices=(6, 9))
    layers: int = option(3, "strided layers of the PatchGAN discriminator (3: it sees 70x70 pixels)")
    antialias: bool = option(True, "blur before resampling, as CUT does (CycleGAN does not)")
    head_dim: int = option(256, "channels of the projection heads")
    checkpointing: bool = option(
        False, "run residual blocks once more in the backward pass instead of keeping their features", resumable=True
    )

    def __post_init__(self) -> None:
        if min(self.ngf, self.ndf, self.layers, self.head_dim) < 1:
            raise UserError("model.ngf, model.ndf, model.layers and model.head_dim are counts: they must be 1 or more")

    def generator(self) -> ResnetGenerator:
        return ResnetGenerator(
            ngf=self.ngf, blocks=self.blocks, antialias=self.antialias, checkpointing=self.checkpointing
        )

    def discriminator(self) -> PatchDiscriminator:
        return PatchDiscriminator(ndf=self.ndf, layers=self.layers, antialias=self.antialias)
