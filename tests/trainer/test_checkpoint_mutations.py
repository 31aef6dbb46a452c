"""Manifests and states of checkpoints that were damaged, or written by somebody who means harm."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from tests.mutations import mutations
from trainer.checkpoint import MANIFEST, STATE, Checkpoint, Damaged
from trainer.checkpointer import Checkpointer

COUNT = 1000
ABOUT = {"step": 4, "data": "0" * 64, "scalers": {}, "config": {"seed": 0, "data.root": "x", "method.taps": [0, 4]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"generator": {"a": torch.arange(3.0)}, "optimiser": {"b": torch.ones(2)}, "slots": {}}
    return Checkpointer(tmp_path, keep=2).save(4, tensors, ABOUT)


def test_a_mutated_manifest_is_told_or_leads_to_the_same_weights(folder: Path) -> None:
    told = 0
    for mutated in mutations((folder / MANIFEST).read_bytes(), COUNT):
        (folder / MANIFEST).write_bytes(mutated)
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.check()
            assert checkpoint.state["step"] == 4 and checkpoint.tensors("generator")["a"].tolist() == [0, 1, 2]
        except Damaged as error:
            told += 1
            assert str(folder) in str(error) and "\n" not in str(error)
    assert told > COUNT / 2


def test_a_mutated_state_is_told(folder: Path) -> None:
    original = (folder / STATE).read_bytes()
    for mutated in mutations(original, COUNT):
        (folder / STATE).write_bytes(mutated)
        with pytest.raises(Damaged, match=r"state.json is missing or damaged .its hash"):
            Checkpoint(folder)


def test_a_mutated_state_whose_hash_fits_is_told_or_has_what_a_start_goes_on_from(folder: Path) -> None:
    original, files = (folder / STATE).read_bytes(), json.loads((folder / MANIFEST).read_bytes())
    for mutated in mutations(original, COUNT):
        (folder / STATE).write_bytes(mutated)
        files[STATE] = {"bytes": len(mutated), "sha256": hashlib.sha256(mutated).hexdigest()}
        (folder / MANIFEST).write_text(json.dumps(files))
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.expect(*ABOUT)
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            kinds = {name: type(value) for name, value in ABOUT.items()}
            assert {name: type(checkpoint.state[name]) for name in ABOUT} == kinds


def test_a_start_goes_on_from_the_one_before(folder: Path) -> None:
    newer = Checkpointer(folder.parent, keep=2).save(5, {"generator": {"a": torch.ones(3)}}, ABOUT | {"step": 5})
    (newer / MANIFEST).write_text('{"generator.safetensors": {"sha256": null}}')
    assert Checkpointer(folder.parent, keep=2).recover() == folder
