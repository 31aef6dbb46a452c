"""Commands as processes of their own, some at once, which end with the one that started them."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.errors import Stopped

POLL_S = 0.2
# Runs a Python script so that, on Linux, it gets SIGTERM when its parent dies without a word (PR_SET_PDEATHSIG is 1).
BOUND = (
    "import os, sys\n"
    "if sys.platform == 'linux':\n"
    "    import ctypes\n"
    "    ctypes.CDLL(None).prctl(1, 15)\n"
    "if os.getppid() == int(sys.argv[1]):\n"
    "    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n"
)
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_all(
    commands: Mapping[str, Sequence[object]], logs: Path, parallel: int, each_poll: Callable[[], object] = lambda: None
) -> Generator[tuple[str, str | None]]:
    """Run Python scripts, each with its arguments and a name; yields the names as they end, with what went wrong or None.

    logs: the folder of their output, NAME.log each, which goes on where there is one. parallel: how many at once; they share
    the cores, unless OMP_NUM_THREADS gives each a number of threads. each_poll: called several times a second. A signal that
    ends this process is handed on as SIGTERM, on which a training saves a checkpoint, and raises Stopped once all have ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    waiting, running = list(commands), dict[str, subprocess.Popen[bytes]]()
    with _signals_raised():
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    name = waiting.pop(0)
                    process = _start(commands[name], logs / f"{name}.log", threads)
                    if process is None:
                        yield name, f"another process is at it and writes {logs / name}.log: wait for it, or end it"
                    else:
                        running[name] = process
                time.sleep(POLL_S)
                each_poll()
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    yield name, _why(logs / f"{name}.log") if code else None
        finally:
            _end(running.values())


def _start(command: Sequence[object], log: Path, threads: int) -> subprocess.Popen[bytes] | None:
    """None if a process that writes this log is still there: another command's, or one that ends since its own was killed."""
    with log.open("ab") as output:
        try:
            # The lock belongs to the open file, which the process inherits, so it ends with the process.
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            pass  # a file system without locks
        # In a session of its own, so that Ctrl-C reaches this process alone, which then asks for checkpoints.
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        return subprocess.Popen(
            bound(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def bound(command: Sequence[object]) -> list[str]:
    """The command line of a Python script with its arguments that gets SIGTERM when this process dies."""
    return [sys.executable, "-ISc", BOUND, str(os.getpid()), *map(str, command)]


def _why(log: Path) -> str:
    last = "".join(log.read_text(errors="replace").strip().splitlines()[-1:])
    return f"{last.removeprefix('error: ')} (see {log})"


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except BaseException:  # a second signal: at once, then
        for process in processes:
            process.kill()
        raise


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Signals that end a process raise Stopped here, except those that were to be ignored (nohup)."""

    def stop(number: int, _: Any) -> None:
        raise Stopped("stopped: the same command continues from here", 128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in END_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
