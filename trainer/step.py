"""One optimisation step of a two-phase game, on any engine, in the order of CUT's published step."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.engines import Engine
from trainer.methods.base import Batch, Losses, Method, StepContext


def train_step(method: Method[Any], engine: Engine, batches: Sequence[Batch], context: StepContext) -> Losses:
    """Run G, update D on its detached output, then update G and its heads against the new D.

    `batches` are this rank's micro-batches. With one, G runs once and both phases share its graph. With more, the
    graphs would not fit together, so G runs again for its own phase: the same numbers, a tenth more arithmetic.
    Returns this rank's mean of every named loss, on the device.
    """
    reported: list[Losses] = []

    def evaluate(loss: Callable[..., tuple[Tensor, Losses]], outputs: Any, batch: Batch) -> Tensor:
        value, named = loss(outputs, batch, context)
        reported.append(named)
        return value

    def run(batch: Batch) -> Any:
        with engine.autocast():
            return method(batch, context)

    shared = run(batches[0]) if len(batches) == 1 else None

    def losses(loss: Callable[..., tuple[Tensor, Losses]], with_graph: bool) -> Iterator[Callable[[], Tensor]]:
        for batch in batches:
            if shared is not None:
                outputs = shared
            else:
                with torch.set_grad_enabled(with_graph):
                    outputs = run(batch)
            yield partial(evaluate, loss, outputs, batch)

    engine.update("discriminator", losses(method.discriminator_loss, with_graph=False), len(batches))
    engine.update("generator", losses(method.generator_loss, with_graph=True), len(batches))
    return _mean(reported, len(batches))


def _mean(reported: Sequence[Losses], count: int) -> Losses:
    names = dict.fromkeys(name for named in reported for name in named)
    return {name: torch.stack([n[name] for n in reported if name in n]).sum() / count for name in names}
