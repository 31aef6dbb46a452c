"""Which checkpoints of a run are kept, here and in a mirror. `trainer/checkpoint.py` has what one of them holds.

checkpoints/step_500, step_1000                 the newest
checkpoints/step_1500.damaged                   one that was found damaged at a start, which went on from one before
checkpoints/best                                a link to the best one, where the run evaluates itself; in a mirror, which
                                                has no links, an object with the name of its folder
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from infra.errors import OUTAGE, Stopped, UserError, first_line
from infra.storage import Storage
from trainer.checkpoint import (
    BEST,
    MANIFEST,
    Checkpoint,
    Damaged,
    checkpoints_in,
    put,
    remove,
    step_of,
    sweep,
    write_checkpoint,
)

log = logging.getLogger(__name__)

PATIENCE_S = 90.0  # for a disk or a mirror at the end of a run
WAIT_S = (1.0, 20.0)  # before another attempt: the first wait, which then doubles, and the longest


class Checkpointer:
    """The checkpoints of one run, the newest `keep` and the best kept; copied to `mirror` (an object store) if there is
    one.

    A disk that is full or a mirror that is away does not end the training: a warning says so, and the next checkpoint is the
    next attempt. `finish` tells whether the last one is where it should be.
    """

    def __init__(self, folder: Path, keep: int, mirror: Storage | None = None) -> None:
        self.folder, self.keep, self.mirror = folder, keep, mirror
        self._damaged: set[str] = set()  # the names of those that were found damaged in the mirror
        self._failing: dict[str, str] = {}  # "disk", "mirror": why the last attempt failed

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return checkpoints_in(self.folder)

    def recover(self) -> Path | None:
        """The newest whole checkpoint, for a start to go on from; None if there is none. Clears away what a killed process
        left. Damaged ones that are newer are set aside with a warning. Where there is none here, or a damaged one, the
        mirror's are tried, and the best is fetched with it."""
        sweep(self.folder)
        complete = self.all()
        found = None
        for path in reversed(complete):
            if reason := _damage(path):
                log.warning("%s; it is set aside as %s", reason, _set_aside(path).name)
            else:
                found = path
                break
        if self.best and not self.best.is_dir():
            (self.folder / BEST).unlink()
        if self.mirror is not None and not (complete and found == complete[-1]):
            self._restore(self.mirror, step_of(found) if found else -1, step_of(complete[-1]) if complete else None)
        newest = next(reversed(self.all()), None)
        if complete and newest != complete[-1]:
            log.warning("going on from %s", newest or "the beginning, since no whole checkpoint is left")
        return newest

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
        try:
            write_checkpoint(target, tensors, state)
        except (OSError, SafetensorError):
            remove(self._draft(target.name))  # it takes room that is wanted
            raise
        if best:
            self._link_best(target.name)
        for old in self.all()[: -self.keep]:
            if old != self.best:
                remove(old)
        if self.mirror is not None:
            self._copied(self.mirror, target)
        return target

    def save_if_possible(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, best: bool,
        patience: float = 0.0,
    ) -> Path | None:  # fmt: skip
        """The same; None, with a warning, if the disk does not take it for `patience` seconds."""
        found: list[Path] = []
        problem = f"the checkpoint of step {step} cannot be written"
        self._tried("disk", problem, lambda: found.append(self.save(step, tensors, state, best=best)), patience)
        return found[0] if found else None

    def finish(self, patience: float = PATIENCE_S) -> None:
        """Bring the mirror up to date. Raises Stopped, with the exit code of an outage, if the last checkpoint is not here or,
        after `patience` seconds, not in the mirror."""
        newest = next(reversed(self.all()), None)
        if reason := self._failing.get("disk"):
            raise Stopped(f"the last checkpoint could not be written ({reason}): make room in {self.folder}, and the same "
                          f"command goes on from {newest.name if newest else 'the beginning'}", OUTAGE)  # fmt: skip
        if self.mirror is not None and newest and not self._copied(self.mirror, newest, patience, known=True):
            raise Stopped(f"{newest} is not in {self.mirror.url} ({self._failing['mirror']}): the same command copies it when "
                          "the store is well", OUTAGE)  # fmt: skip

    def _copied(self, mirror: Storage, newest: Path, patience: float = 0.0, known: bool = False) -> bool:
        """known: what is whole in the mirror under this name is this checkpoint, unless the last attempt failed."""

        def copy() -> None:
            if not known or "mirror" in self._failing or newest.name not in _complete_in(mirror):
                self._update_mirror(mirror, newest)

        return self._tried("mirror", f"{newest} cannot be copied to {mirror.url}", copy, patience)

    def _tried(self, what: str, problem: str, action: Callable[[], None], patience: float) -> bool:
        """Whether it was done, if need be after some attempts. The first failure of many is told, and that it is over."""
        give_up, (wait, longest) = time.monotonic() + patience, WAIT_S
        while True:
            try:
                action()
            except (OSError, SafetensorError, UserError) as error:
                if what not in self._failing:
                    log.warning("%s (%s): training goes on, and tries again", problem, first_line(error))
                self._failing[what] = first_line(error)
            else:
                if self._failing.pop(what, None):
                    log.info("the %s of the checkpoints is well again", what)
                return True
            if time.monotonic() + wait > give_up:
                return False
            time.sleep(wait)
            wait = min(2 * wait, longest)

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
        there = set(_complete_in(mirror)) - self._damaged
        for path in self.all():
            if path.name not in there and step_of(path) <= step_of(new):
                names = [file.name for file in path.iterdir() if file.name != MANIFEST]
                for name in (*names, MANIFEST):  # the manifest last: with it the copy is complete
                    mirror.upload(path / name, f"{path.name}/{name}")
        best = self.best.name if self.best else _best_in(mirror)
        if best:
            mirror.write(BEST, best.encode())
        self._damaged.discard(new.name)
        whole = [name for name in _complete_in(mirror) if name not in self._damaged]
        older = [name for name in whole if step_of(Path(name)) <= step_of(new)]
        for name in sorted(mirror.list("step_"), key=lambda name: not name.endswith(MANIFEST)):  # manifests first
            if name.split("/")[0] not in (*older[-self.keep :], best):
                mirror.delete(name)

    def _restore(self, mirror: Storage, after: int, until: int | None) -> None:
        """Fetch the newest whole checkpoint of the mirror whose step is later than `after`, and not later than `until`, and the
        best if there is none here."""
        complete = _complete_in(mirror)
        steps = {name: step_of(Path(name)) for name in complete}
        wanted = [name for name in complete if steps[name] > after and (until is None or steps[name] <= until)]
        newest = next((name for name in reversed(wanted) if self._fetch(mirror, name)), None)
        best = "" if self.best else _best_in(mirror)
        if newest and best in complete:
            # The newest gets its name last: a run goes on from there.
            if best != newest and not (self.folder / best).is_dir() and self._fetch(mirror, best):
                put(self._draft(best), self.folder / best)
            if best == newest or (self.folder / best).is_dir():
                self._link_best(best)
        if newest:
            put(self._draft(newest), self.folder / newest)

    def _draft(self, name: str) -> Path:
        return self.folder / f".{name}.draft"

    def _fetch(self, mirror: Storage, name: str) -> bool:
        """Copy a checkpoint of the mirror into a draft here; False, with a warning, if it is damaged."""
        draft = self._draft(name)
        remove(draft)
        draft.mkdir(parents=True)
        for file in mirror.list(f"{name}/"):
            mirror.download(file, draft / file.split("/")[1])
        if _damage(draft) is None:
            return True
        remove(draft)
        self._damaged.add(name)
        log.warning(
            "%s/%s is damaged: it is left out, and goes when the next checkpoint is copied there", mirror.url, name
        )
        return False


def _complete_in(mirror: Storage) -> list[str]:
    """The names of a mirror's complete checkpoints, oldest first."""
    folders = (name.split("/")[0] for name in mirror.list("step_") if name.endswith(f"/{MANIFEST}"))
    return sorted(
        (name for name in folders if name.removeprefix("step_").isdigit()), key=lambda name: step_of(Path(name))
    )


def _best_in(mirror: Storage) -> str:
    """The name of the checkpoint that was copied as the best, "" if none was."""
    try:
        return mirror.read(BEST).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a sentence; None if it is whole."""
    try:
        Checkpoint(folder).check()
    except Damaged as error:
        return str(error).partition(": ")[0]
    return None


def _set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody takes it for one; returns it."""
    names = (f"{folder.name}.damaged{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(path for path in (folder.with_name(name) for name in names) if not path.exists())
    return folder.rename(target)
