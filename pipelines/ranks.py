"""Processes that share work on data: the engine of a job gives what is needed, and one process alone needs nothing."""

import typing
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from infra.errors import UserError

T = TypeVar("T")


class Ranks(Protocol):
    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""


class _Alone:
    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


ALONE = _Alone()


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What the first rank made of this, for all of them, which wait for it. Its UserError is raised on all."""
    result: T | UserError | None = None
    if ranks.rank == 0:
        try:
            result = work()
        except UserError as error:
            result = error
    result = ranks.broadcast(result)
    if isinstance(result, UserError):
        raise result
    return typing.cast(T, result)
