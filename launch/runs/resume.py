"""What a training goes on from: the run in its folder or mirror, the data, and the options that were left to the machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from infra.disk import is_in_store, why_unwritable
from infra.errors import UserError
from infra.storage import LocalStorage, Storage, open_storage
from launch.runs.config import TrainingConfig
from launch.runs.data import data_identity
from launch.runs.folder import PRECISION, Config, RunFolder, check_same, default_run_dir, resolved
from launch.runs.lock import RunLock
from trainer.checkpoint import Checkpoint, checkpoints_in
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, resolve_precision
from trainer.optim import OptimConfig

# Of a checkpoint's state:
PARTS = "parts"  # into how many micro-batches the ranks cut a step
OWED = "owed"  # whether the evaluation of its step is still to be made


@dataclass(frozen=True)
class Start(Generic[Config]):
    """folder, checkpointer: where. config: with everything that was left open filled in. data: see `data_identity`.
    checkpoint: what the run goes on from; None at its beginning. accumulation: micro-batches per step and rank. adopted: what
    a continued run has of its beginning where this start left it open."""

    folder: RunFolder
    checkpointer: Checkpointer
    config: Config
    data: str
    checkpoint: Checkpoint | None
    accumulation: int
    adopted: str

    @property
    def optim(self) -> OptimConfig:
        """With the accumulation in use: the configuration keeps the one that was asked for."""
        return replace(self.config.optim, accumulation=self.accumulation)

    @property
    def state(self) -> Mapping[str, Any]:
        """The checkpoint's; empty where there is none."""
        return self.checkpoint.state if self.checkpoint else {}

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))


def find_start(
    asked: Config, engine: Engine, lock: RunLock, run_name: str, find_data: Callable[[str | None], str],
    whole_batch: bool,
) -> Start[Config]:  # fmt: skip
    """lock: taken if the folder is there. run_name: what a run folder is called before the time, where none is asked for; an
    attempt of the same launcher's after the first has that of the first. find_data: gives the data root, given that of the run
    in the folder if there is one. whole_batch: whether the method takes no micro-batches. Called on all ranks, and changes
    nothing but checkpoints: some come from a mirror, damaged ones are set aside.
    UserError if the folder holds something else, or a run of other options or data."""
    main = engine.rank == 0
    if asked.run_dir and is_in_store(asked.run_dir):
        raise UserError(f"--run-dir {asked.run_dir} is a place in a store: name a folder here, and give --loop.mirror to have "
                        "the checkpoints there, too")  # fmt: skip
    own = asked.run_dir or (engine.remember("run_dir", default_run_dir(run_name)) if main else "")
    folder = RunFolder(Path(engine.broadcast(own)))
    if main:
        folder.check_place()
    saved = folder.saved() if main else None
    if main and folder.path.exists():
        lock.take(folder.lock_file)
    begun = engine.broadcast(saved)
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
    accumulation = asked.optim.accumulation
    if checkpoint is not None:
        accumulation = accumulation_on(engine.world_size, asked.optim, checkpoint.state, whole_batch)
    adopted = _adopted(asked, config, engine, accumulation) if begun else ""
    return Start(folder, checkpointer, config, data, checkpoint, accumulation, adopted)


def has_finished(folder: RunFolder, config: TrainingConfig) -> bool:
    """Whether a run of this configuration on these data, one of many in a folder, is there and has ended. UserError for one of
    another (`check_same`), or of other data, as far as a checkpoint is left to tell."""
    if saved := folder.saved():
        check_same(str(folder.path), saved, config)
    if not folder.model.is_dir():  # the last thing that a run leaves
        return False
    assert config.data.root is not None
    for newest in checkpoints_in(folder.checkpoints)[-1:]:
        if Checkpoint(newest).state.get("data") != data_identity(config.data.root, config.data.match):
            raise UserError(f"{folder.path} was trained on other data than {config.data.root} has now: name another --out, or "
                            "delete it to train it again")  # fmt: skip
    return True


def accumulation_on(ranks: int, optim: OptimConfig, state: Mapping[str, Any], whole_batch: bool) -> int:
    """Micro-batches per step and rank of a run that goes on from this state. What is asked for otherwise than before holds;
    else micro-batches become no larger than they were, since the global batch stays and these have fitted. whole_batch: the
    method takes no parts. UserError if so many ranks cannot share the global batch."""
    batch, asked = optim.global_batch, optim.accumulation
    if batch % ranks:
        fit = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
        raise UserError(f"the run has a global batch of {batch}, which {ranks} ranks cannot share evenly: continue it on one of "
                        f"{fit} ranks")  # fmt: skip
    parts = state.get(PARTS)
    if whole_batch or parts is None or asked != state["config"].get("optim.accumulation", asked):
        return asked
    counts = (count for count in range(1, batch // ranks + 1) if (batch // ranks) % count == 0)
    return next((count for count in counts if ranks * count >= parts), batch // ranks)


def _adopted(asked: Config, config: Config, engine: Engine, accumulation: int) -> str:
    taken = []
    if accumulation != asked.optim.accumulation:
        taken.append(
            f"--optim.accumulation {accumulation} (micro-batches no larger than before, on {engine.world_size} ranks)"
        )
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
