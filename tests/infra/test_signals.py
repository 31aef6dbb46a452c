"""Being told to stop, in processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from infra.signals import StopRequest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]

BUSY = """
import sys, time
from infra.signals import listening
with listening(float(sys.argv[1])) as stop, stop.deferred():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""

NATIVE = """
import ctypes, sys
from infra.signals import listening
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with listening(float(sys.argv[1])) as stop, stop.deferred():
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, and no handler can run
"""

LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "60"], env=os.environ | {"RANK": "0"})
child.wait()
"""

SAVES = """
import time
from infra.signals import listening
with listening() as stop, stop.deferred():
    print("ready", flush=True)
    while not stop.told:
        time.sleep(0.05)
    open("saved", "w").close()
"""


WAY_OUT = """
import time
from infra.signals import listening
with listening() as stop, stop.interruptible():
    with stop.deferred():
        print("ready", flush=True)
        while not stop.told:
            time.sleep(0.05)
    print("told", flush=True)
    time.sleep(1)  # the state is written by a thread, which the main thread waits for
    open("saved", "w").close()
"""

DONE = """
import os, signal
from infra.signals import listening
with listening() as stop, stop.interruptible():
    print("ready", flush=True)
    stop.over()
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
os._exit(75)
"""


def begin(code: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("code", [BUSY, NATIVE])
def test_the_grace_period_ends_what_does_not_end_itself(code: str, tmp_path: Path) -> None:
    process = begin(code, "3", cwd=tmp_path)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - told > 2.9
    assert "ended 3 s after the signal (--loop.grace) in the middle of its work; nothing is saved" in output


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = begin(BUSY, "300", cwd=tmp_path)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.5)
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "ended at once by a second signal" in output
    assert "Traceback" not in output


def test_copies_of_a_signal_leave_the_way_out_alone(tmp_path: Path) -> None:
    """As where a cluster tells all processes of a step, and torchrun its ranks once more."""
    process = begin(WAY_OUT, cwd=tmp_path, RANK="0")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout and process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "saved").exists()


def test_one_signal_is_not_two_however_late_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread may have noted it long before the thread that listens gets a turn."""
    request, ends = StopRequest(60), list[str]()
    monkeypatch.setattr(request, "end", lambda why, exit_code: ends.append(why))
    request.note(signal.SIGTERM)
    monkeypatch.setattr(request, "_since", time.monotonic() - 10)
    heard, signalled = socket.socketpair()
    signalled.send(bytes([signal.SIGTERM]))
    signalled.close()
    request._watch(heard)
    assert not ends


def test_a_rank_that_is_done_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    """Its launcher sends a signal as soon as another rank has ended."""
    process = begin(DONE, cwd=tmp_path, RANK="0")
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for its background jobs
    try:
        process = begin(SAVES, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert (tmp_path / "saved").exists()


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    launcher = begin(LAUNCHER, SAVES, cwd=tmp_path)
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    rank.wait(30)
    assert (tmp_path / "saved").exists()
