"""The whole state of a training run as plain tensors and JSON, free of the engine and the number of ranks.

There is no random state to keep: every draw is a function of the seed and the step (trainer/draws.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.average import MovingAverage
from trainer.checkpoint import Checkpoint
from trainer.engines import Engine
from trainer.methods.base import Method

AVERAGED = "{}_ema"  # of a network of the product: generator_ema
OPTIMISER = "optimiser"
SLOTS = "slots"


@dataclass(frozen=True)
class TrainingState:
    """After `step` steps: tensors by file and name, and the loss scalers of all optimisers. owed: whether the evaluation that is
    due after this step has given way to a signal, and is still to be made."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    scalers: dict[str, Any]
    owed: bool = False


def collect_state(method: Method[Any, Any], engine: Engine, averaged: MovingAverage | None, step: int) -> TrainingState:
    """All ranks must call it; only rank 0's result is whole (it alone gets the other ranks' slots), and a copy in the host's
    memory, which the steps that follow do not change. Batch norm's running statistics are rank 0's: each rank has those of
    its own images, and no loss depends on them."""
    optimisers = [spec.name for spec in method.optimisers]
    tensors = {name: net.state_dict() for each in optimisers for name, net in method.networks(each).items()}
    tensors |= {name: module.state_dict() for name, module in method.memory().items()}
    tensors[OPTIMISER] = {
        f"{each}/{parameter}/{key}": value
        for each in optimisers
        for parameter, values in engine.optimiser_state(each).items()
        for key, value in values.items()
    }
    if averaged is not None:
        for name, network in averaged.module.named_children():
            tensors[AVERAGED.format(name)] = network.state_dict()
    slots = engine.gather({name: value.cpu() for name, value in method.slot_state().items()})
    tensors[SLOTS] = {name: value for rank in slots or () for name, value in rank.items()}
    return TrainingState(step, _copies(tensors) if engine.rank == 0 else {}, engine.scaler_state())


def _copies(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """From a GPU all are on their way at once, into pinned memory, and the host waits once."""
    copies = {group: {name: _copy(tensor.detach()) for name, tensor in held.items()} for group, held in groups.items()}
    for device in {t.device for held in groups.values() for t in held.values() if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def restore_state(
    method: Method[Any, Any], engine: Engine, averaged: MovingAverage | None, checkpoint: Checkpoint
) -> None:
    """Put a checkpoint's state in place on this rank. UserError if it is of another architecture or damaged."""
    optimisers = [spec.name for spec in method.optimisers]
    for each in optimisers:
        for name, network in method.networks(each).items():
            checkpoint.load_into(network, name)
    for name, module in method.memory().items():
        checkpoint.load_into(module, name)
    engine.weights_loaded()
    _restore_optimisers(engine, optimisers, checkpoint.tensors(OPTIMISER))
    if averaged is not None:
        for name, network in averaged.module.named_children():
            checkpoint.load_into(network, AVERAGED.format(name))
        averaged.started = True
    method.load_slot_state(checkpoint.tensors(SLOTS))
    engine.load_scaler_state(checkpoint.state["scalers"])


def _restore_optimisers(engine: Engine, optimisers: Sequence[str], flat: dict[str, Tensor]) -> None:
    nested: dict[str, dict[str, dict[str, Tensor]]] = {each: {} for each in optimisers}
    for name, value in flat.items():
        each, parameter, key = name.split("/")
        nested[each].setdefault(parameter, {})[key] = value
    for each in optimisers:
        engine.load_optimiser_state(each, nested[each])
