"""Every random draw of a training step as a pure function of (seed, step, stream, place in the global batch).

Nothing is taken from a generator that is kept between steps, so a step draws the same numbers on one rank or many,
with or without gradient accumulation, and after any restart: the step number is the whole random state.
Draws made on a GPU differ from those made on a CPU for the same counter (another generator), not from run to run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(device: torch.device | str, *counter: int | str) -> torch.Generator:
    """A generator at the start of the stream named by a counter such as (seed, step, "nce", 4)."""
    digest = hashlib.blake2b(repr(counter).encode(), digest_size=8).digest()
    # 63 bits: torch takes a signed 64-bit seed.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Stream:
    """The numbers of one named stream, from its start: each call draws on."""

    def __init__(self, device: torch.device | str, *counter: int | str) -> None:
        self._device, self._generator = device, generator(device, *counter)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, 1), of this shape."""
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """U[0, 1), of this shape."""
        return torch.rand(shape, generator=self._generator, device=self._device, dtype=dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 of range(high), of this shape."""
        return torch.randint(high, shape, generator=self._generator, device=self._device)

    def permutation(self, length: int) -> Tensor:
        """range(length) in a random order, int64."""
        return torch.randperm(length, generator=self._generator, device=self._device)

    def coin(self) -> bool:
        """A fair one."""
        return bool(self.uniform() < 0.5)


@dataclass(frozen=True)
class Draws:
    """The draws of one training step, as streams with names.

    A stream is for the whole global batch, or for one slot of it if the slot is the last part of its name: so what it
    draws depends neither on the ranks nor on micro-batches. Two things that draw must not share a name.
    """

    seed: int
    step: int

    def stream(self, *name: int | str, device: torch.device | str = "cpu") -> Stream:
        return Stream(device, self.seed, self.step, *name)

    def normal(self, slots: Sequence[int], shape: Sequence[int], *name: int | str, like: Tensor) -> Tensor:
        """N(0, 1), (slots, *shape), each slot's from its own stream of this name; dtype and device are those of `like`."""
        rows = [self.stream(*name, slot, device=like.device).normal(*shape) for slot in slots]
        return torch.stack(rows).to(like.dtype)

    def per_slot(self, slots: Tensor, *name: int | str, device: torch.device | str = "cpu") -> list[Stream]:
        """A stream for each slot (b,) of a micro-batch."""
        return [self.stream(*name, slot, device=device) for slot in slots.tolist()]
