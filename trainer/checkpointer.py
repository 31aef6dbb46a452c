"""Which checkpoints of a run are kept, here and in a mirror. `trainer/checkpoint.py` has what one of them holds.

checkpoints/step_500, step_1000                 the newest
checkpoints/best                                a link to the best one, where the run evaluates itself; in a mirror, which
                                                has no links, an object with the name of its folder
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from infra.storage import Storage
from trainer.checkpoint import MANIFEST, checkpoints_in, step_of, write_checkpoint

BEST = "best"


class Checkpointer:
    """The checkpoints of one run, the newest `keep` and the best kept; copied to `mirror` (an object store) if there is
    one."""

    def __init__(self, folder: Path, keep: int, mirror: Storage | None = None) -> None:
        self.folder, self.keep, self.mirror = folder, keep, mirror

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return checkpoints_in(self.folder)

    def latest(self) -> Path | None:
        """The newest complete checkpoint. If there is none here, it and the best are fetched from the mirror."""
        if not self.all() and self.mirror is not None:
            self._restore()
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
        write_checkpoint(target, tensors, state)
        if best:
            self._link_best(target.name)
        for old in self.all()[: -self.keep]:
            if old != self.best:
                shutil.rmtree(old)
        if self.mirror is not None:
            self._update_mirror(self.mirror, target)
        return target

    def _link_best(self, name: str) -> None:
        link = self.folder / f".{BEST}.draft"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.folder / BEST)

    # ---- the mirror -----------------------------------------------------------------------------------------------

    def _update_mirror(self, mirror: Storage, new: Path) -> None:
        """Copy what is kept here and is not there yet, and delete there what is not kept: the newest `keep` of the mirror's
        own stay, since after a restore not all of them are here; what is newer than `new` was left behind by the run."""
        mirror.delete(f"{new.name}/{MANIFEST}")  # of an earlier attempt: it would vouch for a mixture of files
        there = _complete_in(mirror)
        for path in self.all():
            if path.name not in there and step_of(path) <= step_of(new):
                names = [file.name for file in path.iterdir() if file.name != MANIFEST]
                for name in (*names, MANIFEST):  # the manifest last: with it the copy is complete
                    mirror.upload(path / name, f"{path.name}/{name}")
        best = self.best.name if self.best else _best_in(mirror)
        if best:
            mirror.write(BEST, best.encode())
        older = [name for name in _complete_in(mirror) if step_of(Path(name)) <= step_of(new)]
        for name in sorted(mirror.list("step_"), key=lambda name: not name.endswith(MANIFEST)):  # manifests first
            if name.split("/")[0] not in (*older[-self.keep :], best):
                mirror.delete(name)

    def _restore(self) -> None:
        """Fetch the newest complete checkpoint of the mirror, and the best."""
        assert self.mirror is not None
        complete = _complete_in(self.mirror)
        if not complete:
            return
        best = _best_in(self.mirror)
        wanted = dict.fromkeys(name for name in (best, complete[-1]) if name in complete)
        drafts = [self._fetch(self.mirror, name) for name in wanted]
        for name, draft in zip(wanted, drafts, strict=True):  # the newest last: a run goes on from there
            shutil.rmtree(self.folder / name, ignore_errors=True)
            draft.rename(self.folder / name)
            if name == best:
                self._link_best(name)

    def _fetch(self, mirror: Storage, name: str) -> Path:
        draft = self.folder / f".{name}.draft"
        draft.mkdir(parents=True, exist_ok=True)
        for file in mirror.list(f"{name}/"):
            mirror.download(file, draft / file.split("/")[1])
        return draft


def _complete_in(mirror: Storage) -> list[str]:
    """The names of a mirror's complete checkpoints, oldest first."""
    folders = (name.split("/")[0] for name in mirror.list("step_") if name.endswith(f"/{MANIFEST}"))
    return sorted(
        (name for name in folders if name.removeprefix("step_").isdigit()), key=lambda name: step_of(Path(name))
    )


def _best_in(mirror: Storage) -> str:
    """The name of the checkpoint that was copied as the best, "" if none was."""
    try:
        return mirror.read(BEST).decode()
    except FileNotFoundError:
        return ""
