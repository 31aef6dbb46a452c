"""SemST: Zhao et al. 2024, "SemST: Semantically Consistent Multi-Scale Image Translation via Structure-Texture Alignment".

What its supplement leaves open is filled from the works that it cites, and is an option where a reader could mean otherwise
(docs/systems.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from infra.views import CropWithBox
from trainer.draws import generator
from trainer.losses import mutual_information
from trainer.methods.base import Guesses, Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.methods.config import MethodConfig
from trainer.methods.parts.adversary import Adversary, Right
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.part import patch_ids
from trainer.methods.parts.relation import RelationConfig, mean_hdce, mean_relation, projected
from trainer.networks import PatchDiscriminator, ProjectionHeads, ResnetGenerator, init_weights
from trainer.networks.config import DiscriminatorConfig, GeneratorConfig
from trainer.networks.fusion import ScaleFusion, cut, halved, slide
from trainer.networks.sizes import Sizes
from trainer.translation import Translation

GRID = 8  # pixels: windows begin at multiples of it, so that features of both scales lie on each other


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """L_TS, minus the mutual information of source and translation (`trainer.losses.mutual_information`)."""

    weight: float = option(0.5, "weight of L_TS, in each branch; 0: without", adjustable=True)
    space: str = option(
        "heads", "what is compared: projected patches, or the pixels as in SCC", choices=("heads", "pixels")
    )
    taps: tuple[int, ...] = option(
        (), "layers whose patches are: shallow ones see texture, deep ones structure; none given: all of method.taps"
    )
    spread: float = option(0.5, "root mean square that the entries of a projected patch are scaled to")
    kernel: str = option(
        "gaussian", "exp(-d^2/2), or as SCC's published code has it exp(d^2/2)", choices=("gaussian", "published")
    )
    numerator: str = option(
        "product", "of the ratio that is fitted: over all pairs as SCC's published code has it, or over those at one place",
        choices=("product", "joint"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.weight < 0 or self.spread <= 0:
            raise UserError("method.ts.weight must be 0 or more, and method.ts.spread positive: 0.5 is usual for both")


@dataclass(frozen=True, kw_only=True)
class SemstConfig(RelationConfig, MethodConfig):
    lambda_src: float = option(
        0.0, "weight of the semantic relation of patches, which SRC has; 0: without", adjustable=True
    )
    gan: str = option("lsgan", "adversarial loss", choices=("lsgan", "vanilla", "nonsaturating"))
    lambda_gan: float = option(1.0, "weight of the adversarial loss of G", adjustable=True)
    adversarial: str = option(
        "branches", "what a D sees: the coarse translation and the fused one inside the window, each a D of its own; or the "
        "whole fused one", choices=("branches", "fused"),
    )  # fmt: skip
    local: int = option(
        128,
        "side of the window at full resolution, in pixels: at most half of the crop's (the paper: 256, and --crop 512)",
    )
    ts: StructureConfig = field(default_factory=StructureConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_gan < 0:
            raise UserError(f"method.lambda_gan = {self.lambda_gan} is negative: give 0 or more")
        if self.local < GRID or self.local % GRID:
            raise UserError(f"method.local = {self.local} is no multiple of {GRID} pixels: give one such as 128")
        strangers = set(self.ts.taps) - set(self.taps)
        if strangers:
            raise UserError(f"tap {min(strangers)} of method.ts.taps has no projection head: choose taps among "
                            f"{', '.join(map(str, self.taps))}, or add it to method.taps")  # fmt: skip

    @property
    def view(self) -> CropWithBox:
        return CropWithBox(side=self.local, grid=GRID)

    def translation(self) -> "TwoScales":
        return TwoScales(self.generator.build(), self.generator.build(), max(self.taps), self.local)

    def build(self, *, seed: int, global_batch: int) -> "Semst":
        return Semst(self, seed=seed, global_batch=global_batch)


class TwoScales(Translation):
    """A generator that sees images at half their size, one that sees windows of them, and the map that fuses both.

    tap: of the first generator, whose features make the map. side: of the windows, in pixels.
    """

    free = False  # as many windows as an image has

    def __init__(self, coarse: ResnetGenerator, fine: ResnetGenerator, tap: int, side: int) -> None:
        super().__init__()
        self.generator_global, self.generator_local = coarse, fine
        self.scale_fusion = ScaleFusion(*coarse.tap_channels([tap]))
        self.tap, self.side = tap, side

    @property
    def sizes(self) -> Sizes:
        half = self.generator_global.sizes
        return Sizes(GRID, 2 * half.first)

    def forward(self, x_NCHW: Tensor, code: Tensor | None = None, direction: str = "AtoB") -> Tensor:
        coarse, (features,) = self.generator_global.forward_with_features(halved(x_NCHW), [self.tap])
        fine = slide(self.generator_local, x_NCHW, self.side)
        return self.scale_fusion.fuse(coarse, fine, self.scale_fusion(features, coarse.shape[2:]))


class BoxedBatch(Protocol):
    """As `Batch`; source_boxes, target_boxes: (b, 2) on the CPU, (x, y) of the corner of the window in each image."""

    source: Tensor
    target: Tensor
    slots: Tensor
    source_boxes: Tensor
    target_boxes: Tensor


@dataclass
class View:
    """What a branch sees of the source, what it makes of it, and G's features of the source at the taps."""

    source: Tensor
    made: Tensor
    features: list[Tensor]


@dataclass
class Outputs:
    """fused: (b, 3, h, w), of the crop's size."""

    coarse: View
    fine: View
    fused: Tensor


class Branch:
    """hDCE, L_TS and SRC between what one generator sees and makes, by its own encoder and heads.

    name: global or local.
    """

    def __init__(self, config: SemstConfig, name: str, network: ResnetGenerator) -> None:
        self.config, self.name, self.generator = config, name, network
        normalisation: Any = config.normalisation
        self.heads = ProjectionHeads(network.tap_channels(config.taps), config.head_dim, normalisation)

    def losses(self, view: View, context: StepContext) -> Losses:
        """Those that are in use, each times its weight."""
        config, images = self.config, len(view.source)
        ids = patch_ids(view.features, config.taps, config.patches, self.name, context)
        made = self.generator.encode(view.made, config.taps)
        queries, keys = projected(self.heads, made, view.features, ids)
        gamma = context.number(config.gamma_at)
        found = {"hDCE": config.lambda_hdce * mean_hdce(queries, keys, images, gamma, config.temperature)}
        if config.ts.weight > 0:
            found["TS"] = config.ts.weight * self._structure(view, queries, keys)
        if config.lambda_src > 0:
            found["SRC"] = config.lambda_src * mean_relation(queries, keys, images)
        return found

    def _structure(self, view: View, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        ts, images = self.config.ts, len(view.source)
        if ts.space == "pixels":
            pairs = [(view.source.flatten(1), view.made.flatten(1))]
        else:
            chosen = [self.config.taps.index(tap) for tap in ts.taps or self.config.taps]
            factor = ts.spread * math.sqrt(self.config.head_dim)  # rows have length 1
            pairs = [
                (factor * keys[tap].reshape(images, -1), factor * queries[tap].reshape(images, -1)) for tap in chosen
            ]
        return -torch.stack([mutual_information(x, y, ts.kernel, ts.numerator).mean() for x, y in pairs]).mean()


class Semst(Method[BoxedBatch, Outputs]):
    """networks: generator_global, generator_local, scale_fusion, heads_global, heads_local, discriminator_fused and, with
    adversarial branches, discriminator_global."""

    replayable = False  # it cuts windows where the boxes of its images lie
    phases = (
        Phase(name="discriminator", optimiser="discriminator"),
        Phase(name="generator", optimiser="generator", differentiates=True),
    )
    product: TwoScales
    discriminator_fused: PatchDiscriminator

    def __init__(self, config: SemstConfig, *, seed: int, global_batch: int) -> None:
        super().__init__()
        self.config = config
        product = config.translation()
        networks: dict[str, nn.Module] = dict(product.named_children())
        self.branches = [
            Branch(config, "global", product.generator_global),
            Branch(config, "local", product.generator_local),
        ]
        networks |= {f"heads_{branch.name}": branch.heads for branch in self.branches}
        seen = ("global", "fused") if config.adversarial == "branches" else ("fused",)
        discriminators = {f"discriminator_{name}": config.discriminator.build() for name in seen}
        for name, network in (networks | discriminators).items():
            init_weights(network, generator("cpu", seed, "init", name))
            self.add_module(name, network)
        product.scale_fusion.start_even()
        self.product = product  # after its networks, which are named by their own names
        none = ImageBuffers("buffer", 0, global_batch)
        self.adversaries = [Adversary(d, config.gan, config.lambda_gan, none) for d in discriminators.values()]
        self.optimisers = (
            OptimiserSpec(name="discriminator", networks=tuple(discriminators)),
            OptimiserSpec(name="generator", networks=tuple(networks)),
        )
        window = product.generator_local.sizes & self.discriminator_fused.sizes
        if not window.fit(config.local, config.local):
            raise UserError(f"method.local = {config.local} is too small for these networks: give a multiple of {GRID} from "
                            f"{(window & Sizes(GRID)).first} up")  # fmt: skip

    def compiled_parts(self) -> list[nn.Module]:
        generators = (self.product.generator_global, self.product.generator_local)
        return [*generators, *(adversary.discriminator for adversary in self.adversaries)]

    def sizes(self, images: int) -> Sizes:
        return self.product.sizes & Sizes(smallest=2 * self.config.local)

    def forward(self, batch: BoxedBatch, context: StepContext, name: str = "translate") -> Outputs:
        taps, corners = self.config.taps, batch.source_boxes.tolist()
        seen = halved(batch.source), cut(batch.source, corners, self.config.local)
        coarse, fine = (
            View(source, *branch.generator.forward_with_features(source, taps))
            for branch, source in zip(self.branches, seen, strict=True)
        )
        fusion = self.product.scale_fusion
        scale = fusion(coarse.features[taps.index(self.product.tap)], coarse.made.shape[2:])
        return Outputs(coarse, fine, fusion.fuse_windows(coarse.made, fine.made, scale, corners))

    def _judged(self, outputs: Outputs, batch: BoxedBatch) -> list[Tensor]:
        """What each discriminator sees of the translations."""
        if self.config.adversarial == "fused":
            return [outputs.fused]
        return [outputs.coarse.made, cut(outputs.fused, batch.source_boxes.tolist(), self.config.local)]

    def _real(self, batch: BoxedBatch) -> list[Tensor]:
        """And of the targets."""
        if self.config.adversarial == "fused":
            return [batch.target]
        return [halved(batch.target), cut(batch.target, batch.target_boxes.tolist(), self.config.local)]

    def guesses(self) -> Guesses:
        return Guesses(discriminators=[dict.fromkeys(("D_fake", "D_real"), self.adversaries[0].guess)])

    def loss(self, phase: str, outputs: Outputs, batch: BoxedBatch, context: StepContext) -> tuple[Tensor, Losses]:
        evaluate = {"discriminator": self._discriminator_loss, "generator": self._generator_loss}[phase]
        total, named = evaluate(outputs, batch, context)
        return total, {name: value.detach() for name, value in named.items()}

    def _discriminator_loss(self, outputs: Outputs, batch: BoxedBatch, context: StepContext) -> tuple[Tensor, Losses]:
        pairs = zip(self.adversaries, self._judged(outputs, batch), self._real(batch), strict=True)
        each = [adversary.discriminator_losses(made.detach(), real) for adversary, made, real in pairs]
        fakes, reals, rights = zip(*each, strict=True)
        fake, real = torch.stack(fakes).mean(), torch.stack(reals).mean()
        return (fake + real) / 2, {"D_fake": fake, "D_real": real, **Right.mean(rights).named("D")}

    def _generator_loss(self, outputs: Outputs, batch: BoxedBatch, context: StepContext) -> tuple[Tensor, Losses]:
        judged = zip(self.adversaries, self._judged(outputs, batch), strict=True)
        total = g_gan = torch.stack([adversary.generator_loss(made) for adversary, made in judged]).mean()
        named: Losses = {}
        for branch, view in zip(self.branches, (outputs.coarse, outputs.fine), strict=True):
            for name, value in branch.losses(view, context).items():
                named[f"{name}_{branch.name}"] = value
                total = total + value
        return total, {"G_GAN": g_gan, "G": total, **named}
