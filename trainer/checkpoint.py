"""A checkpoint on disk, which belongs to no engine and no number of ranks: one folder, whole or not there at all.

checkpoints/step_500/generator.safetensors      one file per network
                     optimiser.safetensors      optimisers' state, "phase/parameter/key"
                     slots.safetensors          state of the global batch's slots (image buffers)
                     state.json                 format, step, loss scalers, what the data was, the resolved config
                     manifest.json              bytes and SHA-256 of each file, written last

`trainer/checkpointer.py` decides which are kept. This module needs no store, so that a model can carry it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.config import FORMAT, check_format, completed
from infra.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path.parent for path in folder.glob(f"step_*/{MANIFEST}"))
    # A person may keep a copy as step_1000_good.
    return sorted((path for path in found if path.name.removeprefix("step_").isdigit()), key=step_of)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest) or by itself. UserError if there is none."""
    if (path / "checkpoints").is_dir():
        complete = checkpoints_in(path / "checkpoints")
        if not complete:
            raise UserError(f"the run {path} has no complete checkpoint yet: let it train longer")
        return complete[-1]
    if not (path / "state.json").is_file():
        raise UserError(
            f"{path} is neither a run folder nor a checkpoint: give runs/NAME or runs/NAME/checkpoints/step_N"
        )
    return path


def write_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write {file stem: {name: tensor}} and the JSON state, in the place of what was there."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for stem, group in tensors.items():
        save_file({name: t.detach().cpu().contiguous() for name, t in group.items()}, draft / f"{stem}.safetensors")
    (draft / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


class Checkpoint:
    """A complete checkpoint on disk. Every file is checked against its hash before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._read_json(MANIFEST)
        self.state = self._read_json(STATE, self._files)
        check_format(str(folder), self.state.pop("format", None))

    def config(self, cls: type, section: str = "") -> dict[str, Any]:
        """The run's configuration, or a section of it ("model.", taken off the names), flat, as this version would have
        saved it; cls: its class."""
        saved: dict[str, Any] = self.state["config"]
        return completed(cls, {name.removeprefix(section): saved[name] for name in saved if name.startswith(section)})

    def _read_json(self, name: str, files: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if files is not None:
            self._check(name, files)
        try:
            value = json.loads((self.folder / name).read_text())
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{self.folder} is not a complete checkpoint ({name} is missing or damaged): "
                            "name another step, or delete this folder to go on from the one before") from None  # fmt: skip
        return dict(value)

    def _check(self, name: str, files: Mapping[str, Any]) -> Path:
        path = self.folder / name
        if name not in files or not path.is_file() or _sha256(path) != files[name]["sha256"]:
            raise UserError(f"{path} is missing or damaged (its hash is not the recorded one): "
                            f"delete {self.folder} to go on from the checkpoint before")  # fmt: skip
        return path

    def has(self, stem: str) -> bool:
        return f"{stem}.safetensors" in self._files

    def averaged(self, stem: str) -> str:
        """The file of a network's moving average where the run kept one, else its own."""
        return f"{stem}_ema" if self.has(f"{stem}_ema") else stem

    def tensors(self, stem: str) -> dict[str, Tensor]:
        path = self._check(f"{stem}.safetensors", self._files)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}): delete {self.folder}") from None

    def load_into(self, network: nn.Module, stem: str) -> None:
        """Copy one network's weights in. UserError if it has another architecture."""
        tensors = self.tensors(stem)
        expected = network.state_dict()
        for name in sorted(expected.keys() | tensors.keys()):
            there = tuple(tensors[name].shape) if name in tensors else "absent"
            here = tuple(expected[name].shape) if name in expected else "absent"
            if there != here:
                raise UserError(f"{self.folder} holds another architecture: {stem} {name} is {there} there and {here} here, "
                                "so give the model options of its config.yaml")  # fmt: skip
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(tensors[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
