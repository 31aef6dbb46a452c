"""What the loaders of all ranks give, as one process would see it."""

from collections.abc import Iterable
from itertools import islice

import torch

from pipelines.loader import Batch, Loader


def whole_batches(loaders: Iterable[Loader], steps: int) -> list[Batch]:
    """Per step, the global batch in the order of its slots. loaders: of all ranks, in their order; each is closed."""
    parts: list[list[Batch]] = [[] for _ in range(steps)]
    for loader in loaders:
        for step, micro_batches in enumerate(islice(loader, steps)):
            parts[step] += micro_batches
        loader.close()
    return [
        Batch(
            torch.cat([part.source for part in step]),
            torch.cat([part.target for part in step]),
            [key for part in step for key in part.source_keys],
            [key for part in step for key in part.target_keys],
            torch.cat([part.slots for part in step]),
        )
        for step in parts
    ]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.slots, b.slots) and torch.equal(a.source, b.source) and torch.equal(a.target, b.target)
        and (a.source_keys, a.target_keys) == (b.source_keys, b.target_keys)
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip
