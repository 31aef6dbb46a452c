"""CUT and FastCUT: Park et al. 2020, "Contrastive Learning for Unpaired Image-to-Image Translation"."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from infra.views import Crop, View
from trainer.draws import generator
from trainer.methods.base import Batch, Guesses, Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.methods.config import MethodConfig
from trainer.methods.parts.adversary import Adversary
from trainer.methods.parts.contrast import Contrast, ContrastConfig, IdentityConfig, PatchContrast
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.part import Outputs, Owner, Part
from trainer.methods.parts.semantic import SemanticConfig
from trainer.networks import ProjectionHeads, init_weights
from trainer.networks.config import DiscriminatorConfig, GeneratorConfig
from trainer.networks.sizes import Sizes
from trainer.networks.split import split_batch
from trainer.translation import OneGenerator


@dataclass(frozen=True, kw_only=True)
class OneSidedConfig(IdentityConfig, MethodConfig):
    """What CUT shares with methods that compare patches by another loss."""

    gan: str = option("lsgan", "adversarial loss", choices=("lsgan", "vanilla", "nonsaturating"))
    lambda_gan: float = option(1.0, "weight of the adversarial loss of G", adjustable=True)
    flip_equivariance: bool = option(False, "mirror half of G's inputs, and the features of its output back")
    buffer: int = option(0, "images kept to show D earlier translations; 0: none")
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_gan < 0:
            raise UserError(f"method.lambda_gan = {self.lambda_gan} is negative: give 0 or more")
        if self.buffer < 0:
            raise UserError(f"method.buffer = {self.buffer} counts images: give 0 or more")

    @property
    def view(self) -> View:
        return Crop(source_labels=self.semantic.reads_labels)

    def translation(self) -> OneGenerator:
        return OneGenerator(self.generator.build())


@dataclass(frozen=True, kw_only=True)
class CutConfig(ContrastConfig, OneSidedConfig):
    @property
    def whole_batch(self) -> str:
        return "method.all_negatives" if self.all_negatives else ""

    def build(self, *, seed: int, global_batch: int) -> "Cut":
        return Cut(self, seed=seed, global_batch=global_batch)


# FastCUT is CUT with these options (Sec. 4.1 and Appendix C.1).
FASTCUT = {
    "method.identity": False, "method.lambda_nce": 10.0, "method.flip_equivariance": True,
    "optim.epochs": 150.0, "optim.decay_epochs": 50.0,
}  # fmt: skip


class Cut(Method[Batch, Outputs]):
    """networks: generator, discriminator, heads (the F_k), and those of the parts.

    A method that adds losses to CUT's gives them in `added_parts`, one that has another in place of PatchNCE in
    `make_contrast`.
    """

    # In the order of CUT's published step.
    phases: tuple[Phase, ...] = (
        Phase(name="discriminator", optimiser="discriminator"),
        Phase(name="generator", optimiser="generator", differentiates=True),
    )
    product: OneGenerator
    heads: ProjectionHeads

    def __init__(self, config: OneSidedConfig, *, seed: int, global_batch: int) -> None:
        super().__init__()
        self.config = config
        product = config.translation()
        self.generator = product.generator
        self.product = product  # after its network, which is named by its own name
        self.discriminator = config.discriminator.build()
        for name in ("generator", "discriminator"):
            init_weights(getattr(self, name), generator("cpu", seed, "init", name))
        self.contrast = self.make_contrast(seed)
        segmenter = config.semantic.build(self.discriminator, global_batch)
        self.mask = segmenter.mask
        buffers = ImageBuffers("buffer", config.buffer, global_batch)
        self.adversary = Adversary(self.discriminator, config.gan, config.lambda_gan, buffers, segmenter.balance)
        self.parts = [*self.added_parts(), *([segmenter.semantics] if segmenter.semantics else [])]
        others = [each for each in (segmenter.mask, segmenter.balance) if each]
        self._owners: list[Owner] = [*self.parts, self.contrast, *others]
        for owner in self._owners:
            for name, module in (owner.networks | owner.memory | owner.fixed).items():
                self.add_module(name, module)
        own = {phase.name: [phase.name] for phase in self.phases}
        own["generator"] += self.contrast.networks
        for part in self.parts:
            own[part.phase] += part.networks
        self.optimisers = tuple(OptimiserSpec(name=name, networks=tuple(networks)) for name, networks in own.items())

    def make_contrast(self, seed: int) -> PatchContrast:
        """The loss between patches of translations and of their originals. It may ask for `config` and `generator`."""
        assert isinstance(self.config, ContrastConfig)
        return Contrast(self.config, self.generator, seed)

    def added_parts(self) -> list[Part]:
        """Losses beside CUT's own."""
        return []

    def memory(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: module for owner in self._owners for name, module in owner.memory.items()})

    def given(self) -> dict[str, str]:
        return {option: found for owner in self._owners for option, found in owner.given.items()}

    def measured_steps(self) -> int:
        return max(owner.measured_steps() for owner in self._owners)

    def measure(self, batches: Sequence[Batch], context: StepContext) -> None:
        for owner in self._owners:
            owner.measure(batches, context)

    def compiled_parts(self) -> list[nn.Module]:
        parts = self.generator.compiled_parts()
        # Compiled code has no second derivative.
        return parts if any(part.second_order for part in self.parts) else [*parts, self.discriminator]

    def sizes(self, images: int) -> Sizes:
        taken = self.generator.sizes & self.discriminator.sizes
        for part in self.parts:
            taken &= part.sizes
        return taken

    def late_losses(self) -> dict[str, float]:
        return {part.starts_at: part.start for part in self.parts if part.starts_at}

    def notes(self) -> list[str]:
        notes = [note for part in self.parts if (note := part.note())]
        if self.config.semantic.segmenter and not self.config.semantic.used:
            notes.append(
                "no method.semantic option uses method.semantic.segmenter: give a weight, mask or balance, or leave it out"
            )
        return notes

    def guesses(self) -> Guesses:
        of_d = dict.fromkeys(("D_fake", "D_real"), self.adversary.guess)
        return Guesses(discriminators=[of_d], contrasts=self.contrast.guesses())

    def slot_state(self) -> dict[str, Tensor]:
        return self.adversary.buffers.state()

    def load_slot_state(self, state: dict[str, Tensor]) -> None:
        self.adversary.buffers.load_state(state)

    def forward(self, batch: Batch, context: StepContext, name: str = "translate") -> Outputs:
        flipped = self.config.flip_equivariance and context.draws.coin("flip", "coin")
        images = torch.cat([batch.source, batch.target]) if self.config.identity else batch.source
        images = images.flip(3) if flipped else images
        translated, features = self.translate(images, batch, context)
        if not self.config.identity:
            return Outputs(translated, None, features, None, flipped)
        domains = [len(batch.source), len(batch.target)]
        fake, identity = split_batch(translated, domains)
        of_source, of_target = zip(*(split_batch(feature, domains) for feature in features), strict=True)
        return Outputs(fake, identity, list(of_source), list(of_target), flipped)

    def translate(self, images: Tensor, batch: Batch, context: StepContext) -> tuple[Tensor, list[Tensor]]:
        """G of images, those of the batch (source, and target where that is asked for), and its features at the taps."""
        return self.generator.forward_with_features(images, self.config.taps)

    def loss(self, phase: str, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        evaluate = {"discriminator": self.discriminator_loss, "generator": self.generator_loss}[phase]
        total, named = evaluate(outputs, batch, context)
        for name, weight, term in self._terms(phase, outputs, batch, context):
            named[name] = term
            total = total + weight * term
        return total, {name: value.detach() for name, value in named.items()}

    def discriminator_loss(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        self._hide(outputs, batch)
        outputs.shown = self.adversary.shown(outputs.masked(outputs.fake), batch.slots, context.draws)
        # Through a mask both are compared place by place. Without one D sees the target as it is, as published.
        target = outputs.seen_target(batch) if self.mask else batch.target
        real = outputs.masked(target)
        d_fake, d_real, right = self.adversary.discriminator_losses(outputs.shown, real, target)
        return (d_fake + d_real) / 2, {"D_fake": d_fake, "D_real": d_real, **right.named("D")}

    def generator_loss(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        self._hide(outputs, batch)
        g_gan = self.adversary.generator_loss(outputs.masked(outputs.fake))
        compared, named = self.contrast.losses(outputs, batch, context)
        total = g_gan + compared
        return total, {"G_GAN": g_gan, "G": total, **named}

    def _hide(self, outputs: Outputs, batch: Batch) -> None:
        """Find the mask, if there is one, unless an earlier phase on these outputs did: in micro-batches each has its own."""
        if self.mask and outputs.mask is None:
            outputs.mask = self.mask.of(outputs, batch)

    def _terms(
        self, phase: str, outputs: Outputs, batch: Batch, context: StepContext
    ) -> Iterator[tuple[str, float, Tensor]]:
        """The added losses of a phase at this point of the schedule: name, weight and value of each."""
        for part in self.parts:
            if part.phase == phase and part.acts(context):
                yield part.name, part.weight, part.value(outputs, batch, context)

    def after_step(self, batches: Sequence[Batch], context: StepContext) -> None:
        for owner in self._owners:
            owner.after_step(batches, context)
