"""A part of a method: a weighted loss, with the networks and the memory that it needs for itself."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from trainer.methods.base import Batch, StepContext
from trainer.networks.sizes import Sizes


@dataclass
class Outputs:
    """What a generator makes of a batch.

    fake, identity: G of the source and of the target (identity None if not asked for), (b, 3, h, w).
    source_features, target_features: G's features of both at the taps; flipped: the inputs were mirrored.
    shown: the translations that D has seen in this step, once it has; mask: through which, (b, 1, h, w), 1 where it saw; None:
    all of them.
    """

    fake: Tensor
    identity: Tensor | None
    source_features: list[Tensor]
    target_features: list[Tensor] | None
    flipped: bool
    shown: Tensor | None = None
    mask: Tensor | None = None

    def masked(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) as D sees them: grey, 0, where the mask hides them."""
        return images if self.mask is None else images * self.mask

    def seen_source(self, batch: Batch) -> Tensor:
        """The source as the generator saw it."""
        return batch.source.flip(3) if self.flipped else batch.source

    def seen_target(self, batch: Batch) -> Tensor:
        """The target likewise."""
        return batch.target.flip(3) if self.flipped else batch.target


class Owner:
    """Something with modules of its own, which are attributes of the method and files of a checkpoint by these names.

    networks: an optimiser trains them. memory: no optimiser does, and all ranks hold it alike. fixed: nothing changes
    it, and no checkpoint has it, but its hash: `given`, by the option that names it.
    """

    def __init__(self) -> None:
        self.networks: dict[str, nn.Module] = {}
        self.memory: dict[str, nn.Module] = {}
        self.fixed: dict[str, nn.Module] = {}
        self.given: dict[str, str] = {}

    def measured_steps(self) -> int:
        """See `Method.measured_steps`."""
        return 0

    def measure(self, batches: Sequence[Batch], context: StepContext) -> None:
        """Count into `memory`; see `Method.measure`."""

    def after_step(self, batches: Sequence[Batch], context: StepContext) -> None:
        """Bring `memory` up to date; see `Method.after_step`."""


class Part(Owner, ABC):
    """A loss that is added to that of a phase, whose optimiser trains its networks.

    name: under which it is reported. phase: whose loss it is added to. starts_at: the option that says when it begins.
    sizes: of images that it takes. second_order: it needs the gradient of a gradient of D.
    """

    name: ClassVar[str]
    phase: ClassVar[str] = "generator"
    starts_at: ClassVar[str] = ""
    sizes: ClassVar[Sizes] = Sizes()
    second_order: ClassVar[bool] = False

    def __init__(self, weight: float, start: float = 0.0) -> None:
        """start: the share of all epochs before it begins."""
        super().__init__()
        self.weight, self.start = weight, start

    def acts(self, context: StepContext) -> bool:
        """Whether it has begun."""
        return context.begun(self.start)

    def note(self) -> str:
        """See `Method.notes`; empty: nothing."""
        return ""

    @abstractmethod
    def value(self, outputs: Outputs, batch: Batch, context: StepContext) -> Tensor:
        """The loss before its weight, a scalar."""


def patch_ids(
    features: Sequence[Tensor], taps: Sequence[int], count: int, stream: str, context: StepContext
) -> list[Tensor]:
    """For the feature maps (b, c, h, w) at each tap so many distinct places (n,), flat positions y * w + x, shared by the
    whole global batch; all places where a map has fewer."""
    ids = [
        context.draws.stream(stream, "ids", tap).permutation(feature.shape[2] * feature.shape[3], count)
        for tap, feature in zip(taps, features, strict=True)
    ]
    return [each.to(features[0].device, non_blocking=True) for each in ids]
