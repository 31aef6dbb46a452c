"""CycleGAN: Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks"."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from trainer.draws import generator
from trainer.losses import l1_distance
from trainer.methods.base import Batch, Guesses, Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.methods.config import MethodConfig
from trainer.methods.parts.adversary import Adversary
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.sides import Side, Translated
from trainer.networks import PatchDiscriminator, init_weights
from trainer.networks.config import StridedDiscriminatorConfig, StridedGeneratorConfig
from trainer.networks.sizes import Sizes
from trainer.translation import Translation, TwoGenerators


@dataclass(frozen=True, kw_only=True)
class StridedConfig(MethodConfig):
    """What CycleGAN and those who took over its networks have in common."""

    gan: str = option("lsgan", "adversarial loss; wgangp: without penalty", choices=("lsgan", "vanilla", "wgangp"))
    buffer: int = option(50, "translations of each kind kept to show D earlier ones; 0: none")
    generator: StridedGeneratorConfig = field(default_factory=StridedGeneratorConfig)
    discriminator: StridedDiscriminatorConfig = field(default_factory=StridedDiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.buffer < 0:
            raise UserError(f"method.buffer = {self.buffer} counts images: give 0 or more")
        for name, value in self.weights().items():
            if value < 0:
                raise UserError(f"method.{name} = {value} is a weight: give 0 (without) or a positive number")

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """The options that are weights of losses."""

    def new_discriminator(self) -> PatchDiscriminator:
        return self.discriminator.build()

    def initialise(self, network: nn.Module, draws: torch.Generator) -> None:
        """N(0, 0.02^2), as CycleGAN."""
        init_weights(network, draws, "normal")

    def adversary(
        self, discriminator: PatchDiscriminator, buffer: str, global_batch: int, weight: float = 1.0
    ) -> Adversary:
        """buffer: the name of its image buffers. weight: of the generator's loss."""
        return Adversary(discriminator, self.gan, weight, ImageBuffers(buffer, self.buffer, global_batch))


@dataclass(frozen=True, kw_only=True)
class SidesConfig(StridedConfig):
    """Of methods with a generator each way, or one way."""

    @abstractmethod
    def sides(self) -> Sequence[tuple[float, float]]:
        """For each generator of the translation, in order, the weights of its cycle and of its identity loss."""


@dataclass(frozen=True, kw_only=True)
class CycleGanConfig(SidesConfig):
    lambda_a: float = option(10.0, "weight of the cycle that begins with the source", adjustable=True)
    lambda_b: float = option(10.0, "weight of the cycle that begins with the target", adjustable=True)
    identity: float = option(
        0.0, "weight of the identity losses, as a share of lambda (paper: 0.5 for paintings, else 0; its code: 0.5)"
    )

    def weights(self) -> dict[str, float]:
        return {"lambda_a": self.lambda_a, "lambda_b": self.lambda_b, "identity": self.identity}

    def sides(self) -> Sequence[tuple[float, float]]:
        # The identity loss goes with the cycle that begins with the same images, which is the other side's.
        return (self.lambda_a, self.lambda_b * self.identity), (self.lambda_b, self.lambda_a * self.identity)

    def translation(self) -> Translation:
        return TwoGenerators(self.generator.build(), self.generator.build())

    def build(self, *, seed: int, global_batch: int) -> "CycleGan":
        return CycleGan(self, seed=seed, global_batch=global_batch)


CYCLEGAN = {"optim.epochs": 100.0, "optim.decay_epochs": 100.0}


class CycleGan(Method[Batch, list[Translated]]):
    """networks: generator_a (the paper's G) from the source to the target domain and discriminator_a (D_Y), which judges its
    translations; generator_b (F) and discriminator_b (D_X) the other way. With one way only the names have no letter.
    """

    # G against the D's of the step before, then these on the translations that G was updated on (the published order).
    phases = (
        Phase(name="generator", optimiser="generator", differentiates=True),
        Phase(name="discriminator", optimiser="discriminator"),
    )
    product: Translation

    def __init__(self, config: SidesConfig, *, seed: int, global_batch: int) -> None:
        super().__init__()
        product = config.translation()
        generators, discriminators = dict(product.named_children()), []
        self.sides: list[Side] = []
        for letter, (name, network), (cycle, identity) in zip("AB", generators.items(), config.sides(), strict=False):
            suffix = name.removeprefix("generator")
            discriminator = config.new_discriminator()
            adversary = config.adversary(discriminator, f"buffer{suffix}", global_batch)
            self.sides.append(Side(letter, network, adversary, cycle, identity))
            for each, module in ((name, network), (f"discriminator{suffix}", discriminator)):
                self.add_module(each, module)
                config.initialise(module, generator("cpu", seed, "init", each))
            discriminators.append(f"discriminator{suffix}")
        self.product = product  # after its networks, which are named by their own names
        self.optimisers = (
            OptimiserSpec(name="generator", networks=tuple(generators)),
            OptimiserSpec(name="discriminator", networks=tuple(discriminators)),
        )

    def sizes(self, images: int) -> Sizes:
        (discriminator, *_) = (side.adversary.discriminator for side in self.sides)
        return self.product.sizes & discriminator.sizes

    def guesses(self) -> Guesses:
        return Guesses(discriminators=[{f"D_{side.letter}": side.adversary.guess} for side in self.sides])

    def slot_state(self) -> dict[str, Tensor]:
        return {name: kept for side in self.sides for name, kept in side.adversary.buffers.state().items()}

    def load_slot_state(self, state: dict[str, Tensor]) -> None:
        for side in self.sides:
            side.adversary.buffers.load_state(state)

    def forward(self, batch: Batch, context: StepContext, name: str = "translate") -> list[Translated]:
        outputs = [side.translate(batch) for side in self.sides]
        for side, other, translated in zip(self.sides, reversed(self.sides), outputs, strict=True):
            if side.cycle:
                translated.cycle = other.generator(translated.fake)
        return outputs

    def loss(self, phase: str, outputs: list[Translated], batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        """The terms, with their weights, under the names of the published code; G is their sum."""
        terms = {"discriminator": self.discriminator_terms, "generator": self.generator_terms}[phase]
        named = {
            f"{name}_{side.letter}": value
            for side, translated in zip(self.sides, outputs, strict=True)
            for name, value in terms(side, translated, batch, context)
        }
        total = torch.stack(list(named.values())).sum()
        if phase == "generator":
            named["G"] = total
        else:
            for side, translated in zip(self.sides, outputs, strict=True):
                assert translated.right is not None
                named |= translated.right.named(f"D_{side.letter}")
        return total, {name: value.detach() for name, value in named.items()}

    def generator_terms(
        self, side: Side, translated: Translated, batch: Batch, context: StepContext
    ) -> Iterator[tuple[str, Tensor]]:
        images, others = side.images(batch)
        yield "G", side.adversary.generator_loss(translated.fake)
        if translated.cycle is not None:
            yield "cycle", side.cycle * l1_distance(translated.cycle, images)
        if translated.identity is not None:
            yield "idt", side.identity * l1_distance(translated.identity, others)

    def discriminator_terms(
        self, side: Side, translated: Translated, batch: Batch, context: StepContext
    ) -> Iterator[tuple[str, Tensor]]:
        _, real = side.images(batch)
        shown = side.adversary.shown(translated.fake, batch.slots, context.draws)
        d_fake, d_real, translated.right = side.adversary.discriminator_losses(shown, real)
        yield "D", (d_fake + d_real) / 2
