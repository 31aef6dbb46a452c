"""Being told to stop, by a signal or by the end of whoever started this process."""

import ctypes
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_S = 0.5
LAUNCHER_WINDOW_S, WINDOW_S = 5.0, 1.0  # signals so soon after the first are copies of it, such as a launcher's
GRACE_S = 30.0
LAST_WORDS_S = 5.0  # for a disk or a screen that does not take what is said before a process is ended
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h

log = logging.getLogger(__name__)


class ToldToStop(BaseException):
    """Ends what the main thread does, where it may be interrupted."""

    @property
    def exit_code(self) -> int:
        return current().exit_code


class StopRequest:
    """Whether this process was told to stop, and whether that interrupts what it does: inside `interruptible`.

    number: of the signal, None until there is one. saved: words on what is kept, for the case that time runs out. at_end:
    called, with the exit code, before the process is ended by force.

    A thread keeps the time: `grace` seconds after the signal, or by a second one, the process ends whatever it is doing, also
    where Python hears no signals because it waits in native code.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.number: int | None = None
        self.saved = "nothing is saved"
        self.at_end: list[Callable[[int], object]] = []
        self._since = 0.0
        self._interrupts = False
        self._heard = False  # by the main thread
        self._over = False

    @property
    def told(self) -> bool:
        return self.number is not None

    def agree(self) -> None:
        """Another rank was told, and this one stops with it."""
        self.note(signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, else 143: 128 + the signal's number, where SIGUSR1 counts as SIGTERM."""
        return 128 + (signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM)

    @property
    def time_left(self) -> float:
        """Seconds; the whole grace period while nobody has asked."""
        return max(0.0, self._since + self.grace - time.monotonic()) if self.told else self.grace

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, whoever works has to ask whether it was told."""
        before, self._interrupts = self._interrupts, False
        try:
            yield
        finally:
            self._interrupts = before

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, ToldToStop is raised as soon as it is told, or at once if it was before."""
        before, self._interrupts = self._interrupts, True
        try:
            if self.told:
                raise ToldToStop
            yield
        finally:
            self._interrupts = before

    def settle(self) -> None:
        """What is under way is the way out, which only a second signal or the end of the grace period cuts short."""
        self._interrupts = False

    def over(self) -> None:
        """All is done, and a launcher's signals, which come when the first rank has ended, mean nothing any more."""
        self._interrupts, self._over = False, True

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of the signals. Only the first interrupts: its copies would cut short the saving that follows."""
        self.note(number)
        first, self._heard = not self._heard, True
        if first and self._interrupts:
            self._interrupts = False
            raise ToldToStop

    def note(self, number: int) -> None:
        """The first counts."""
        if self.number is None:
            self._since, self.number = time.monotonic(), number

    def _watch(self, heard: socket.socket) -> None:
        """The thread. heard: has a byte for each signal as soon as it comes."""
        window = LAUNCHER_WINDOW_S if STARTED_BY else WINDOW_S
        first: float | None = None  # when it was heard here, which on a busy machine may be long after it came
        while True:
            numbers: list[int] = []
            if select.select([heard], [], [], POLL_S)[0]:
                if not (received := heard.recv(64)):
                    heard.close()
                    return
                numbers = [number for number in received if number in STOP_SIGNALS]
            for number in numbers:
                self.note(number)
            if numbers and first is None:
                first = time.monotonic()
            elif numbers and first is not None and time.monotonic() - first > window and not self._over:
                self.end("ended at once by a second signal", self.exit_code)
            if self.told and self.time_left == 0:
                self.end(
                    f"ended {self.grace:g} s after the signal (--loop.grace) in the middle of its work", self.exit_code
                )
            if not self.told and is_orphan():
                os.kill(os.getpid(), signal.SIGTERM)

    def end(self, why: str, exit_code: int) -> None:
        """End this process now."""
        # One of the ranks is enough on the screen.
        level = logging.INFO if int(os.environ.get("RANK", 0)) else logging.ERROR

        def say(_: int) -> None:
            log.log(level, "%s; %s: the same command goes on from there", why, self.saved)

        end_process(exit_code, [say, *self.at_end])


def end_process(exit_code: int, actions: Sequence[Callable[[int], object]]) -> None:
    """End this process now, whatever its threads do. actions: called with the exit code before, for LAST_WORDS_S at most."""
    limit = threading.Timer(LAST_WORDS_S, os._exit, (exit_code,))
    limit.daemon = True
    limit.start()
    for action in actions:
        with suppress(Exception):
            action(exit_code)
    with suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
    os._exit(exit_code)


_current: StopRequest | None = None


def current() -> StopRequest:
    """The request that this process listens for; one that never comes where it does not listen."""
    return _current or StopRequest(GRACE_S)


@contextmanager
def listening(grace: float = GRACE_S) -> Iterator[StopRequest]:
    """Take note of SIGTERM, SIGUSR1 and Ctrl-C instead of dying of them, and of the launcher's end as of SIGTERM. Inside
    another such block it is that one's. (Python hears signals in the main thread only; elsewhere nothing is heard.)"""
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield current()
        return
    request = StopRequest(grace)
    heard, signalled = socket.socketpair()
    signalled.setblocking(False)
    wakeup = signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
    # What was to be ignored (nohup, the background jobs of a shell) stays ignored.
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    taken = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, request.hear)
    if STARTED_BY:
        _die_with_parent()
    thread = threading.Thread(target=request._watch, args=(heard,), name="signals", daemon=True)
    thread.start()
    _current = request
    try:
        yield request
    finally:
        _current = None
        for number in taken:
            # A rank that is done ends with its own exit code, though the launcher of one that was faster sends a signal. (A
            # handler that is not Python's own, None here, cannot be put back.)
            former = signal.SIG_IGN if request._over and STARTED_BY else before[number]
            signal.signal(number, signal.SIG_DFL if former is None else former)
        signal.set_wakeup_fd(wakeup)
        signalled.close()
        thread.join(POLL_S)


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent ends, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_orphan() -> bool:
    """Whether the launcher of this rank is gone."""
    return bool(STARTED_BY) and _launcher() != STARTED_BY


def _launcher() -> tuple[int, ...]:
    """Of a rank the process that started it and, for deepspeed, the one that started that: it ends alone when it is told to.
    Nothing for a process that no launcher started."""
    if "RANK" not in os.environ:
        return ()
    parent = os.getppid()
    try:
        process = psutil.Process(parent)
        return (parent, process.ppid()) if "deepspeed.launcher.launch" in process.cmdline() else (parent,)
    except psutil.Error:
        return (parent,)


STARTED_BY = _launcher()
"""As it was when this module was imported, which entry scripts do first: the imports of torch take seconds."""


def _forked() -> None:
    """A process that a rank forks is no rank, and its parent is no launcher."""
    global STARTED_BY
    STARTED_BY = ()


os.register_at_fork(after_in_child=_forked)
