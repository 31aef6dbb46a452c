"""Checkpoints of a whole training: written while it goes on, and where the folder or the mirror takes none for a while."""

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.config import Config

from infra.errors import OUTAGE, Stopped
from infra.json_lines import read_records
from infra.storage import LocalStorage, S3Storage
from launch.runs import training, translator
from launch.runs.config import parse_arguments
from launch.runs.folder import RunFolder
from tests.conftest import S3Server
from tests.faulty_s3 import FaultyS3
from tests.launch.test_bad_input import SMALL
from tests.pipelines.shardmaker import write_root
from trainer import checkpointer
from trainer.checkpointer import Checkpointer
from trainer.loop import Trainer

pytestmark = pytest.mark.slow

STEPS, EVERY = 9, 3


@pytest.fixture
def folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """That of the run which `train` makes."""
    write_root(LocalStorage(place / "data"))
    monkeypatch.setattr(training, "Follower", lambda folder: SimpleNamespace(finish=lambda: None))
    monkeypatch.setattr(translator, "save_pyfunc_model", lambda *_: None)
    return RunFolder(place / "run")


def train(*options: str) -> None:
    own = [*options, "--max-steps", str(STEPS), "--loop.checkpoint-every", str(EVERY), "--loop.report-every", "1"]
    translator.train(parse_arguments([*SMALL, "--data", "data", "--run-dir", "run", *own]))


def each_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Have it called with the number of each step as that begins."""
    do = Trainer._step

    def step(self: Trainer, step: int, batches: Any) -> None:
        action(step + 1)
        do(self, step, batches)

    monkeypatch.setattr(Trainer, "_step", step)


def until_it_says(folder: RunFolder, words: str) -> None:
    """The thread that writes checkpoints says it in the log."""
    deadline = time.monotonic() + 60
    while words not in folder.log_file.read_text():
        assert time.monotonic() < deadline, folder.log_file.read_text()
        time.sleep(0.01)


def saved(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.glob("step_*"))


def in_mirror(mirror: S3Storage) -> set[str]:
    return {name.split("/")[0] for name in mirror.list("step_")}


def test_training_goes_on_while_a_checkpoint_is_written(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one is held up until the second step after it begins. What the loop itself waits is less than a step."""
    write, begun, met = checkpointer.write_checkpoint, {step: threading.Event() for step in range(1, STEPS + 1)}, []

    def write_late(folder: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        if state["step"] < STEPS:
            met.append(begun[state["step"] + 2].wait(60))
        write(folder, tensors, state)

    monkeypatch.setattr(checkpointer, "write_checkpoint", write_late)
    each_step(monkeypatch, lambda step: begun[step].set())
    train()
    assert met == [True, True] and saved(folder) == ["step_6", "step_9"]
    rows = read_records(folder.metrics_file)
    pauses = [row["save/pause"] for row in rows if "save/pause" in row]
    steps = [after["time"] - before["time"] for before, after in pairwise(rows)]
    # The shortest, since others may want the cores.
    assert len(pauses) == 2 and min(pauses) < statistics.median(steps)


@pytest.fixture
def own_disk(folder: RunFolder) -> Iterator[Callable[[str], None]]:
    """The checkpoints lie on a file system of their own, which is mounted "ro" or "rw" when this is called."""
    folder.checkpoints.mkdir(parents=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(folder.checkpoints)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "tmpfs")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a file system")
    yield lambda kind: mount("-o", f"remount,{kind}")
    subprocess.run(["umount", str(folder.checkpoints)], check=True)


def test_a_folder_that_is_read_only_at_a_checkpoint_costs_that_one(
    folder: RunFolder, own_disk: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(step: int) -> None:
        if step == 2:
            own_disk("ro")
        if step == 5:
            until_it_says(folder, "the checkpoint of step 3 cannot be written ([Errno 30] Read-only file system")
            own_disk("rw")

    each_step(monkeypatch, change)
    train()
    assert saved(folder) == ["step_6", "step_9"]
    assert [row["step"] for row in read_records(folder.metrics_file)] == list(range(1, STEPS + 1))
    assert folder.status() == "FINISHED"


def test_a_folder_that_stays_read_only_is_an_outage_at_the_end(
    folder: RunFolder, own_disk: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved before is there, and the same command goes on from it."""

    def change(step: int) -> None:
        if step == 5:
            until_it_says(folder, "saved run/checkpoints/step_3")
            own_disk("ro")

    with monkeypatch.context() as patch:
        patch.setattr(training, "PATIENCE_S", 0.5)
        patch.setattr(checkpointer, "WAIT_S", (0.1, 0.1))
        each_step(patch, change)
        with pytest.raises(Stopped, match=r"could not be written .*Read-only.* goes on from step_3$") as stop:
            train()
    assert stop.value.exit_code == OUTAGE and saved(folder) == ["step_3"] and folder.status() == "KILLED"
    own_disk("rw")
    train()
    assert saved(folder) == ["step_6", "step_9"] and folder.status() == "FINISHED"


def test_a_mirror_that_dies_gets_what_it_lacks_from_the_same_command(
    folder: RunFolder, s3_server: S3Server, faulty_server: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on to its end, and the exit code says that the last checkpoint is here alone."""
    mirror = S3Storage(s3_server.make_bucket(), "run")
    monkeypatch.setattr(S3Storage, "_CONFIG", S3Storage._CONFIG.merge(Config(retries={"total_max_attempts": 1})))

    def die(step: int) -> None:
        if step == 5:
            until_it_says(folder, "saved run/checkpoints/step_3")
            faulty_server.faults = lambda request: "reset"

    with monkeypatch.context() as patch:
        patch.setattr(training, "PATIENCE_S", 0.5)
        patch.setattr(Checkpointer.finish, "__defaults__", (0.5,))
        patch.setattr(checkpointer, "WAIT_S", (0.1, 0.1))
        each_step(patch, die)
        with pytest.raises(Stopped, match=r"step_9 is not in s3://.* the same command copies it") as stop:
            train("--loop.mirror", mirror.url)
    assert stop.value.exit_code == OUTAGE and saved(folder) == ["step_6", "step_9"] and folder.status() == "KILLED"
    assert folder.log_file.read_text().count("cannot be copied to") == 1
    faulty_server.faults = []
    assert in_mirror(mirror) == {"step_3"}
    train("--loop.mirror", mirror.url)
    assert in_mirror(mirror) == {"step_6", "step_9"} and folder.status() == "FINISHED"
