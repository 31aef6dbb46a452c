"""Steps of one kind, which read everything that differs between them from tensors that stay where they are.

Where a step's operations depend on nothing else, those of one step, recorded with their addresses, are the next one's as well:
what a CUDA graph asks for (trainer/step_graphs.py).
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.draws import Draw, Draws, Stream
from trainer.methods.base import StepContext

SLOTS = "slots"  # of a batch: on the host, and the same in all steps of a kind

Name = tuple[int | str, ...]


@dataclass(frozen=True)
class _Taken:
    """A stream that a step took, by its name and the device that it draws on, with what it gave, in order."""

    name: Name
    device: str
    draws: list[Draw] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)  # on the step's device


@dataclass
class _Notes:
    """What a step asked for, in order. answers: by the name of a question to `StepContext` or `Draws` and its arguments.
    numbers: functions of the progress, with their tensors."""

    device: torch.device
    shared: dict[Hashable, Tensor]  # buffers of other kinds of step, too
    answers: dict[tuple[str, tuple[Any, ...]], Any] = field(default_factory=dict)
    streams: list[_Taken] = field(default_factory=list)
    numbers: list[tuple[Callable[[float], float], Tensor]] = field(default_factory=list)

    def buffer(self, key: Hashable, drawn: Tensor) -> Tensor:
        if key not in self.shared:
            self.shared[key] = torch.empty_like(drawn, device=self.device)
        return self.shared[key]


class _NotedStream(Stream):
    def __init__(self, given: Stream, taken: _Taken, notes: _Notes) -> None:
        self._given, self._taken, self._notes = given, taken, notes

    def take(self, draw: Draw) -> Tensor:
        drawn, taken = self._given.take(draw), self._taken
        taken.draws.append(draw)
        taken.buffers.append(self._notes.buffer((taken.name, taken.device, *taken.draws), drawn))
        return drawn


@dataclass(frozen=True)
class _NotedDraws(Draws):
    """The draws of a step, which notes them."""

    given: Draws = field(kw_only=True)
    notes: _Notes = field(kw_only=True)

    def stream(self, *name: int | str, device: torch.device | str = "cpu") -> Stream:
        taken = _Taken(name, str(device))
        self.notes.streams.append(taken)
        return _NotedStream(self.given.stream(*name, device=device), taken, self.notes)

    def coin(self, *name: int | str) -> bool:
        return self.notes.answers.setdefault(("coin", name), self.given.coin(*name))

    def choice(self, count: int, *name: int | str) -> int:
        return self.notes.answers.setdefault(("choice", (count, *name)), self.given.choice(count, *name))


@dataclass(frozen=True)
class _NotedContext(StepContext):
    notes: _Notes = field(kw_only=True)

    def begun(self, start: float) -> bool:
        return self.notes.answers.setdefault(("begun", (start,)), super().begun(start))

    def turn(self, every: int) -> int:
        return self.notes.answers.setdefault(("turn", (every,)), super().turn(every))

    def number(self, of_progress: Callable[[float], float]) -> float | Tensor:
        tensor = torch.zeros((), dtype=torch.float64, device=self.notes.device)
        self.notes.numbers.append((of_progress, tensor))
        return super().number(of_progress)


class _FilledStream(Stream):
    def __init__(self, taken: _Taken) -> None:
        self._given = zip(taken.draws, taken.buffers, strict=True)

    def take(self, draw: Draw) -> Tensor:
        noted, buffer = next(self._given, (None, None))
        if buffer is None or draw != noted:
            raise RuntimeError(f"a step of a kind that was seen before draws otherwise: {draw} in place of {noted}")
        return buffer


@dataclass(frozen=True)
class _FilledDraws(Draws):
    """Draws of the same kind of step, from its buffers."""

    notes: _Notes = field(kw_only=True)
    streams: Iterator[_Taken] = field(kw_only=True)

    def stream(self, *name: int | str, device: torch.device | str = "cpu") -> Stream:
        taken = next(self.streams, None)
        if taken is None or (taken.name, taken.device) != (name, str(device)):
            raise RuntimeError(f"a step of a kind that was seen before draws from {name}, which it did not then")
        return _FilledStream(taken)

    def coin(self, *name: int | str) -> bool:
        return bool(self.notes.answers["coin", name])

    def choice(self, count: int, *name: int | str) -> int:
        return int(self.notes.answers["choice", (count, *name)])


@dataclass(frozen=True)
class _FilledContext(StepContext):
    notes: _Notes = field(kw_only=True)
    numbers: Iterator[tuple[Callable[[float], float], Tensor]] = field(kw_only=True)

    def begun(self, start: float) -> bool:
        return bool(self.notes.answers["begun", (start,)])

    def turn(self, every: int) -> int:
        return int(self.notes.answers["turn", (every,)])

    def number(self, of_progress: Callable[[float], float]) -> float | Tensor:
        return next(self.numbers)[1]


class StaticStep:
    """A kind of step: steps with batches of the same shapes and slots, that get the same answers to the same questions.

    To be run first with the batches and the context that it is made of, by `noting`; from then on with its own `batches` and
    `filled` context, after `fill`.
    """

    def __init__(
        self, batches: Sequence[Any], context: StepContext, device: torch.device, shared: dict[Hashable, Tensor]
    ) -> None:
        """shared: the buffers of all kinds of step, to which its own are added."""
        self._context, self._shapes = context, _shapes_of(batches)
        self._notes = _Notes(device, shared)
        self.batches = [_copied(batch) for batch in batches]

    @property
    def noting(self) -> StepContext:
        given = self._context
        draws = _NotedDraws(given.draws.seed, given.draws.step, given=given.draws, notes=self._notes)
        return _NotedContext(draws, given.progress, given.all_ranks, notes=self._notes)

    @property
    def filled(self) -> StepContext:
        """For one run."""
        given, notes = self._context, self._notes
        draws = _FilledDraws(given.draws.seed, given.draws.step, notes=notes, streams=iter(notes.streams))
        return _FilledContext(draws, given.progress, given.all_ranks, notes=notes, numbers=iter(notes.numbers))

    def fits(self, batches: Sequence[Any], context: StepContext) -> bool:
        """Whether a step is of this kind."""
        if _shapes_of(batches) != self._shapes:
            return False
        asked = {"coin": context.draws, "choice": context.draws}
        return all(
            getattr(asked.get(question, context), question)(*arguments) == answer
            for (question, arguments), answer in self._notes.answers.items()
        )

    def fill(self, batches: Sequence[Any], context: StepContext) -> None:
        """Write what is a step's own into the tensors that this kind of step reads."""
        for given, own in zip(batches, self.batches, strict=True):
            for name, value in _tensors(given).items():
                getattr(own, name).copy_(value, non_blocking=True)
        for of_progress, tensor in self._notes.numbers:
            tensor.fill_(of_progress(context.progress))
        filled: set[int] = set()
        for taken in self._notes.streams:
            if not filled.issuperset(map(id, taken.buffers)):  # a stream may be taken several times, from its start
                stream = context.draws.stream(*taken.name, device=taken.device)
                for draw, buffer in zip(taken.draws, taken.buffers, strict=True):
                    stream.fill(draw, buffer)
                filled |= set(map(id, taken.buffers))


def _tensors(batch: Any) -> dict[str, Tensor]:
    """Those of a micro-batch that are copied for each step."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor) and name != SLOTS}


def _copied(batch: Any) -> Any:
    """A micro-batch with tensors of its own."""
    own = copy.copy(batch)
    vars(own).update({name: value.clone() for name, value in _tensors(batch).items()})
    return own


def _shapes_of(batches: Sequence[Any]) -> list[Any]:
    return [
        (batch.slots.tolist(), {name: (value.shape, value.dtype) for name, value in _tensors(batch).items()})
        for batch in batches
    ]
