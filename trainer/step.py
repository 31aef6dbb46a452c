"""One optimisation step of a method, phase after phase, on any engine."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.engines import Engine
from trainer.methods.base import Losses, Method, Phase, StepContext

NORM = "norm/"  # how the names of the gradients' norms begin


def train_step(method: Method[Any, Any], engine: Engine, batches: Sequence[Any], context: StepContext) -> Losses:
    """Update the phases that this step has, one after the other.

    `batches` are this rank's micro-batches. With one, each forward pass runs once and all its phases share its graph.
    With more, the graphs would not fit together. Then a pass runs anew for each phase up to the one that differentiates
    it, and later phases take its outputs as that phase saw them: the same numbers, and for CUT a tenth more arithmetic.
    Returns this rank's mean of every named loss, and as norm/PHASE the L2 norm of each phase's gradient (the same on all
    ranks; infinite where fp16 overflowed), on the device. Where the method gives its batches an `amount`, both what is
    minimised and what is returned count with it: their mean over ranks is that of the global batch.
    """
    reported: list[Losses] = []
    weights = _weights(method, engine, batches)
    phases = [phase for phase in method.phases if phase.runs_in(context)]

    def run(name: str, batch: Any) -> Any:
        with engine.autocast():
            return method(batch, context, name)

    def evaluate(phase: Phase, outputs: Any, batch: Any, weight: Tensor | None) -> Tensor:
        value, named = method.loss(phase.name, outputs, batch, context)
        if weight is not None:
            value = value * weight.to(value.dtype)
            named = {name: loss * weight.to(loss.dtype) for name, loss in named.items()}
        reported.append(named)
        return value

    passes = {
        name: _ForwardPass(partial(run, name), batches, [phase for phase in phases if phase.forward == name])
        for name in dict.fromkeys(phase.forward for phase in phases)
    }

    def losses(phase: Phase) -> Iterator[Callable[[], Tensor]]:
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            yield partial(evaluate, phase, passes[phase.forward].outputs(index, phase), batch, weight)

    norms = {
        NORM + phase.name: engine.update(phase.optimiser, losses(phase), len(batches), phase.moves) for phase in phases
    }
    with torch.no_grad(), engine.autocast():
        method.after_step(batches, context)
    return {**_mean(reported, len(batches)), **norms}


class _ForwardPass:
    """The outputs of one forward pass for each micro-batch, run when a phase first needs them. phases: those that do."""

    def __init__(self, run: Callable[[Any], Any], batches: Sequence[Any], phases: Sequence[Phase]) -> None:
        self._run, self._batches, self._phases = run, batches, phases
        self._kept: dict[int, Any] = {}

    def outputs(self, index: int, phase: Phase) -> Any:
        if index in self._kept:
            return self._kept[index]
        alone = len(self._batches) == 1
        with torch.set_grad_enabled(phase.differentiates or (alone and any(p.differentiates for p in self._phases))):
            outputs = self._run(self._batches[index])
        if alone:
            self._kept[index] = outputs
        elif phase.differentiates and phase is not self._phases[-1]:
            self._kept[index] = detached(outputs)
        return outputs


def detached(outputs: Any) -> Any:
    """The same tensors without their graph: of a tensor, a list of them, or a dataclass of both."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    if isinstance(outputs, list | tuple):
        return type(outputs)(map(detached, outputs))
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        fields = {field.name: detached(getattr(outputs, field.name)) for field in dataclasses.fields(outputs)}
        return dataclasses.replace(outputs, **fields)
    return outputs


def _weights(method: Method[Any, Any], engine: Engine, batches: Sequence[Any]) -> Sequence[Tensor | None]:
    """Of each micro-batch its amount as a multiple of the mean over all micro-batches of all ranks, float64; 0 where there
    is none anywhere."""
    amounts = [amount for batch in batches if (amount := method.amount(batch)) is not None]
    if not amounts:
        return [None] * len(batches)
    held = torch.stack(amounts).double()  # counts of pixels, to the last one
    mean = engine.mean(held.mean())
    return list(held / mean.clamp(min=torch.finfo(mean.dtype).tiny))


def _mean(reported: Sequence[Losses], count: int) -> Losses:
    names = dict.fromkeys(name for named in reported for name in named)
    return {name: torch.stack([n[name] for n in reported if name in n]).sum() / count for name in names}
