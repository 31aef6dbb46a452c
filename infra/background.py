"""Work that the caller does not wait for."""

import threading
from collections.abc import Callable
from types import TracebackType


class Background:
    """One piece of work at a time, in a thread. What goes wrong in it is raised by the next `start` or `wait`.

    A context manager: at its end it waits, also where an exception ends it, so that nothing stays half done.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; waits for the work before it."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="background", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was started is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
