"""An iterator that runs in a thread, ahead of who consumes it."""

import atexit
import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Iterator[T], Generic[T]):
    """Runs an endless iterator in a thread, up to `depth` items ahead. Its exception reaches the consumer."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[T | Exception] = queue.Queue(depth)
        stopped = threading.Event()
        thread = threading.Thread(target=_run_ahead, args=(items, self._ready, stopped), name="decode", daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _stop_ahead, thread, self._ready, stopped)
        # No thread may be left inside native code at the interpreter's exit. Finalizers run there at a time of their own;
        # what is registered now runs before DALI, registered when it was imported, shuts down.
        self._stop.atexit = False
        atexit.register(self._stop)

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stop()
        atexit.unregister(self._stop)


def _run_ahead(items: Iterator[T], ready: "queue.Queue[T | Exception]", stopped: threading.Event) -> None:
    try:
        for item in items:
            ready.put(item)
            if stopped.is_set():
                return
    except Exception as error:
        ready.put(error)


def _stop_ahead(thread: threading.Thread, ready: "queue.Queue[T | Exception]", stopped: threading.Event) -> None:
    stopped.set()
    while not ready.empty():  # lets a waiting put through; there is room for the one after it
        ready.get()
    # Not for long: a shard that does not arrive may keep the thread waiting, while there is a state to save. It is a daemon.
    thread.join(timeout=2)
    with suppress(queue.Full):
        ready.put_nowait(StopIteration())  # lets a waiting get through
