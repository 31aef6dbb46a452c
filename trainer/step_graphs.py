"""Whole training steps as CUDA graphs: what a step launches is recorded once for each kind of step, and replayed."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.engines import Engine
from trainer.methods.base import Losses, Method, StepContext
from trainer.static_step import StaticStep
from trainer.step import train_step

# Kinds of step; methods have up to about twenty: with and without late losses, mirrored or not, by random taps.
LIMIT = 32

log = logging.getLogger(__name__)

Run = Callable[[], Losses]


class Capture(Protocol):
    """Runs a step once, and gives its losses and what runs its operations again."""

    def __call__(self, run: Run, /) -> tuple[Losses, Run]: ...

    def warming(self) -> AbstractContextManager[None]:
        """Where a step runs that is captured the next time."""


class RunAnew:
    """In place of a capture, on a CPU: the same step, operation by operation."""

    def __call__(self, run: Run, /) -> tuple[Losses, Run]:
        return run(), run

    def warming(self) -> AbstractContextManager[None]:
        return nullcontext()


class CudaCapture:
    """By torch.cuda.graph. All graphs share one pool of memory: none needs what another one left there. Other threads, which
    decode images, may use the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, run: Run, /) -> tuple[Losses, Run]:
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # Around it the stream of now, to which torch does not go back where a capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            static = run()

        def replay() -> Losses:
            graph.replay()
            return {name: value.clone() for name, value in static.items()}

        return replay(), replay  # a capture alone computes nothing

    @contextmanager
    def warming(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def steps_of(method: Method[Any, Any], engine: Engine) -> Callable[[Sequence[Any], StepContext], Losses]:
    """What takes a training step: `train_step`, or where the engine is asked for graphs one that replays it."""
    return StepGraphs(method, engine).take if engine.config.graphs else partial(train_step, method, engine)


class StepGraphs:
    """Takes training steps, with the numbers of `train_step`.

    The first step of a kind (`StaticStep`) runs operation by operation, and shows what it draws and decides. In the second one
    all that it launches is captured, from the first forward pass to the last optimiser; from then on that is replayed. Where a
    capture fails, a warning says so, and all goes on without.
    """

    def __init__(self, method: Method[Any, Any], engine: Engine, capture: Capture | None = None) -> None:
        """capture: in place of the device's."""
        self._method, self._engine = method, engine
        self._capture = capture or (CudaCapture(engine.device) if engine.device.type == "cuda" else RunAnew())
        self._kinds: list[StaticStep] = []
        self._runs: dict[int, Run] = {}  # of a kind's place, once it is captured
        self._buffers: dict[Hashable, Tensor] = {}
        self._adds = True  # whether new kinds are captured

    def take(self, batches: Sequence[Any], context: StepContext) -> Losses:
        """See `train_step`. The losses are the caller's own."""
        for place, kind in enumerate(self._kinds):
            if kind.fits(batches, context):
                kind.fill(batches, context)
                return self._runs[place]() if place in self._runs else self._captured(place, batches, context)
        if self._adds and len(self._kinds) == LIMIT:
            self._adds = False
            log.warning("there are more than %d kinds of training step: the others are launched one operation at a time, which "
                        "is slower", LIMIT)  # fmt: skip
        if not self._adds:
            return self._eager(batches, context)
        kind = StaticStep(batches, context, self._engine.device, self._buffers)
        with self._capture.warming():
            losses = self._eager(batches, kind.noting)
        self._kinds.append(kind)
        return losses

    def _captured(self, place: int, batches: Sequence[Any], context: StepContext) -> Losses:
        """The second step of a kind, with which that is filled."""
        kind = self._kinds[place]
        try:
            losses, self._runs[place] = self._capture(lambda: self._eager(kind.batches, kind.filled))
        except RuntimeError as error:
            if isinstance(self._capture, RunAnew):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("a training step cannot be captured as a CUDA graph (%s): steps are launched one operation at a time, "
                        "which is slower; --engine.graphs false does not try", why)  # fmt: skip
            self._adds = False
            self._kinds.clear()
            self._runs.clear()
            return self._eager(batches, context)
        return losses

    def _eager(self, batches: Sequence[Any], context: StepContext) -> Losses:
        return train_step(self._method, self._engine, batches, context)
