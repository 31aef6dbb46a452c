"""Reading ahead and writing behind: threads decode what comes next and encode what is done, while the network works."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Read = TypeVar("Read")
Made = TypeVar("Made")
Written = TypeVar("Written")

THREADS = 4  # of each kind: Pillow lets go of the interpreter while it decodes and encodes


def stream(
    jobs: Iterable[Job],
    read: Callable[[Job], Read],
    make: Callable[[Job, Read], Made],
    write: Callable[[Job, Made], Written],
    *,
    ahead: int,
) -> Iterator[tuple[Job, Written]]:
    """Each job and what `write` gave, in order. `make` is called in this thread, the others in some others.

    ahead: jobs that are read before their turn, and that wait to be written. The first exception of any of the three ends it;
    what was made by then is written.
    """
    with ThreadPoolExecutor(THREADS, "read") as readers, ThreadPoolExecutor(THREADS, "write") as writers:
        writing = deque[tuple[Job, Future[Written]]]()
        try:
            for job, found in _in_order(readers, jobs, read, ahead):
                writing.append((job, writers.submit(write, job, make(job, found))))
                while writing and (len(writing) > ahead or writing[0][1].done()):
                    done, result = writing.popleft()
                    yield done, result.result()
            for done, result in writing:
                yield done, result.result()
        finally:
            readers.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Job], work: Callable[[Job], Read], ahead: int
) -> Iterator[tuple[Job, Read]]:
    waiting = deque[tuple[Job, Future[Read]]]()
    for job in jobs:
        waiting.append((job, pool.submit(work, job)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()
