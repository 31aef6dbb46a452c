"""The constraints that SRUNIT is compared with (its supplement, Appendix G): E1, E2 and E6; E5 is in robustness.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from trainer.losses import gradient_norms, self_distance_loss, self_distances, smoothness_loss
from trainer.losses.constraints import PATCH_SIZE
from trainer.methods.base import Batch, StepContext
from trainer.methods.parts.contrast import PatchContrast
from trainer.methods.parts.memory import RunningMoments
from trainer.methods.parts.part import Outputs, Part
from trainer.methods.parts.robustness import Consistency
from trainer.networks.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """Weights of the constraints; 0: without.

    The supplement gives no weights and no start: all begin where L_robust does by default.
    """

    self_distance: float = option(0.0, "weight of DistanceGAN's self-distance loss (E1)")
    smoothness: float = option(
        0.0, "weight of HarmonicGAN's smoothness loss on histograms of patches (E2)", adjustable=True
    )
    consistency: float = option(
        0.0, "weight of the distance between projected patches of source and translation (E5)", adjustable=True
    )
    lipschitz: float = option(0.0, "weight of the penalty on the gradient of D (E6)", adjustable=True)
    start: float = option(0.25, "share of all epochs before they begin, in which E1 measures its statistics")

    def __post_init__(self) -> None:
        if min(self.self_distance, self.smoothness, self.consistency, self.lipschitz) < 0:
            raise UserError("method.constraint.* are weights: give 0 (without) or positive numbers such as 1")
        if not 0 <= self.start <= 1:
            raise UserError(f"method.constraint.start = {self.start} is a share of the epochs: give one from 0 to 1")
        if self.self_distance > 0 and self.start == 0:
            raise UserError("method.constraint.self_distance measures both domains before method.constraint.start: "
                            "give a start above 0, such as 0.25")  # fmt: skip

    def parts(self, contrast: PatchContrast, discriminator: nn.Module) -> list[Part]:
        """Those with a weight."""
        start = self.start
        every = [
            SelfDistance(self.self_distance, start),
            Smoothness(self.smoothness, start, contrast.config.patches),
            Consistency(self.consistency, start, contrast),
            Lipschitz(self.lipschitz, start, discriminator),
        ]
        return [part for part in every if part.weight > 0]


class SelfDistance(Part):
    """E1. Its statistics are measured on the training crops before it starts."""

    name = "self_distance"
    starts_at = "method.constraint.start"

    def __init__(self, weight: float, start: float) -> None:
        super().__init__(weight, start)
        self.distances = RunningMoments(2)
        self.memory = {"distances": self.distances}

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        source = outputs.seen_source(batch)
        return self_distance_loss(source, outputs.fake, self.distances.mean, self.distances.std)

    def after_step(self, batches: Sequence[Batch], context: StepContext) -> None:
        if self.acts(context):
            return
        for batch in batches:
            pair = torch.stack([self_distances(batch.source), self_distances(batch.target)], dim=1)
            self.distances.add(context.all_ranks(pair)[0])


class Smoothness(Part):
    """E2."""

    name = "smoothness"
    starts_at = "method.constraint.start"
    sizes = Sizes(smallest=PATCH_SIZE + 1)  # for two patches to compare

    def __init__(self, weight: float, start: float, patches: int) -> None:
        super().__init__(weight, start)
        self.patches = patches

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        source = outputs.seen_source(batch)
        places = (source.shape[2] - PATCH_SIZE + 1) * (source.shape[3] - PATCH_SIZE + 1)
        count = min(self.patches, places) // 2 * 2
        corners = context.draws.stream("smoothness", "ids", 0).permutation(places, count)
        return smoothness_loss(source, outputs.fake, corners.to(source.device, non_blocking=True))


class Lipschitz(Part):
    """E6: the slope of D at sources and at what it was shown."""

    name = "lipschitz"
    phase = "discriminator"
    second_order = True
    starts_at = "method.constraint.start"

    def __init__(self, weight: float, start: float, discriminator: nn.Module) -> None:
        super().__init__(weight, start)
        self.discriminator = discriminator

    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        assert outputs.shown is not None
        at_source, at_fake = gradient_norms(self.discriminator, torch.cat([batch.source, outputs.shown])).chunk(2)
        return at_source.mean() + at_fake.mean()
