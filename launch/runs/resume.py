"""What a training goes on from: the run in its folder or mirror, the data, and the options that were left to the machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from infra.errors import UserError
from infra.storage import LocalStorage, Storage, open_storage, why_unwritable
from launch.runs.data import data_identity
from launch.runs.folder import PRECISION, Config, RunFolder, check_same, default_run_dir, resolved
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, resolve_precision


@dataclass(frozen=True)
class Start(Generic[Config]):
    """folder, checkpointer: where. config: with everything that was left open filled in. data: see `data_identity`.
    checkpoint: what the run goes on from; None at its beginning. adopted: what a continued run has of its beginning where
    this start left it open."""

    folder: RunFolder
    checkpointer: Checkpointer
    config: Config
    data: str
    checkpoint: Checkpoint | None
    adopted: str

    @property
    def state(self) -> Mapping[str, Any]:
        """The checkpoint's; empty where there is none."""
        return self.checkpoint.state if self.checkpoint else {}

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))


def find_start(asked: Config, engine: Engine, run_name: str, find_data: Callable[[str | None], str]) -> Start[Config]:
    """run_name: what a run folder is called before the time, where none is asked for. find_data: gives the data root, given
    that of the run in the folder if there is one. Called on all ranks, and changes nothing but checkpoints: some come
    from a mirror, damaged ones are set aside.
    UserError if the folder holds something else, or a run of other options or data."""
    folder = RunFolder(Path(engine.broadcast(asked.run_dir or default_run_dir(run_name))))
    main = engine.rank == 0
    if main:
        folder.check_place()
    begun = engine.broadcast(folder.saved() if main else None)
    if begun:
        check_same(f"the run in {folder.path}", begun, asked)
    root = engine.broadcast(find_data(begun.get("data.root")) if main else None)
    data = data_identity(root, asked.data.match)
    checkpointer = Checkpointer(folder.checkpoints, asked.loop.keep, _open_mirror(asked.loop.mirror))
    newest = engine.broadcast(checkpointer.recover() if main else None)
    checkpoint = None
    if newest is not None:
        checkpoint = Checkpoint(newest)
        checkpoint.expect("step", "data", "config", "scalers")
        if checkpoint.state["data"] != data:
            match = f", or on another match {asked.data.match}" if asked.data.match else ""
            raise UserError(
                f"{newest} was trained on other data{match}: give its --data to continue it, or another --run-dir"
            )
        check_same(str(newest), checkpoint.state["config"], asked)  # from a mirror it may be another run's
        begun = begun or checkpoint.state["config"]
    precision = asked.engine.precision
    if precision == "auto":
        precision = begun.get(PRECISION) or resolve_precision(precision, engine.device)
    config = resolved(asked, root=root, run_dir=str(folder.path), precision=precision)
    return Start(folder, checkpointer, config, data, checkpoint, _adopted(asked, config, engine) if begun else "")


def _adopted(asked: Config, config: Config, engine: Engine) -> str:
    taken = []
    own = resolve_precision("auto", engine.device)
    if asked.engine.precision == "auto" and config.engine.precision != own:
        taken.append(f"--precision {config.engine.precision} (this machine would choose {own})")
    if asked.data.root is None:
        taken.append(f"--data {config.data.root}")
    return ", ".join(taken)


def _open_mirror(url: str | None) -> Storage | None:
    """UserError for a folder that cannot be written, which would show only when there is a checkpoint to lose."""
    if url is None:
        return None
    mirror = open_storage(url)
    if isinstance(mirror, LocalStorage) and (reason := why_unwritable(mirror.root)):
        raise UserError(f"--loop.mirror {url} cannot be written ({reason}): name another place")
    return mirror
