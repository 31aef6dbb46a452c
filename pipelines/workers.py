"""Work spread over processes, of this machine or of a Ray cluster."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from infra.errors import UserError
from infra.ray_cluster import connected
from infra.ray_work import deal


def check_workers(workers: int) -> None:
    if workers < 1:
        raise UserError(f"{workers} workers are impossible: give 1 or more")


@contextmanager
def parallel(workers: int, preload: Sequence[str], remedy: str) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over that many processes, results in order; the first error ends it. One worker is this process itself.

    preload: modules that all workers need, imported once. remedy: what to do where a worker is killed for want of memory.
    """
    check_workers(workers)
    if workers == 1:
        yield map
        return
    # A plain fork would copy the locks of the caller's threads. The server forks workers that have imported all they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            yield pool.map
    except BrokenProcessPool as error:
        raise UserError(f"a worker process was killed, perhaps for want of memory: {remedy}") from error


@contextmanager
def on_cluster(address: str, use_gpus: bool = False, together: int = 1) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over the machines of a Ray cluster, results in order; see `deal`. Errors: see `connected`."""
    with connected(address, lost="the same command goes on") as machines:

        def run(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
            return deal(work, list(jobs), machines, use_gpus=use_gpus, together=together)

        yield run


def _end_with_parent() -> None:
    """A worker whose parent is killed would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
