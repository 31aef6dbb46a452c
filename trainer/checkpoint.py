"""A checkpoint on disk, which belongs to no engine and no number of ranks: one folder, whole or not there at all.

checkpoints/step_500/generator.safetensors      one file per network
                     optimiser.safetensors      optimisers' state, "phase/parameter/key"
                     slots.safetensors          state of the global batch's slots (image buffers)
                     state.json                 format, step, loss scalers, what the data was, the resolved config
                     manifest.json              bytes and SHA-256 of each file, written last

It is written as .step_500.draft, flushed to disk and renamed; an earlier one of the same step is .step_500.old meanwhile.
`trainer/checkpointer.py` decides which are kept. This module needs no store, so that a model can carry it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.config import FORMAT, check_format, completed
from infra.disk import flush
from infra.errors import DIVERGED, Stopped, UserError
from infra.shapes import read_shape, shaped

T = TypeVar("T")

MANIFEST = "manifest.json"
STATE = "state.json"
NETWORK = "network"  # the checkpoint among the artifacts of an MLflow model
BEST, LATEST, AUTO = "best", "latest", "auto"  # which one of a run's is meant; BEST: also the link to it
DRAFT, OLD = "draft", "old"  # how the hidden names end that a checkpoint has while it is written or replaced


@dataclass(frozen=True)
class _File:
    """What the manifest says of one."""

    bytes: int
    sha256: str


# Entries of state.json: of a training all of these, of a published network some; and facts of any kind.
_STATE: dict[str, Any] = {"step": int, "data": str, "config": dict[str, Any], "scalers": dict[str, Any]}


class Damaged(UserError):
    """A checkpoint whose files are not those that were written, or hold numbers that are not finite."""


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _folders_of_steps(folder) if (path / MANIFEST).is_file()]


def _folders_of_steps(folder: Path) -> list[Path]:
    # A person may keep a copy as step_1000_good.
    return sorted((path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()), key=step_of)


def find_checkpoint(path: Path, which: str = LATEST) -> Path:
    """The checkpoint folder meant by a run folder or by itself. which: of a run's, best, latest or step_N; auto: the best where
    it was evaluated, else the latest. UserError if there is none."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        if not (path / STATE).is_file():
            raise UserError(
                f"{path} is neither a run folder nor a checkpoint: give runs/NAME or runs/NAME/checkpoints/step_N"
            )
        if which not in (LATEST, AUTO):
            raise UserError(f"{path} is a checkpoint, not a run that has a {which}: give the run folder, "
                            "or leave out --checkpoint")  # fmt: skip
        return path
    complete = checkpoints_in(folder)
    if not complete:
        raise UserError(f"the run {path} has no complete checkpoint yet: let it train longer")
    if which == AUTO:
        which = BEST if (folder / BEST / MANIFEST).is_file() else LATEST
    if which == LATEST:
        return complete[-1]
    if which == BEST and (folder / BEST / MANIFEST).is_file():
        return folder / (folder / BEST).resolve().name
    if which not in [each.name for each in complete]:
        reason = " (its training did not evaluate it)" if which == BEST else ""
        raise UserError(f"the run {path} has no checkpoint {which}{reason}: give {LATEST} or "
                        f"{', '.join(each.name for each in complete)}")  # fmt: skip
    return folder / which


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, finite: bool = True
) -> None:
    """Write {file stem: {name: tensor}} and the JSON state, in the place of what was there, which stays until the new one
    is on disk. finite: raise Stopped, and write nothing, if a number in it is not finite."""
    draft = _hidden(folder, DRAFT)
    remove(draft)
    draft.mkdir(parents=True)
    for stem, group in tensors.items():
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
        if finite and (name := _not_finite(host)):
            remove(draft)
            raise Stopped(f"no checkpoint {folder} was made, since {stem} {name} holds numbers that are not finite: the one "
                          "before is good; train in another --run-dir with a lower optim.lr or beta", DIVERGED)  # fmt: skip
        save_file(host, draft / f"{stem}.safetensors")
    (draft / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in (*draft.iterdir(), draft):
        flush(path)
    put(draft, folder)


def put(draft: Path, folder: Path) -> None:
    """Give a complete draft its name. A process that is killed in between leaves the old one or the new one, if need be
    under a hidden name that `sweep` knows."""
    old = _hidden(folder, OLD)
    if folder.exists():
        remove(old)
        folder.rename(old)
    draft.rename(folder)
    flush(folder.parent)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: a process that is killed in between leaves nothing that looks complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear away what a killed process left among a run's checkpoints: one that was being replaced gets its name back;
    drafts, and what was being deleted, go. Only for the process that writes there."""
    for old in folder.glob(f".step_*.{OLD}"):
        target = folder / old.name.removeprefix(".").removesuffix(f".{OLD}")
        if (old / MANIFEST).is_file() and not target.exists():
            old.rename(target)
    for hidden in folder.glob(".step_*"):
        remove(hidden)
    newest = max(map(step_of, checkpoints_in(folder)), default=0)
    for path in _folders_of_steps(folder):
        if step_of(path) < newest and not (path / MANIFEST).is_file():
            remove(path)


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a number that is not finite."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)


class Checkpoint:
    """A complete checkpoint on disk. Every file is checked against its hash before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._read(MANIFEST, dict[str, _File])
        if any(Path(name).name != name for name in self._files):
            raise self._incomplete(MANIFEST)
        self._check(STATE)
        self.state = self._read(STATE, dict[str, Any])
        try:
            for name in _STATE.keys() & self.state.keys():
                shaped(_STATE[name], self.state[name], name)
        except ValueError:
            raise self._incomplete(STATE) from None
        check_format(str(folder), self.state.pop("format", None))

    def expect(self, *names: str) -> None:
        """Raise Damaged unless the state has all of these."""
        for name in names:
            if name not in self.state:
                raise self._incomplete(STATE)

    def config(self, cls: type, section: str = "") -> dict[str, Any]:
        """The run's configuration, or a section of it ("model.", taken off the names), flat, as this version would have
        saved it; cls: its class."""
        saved: dict[str, Any] = self.state["config"]
        return completed(cls, {name.removeprefix(section): saved[name] for name in saved if name.startswith(section)})

    def _read(self, name: str, kind: type[T]) -> T:
        try:
            return read_shape(kind, (self.folder / name).read_bytes())
        except (OSError, ValueError):
            raise self._incomplete(name) from None

    def _incomplete(self, name: str) -> Damaged:
        return Damaged(f"{self.folder} is not a complete checkpoint ({name} is missing or damaged): "
                       "name another step, or delete this folder to go on from the one before")  # fmt: skip

    def check(self) -> None:
        """Raise Damaged unless every file is as it was written, and every number in it finite."""
        for name in self._files:
            if not name.endswith(".safetensors"):
                self._check(name)
            elif wrong := _not_finite(self.tensors(name.removesuffix(".safetensors"))):
                raise Damaged(f"{self.folder / name} holds numbers that are not finite ({wrong}): delete {self.folder} "
                              "to go on from the checkpoint before")  # fmt: skip

    def _check(self, name: str) -> Path:
        path = self.folder / name
        if name not in self._files or not path.is_file() or _sha256(path) != self._files[name].sha256:
            raise Damaged(f"{path} is missing or damaged (its hash is not the recorded one): "
                          f"delete {self.folder} to go on from the checkpoint before")  # fmt: skip
        return path

    def has(self, stem: str) -> bool:
        return f"{stem}.safetensors" in self._files

    def averaged(self, stem: str) -> str:
        """The file of a network's moving average where the run kept one, else its own."""
        return f"{stem}_ema" if self.has(f"{stem}_ema") else stem

    def tensors(self, stem: str) -> dict[str, Tensor]:
        path = self._check(f"{stem}.safetensors")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise Damaged(f"{path} cannot be read ({error}): delete {self.folder}") from None

    def load_into(self, network: nn.Module, stem: str) -> None:
        """Copy one network's weights in. UserError if it has another architecture."""
        fill(network, self.tensors(stem), f"{self.folder} holds another architecture: {stem}")


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a network. UserError, which begins with `where`, if it has another architecture."""
    expected = network.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        there = tuple(tensors[name].shape) if name in tensors else "absent"
        here = tuple(expected[name].shape) if name in expected else "absent"
        if there != here:
            raise UserError(f"{where} {name} is {there} there and {here} here, "
                            "so give the model options of its config.yaml")  # fmt: skip
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
