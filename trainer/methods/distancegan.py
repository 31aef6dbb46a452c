"""DistanceGAN: Benaim and Wolf 2017, "One-Sided Unsupervised Domain Mapping", and its variant with self-distances."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.config import option
from infra.errors import UserError
from trainer.losses import distance_changes, pair_distances, self_distances
from trainer.methods.base import Batch, StepContext
from trainer.methods.cyclegan import CYCLEGAN, CycleGan, SidesConfig
from trainer.methods.parts.memory import RunningMoments
from trainer.methods.parts.sides import Side, Translated
from trainer.networks import PatchDiscriminator, init_weights
from trainer.translation import OneGenerator, Translation, TwoGenerators


@dataclass(frozen=True, kw_only=True)
class DistanceGanConfig(SidesConfig):
    distances: str = option(
        "pairs", "what is held: distances of the images of a step, or of the halves of each", choices=("pairs", "self")
    )
    halves: str = option("left-right", "of self-distances", choices=("left-right", "top-bottom"))
    both: bool = option(False, "train the way back, too")
    distance_a: float = option(1.0, "weight of the distances from source to target", adjustable=True)
    distance_b: float = option(1.0, "the same of the way back", adjustable=True)
    lambda_a: float = option(0.0, "weight of the cycle that begins with the source; needs both ways")
    lambda_b: float = option(0.0, "weight of the cycle that begins with the target; needs both ways")
    measured: int = option(
        900,
        "images of each domain whose distances are measured before the first step, to normalise with; 0: not normalised",
    )
    architecture: str = option(
        "cyclegan", "networks: of CycleGAN, or of DistanceGAN's code (zero padding, norms with weights)",
        choices=("cyclegan", "distancegan"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measured < 0:
            raise UserError(f"method.measured = {self.measured} counts images: give 0 (without) or more, such as 900")
        if max(self.lambda_a, self.lambda_b) > 0 and not self.both:
            raise UserError("a cycle needs the way back: give --method.both true, or leave lambda_a and lambda_b at 0")

    @property
    def whole_batch(self) -> str:
        return "method.distances pairs" if self.distances == "pairs" else ""

    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("distance_a", "distance_b", "lambda_a", "lambda_b")}

    def sides(self) -> Sequence[tuple[float, float]]:
        return ((self.lambda_a, 0.0), (self.lambda_b, 0.0))[: 1 + self.both]

    def translation(self) -> Translation:
        own = self.architecture == "distancegan"
        generators = [self.generator.build(zero_padding=own, affine=own) for _ in range(1 + self.both)]
        return TwoGenerators(*generators) if self.both else OneGenerator(*generators)

    def new_discriminator(self) -> PatchDiscriminator:
        return self.discriminator.build(affine=self.architecture == "distancegan")

    def initialise(self, network: nn.Module, draws: torch.Generator) -> None:
        init_weights(network, draws, "normal", uniform_biases=self.architecture == "distancegan")

    def build(self, *, seed: int, global_batch: int) -> "DistanceGan":
        return DistanceGan(self, seed=seed, global_batch=global_batch)


DISTANCEGAN = {**CYCLEGAN, "optim.global_batch": 2}  # of its code; a pair takes two


class DistanceGan(CycleGan):
    """CycleGAN, one way or both, with a loss on distances in place of the cycles or beside them.

    Distances of source and target images are measured before the first step (`statistics`), single images' or single pairs'.
    """

    def __init__(self, config: DistanceGanConfig, *, seed: int, global_batch: int) -> None:
        if config.distances == "pairs" and global_batch < 2:
            raise UserError("distances of pairs need two images in a step: give --global-batch 2 or more, or "
                            "--method.distances self")  # fmt: skip
        super().__init__(config, seed=seed, global_batch=global_batch)
        self.distances, self.halves = config.distances, config.halves
        self.distance_weights = {"A": config.distance_a, "B": config.distance_b}
        self.steps_to_measure = -(-config.measured // global_batch)
        self.statistics = RunningMoments(2)  # of the source's distances, of the target's

    def memory(self) -> nn.ModuleDict:
        return nn.ModuleDict({"statistics": self.statistics})

    def measured_steps(self) -> int:
        return self.steps_to_measure

    def measure(self, batches: Sequence[Batch], context: StepContext) -> None:
        for batch in batches:
            images = batch.source, batch.target
            if self.distances == "self":
                found = torch.stack([self.self_distances(each) for each in images], dim=1)
                self.statistics.add(context.all_ranks(found)[0])
            else:  # each rank has those of all
                rows = [context.all_ranks(as_rows(each))[0] for each in images]
                one, other = torch.triu_indices(len(rows[0]), len(rows[0]), 1, device=rows[0].device)
                self.statistics.add(torch.stack([pair_distances(each, each)[one, other] for each in rows], dim=1))

    def self_distances(self, images: Tensor) -> Tensor:
        """(B,) of images (B, C, H, W)."""
        return self_distances(images, self.halves)

    def generator_terms(
        self, side: Side, translated: Translated, batch: Batch, context: StepContext
    ) -> Iterator[tuple[str, Tensor]]:
        yield from super().generator_terms(side, translated, batch, context)
        if weight := self.distance_weights[side.letter]:
            yield "Dist", weight * self.distance_loss(side, translated.fake, batch, context)

    def distance_loss(self, side: Side, fake: Tensor, batch: Batch, context: StepContext) -> Tensor:
        """How much G changes distances, normalised by those of either domain: a mean over the images
        of the global batch, or over its pairs. Its mean over the ranks has that value, and its gradient."""
        images, _ = side.images(batch)
        mean, std = self._moments() if side.letter == "A" else (each.flip(0) for each in self._moments())
        if self.distances == "self":
            return distance_changes(self.self_distances(images), self.self_distances(fake), mean, std).mean()
        (of_images, first), (of_fakes, _) = (pairs_of_own(each, context) for each in (images, fake))
        changes = distance_changes(of_images, of_fakes, mean, std)
        own, all_images = changes.shape
        itself = torch.arange(own, device=fake.device)[:, None] + first == torch.arange(all_images, device=fake.device)
        value = changes.masked_fill(itself, 0.0).sum() / (own * (all_images - 1))
        # A pair counts once with each of its images, which each time is the one that moves: half of its gradient.
        return 2 * value - value.detach()

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the source's and the target's distances, (2,) each. 0 and 1 where nothing was measured;
        where all are alike, they are not scaled."""
        statistics = self.statistics
        std = statistics.std
        return statistics.mean.nan_to_num(), torch.where(std > 0, std, torch.ones_like(std))


def as_rows(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H * W * C), without a copy of what is channels-last."""
    return images.permute(0, 2, 3, 1).flatten(1)


def pairs_of_own(images: Tensor, context: StepContext) -> tuple[Tensor, int]:
    """Distances (b, B) of this rank's images to those of the whole global batch, of which the former alone carry a gradient; and
    the place of this rank's first."""
    rows = as_rows(images)
    others, first = context.all_ranks(rows.detach())
    return pair_distances(rows, others), first
