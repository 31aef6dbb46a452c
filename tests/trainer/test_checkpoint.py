"""Checkpoints: whole or not there, exact, kept, mirrored, and refused with a sentence where they do not fit."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.config import FORMAT
from infra.errors import UserError
from infra.storage import LocalStorage
from tests.trainer.small import small_method
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, EngineConfig
from trainer.loop import Evaluation, LoopConfig, Trainer
from trainer.networks.config import GeneratorConfig
from trainer.optim import OptimConfig
from trainer.state import TrainingState

TENSORS = {
    "generator": {"a": torch.tensor([1 / 3, -0.0, 1e-42]), "b": torch.ones(2, 3).T, "n": torch.tensor(7)},
    "slots": {"buffer/0": torch.empty(0)},
}
STATE = {"step": 3, "scalers": {}, "config": {"seed": 0, "method.taps": [0, 4], "optim.lr": 2e-4}}


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, TENSORS, {**STATE, "step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_exactly(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, keep=1).save(3, TENSORS, STATE)
    assert path == tmp_path / "step_3" and names(tmp_path) == ["step_3"]
    assert names(path) == ["generator.safetensors", "manifest.json", "slots.safetensors", "state.json"]
    assert json.loads((path / "state.json").read_text())["format"] == FORMAT
    loaded = Checkpoint(path)
    assert loaded.state == STATE and loaded.has("slots") and not loaded.has("generator_ema")
    for stem, group in TENSORS.items():
        read = loaded.tensors(stem)
        assert read.keys() == group.keys()
        for name, tensor in group.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert read[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()


def test_the_best_stays_until_there_is_a_better(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path, keep=1).best is None
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, best in ((1, False), (2, True), (3, False), (4, False)):
        checkpointer.save(step, TENSORS, {**STATE, "step": step}, best=best)
    assert names(tmp_path) == ["best", "step_2", "step_4"] and checkpointer.best == tmp_path / "step_2"
    assert Checkpoint(tmp_path / "best").state["step"] == 2 and checkpointer.recover() == tmp_path / "step_4"
    checkpointer.save(5, TENSORS, {**STATE, "step": 5}, best=True)
    assert names(tmp_path) == ["best", "step_5"]
    checkpointer.save(6, TENSORS, {**STATE, "step": 6})
    assert names(tmp_path) == ["best", "step_5", "step_6"]


def test_only_complete_folders_are_checkpoints(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "none", keep=5)
    assert checkpointer.all() == [] and checkpointer.recover() is None
    checkpointer = Checkpointer(tmp_path, keep=5)
    save(checkpointer, 2, 10)
    shutil.copytree(tmp_path / "step_10", tmp_path / ".step_12.draft")  # killed before its renaming
    shutil.copytree(tmp_path / "step_10", tmp_path / "step_13")
    (tmp_path / "step_13" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step_10", tmp_path / "step_10_good")  # a person's copy
    assert [path.name for path in checkpointer.all()] == ["step_2", "step_10"]
    assert checkpointer.recover() == tmp_path / "step_10"


def test_a_draft_left_by_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".step_4.draft").mkdir()
    (tmp_path / ".step_4.draft" / "stranger.safetensors").write_bytes(b"half")
    save(Checkpointer(tmp_path, keep=1), 4)
    assert names(tmp_path) == ["step_4"] and not Checkpoint(tmp_path / "step_4").has("stranger")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path, keep=2), 8, 9, 10, 11)
    assert names(tmp_path) == ["step_10", "step_11"]


# ---- the mirror -----------------------------------------------------------------------------------------------------


def test_the_mirror_holds_the_same_checkpoints_and_restores_the_newest(tmp_path: Path) -> None:
    mirror = LocalStorage(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "here", 2, mirror), 8, 9, 10)
    assert {name.split("/")[0] for name in mirror.list()} == {"step_9", "step_10"}

    fresh = Checkpointer(tmp_path / "new machine", 2, mirror)
    assert fresh.recover() == tmp_path / "new machine" / "step_10"
    assert names(fresh.folder) == ["step_10"]
    loaded = Checkpoint(fresh.folder / "step_10")
    assert loaded.state["step"] == 10 and loaded.tensors("generator").keys() == TENSORS["generator"].keys()


def test_an_upload_that_broke_off_is_not_restored(tmp_path: Path) -> None:
    mirror = LocalStorage(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "here", 2, mirror), 8, 9)
    mirror.delete("step_9/manifest.json")
    fresh = Checkpointer(tmp_path / "new machine", 2, mirror)
    (fresh.folder / "step_8").mkdir(parents=True)  # what a crash may leave here gives way
    (fresh.folder / "step_8" / "state.json").write_text("{}")
    assert fresh.recover() == fresh.folder / "step_8"
    assert Checkpoint(fresh.folder / "step_8").state["step"] == 8
    assert Checkpointer(tmp_path / "other", 2, LocalStorage(tmp_path / "empty")).recover() is None


class BreaksOff(LocalStorage):
    """A store that takes `uploads` more files."""

    uploads = 1000

    def upload(self, path: Path, name: str) -> None:
        if self.uploads == 0:
            raise UserError("the store is full")
        self.uploads -= 1
        super().upload(path, name)


@pytest.mark.parametrize("uploads", range(4))
def test_what_an_upload_leaves_that_breaks_off_is_no_checkpoint(
    tmp_path: Path, uploads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of a new checkpoint nor of one that takes the place of an earlier attempt's."""
    mirror = BreaksOff(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "here", 2, mirror), 8, 9)
    for step in (9, 10):
        mirror.uploads = uploads
        save(Checkpointer(tmp_path / f"again{step}", 2, mirror), step)
        assert f"step_{step} cannot be copied to {mirror.url} (the store is full)" in caplog.text
        latest = Checkpointer(tmp_path / f"new machine {step}", 2, mirror).recover()
        assert latest is not None and latest.name == "step_8"


def restored(folder: Path, mirror: LocalStorage, keep: int) -> Checkpointer:
    checkpointer = Checkpointer(folder, keep, mirror)
    checkpointer.recover()
    return checkpointer


def in_mirror(mirror: LocalStorage) -> set[str]:
    return {name.split("/")[0] for name in mirror.list()}


def test_a_restore_brings_the_best_back_and_the_mirror_keeps_what_a_run_keeps(tmp_path: Path) -> None:
    mirror = LocalStorage(tmp_path / "mirror")
    first = Checkpointer(tmp_path / "first", 2, mirror)
    for step in (5, 6, 7, 8):
        first.save(step, TENSORS, {**STATE, "step": step}, best=step == 5)
    assert in_mirror(mirror) == {"best", "step_5", "step_7", "step_8"}

    second = restored(tmp_path / "second", mirror, keep=2)
    assert second.best == tmp_path / "second" / "step_5" and names(second.folder) == ["best", "step_5", "step_8"]
    assert Checkpoint(second.folder / "best").state["step"] == 5 and second.recover() == second.folder / "step_8"
    save(second, 9)
    assert in_mirror(mirror) == {"best", "step_5", "step_8", "step_9"}
    second.save(10, TENSORS, {**STATE, "step": 10}, best=True)
    assert in_mirror(mirror) == {"best", "step_9", "step_10"}
    assert restored(tmp_path / "third", mirror, keep=2).best == tmp_path / "third" / "step_10"


def test_the_mirrors_own_stay_after_a_restore_until_they_are_old(tmp_path: Path) -> None:
    mirror = LocalStorage(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "first", 3, mirror), 1, 2, 3)
    second = restored(tmp_path / "second", mirror, keep=3)
    assert names(second.folder) == ["step_3"]
    save(second, 4)
    assert in_mirror(mirror) == {"step_2", "step_3", "step_4"}


def test_what_a_run_left_behind_when_it_went_back_goes(tmp_path: Path) -> None:
    mirror = LocalStorage(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "first", 2, mirror), 6, 8)
    shutil.rmtree(tmp_path / "first" / "step_8")  # as a damaged one is deleted
    save(Checkpointer(tmp_path / "first", 2, mirror), 7)
    assert in_mirror(mirror) == {"step_6", "step_7"}


def test_a_mirror_named_later_gets_what_was_kept_before(tmp_path: Path) -> None:
    Checkpointer(tmp_path / "here", 1).save(3, TENSORS, STATE, best=True)
    mirror = LocalStorage(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "here", 1, mirror), 4)
    assert in_mirror(mirror) == {"best", "step_3", "step_4"}


def test_what_is_here_goes_before_the_mirror(tmp_path: Path) -> None:
    mirror = LocalStorage(tmp_path / "mirror")
    save(Checkpointer(tmp_path / "elsewhere", 2, mirror), 9)
    save(Checkpointer(tmp_path / "here", 2), 5)
    assert Checkpointer(tmp_path / "here", 2, mirror).recover() == tmp_path / "here" / "step_5"


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generator.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = Checkpointer(tmp_path, 1).save(3, TENSORS, STATE) / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-2] + b"\x00" + content[-1:])
    with pytest.raises(UserError, match=rf"{path} is missing or damaged .*: delete {path.parent} to go on"):
        Checkpoint(path.parent).tensors("generator")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    path = Checkpointer(tmp_path, 1).save(3, TENSORS, STATE)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{path} is not a complete checkpoint \(manifest.json is missing or damaged\)"
    ):
        Checkpoint(path)


def test_a_file_with_the_right_hash_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, 1).save(3, TENSORS, STATE)
    (path / "generator.safetensors").write_bytes(b"not tensors")
    files = json.loads((path / "manifest.json").read_text())
    files["generator.safetensors"]["sha256"] = hashlib.sha256(b"not tensors").hexdigest()
    (path / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(UserError, match="generator.safetensors cannot be read"):
        Checkpoint(path).tensors("generator")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"ngf": 8}, r"generator model.1.bias is \(4,\) there and \(8,\) here"),
        ({"blocks": 9}, r"generator model.18.* is .* there and .* here"),
    ],
)
def test_another_architecture_is_named(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    small = GeneratorConfig(ngf=4, blocks=6)
    path = Checkpointer(tmp_path, 1).save(3, {"generator": small.build().state_dict()}, STATE)
    network = GeneratorConfig(**{"ngf": 4, "blocks": 6} | other).build()
    before = network.get_parameter("model.1.weight").clone()
    with pytest.raises(UserError, match=f"{path} holds another architecture: {words}"):
        Checkpoint(path).load_into(network, "generator")
    assert torch.equal(network.get_parameter("model.1.weight"), before)


# ---- a whole run ------------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor


def steps_of_noise(first: int) -> Iterator[list[Pairs]]:
    step = first
    while True:
        draw = torch.Generator().manual_seed(step)
        source, target = (torch.rand(2, 3, 16, 16, generator=draw) * 2 - 1 for _ in range(2))
        yield [Pairs(source, target, torch.tensor([0, 1]))]
        step += 1


class Keeper:
    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.rows: list[dict[str, Any]] = []

    def measured(self, done: int, count: int) -> None:
        pass

    def estimate(self, seconds: float) -> None:
        pass

    def record(self, done: int, rows: Any) -> None:
        timed = ("pairs_per_s", "memory_gib", "data/wait", "save/pause")
        self.rows += [{k: v for k, v in row.items() if k not in timed} for row in rows]

    def save(self, state: TrainingState, evaluation: Evaluation | None) -> None:
        self.checkpointer.save(state.step, state.tensors, {"step": state.step, "scalers": state.scalers})


def train(folder: Path, steps: int, **model: Any) -> Keeper:
    """Train to that step, from the newest checkpoint in the folder if there is one."""
    options: dict[str, Any] = {"taps": (0, 4, 12), "patches": 8, "buffer": 2, "discriminator__layers": 1} | model
    method = small_method(global_batch=2, **options)
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    optim = OptimConfig(global_batch=2, ema=0.9, epochs=1, decay_epochs=1)
    engine.prepare(method, optim)
    trainer = Trainer(method, engine, optim, LoopConfig(max_steps=steps), seed=0, source_samples=4)
    keeper, first = Keeper(Checkpointer(folder, keep=1)), 0
    if (path := keeper.checkpointer.recover()) is not None:
        checkpoint = Checkpoint(path)
        trainer.restore(checkpoint)
        first = checkpoint.state["step"]
    trainer.fit(
        steps_of_noise(first), first, recorder=keeper, sample=lambda step: None, evaluate=None, save=keeper.save
    )
    return keeper


def test_a_restored_run_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 4)
    parts = [train(tmp_path / "parts", steps) for steps in (1, 3, 4)]
    assert [row for part in parts for row in part.rows] == whole.rows and len(whole.rows) == 4
    one, other = (tmp_path / name / "step_4" for name in ("whole", "parts"))
    stems = {"generator", "discriminator", "heads", "generator_ema", "optimiser", "slots"}
    assert names(one) == names(other) == sorted({f"{s}.safetensors" for s in stems} | {"state.json", "manifest.json"})
    assert (one / "manifest.json").read_text() == (other / "manifest.json").read_text()  # it has all hashes
    assert len(Checkpoint(one).tensors("slots")) == 2


def test_a_run_does_not_restore_another_architecture(tmp_path: Path) -> None:
    train(tmp_path, 1)
    with pytest.raises(UserError, match=rf"{tmp_path}/step_1 holds another architecture: discriminator "):
        train(tmp_path, 2, discriminator__ndf=8)
