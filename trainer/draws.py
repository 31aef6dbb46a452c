"""Every random draw of a training step as a pure function of (seed, step, stream, place in the global batch).

Nothing is taken from a generator that lives on between steps, so a step draws the same numbers on one rank or many,
with or without gradient accumulation, and after any restart: the step number is the whole random state.
Draws made on a GPU differ from those made on a CPU for the same counter (another generator), not from run to run.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(device: torch.device | str, *counter: int | str) -> torch.Generator:
    """A generator at the start of the stream named by a counter such as (seed, step, "nce", 4)."""
    digest = hashlib.blake2b(repr(counter).encode(), digest_size=8).digest()
    # 63 bits: torch takes a signed 64-bit seed.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The draws of one training step."""

    seed: int
    step: int

    def _generator(self, device: torch.device | str, *stream: int | str) -> torch.Generator:
        return generator(device, self.seed, self.step, *stream)

    def patch_ids(self, stream: str, tap: int, positions: int, count: int) -> Tensor:
        """(min(count, positions),) int64 on the CPU: distinct places in [0, positions), shared by the whole batch."""
        return torch.randperm(positions, generator=self._generator("cpu", stream, "ids", tap))[:count]

    def coin(self, stream: str) -> bool:
        """One fair coin for the whole global batch."""
        return bool(torch.rand((), generator=self._generator("cpu", stream, "coin")) < 0.5)

    def choice(self, stream: str, count: int) -> int:
        """One of range(count), for the whole global batch."""
        return int(torch.randint(count, (), generator=self._generator("cpu", stream, "choice")))

    def noise(self, tap: int, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The raw draws of tau_k for a batch of features `like` (B, C, H, W), one stream per slot of the global batch.

        Returns normal (B, C, H, W) ~ N(0, 1) and uniform (B, 1, H, W) ~ U[0, 1), float32 (float64 for float64
        features) on the device of `like`.
        """
        _, channels, height, width = like.shape
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        normals, uniforms = [], []
        for slot in slots.tolist():
            stream = self._generator(like.device, "tau", tap, slot)
            normals.append(torch.randn(channels, height, width, generator=stream, device=like.device, dtype=dtype))
            uniforms.append(torch.rand(1, height, width, generator=stream, device=like.device, dtype=dtype))
        return torch.stack(normals), torch.stack(uniforms)

    def buffer(self, slot: int, capacity: int) -> tuple[float, int]:
        """The draws of the image buffer for one slot: U[0, 1) and a place in [0, capacity)."""
        stream = self._generator("cpu", "buffer", slot)
        return float(torch.rand((), generator=stream)), int(torch.randint(capacity, (), generator=stream))
