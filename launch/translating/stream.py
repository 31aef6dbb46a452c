"""Reading ahead and writing behind: threads decode what comes next and encode what is done, while the network works."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Read = TypeVar("Read")
Made = TypeVar("Made")

THREADS = 4  # of each kind: Pillow lets go of the interpreter while it decodes and encodes
AHEAD = 4  # jobs that are read before their turn, or wait to be written


def stream(
    jobs: Iterable[Job],
    read: Callable[[Job], Read],
    make: Callable[[Job, Read], Made],
    write: Callable[[Job, Made], object],
) -> Iterator[Job]:
    """Each job once it is written, in order. `make` is called in this thread, the others in some others.

    The first exception of any of them ends it; what was made by then is written.
    """
    with ThreadPoolExecutor(THREADS, "read") as readers, ThreadPoolExecutor(THREADS, "write") as writers:
        writing = deque[tuple[Job, Future[object]]]()
        try:
            for job, found in _in_order(readers, jobs, read):
                writing.append((job, writers.submit(write, job, make(job, found))))
                while writing and (len(writing) > AHEAD or writing[0][1].done()):
                    done, result = writing.popleft()
                    result.result()
                    yield done
            while writing:
                done, result = writing.popleft()
                result.result()
                yield done
        finally:
            readers.shutdown(cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Job], work: Callable[[Job], Read]) -> Iterator[tuple[Job, Read]]:
    waiting = deque[tuple[Job, Future[Read]]]()
    for job in jobs:
        waiting.append((job, pool.submit(work, job)))
        if len(waiting) > AHEAD:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()
