"""Being told to stop, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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


def begin(code: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("code", [BUSY, NATIVE])
def test_the_grace_period_ends_what_does_not_end_itself(code: str, tmp_path: Path) -> None:
    process = begin(code, "1.5", cwd=tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "ended 1.5 s after the signal (--loop.grace) in the middle of its work; nothing is saved" in output


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = begin(BUSY, "300", cwd=tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "ended at once by a second signal" in output
    assert "Traceback" not in output


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
