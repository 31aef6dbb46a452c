"""A run folder has one writer, says how it is, and goes on with other numbers of ranks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import OUTAGE, UserError, exit_code_of
from launch.runs import lock as module
from launch.runs.folder import RunFolder, default_run_dir
from launch.runs.lock import RunLock, is_held
from launch.runs.resume import accumulation_on
from launch.runs.status import StatusFile
from trainer.optim import OptimConfig

HOLDS = """
import sys, time
from pathlib import Path
from launch.runs.lock import RunLock
lock = RunLock()
lock.take(Path(sys.argv[1]))
lock.sign()
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.3)


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.slow
def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    assert is_held(path)
    with pytest.raises(
        UserError, match=rf"is being trained by process {holder.pid} on \S+ since \d+-.*--run-dir"
    ) as refused:
        RunLock().take(path)
    assert exit_code_of(refused.value) == OUTAGE  # which passes, as where a file server has yet to learn of a death
    holder.kill()
    holder.wait()
    assert not is_held(path)
    lock = RunLock()
    lock.take(path)
    assert is_held(path)
    lock.release()
    assert not is_held(path)


def test_without_locks_a_new_sign_of_life_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    path, lock = tmp_path / "run.lock", RunLock()
    lock.take(path)
    lock.sign()
    assert is_held(path)
    with pytest.raises(UserError, match=f"by process {os.getpid()} on "):
        RunLock().take(path)
    long_ago = time.time() - 2 * module.LEASE_S
    os.utime(path, (long_ago, long_ago))
    assert not is_held(path)
    lock.release()


def test_default_names_do_not_collide() -> None:
    assert len({default_run_dir("cut") for _ in range(50)}) == 50


def test_a_status_that_a_probe_can_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "status").write_text("KILLED\n")
    assert folder.status() == "KILLED"  # of an earlier version
    lock = RunLock()
    lock.take(folder.lock_file)
    status = StatusFile(folder, 3, 10)
    status.progress(4)
    status.saved(4)
    facts = json.loads(folder.status_file.read_text())
    assert not (tmp_path / "status").exists()
    assert (facts["state"], facts["step"], facts["total"], facts["checkpoint"]) == ("RUNNING", 4, 10, 4)
    assert facts["exit_code"] is None and facts["pid"] == os.getpid() and time.time() - facts["progress"] < 60
    assert folder.status() == "RUNNING"
    lock.release()
    assert folder.status() == "KILLED"  # nobody trains it
    status.end(143)
    status.progress(5)
    facts = json.loads(folder.status_file.read_text())
    assert (facts["state"], facts["exit_code"], facts["step"]) == ("KILLED", 143, 4)


@pytest.mark.parametrize(
    ("code", "state"), [(0, "FINISHED"), (1, "FAILED"), (3, "FAILED"), (75, "KILLED"), (130, "KILLED")]
)
def test_states_by_exit_code(tmp_path: Path, code: int, state: str) -> None:
    folder = RunFolder(tmp_path)
    StatusFile(folder, 0, 10).end(code)
    assert folder.status() == state


@pytest.mark.parametrize(
    ("batch", "parts", "ranks", "expected"),
    [(8, 4, 4, 1), (8, 4, 2, 2), (8, 4, 1, 4), (8, 4, 8, 1), (8, 2, 8, 1), (12, 4, 3, 2), (8, None, 2, 1)],
)
def test_accumulation_adapts_to_the_number_of_ranks(batch: int, parts: int | None, ranks: int, expected: int) -> None:
    """Micro-batches become no larger than they were."""
    state = {"config": {"optim.accumulation": 1}} | ({"parts": parts} if parts else {})
    assert accumulation_on(ranks, OptimConfig(global_batch=batch), state, False) == expected
    assert accumulation_on(ranks, OptimConfig(global_batch=batch), state, True) == 1


def test_an_accumulation_that_is_asked_for_anew_holds() -> None:
    state = {"config": {"optim.accumulation": 1}, "parts": 4}
    assert accumulation_on(1, OptimConfig(global_batch=8, accumulation=2), state, False) == 2


def test_ranks_that_cannot_share_the_batch_are_refused_with_those_that_can() -> None:
    with pytest.raises(
        UserError, match="global batch of 6, which 4 ranks cannot .*continue it on one of 1, 2, 3, 6 ranks"
    ):
        accumulation_on(4, OptimConfig(global_batch=6), {"config": {}, "parts": 2}, False)
