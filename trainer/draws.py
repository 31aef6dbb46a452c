"""Every random draw of a training step as a pure function of (seed, step, stream, place in the global batch).

Nothing is taken from a generator that is kept between steps, so a step draws the same numbers on one rank or many,
with or without gradient accumulation, and after any restart: the step number is the whole random state.
Draws made on a GPU differ from those made on a CPU for the same counter (another generator), not from run to run.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def generator(device: torch.device | str, *counter: int | str) -> torch.Generator:
    """A generator at the start of the stream named by a counter such as (seed, step, "nce", 4)."""
    digest = hashlib.blake2b(repr(counter).encode(), digest_size=8).digest()
    # 63 bits: torch takes a signed 64-bit seed.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draw:
    """What is drawn from a stream: by one of torch's functions, of its arguments and a generator; count: the first so many."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    dtype: torch.dtype
    count: int | None = None

    def made(self, device: torch.device | str, generator: torch.Generator) -> Tensor:
        drawn = self.function(*self.arguments, generator=generator, device=device, dtype=self.dtype)
        return drawn if self.count is None else drawn[: self.count]


class Stream:
    """The numbers of one named stream, from its start: each call draws on."""

    def __init__(self, device: torch.device | str, *counter: int | str) -> None:
        self._device, self._generator = device, generator(device, *counter)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, 1), of this shape."""
        return self.take(Draw(torch.randn, (shape,), dtype))

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """U[0, 1), of this shape."""
        return self.take(Draw(torch.rand, (shape,), dtype))

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 of range(high), of this shape."""
        return self.take(Draw(torch.randint, (high, shape), torch.int64))

    def permutation(self, length: int, count: int | None = None) -> Tensor:
        """range(length) in a random order, int64; of that the first `count`, if they are all that is asked for."""
        return self.take(Draw(torch.randperm, (length,), torch.int64, count))

    def coin(self) -> bool:
        """A fair one."""
        return bool(self.uniform() < 0.5)

    def take(self, draw: Draw) -> Tensor:
        return draw.made(self._device, self._generator)

    def fill(self, draw: Draw, buffer: Tensor) -> None:
        """The same, written into a tensor of its shape and dtype, on any device."""
        if draw.count is None and buffer.device == torch.device(self._device):
            draw.function(*draw.arguments, generator=self._generator, out=buffer)
        else:
            buffer.copy_(self.take(draw), non_blocking=True)


@dataclass(frozen=True)
class Draws:
    """The draws of one training step, as streams with names.

    A stream is for the whole global batch, or for one slot of it if the slot is the last part of its name: so what it
    draws depends neither on the ranks nor on micro-batches. Two things that draw must not share a name. A stream that names no
    device draws on the CPU, so that its numbers are the same on every device; whoever computes with them brings them to its
    own (`to`, non_blocking): in a step that is replayed they are there already (trainer/static_step.py).

    What decides, on the host, what a step does is asked for by `coin` and `choice`, and is known before the step begins.
    """

    seed: int
    step: int

    def stream(self, *name: int | str, device: torch.device | str = "cpu") -> Stream:
        return Stream(device, self.seed, self.step, *name)

    def coin(self, *name: int | str) -> bool:
        """A fair one."""
        return self.stream(*name).coin()

    def choice(self, count: int, *name: int | str) -> int:
        """One of range(count)."""
        return int(self.stream(*name).integers(count))

    def normal(self, slots: Sequence[int], shape: Sequence[int], *name: int | str, like: Tensor) -> Tensor:
        """N(0, 1), (slots, *shape), each slot's from its own stream of this name; dtype and device are those of `like`."""
        rows = [self.stream(*name, slot, device=like.device).normal(*shape) for slot in slots]
        return torch.stack(rows).to(like.dtype)

    def per_slot(self, slots: Tensor, *name: int | str, device: torch.device | str = "cpu") -> list[Stream]:
        """A stream for each slot (b,) of a micro-batch."""
        return [self.stream(*name, slot, device=device) for slot in slots.tolist()]
