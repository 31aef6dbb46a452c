"""What every translation method gives: three functions of one game, and the networks each of its two optimisers owns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.draws import Draws

PHASES = ("discriminator", "generator")


class Batch(Protocol):
    """One micro-batch of unpaired images: source and target (b, 3, h, w) in [-1, 1]; slots (b,) are their places in
    the global batch."""

    source: Tensor
    target: Tensor
    slots: Tensor


@dataclass(frozen=True)
class StepContext:
    """What a step knows beside its images.

    progress: source images seen so far as a share of the whole schedule, in [0, 1).
    all_ranks: gathers detached rows (n, c) from all ranks in rank order, and says at which row this rank's begin.
    """

    draws: Draws
    progress: float = 0.0
    all_ranks: "RowGather" = field(default=lambda rows: (rows, 0))


class RowGather(Protocol):
    def __call__(self, rows: Tensor, /) -> tuple[Tensor, int]: ...


Outputs = TypeVar("Outputs")
Losses = dict[str, Tensor]


class Method(nn.Module, ABC, Generic[Outputs]):
    """A game of two phases. A method knows nothing of engines, devices, loggers or files.

    A step calls `forward`, then `discriminator_loss` (after which the discriminators are updated), then
    `generator_loss`, in the order of CUT's published step. Each loss function returns the scalar to minimise and the
    named scalars to report (detached).
    """

    @abstractmethod
    def networks(self, phase: str) -> nn.ModuleDict:
        """The networks that this phase's optimiser owns, by the name they have in a checkpoint."""

    @abstractmethod
    def forward(self, batch: Batch, context: StepContext) -> Outputs:
        """Run the generators on a batch and keep what both losses need, with its graph."""

    @abstractmethod
    def discriminator_loss(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]: ...

    @abstractmethod
    def generator_loss(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]: ...

    @property
    @abstractmethod
    def translator(self) -> nn.Module:
        """The network that translates source images (b, 3, h, w) in [-1, 1] to the target domain."""

    def slot_state(self) -> dict[str, Tensor]:
        """State that belongs to slots of the global batch (image buffers), "name/slot" -> tensor. Ranks own
        different slots; a checkpoint holds the union."""
        return {}

    def load_slot_state(self, state: dict[str, Tensor]) -> None:
        """Take over the union of all ranks' `slot_state`."""


def frozen(module: nn.Module, *inputs: Any) -> Any:
    """module(*inputs) with its parameters held constant: gradients flow to the inputs only."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, inputs)
