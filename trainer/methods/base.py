"""What every method gives: forward passes, a loss for each phase of a step, and the networks that each optimiser trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.networks.sizes import Sizes


class Batch(Protocol):
    """One micro-batch of unpaired images: source and target (b, 3, h, w) in [-1, 1]; slots (b,) are their places in
    the global batch. source_labels: uint8 (b, h, w) trainIds, 255 = ignore, where the method's view asks for them."""

    source: Tensor
    target: Tensor
    slots: Tensor
    source_labels: Tensor | None


@dataclass(frozen=True)
class StepContext:
    """What a step knows beside its images.

    What a step does may depend on the course of the training by `begun` and `turn` alone, and on chance by `coin` and `choice`
    of its draws; what it computes with, by `number`. So a step that is replayed knows which of its kinds it is, and has its
    numbers where it looks for them (trainer/static_step.py).

    progress: images (of the source) seen so far as a share of the whole schedule, in [0, 1).
    all_ranks: gathers detached rows (n, c) from all ranks in rank order, and says at which row this rank's begin.
    """

    draws: Draws
    progress: float = 0.0
    all_ranks: "RowGather" = field(default=lambda rows: (rows, 0))

    def begun(self, start: float) -> bool:
        """Whether this share of all epochs is done."""
        return self.progress >= start

    def turn(self, every: int) -> int:
        """The step's number (counted from 0) modulo this."""
        return self.draws.step % every

    def number(self, of_progress: Callable[[float], float]) -> float | Tensor:
        """What this makes of `progress`, to compute with: a number, or one in a tensor on the step's device."""
        return of_progress(self.progress)


class RowGather(Protocol):
    def __call__(self, rows: Tensor, /) -> tuple[Tensor, int]: ...


Data = TypeVar("Data")  # a micro-batch, such as Batch; whatever it is, it has `slots`
Outputs = TypeVar("Outputs")
Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OptimiserSpec:
    """What one optimiser trains, and how it differs from the run's options (`OptimConfig`).

    name: in checkpoints and logs. networks: attributes of the method, and files of a checkpoint. rate: factor of the
    learning rate. clip: largest norm of all its gradients together; none: without. The others replace the run's.
    """

    name: str
    networks: tuple[str, ...]
    rate: float = 1.0
    clip: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One update within a step: a loss, taken on a forward pass, and the optimiser that it moves.

    optimiser: by name; phases that share one share its moments. forward: the pass that the loss is taken on, by the
    name that `Method.forward` knows; phases that name the same one share its outputs. differentiates: gradients flow
    through that pass; otherwise its outputs are constants. moves: those of the optimiser's networks that it updates, where
    not all: the others keep their weights and their moments, and their gradients are dropped.
    every, at: it runs in steps (counted from 0) whose number modulo `every` is one of `at`. start: and only once this share
    of all epochs is done; until then the weights and moments that it moves rest.
    """

    name: str
    optimiser: str
    forward: str = "translate"
    differentiates: bool = False
    moves: tuple[str, ...] | None = None
    every: int = 1
    at: tuple[int, ...] = (0,)
    start: float = 0.0

    def runs_in(self, context: StepContext) -> bool:
        return context.turn(self.every) in self.at and context.begun(self.start)


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What reported losses are where a network knows nothing and only guesses, by their names: of each discriminator, and of
    PatchNCE (times its weight)."""

    discriminators: Sequence[Mapping[str, float]] = ()
    contrasts: Mapping[str, float] = field(default_factory=dict)


class Method(nn.Module, ABC, Generic[Data, Outputs]):
    """What is trained, and how. A method knows nothing of engines, devices, loggers or files.

    A step goes through the phases in order: each takes its loss on the outputs of its forward pass, and its optimiser
    updates its networks (trainer/step.py).

    product: the module that the whole run is for, whose children are networks by their names in a checkpoint.
    replayable: whether what a step launches depends on nothing but the shapes and slots of its batches and what it asks of its
    context, so that another step can replay it (trainer/step_graphs.py).
    """

    replayable: ClassVar[bool] = True

    phases: tuple[Phase, ...]
    optimisers: tuple[OptimiserSpec, ...]
    product: nn.Module

    def networks(self, optimiser: str) -> nn.ModuleDict:
        """The networks that an optimiser trains, by the name they have in a checkpoint."""
        (spec,) = (spec for spec in self.optimisers if spec.name == optimiser)
        return nn.ModuleDict({name: self.get_submodule(name) for name in spec.networks})

    @abstractmethod
    def forward(self, batch: Data, context: StepContext, name: str = "translate") -> Outputs:
        """Run a batch through the networks, in the pass of this name, and keep what the losses need, with its graph."""

    @abstractmethod
    def loss(self, phase: str, outputs: Outputs, batch: Data, context: StepContext) -> tuple[Tensor, Losses]:
        """The scalar that a phase minimises, and the named scalars to report (detached)."""

    def late_losses(self) -> dict[str, float]:
        """What begins late, by the option that says when: the share of all epochs that is done by then."""
        return {}

    def notes(self) -> list[str]:
        """Sentences for the run's log: what its options amount to, where they do not say it themselves."""
        return []

    def sizes(self, images: int) -> Sizes:
        """The sizes of images that it can be trained on, with so many images in a micro-batch."""
        return Sizes()

    def guesses(self) -> Guesses:
        """By which a collapse is told (trainer/collapse.py); what is not named is not watched."""
        return Guesses()

    def amount(self, batch: Data) -> Tensor | None:
        """How much a micro-batch counts for: a scalar on its device, what its losses are means over, such as labelled
        pixels. A step weighs the micro-batches of all ranks by it, so that its losses are means over the global batch
        however that is split up. None: all alike, as for losses that are means over images."""
        return None

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that torch.compile takes: networks whose passes are marked for it (`trainer.networks.compiling`), others as
        a whole, if they are called with features and return features."""
        return [network for spec in self.optimisers for network in self.networks(spec.name).values()]

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

    def given(self) -> dict[str, str]:
        """SHA-256 of the weights of networks from elsewhere that it uses and does not train, by the option that names them. A
        checkpoint has the hashes and not the networks; a run goes on with the same ones alone."""
        return {}

    def measured_steps(self) -> int:
        """How many steps' batches `measure` is to see before the first step. The loader starts over after them."""
        return 0

    def measure(self, batches: Sequence[Data], context: StepContext) -> None:
        """Count a step's micro-batches into `memory`, before anything is trained. Called on all ranks with their own, without
        gradients; a continued run has it from its checkpoint."""

    def after_step(self, batches: Sequence[Data], context: StepContext) -> None:
        """Bring `memory` up to date, once all phases of a step have updated their networks. Called on all ranks with
        their micro-batches, without gradients."""


def frozen(module: nn.Module, *inputs: Any) -> Any:
    """module(*inputs) with its parameters held constant: gradients flow to the inputs only."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, inputs)
