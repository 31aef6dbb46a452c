"""One optimisation step of a method, phase after phase, on any engine."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.engines import Engine
from trainer.methods.base import Losses, Method, StepContext


def train_step(method: Method[Any, Any], engine: Engine, batches: Sequence[Any], context: StepContext) -> Losses:
    """Run the method forward and update its phases one after the other: D on G's detached output, then G against the
    new D; or a segmenter alone.

    `batches` are this rank's micro-batches. With one, `forward` runs once and all phases share its graph. With more,
    the graphs would not fit together, so it runs again for each phase: the same numbers, and for CUT a tenth more
    arithmetic. Returns this rank's mean of every named loss, on the device. Where the method gives its batches an
    `amount`, both what is minimised and what is returned count with it: their mean over ranks is that of the global batch.
    """
    engine.begin_step()
    reported: list[Losses] = []
    weights = _weights(method, engine, batches)

    def evaluate(phase: str, outputs: Any, batch: Any, weight: Tensor | None) -> Tensor:
        value, named = method.loss(phase, outputs, batch, context)
        if weight is not None:
            value = value * weight.to(value.dtype)
            named = {name: loss * weight.to(loss.dtype) for name, loss in named.items()}
        reported.append(named)
        return value

    def run(batch: Any) -> Any:
        with engine.autocast():
            return method(batch, context)

    shared = run(batches[0]) if len(batches) == 1 else None

    def losses(phase: str) -> Iterator[Callable[[], Tensor]]:
        for batch, weight in zip(batches, weights, strict=True):
            if shared is not None:
                outputs = shared
            else:
                with torch.set_grad_enabled(phase == method.phases[-1]):
                    outputs = run(batch)
            yield partial(evaluate, phase, outputs, batch, weight)

    for phase in method.phases:
        engine.update(phase, losses(phase), len(batches))
    with torch.no_grad(), engine.autocast():
        method.after_step(batches, context)
    return _mean(reported, len(batches))


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
