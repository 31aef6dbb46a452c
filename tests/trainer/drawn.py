"""What a method draws in a step, by the names of its streams."""

import torch
from torch import Tensor

from trainer.draws import Draws


def patch_ids(draws: Draws, stream: str, tap: int, positions: int, count: int) -> Tensor:
    """Places of patches."""
    return draws.stream(stream, "ids", tap).permutation(positions)[:count]


def coin(draws: Draws, stream: str) -> bool:
    return draws.stream(stream, "coin").coin()


def choice(draws: Draws, stream: str, count: int) -> int:
    return int(draws.stream(stream, "choice").integers(count))


def noise(draws: Draws, tap: int, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The raw draws of L_robust's perturbation."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    streams = draws.per_slot(slots, "tau", tap)
    normals, uniforms = zip(
        *(
            (each.normal(*like.shape[1:], dtype=dtype), each.uniform(1, *like.shape[2:], dtype=dtype))
            for each in streams
        ),
        strict=True,
    )
    return torch.stack(normals), torch.stack(uniforms)


def buffer(draws: Draws, slot: int, capacity: int) -> tuple[float, int]:
    """The draws of the image buffer."""
    stream = draws.stream("buffer", slot)
    return float(stream.uniform()), int(stream.integers(capacity))
