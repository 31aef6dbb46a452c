"""GcGAN: Fu et al. 2019, "Geometry-Consistent Generative Adversarial Networks for One-Sided Unsupervised Domain Mapping"."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.config import option
from trainer.draws import generator
from trainer.losses import l1_distance
from trainer.methods.base import Batch, Guesses, Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.methods.cyclegan import CYCLEGAN, StridedConfig
from trainer.methods.parts.adversary import Right
from trainer.methods.parts.sides import Translated, translate
from trainer.networks import init_weights
from trainer.networks.sizes import Sizes
from trainer.translation import OneGenerator


@dataclass(frozen=True, kw_only=True)
class GcGanConfig(StridedConfig):
    geometry: str = option(
        "rot90", "the map f: a quarter turn clockwise, or top and bottom exchanged", choices=("rot90", "vflip")
    )
    generators: str = option("share", "one generator for x and f(x), or one for each", choices=("share", "cross"))
    lambda_gan: float = option(1.0, "weight of each adversarial loss of G", adjustable=True)
    lambda_geometry: float = option(20.0, "weight of the geometry consistency", adjustable=True)
    lambda_identity: float = option(5.0, "weight of each identity loss; 0: without")

    def weights(self) -> dict[str, float]:
        names = ("lambda_gan", "lambda_geometry", "lambda_identity")
        return {name: getattr(self, name) for name in names}

    def initialise(self, network: nn.Module, draws: torch.Generator) -> None:
        """The published code draws weights alone, so that biases are torch's own."""
        init_weights(network, draws, "xavier", uniform_biases=True)

    def translation(self) -> OneGenerator:
        return OneGenerator(self.generator.build())

    def build(self, *, seed: int, global_batch: int) -> "GcGan":
        return GcGan(self, seed=seed, global_batch=global_batch)


GCGAN = CYCLEGAN
# What its code used for these (in both directions of the last).
GCGAN_ON_TASKS: dict[str, dict[str, Any]] = {
    "label2city": {"method.lambda_identity": 3.0},
    "horse2zebra": {"method.generators": "cross"},
    "summer2winter": {"method.generators": "cross"},
}


class GcGan(Method[Batch, list[Translated]]):
    """networks: generator (G) and discriminator (D); discriminator_gc (D~) judges translations of f(x) against f(target);
    generator_gc (G~) translates f(x), where it is not G.

    The outputs are translations of the images, and of what f makes of them.
    """

    phases = (
        Phase(name="generator", optimiser="generator", differentiates=True),
        Phase(name="discriminator", optimiser="discriminator"),
    )
    product: OneGenerator

    def __init__(self, config: GcGanConfig, *, seed: int, global_batch: int) -> None:
        super().__init__()
        self.config = config
        product = config.translation()
        networks: dict[str, nn.Module] = {"generator": product.generator}
        if config.generators == "cross":
            networks["generator_gc"] = config.generator.build()
        self.optimisers = (
            OptimiserSpec(name="generator", networks=tuple(networks)),
            OptimiserSpec(name="discriminator", networks=("discriminator", "discriminator_gc")),
        )
        discriminator, discriminator_gc = config.discriminator.build(), config.discriminator.build()
        networks |= {"discriminator": discriminator, "discriminator_gc": discriminator_gc}
        for name, network in networks.items():
            self.add_module(name, network)
            config.initialise(network, generator("cpu", seed, "init", name))
        self.product = product  # after its network, which is named by its own name
        self.generators = [product.generator, networks.get("generator_gc", product.generator)]
        self.adversaries = [
            config.adversary(network, name, global_batch, config.lambda_gan)
            for name, network in (("buffer", discriminator), ("buffer_gc", discriminator_gc))
        ]

    def sizes(self, images: int) -> Sizes:
        return self.product.sizes & self.adversaries[0].discriminator.sizes

    def guesses(self) -> Guesses:
        return Guesses(discriminators=[{"D_B": sum(adversary.guess for adversary in self.adversaries)}])

    def slot_state(self) -> dict[str, Tensor]:
        return {name: kept for adversary in self.adversaries for name, kept in adversary.buffers.state().items()}

    def load_slot_state(self, state: dict[str, Tensor]) -> None:
        for adversary in self.adversaries:
            adversary.buffers.load_state(state)

    def f(self, x_NCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, W, H) for a quarter turn clockwise, or to the same shape."""
        return quarter_turn(x_NCHW, -1) if self.config.geometry == "rot90" else x_NCHW.flip(2)

    def f_back(self, x_NCHW: Tensor) -> Tensor:
        """The inverse of `f`."""
        return quarter_turn(x_NCHW, 1) if self.config.geometry == "rot90" else x_NCHW.flip(2)

    def forward(self, batch: Batch, context: StepContext, name: str = "translate") -> list[Translated]:
        views = (batch.source, batch.target), (self.f(batch.source), self.f(batch.target))
        return [
            translate(network, images, others if self.config.lambda_identity else None)
            for network, (images, others) in zip(self.generators, views, strict=True)
        ]

    def loss(self, phase: str, outputs: list[Translated], batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        """The terms, with their weights, under the names of the published code; G is their sum."""
        targets = batch.target, self.f(batch.target)
        if phase == "discriminator":
            losses, rights = list[Tensor](), list[Right]()
            for adversary, translated, real in zip(self.adversaries, outputs, targets, strict=True):
                shown = adversary.shown(translated.fake, batch.slots, context.draws)
                *both, right = adversary.discriminator_losses(shown, real)
                losses += both
                rights.append(right)
            total = torch.stack(losses).sum() / 2
            return total, {"D_B": total.detach(), **Right.mean(rights).named("D_B")}
        plain, turned = outputs
        named = {
            "G_AB": self.adversaries[0].generator_loss(plain.fake),
            "G_gc_AB": self.adversaries[1].generator_loss(turned.fake),
            "Gc": self.config.lambda_geometry * self.inconsistency(plain.fake, turned.fake),
        }
        for name, translated, target in zip(("idt", "idt_gc"), outputs, targets, strict=True):
            if translated.identity is not None:
                named[name] = self.config.lambda_identity * l1_distance(translated.identity, target)
        total = torch.stack(list(named.values())).sum()
        return total, {name: value.detach() for name, value in {**named, "G": total}.items()}

    def inconsistency(self, plain: Tensor, turned: Tensor) -> Tensor:
        """The geometry consistency (L_geo of the paper) between the translations of x and of f(x), a scalar: each moves towards
        the other, held constant. Its value is twice, its gradient once that of one distance with both sides moving."""
        return l1_distance(plain, self.f_back(turned.detach())) + l1_distance(turned, self.f(plain.detach()))


def quarter_turn(x_NCHW: Tensor, times: int) -> Tensor:
    """By so many quarters anticlockwise, in the layout of x."""
    layout = torch.contiguous_format if x_NCHW.is_contiguous() else torch.channels_last
    return x_NCHW.rot90(times, (2, 3)).contiguous(memory_format=layout)
