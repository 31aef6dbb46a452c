"""Checkpoints that belong to no engine and no number of ranks: one folder per step, whole or not there at all.

checkpoints/step_500/generator.safetensors      one file per network
                     optimiser.safetensors      optimisers' state, "phase/parameter/key"
                     slots.safetensors          state of the global batch's slots (image buffers)
                     state.json                 step, loss scalers, what the data was, the resolved config
                     manifest.json              bytes and SHA-256 of each file, written last
checkpoints/best                                a link to the best one, where the run evaluates itself
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

from infra.errors import UserError
from infra.storage import Storage

MANIFEST = "manifest.json"
STATE = "state.json"
BEST = "best"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


class Checkpointer:
    """The checkpoints of one run, the newest `keep` and the best kept; copied to `mirror` (an object store) if there is
    one."""

    def __init__(self, folder: Path, keep: int, mirror: Storage | None = None) -> None:
        self.folder, self.keep, self.mirror = folder, keep, mirror

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = (path.parent for path in self.folder.glob(f"step_*/{MANIFEST}"))
        # A person may keep a copy as step_1000_good.
        return sorted((path for path in found if path.name.removeprefix("step_").isdigit()), key=step_of)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, fetched from the mirror if there is none here."""
        if not self.all() and self.mirror is not None:
            self._fetch()
        return next(reversed(self.all()), None)

    @property
    def best(self) -> Path | None:
        """The checkpoint that was saved as the best, if any."""
        link = self.folder / BEST
        return self.folder / os.readlink(link) if link.is_symlink() else None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, best: bool = False
    ) -> Path:
        """Write a checkpoint: {file stem: {name: tensor}} and the JSON state. Older ones beyond `keep` go, but not the
        one last saved as the `best`."""
        target = self.folder / f"step_{step}"
        draft = self.folder / f".step_{step}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for stem, group in tensors.items():
            save_file({name: t.detach().cpu().contiguous() for name, t in group.items()}, draft / f"{stem}.safetensors")
        (draft / STATE).write_text(json.dumps(state, indent=1))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(files, indent=1))
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        if best:
            link = self.folder / f".{BEST}.draft"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            link.replace(self.folder / BEST)
        for old in self.all()[: -self.keep]:
            if old != self.best:
                shutil.rmtree(old)
        if self.mirror is not None:
            self._copy_to_mirror(target)
        return target

    def _copy_to_mirror(self, folder: Path) -> None:
        assert self.mirror is not None
        names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
        for name in (*names, MANIFEST):  # the manifest last: with it the copy is complete
            self.mirror.upload(folder / name, f"{folder.name}/{name}")
        kept = {path.name for path in self.all()}
        for name in self.mirror.list("step_"):
            if name.split("/")[0] not in kept:
                self.mirror.delete(name)

    def _fetch(self) -> None:
        assert self.mirror is not None
        complete = [name.split("/")[0] for name in self.mirror.list("step_") if name.endswith(f"/{MANIFEST}")]
        if not complete:
            return
        newest = max(complete, key=lambda name: step_of(Path(name)))
        draft = self.folder / f".{newest}.draft"
        draft.mkdir(parents=True, exist_ok=True)
        for name in self.mirror.list(f"{newest}/"):
            self.mirror.download(name, draft / name.split("/")[1])
        shutil.rmtree(self.folder / newest, ignore_errors=True)
        draft.rename(self.folder / newest)


class Checkpoint:
    """A complete checkpoint on disk. Every file is checked against its hash before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._read_json(MANIFEST)
        self.state = self._read_json(STATE, self._files)

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
