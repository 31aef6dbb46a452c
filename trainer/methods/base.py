"""What every method gives: a forward pass, a loss for each phase of a step, and the networks each phase trains."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.networks.sizes import Sizes


class Batch(Protocol):
    """One micro-batch of unpaired images: source and target (b, 3, h, w) in [-1, 1]; slots (b,) are their places in
    the global batch."""

    source: Tensor
    target: Tensor
    slots: Tensor


@dataclass(frozen=True)
class StepContext:
    """What a step knows beside its images.

    progress: images (of the source) seen so far as a share of the whole schedule, in [0, 1).
    all_ranks: gathers detached rows (n, c) from all ranks in rank order, and says at which row this rank's begin.
    """

    draws: Draws
    progress: float = 0.0
    all_ranks: "RowGather" = field(default=lambda rows: (rows, 0))


class RowGather(Protocol):
    def __call__(self, rows: Tensor, /) -> tuple[Tensor, int]: ...


Data = TypeVar("Data")  # a micro-batch, such as Batch; whatever it is, it has `slots`
Outputs = TypeVar("Outputs")
Losses = dict[str, Tensor]


class Method(nn.Module, ABC, Generic[Data, Outputs]):
    """What is trained, and how. A method knows nothing of engines, devices, loggers or files.

    A step calls `forward`, then for each phase in turn `loss`, after which the phase's optimiser updates its networks.
    The last phase trains the networks that `forward` runs; those before it take its outputs as constants.

    phases: the names of the optimisers in the order of their updates, ("discriminator", "generator") for a game.
    product_name: the network that the whole run is for, by its name as an attribute and in a checkpoint.
    """

    phases: ClassVar[tuple[str, ...]]
    product_name: ClassVar[str]

    @abstractmethod
    def networks(self, phase: str) -> nn.ModuleDict:
        """The networks that this phase's optimiser owns, by the name they have in a checkpoint."""

    @abstractmethod
    def forward(self, batch: Data, context: StepContext) -> Outputs:
        """Run a batch through the networks of the last phase and keep what the losses need, with its graph."""

    @abstractmethod
    def loss(self, phase: str, outputs: Outputs, batch: Data, context: StepContext) -> tuple[Tensor, Losses]:
        """The scalar that a phase minimises, and the named scalars to report (detached)."""

    @property
    def product(self) -> nn.Module:
        """The network that the run is for: a generator (b, 3, h, w) -> (b, 3, h, w) in [-1, 1], or a segmenter."""
        return self.get_submodule(self.product_name)

    def late_losses(self) -> dict[str, float]:
        """What begins late, by the option that says when: the share of all epochs that is done by then."""
        return {}

    def sizes(self, images: int) -> Sizes:
        """The sizes of images that it can be trained on, with so many images in a micro-batch."""
        return Sizes()

    def amount(self, batch: Data) -> Tensor | None:
        """How much a micro-batch counts for: a scalar on its device, what its losses are means over, such as labelled
        pixels. A step weighs the micro-batches of all ranks by it, so that its losses are means over the global batch
        however that is split up. None: all alike, as for losses that are means over images."""
        return None

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that torch.compile takes as a whole: those that are called with features and return features."""
        return [network for phase in self.phases for network in self.networks(phase).values()]

    def slot_state(self) -> dict[str, Tensor]:
        """State that belongs to slots of the global batch (image buffers), "name/slot" -> tensor. Ranks own
        different slots; a checkpoint holds the union."""
        return {}

    def load_slot_state(self, state: dict[str, Tensor]) -> None:
        """Take over the union of all ranks' `slot_state`."""

    def memory(self) -> nn.ModuleDict:
        """What no optimiser trains and all ranks hold alike (moving averages, a bank of negatives, statistics of the
        data), by the name that it has in a checkpoint."""
        return nn.ModuleDict()

    def after_step(self, batches: Sequence[Data], context: StepContext) -> None:
        """Bring `memory` up to date, once all phases of a step have updated their networks. Called on all ranks with
        their micro-batches, without gradients."""


def frozen(module: nn.Module, *inputs: Any) -> Any:
    """module(*inputs) with its parameters held constant: gradients flow to the inputs only."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, inputs)
