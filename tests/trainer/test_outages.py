"""Disks that are full and mirrors that are away: training goes on, and the end says what is not safe."""

import errno
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infra.errors import OUTAGE, Stopped
from infra.storage import LocalStorage, StorageUnavailable
from trainer import checkpoint, checkpointer
from trainer.checkpointer import Checkpointer

SIZE = 60_000  # numbers of a checkpoint, of four bytes


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"a": torch.full((SIZE,), float(step))}}


def save(kept: Checkpointer, *steps: int) -> None:
    for step in steps:
        kept.save_if_possible(step, tensors(step), {"step": step}, best=False)


class Away(LocalStorage):
    """A mirror that does not answer while `away`."""

    away = True

    def _answer(self) -> None:
        if self.away:
            raise StorageUnavailable("the S3 endpoint cannot be reached")

    def list(self, prefix: str = "") -> list[str]:
        self._answer()
        return super().list(prefix)

    def upload(self, path: Path, name: str) -> None:
        self._answer()
        super().upload(path, name)

    def delete(self, name: str) -> None:
        self._answer()
        super().delete(name)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "WAIT_S", (0.01, 0.02))


def in_mirror(mirror: LocalStorage) -> set[str]:
    return {name.split("/")[0] for name in LocalStorage.list(mirror)}


def test_a_mirror_that_is_away_is_told_once_and_gets_everything_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mirror = Away(tmp_path / "mirror")
    kept = Checkpointer(tmp_path / "here", 2, mirror)
    save(kept, 1, 2)
    assert [path.name for path in kept.all()] == ["step_1", "step_2"] and in_mirror(mirror) == set()
    assert caplog.text.count("cannot be copied to") == 1 and "training goes on" in caplog.text
    mirror.away = False
    save(kept, 3)
    assert in_mirror(mirror) == {"step_2", "step_3"} and "well again" in caplog.text
    kept.finish()


def test_the_end_waits_for_a_mirror_and_tells_what_is_not_there(tmp_path: Path) -> None:
    mirror = Away(tmp_path / "mirror")
    kept = Checkpointer(tmp_path / "here", 2, mirror)
    save(kept, 1)
    with pytest.raises(
        Stopped, match=r"step_1 is not in .*mirror .the S3 endpoint.*: the same command copies it"
    ) as stop:
        kept.finish(patience=0.1)
    assert stop.value.exit_code == OUTAGE
    mirror.away = False
    Checkpointer(tmp_path / "here", 2, mirror).finish()  # as the same command does
    assert in_mirror(mirror) == {"step_1"}


def test_a_mirror_that_comes_back_while_the_end_waits_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Away(tmp_path / "mirror")
    kept = Checkpointer(tmp_path / "here", 2, mirror)
    save(kept, 1)
    monkeypatch.setattr(time, "sleep", lambda _: setattr(mirror, "away", False))
    kept.finish(patience=10)
    assert in_mirror(mirror) == {"step_1"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KiB: room for two checkpoints, and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpointer(small_disk / "checkpoints", 1)
    save(kept, 1)
    (small_disk / "other").write_bytes(bytes(300 * 2**10))
    save(kept, 2, 3)
    assert [path.name for path in kept.all()] == ["step_1"]
    assert caplog.text.count("checkpoint of step 2 cannot be written") == 1 and "No space left" in caplog.text
    assert not [path.name for path in kept.folder.iterdir() if path.name.startswith(".")]  # nothing takes room
    with pytest.raises(
        Stopped, match="the last checkpoint could not be written .*: make room .* goes on from step_1"
    ) as stop:
        kept.finish()
    assert stop.value.exit_code == OUTAGE
    (small_disk / "other").unlink()
    save(kept, 4)
    kept.finish()
    found = kept.recover()
    assert found is not None and checkpoint.Checkpoint(found).tensors("generator")["a"][0] == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_last_one_is_tried_until_there_is_room(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 3

    def flush(path: Path) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(number, "it does not go")

    monkeypatch.setattr(checkpoint, "flush", flush)
    kept = Checkpointer(tmp_path, 1)
    assert kept.save_if_possible(5, tensors(5), {"step": 5}, best=False) is None
    assert kept.save_if_possible(6, tensors(6), {"step": 6}, best=False, patience=5) == tmp_path / "step_6"
    kept.finish()
