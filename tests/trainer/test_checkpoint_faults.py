"""A run's checkpoints after kills, damage and numbers that are not finite: there is always one to go on from."""

import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.errors import Stopped
from infra.storage import LocalStorage
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer

KILLS = 50  # in each of two ways

Tell = Callable[[int], object]


def save(checkpointer: Checkpointer, *steps: int, best: bool = False) -> None:
    for step in steps:
        tensors = {"generator": {"a": torch.full((3,), float(step))}, "slots": {"s": torch.ones(2)}}
        checkpointer.save(step, tensors, {"step": step}, best=best)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_while(saving: Callable[[Tell], None], seconds: float) -> int:
    """Run it in a process of its own, which is killed so long after it has told of a save; the step it last told of."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # it must never return into the test
        try:
            saving(lambda step: os.write(write, step.to_bytes(4, "big")))
        finally:
            os._exit(1)
    os.close(write)
    with open(read, "rb") as told:
        try:
            first = told.read(4)
            time.sleep(seconds)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return int.from_bytes((first + told.read())[-4:], "big")


@pytest.mark.parametrize("again", [True, False], ids=["the same step", "later steps"])
def test_no_kill_in_a_hundred_leaves_a_run_without_its_last_checkpoint(
    tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is not flushed survives the kill of a process.
    monkeypatch.setattr(checkpoint, "flush", lambda path: None)
    draws = random.Random(0)
    save(Checkpointer(tmp_path, keep=1), 1)
    reached = 1
    for _ in range(KILLS):

        def saving(tell: Tell, first: int = reached) -> None:
            checkpointer, step = Checkpointer(tmp_path, keep=1), first
            while True:
                step += not again
                save(checkpointer, step, best=step % 3 == 0)
                tell(step)

        told = killed_while(saving, draws.uniform(0.0, 0.01))
        found = Checkpointer(tmp_path, keep=1).recover()
        assert found is not None, "no checkpoint is left"
        Checkpoint(found).check()
        assert Checkpoint(found).state["step"] >= told >= reached
        assert not [name for name in names(tmp_path) if name.startswith(".step") or name.endswith("damaged")]
        reached = Checkpoint(found).state["step"]
    save(Checkpointer(tmp_path, keep=1), 10**6)
    assert len(names(tmp_path)) <= 3  # the best with its link, and the last


def test_an_earlier_one_of_the_same_step_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before any single change of the folder."""
    changes = ("rename", "unlink", "mkdir", "rmdir")
    for fatal in range(40):
        folder = tmp_path / str(fatal)
        save(Checkpointer(folder, keep=1), 4)
        with monkeypatch.context() as patch:
            left = fatal

            def changing(original: Callable[..., object], *args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return original(*args, **options)

            for name in changes:
                original = getattr(os, name)
                patch.setattr(os, name, lambda *a, _o=original, **k: changing(_o, *a, **k))
            try:
                save(Checkpointer(folder, keep=1), 4)
            except KeyboardInterrupt:
                pass
            else:
                break
        found = Checkpointer(folder, keep=1).recover()
        assert found is not None and found.name == "step_4"
        Checkpoint(found).check()
        assert names(folder) == ["step_4"]
    assert 5 < fatal < 39


def test_files_and_folders_are_flushed_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    def flush(path: Path) -> None:
        there = "step_4" if (tmp_path / "step_4").exists() else "no step_4"
        flushed.append(f"{path.name}, {there}")

    monkeypatch.setattr(checkpoint, "flush", flush)
    save(Checkpointer(tmp_path, keep=1), 4)
    *files, draft, folder = flushed
    written = ("generator.safetensors", "slots.safetensors", "state.json", "manifest.json")
    assert sorted(files) == sorted(f"{name}, no step_4" for name in written)
    assert draft == ".step_4.draft, no step_4" and folder == f"{tmp_path.name}, step_4"


# ---- numbers that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_become_a_checkpoint(tmp_path: Path, value: float) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 3)
    tensors = {"generator": {"a": torch.ones(2), "b": torch.tensor([0.0, value])}}
    with pytest.raises(Stopped, match="step_4 was made, since generator b holds numbers that are not finite") as stop:
        checkpointer.save(4, tensors, {"step": 4})
    assert stop.value.exit_code == 3
    assert names(tmp_path) == ["step_3"] and checkpointer.recover() == tmp_path / "step_3"


def test_one_that_an_earlier_version_saved_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(Checkpointer(tmp_path, keep=2), 3)
    checkpoint.write_checkpoint(tmp_path / "step_4", {"g": {"a": torch.tensor(float("nan"))}}, {}, finite=False)
    assert Checkpointer(tmp_path, keep=2).recover() == tmp_path / "step_3"
    assert names(tmp_path) == ["step_3", "step_4.damaged"]
    assert "step_4/g.safetensors holds numbers that are not finite (a); it is set aside" in caplog.text


# ---- damage -------------------------------------------------------------------------------------------------------------


def damage(folder: Path, name: str, kind: str) -> None:
    content = (folder / name).read_bytes()
    if kind == "remove":
        (folder / name).unlink()
    else:
        changed = {"empty": b"", "cut": content[:-1], "NUL": content[:-2] + b"\0\0", "other": b"[1, 2]"}[kind]
        (folder / name).write_bytes(changed)


FAULTS = [(name, kind) for name in ("generator.safetensors", "slots.safetensors", "state.json")
          for kind in ("empty", "cut", "NUL", "remove")]  # fmt: skip
FAULTS += [("manifest.json", kind) for kind in ("empty", "cut", "NUL", "other")]


@pytest.mark.parametrize(("name", "kind"), FAULTS)
def test_a_damaged_newest_one_is_set_aside_for_the_one_before(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path, keep=3)
    save(checkpointer, 1, 2, 3)
    damage(tmp_path / "step_3", name, kind)
    damage(tmp_path / "step_2", name, kind)
    caplog.set_level(logging.WARNING)
    assert checkpointer.recover() == tmp_path / "step_1"
    assert names(tmp_path) == ["step_1", "step_2.damaged", "step_3.damaged"]
    assert "it is set aside as step_3.damaged" in caplog.text and f"going on from {tmp_path}/step_1" in caplog.text
    save(checkpointer, 2, 3, 4)
    assert {"step_2", "step_3", "step_4", "step_2.damaged", "step_3.damaged"} <= {*names(tmp_path)}
    damage(tmp_path / "step_4", "manifest.json", "empty")
    damage(tmp_path / "step_3", "manifest.json", "empty")
    assert checkpointer.recover() == tmp_path / "step_2"
    assert "step_3.damaged-2" in names(tmp_path)


def test_without_a_whole_one_a_run_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(Checkpointer(tmp_path, keep=1), 3, best=True)
    damage(tmp_path / "step_3", "state.json", "cut")
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert checkpointer.recover() is None and checkpointer.best is None
    assert "going on from the beginning, since no whole checkpoint is left" in caplog.text


def test_a_format_of_a_later_version_is_no_damage(tmp_path: Path) -> None:
    checkpoint.write_checkpoint(tmp_path / "step_3", {}, {"format": 99})
    with pytest.raises(ValueError, match="has the format 99"):
        Checkpointer(tmp_path, keep=1).recover()
    assert names(tmp_path) == ["step_3"]


def test_what_a_killed_process_left_is_swept_at_the_start(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=9)
    save(checkpointer, 1, 2, 3)
    (tmp_path / "step_1" / "manifest.json").unlink()  # killed while it was pruned
    shutil.copytree(tmp_path / "step_3", tmp_path / ".step_3.old")  # killed after the new one got its name
    (tmp_path / "step_2").rename(tmp_path / ".step_2.old")  # killed before the new one got its name
    (tmp_path / ".step_2.draft").mkdir()
    assert checkpointer.recover() == tmp_path / "step_3"
    assert names(tmp_path) == ["step_2", "step_3"]


# ---- the mirror ---------------------------------------------------------------------------------------------------------


def mirrored(tmp_path: Path, *steps: int) -> tuple[Checkpointer, LocalStorage]:
    mirror = LocalStorage(tmp_path / "mirror")
    checkpointer = Checkpointer(tmp_path / "here", 3, mirror)
    save(checkpointer, *steps)
    return checkpointer, mirror


def test_the_mirrors_copy_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    checkpointer, _ = mirrored(tmp_path, 1, 2, 3)
    damage(tmp_path / "here" / "step_3", "state.json", "cut")
    assert checkpointer.recover() == tmp_path / "here" / "step_3"
    assert names(checkpointer.folder) == ["step_1", "step_2", "step_3", "step_3.damaged"]


def test_each_checkpoint_of_a_mirror_can_be_gone_back_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer, mirror = mirrored(tmp_path, 1, 2, 3)
    for step in (2, 3):
        damage(tmp_path / "mirror" / f"step_{step}", "generator.safetensors", "NUL")
    shutil.rmtree(checkpointer.folder)
    assert checkpointer.recover() == checkpointer.folder / "step_1"
    assert f"{mirror.url}/step_3 is damaged" in caplog.text and names(checkpointer.folder) == ["step_1"]
    save(checkpointer, 4)
    assert {name.split("/")[0] for name in mirror.list()} == {"step_1", "step_4"}


def test_what_is_whole_here_goes_before_damage_in_both(tmp_path: Path) -> None:
    checkpointer, _ = mirrored(tmp_path, 1, 2, 3)
    for place in ("here", "mirror"):
        damage(tmp_path / place / "step_3", "slots.safetensors", "remove")
    assert checkpointer.recover() == tmp_path / "here" / "step_2"
    assert json.loads((tmp_path / "here" / "step_2" / "state.json").read_text())["step"] == 2


def test_a_damaged_best_of_a_mirror_is_left_out(tmp_path: Path) -> None:
    checkpointer, _ = mirrored(tmp_path, 1)
    save(checkpointer, 2, best=True)
    save(checkpointer, 3)
    damage(tmp_path / "mirror" / "step_2", "generator.safetensors", "cut")
    shutil.rmtree(checkpointer.folder)
    assert checkpointer.recover() == checkpointer.folder / "step_3" and checkpointer.best is None
