"""SinCUT: CUT for a single pair of images (Park et al. 2020, Sec. 4.2 and Appendix B).

CUT on many tiles of the two images, with the networks of StyleGAN2, patches of the other tiles as negatives, a penalty on the
slope of D at real tiles (R1, Mescheder et al. 2018, Eqn. 9) and one on what G changes of the target.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from infra.views import Tiles
from trainer.losses import gradient_norms, l1_distance
from trainer.methods.base import Batch, StepContext
from trainer.methods.cut import Cut, CutConfig
from trainer.methods.parts.part import Outputs, Part
from trainer.networks.config import StyleDiscriminatorConfig, StyleGeneratorConfig
from trainer.networks.stylegan2 import StyleDiscriminator, StyleGenerator, into_tiles
from trainer.translation import OneGenerator

# The image, the block that halves it and the second one after that (the published code).
PUBLISHED_TAPS = (0, 2, 4)


@dataclass(frozen=True, kw_only=True)
class SincutConfig(CutConfig):
    """The defaults are those of the published code."""

    least_patches: ClassVar[int] = 1

    gan: str = option("nonsaturating", "adversarial loss", choices=("lsgan", "vanilla", "nonsaturating"))
    lambda_nce: float = option(4.0, "weight of PatchNCE", adjustable=True)
    taps: tuple[int, ...] = option(PUBLISHED_TAPS, "layers of G whose patches are contrasted")
    patches: int = option(1, "patches per image and layer", adjustable=True)
    all_negatives: bool = option(True, "negatives from the whole global batch, not only from the same image")
    lambda_r1: float = option(1.0, "weight of R1, half the squared slope of D at real tiles", adjustable=True)
    lambda_idt: float = option(
        1.0, "weight of the mean absolute difference of G(target) from the target", adjustable=True
    )
    zoom: float = option(1 / 3, "least factor by which width and height of the image are multiplied; the largest is 1")
    epoch: int = option(100_000, "crops that count as one epoch")
    generator: StyleGeneratorConfig = field(default_factory=StyleGeneratorConfig)  # type: ignore[assignment]
    discriminator: StyleDiscriminatorConfig = field(default_factory=StyleDiscriminatorConfig)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patches == 1 and not (self.all_negatives or self.bank.size):
            raise UserError("one patch per image has no negatives: give method.patches 2 or more, or leave "
                            "method.all_negatives true")  # fmt: skip
        if min(self.lambda_r1, self.lambda_idt) < 0:
            raise UserError("method.lambda_r1 and method.lambda_idt are weights: give 0 (without) or positive numbers")
        if self.lambda_idt and not self.identity:
            raise UserError("method.lambda_idt compares G(target) with the target, which method.identity false leaves out: "
                            "give method.lambda_idt 0 as well")  # fmt: skip
        if self.semantic.used:
            raise UserError("method.semantic compares whole crops with their labels, and sincut trains on tiles without any: "
                            "leave out method.semantic, or choose another method")  # fmt: skip
        if not 0 < self.zoom <= 1 or self.epoch < 1:
            raise UserError("method.zoom is a factor above 0 and up to 1, and method.epoch counts crops: "
                            "the paper's are 0.333 and 100000")  # fmt: skip

    @property
    def view(self) -> Tiles:
        return Tiles(zoom=self.zoom, epoch=self.epoch)

    def translation(self) -> "SincutTranslation":
        return SincutTranslation(self.generator.build())

    def build(self, *, seed: int, global_batch: int) -> "Sincut":
        return Sincut(self, seed=seed, global_batch=global_batch)


SINCUT: dict[str, Any] = {
    "optim.lr": 2e-3, "optim.beta1": 0.0, "optim.beta2": 0.99, "optim.global_batch": 16,
}  # fmt: skip
# Whatever the task.
SINCUT_ON_TASKS: dict[str, Any] = {"data.crop": 64, "optim.epochs": 8.0, "optim.decay_epochs": 8.0}


class SincutTranslation(OneGenerator):
    """The code is the noise of the generator, one number for each pixel. Without, there is no noise, which is its mean."""

    generator: StyleGenerator  # type: ignore[assignment]

    def __init__(self, generator: StyleGenerator) -> None:
        super().__init__(generator)  # type: ignore[arg-type]

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        return 1, height, width

    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        return self.generator(x_NCHW, code).clamp(-1, 1)


class SlopePenalty(Part):
    """R1, in float32 or wider."""

    name = "D_R1"
    phase = "discriminator"
    second_order = True

    def __init__(self, weight: float, discriminator: StyleDiscriminator) -> None:
        super().__init__(weight)
        self.discriminator = discriminator

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        tiles = into_tiles(batch.target, self.discriminator.size)
        return gradient_norms(self.discriminator, tiles).square().mean() / 2


class PixelIdentity(Part):
    """|G(y) - y|_1 of target images, the mean over pixels."""

    name = "idt"

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        assert outputs.identity is not None
        target = outputs.seen_target(batch)
        return l1_distance(outputs.identity, target)


class Sincut(Cut):
    config: SincutConfig
    generator: StyleGenerator  # type: ignore[assignment]
    discriminator: StyleDiscriminator  # type: ignore[assignment]

    def added_parts(self) -> list[Part]:
        every: list[Part] = [
            SlopePenalty(self.config.lambda_r1, self.discriminator), PixelIdentity(self.config.lambda_idt)
        ]  # fmt: skip
        return [part for part in every if part.weight > 0]

    def translate(self, images: Tensor, batch: Batch, context: StepContext) -> tuple[Tensor, list[Tensor]]:
        """With noise that belongs to slots of the global batch, drawn for each step."""
        height, width = images.shape[2:]
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        noise = [
            stream.normal(1, height, width, dtype=dtype)
            for domain in ("source", "target")[: len(images) // len(batch.source)]
            for stream in context.draws.per_slot(batch.slots, "noise", domain, device=images.device)
        ]
        return self.generator.forward_with_features(images, self.config.taps, torch.stack(noise))
