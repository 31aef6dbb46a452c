"""One training job, wired: data -> method -> engine -> loop -> run folder and MLflow."""

import hashlib
import logging
from pathlib import Path

from infra.config import flatten
from infra.console import setup_logging
from infra.errors import Stopped, UserError
from infra.storage import open_storage
from infra.tracking import Status, Tracker
from launch.config import JobConfig
from launch.data import find_data
from launch.observer import RunObserver, fixed_grid
from launch.run_folder import RunFolder, check_same, default_run_dir, resolved
from pipelines.loader import UnpairedLoader
from pipelines.manifest import MANIFEST, load_manifest
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.engines import Engine, make_engine, resolve_precision
from trainer.loop import Observer, Trainer
from trainer.methods import Cut

log = logging.getLogger(__name__)


def train(config: JobConfig) -> Path:
    """Train, or continue, one run to its end on this process's rank; returns the run folder.

    Raises UserError before anything is written for what cannot work, Stopped for an early end.
    """
    engine = make_engine(config.engine)
    setup_logging(None, engine.rank)
    try:
        return _train(_resolve(config, engine), engine)
    finally:
        engine.close()


def _resolve(config: JobConfig, engine: Engine) -> JobConfig:
    """Fill in what was left open: where the data is (rank 0 may have to draw it first), the precision, the folder."""
    root = engine.broadcast(find_data(config.task, config.data.root) if engine.rank == 0 else None)
    run_dir = engine.broadcast(config.run_dir or default_run_dir(config))
    precision = resolve_precision(config.engine.precision, engine.device)
    return resolved(config, root=root, run_dir=run_dir, precision=precision)


def _train(config: JobConfig, engine: Engine) -> Path:
    folder = RunFolder(Path(str(config.run_dir)))
    if engine.rank == 0:
        folder.check(config)
    data = _data_identity(str(config.data.root))
    mirror = open_storage(config.loop.mirror) if config.loop.mirror else None
    checkpointer = Checkpointer(folder.checkpoints, config.loop.keep, mirror)
    checkpoint = _newest_checkpoint(checkpointer, engine, config, data)
    first_step = checkpoint.state["step"] if checkpoint else 0

    optim = config.optim
    loader = UnpairedLoader(
        str(config.data.root), config.data, seed=config.seed, global_batch=optim.global_batch,
        accumulation=optim.accumulation, rank=engine.rank, world_size=engine.world_size, device=engine.device,
        first_step=first_step,
    )  # fmt: skip
    try:
        method = Cut(config.method, config.model, seed=config.seed, global_batch=optim.global_batch)
        engine.prepare(method, optim)
        trainer = Trainer(method, engine, optim, config.loop, seed=config.seed, source_samples=loader.source_samples)
        # The model is the last thing a run leaves: without it, a start that was killed at the end is still to publish it.
        if first_step >= trainer.total_steps and folder.model.is_dir():
            log.info("%s is complete: all %d steps are done", folder.path, trainer.total_steps)
            return folder.path
        if checkpoint:
            trainer.restore(checkpoint)
        observer = (
            _observer(config, folder, trainer, checkpointer, first_step, data) if engine.rank == 0 else Observer()
        )
        _fit(trainer, loader, first_step, observer)
    finally:
        loader.close()
    return folder.path


def _data_identity(root: str) -> str:
    """SHA-256 of the manifest, which has the hash of every shard: the same data anywhere, or other data."""
    storage = open_storage(root)
    load_manifest(storage)  # says what is wrong where there is none
    return hashlib.sha256(storage.read(MANIFEST)).hexdigest()


def _newest_checkpoint(checkpointer: Checkpointer, engine: Engine, config: JobConfig, data: str) -> Checkpoint | None:
    path = engine.broadcast(checkpointer.latest() if engine.rank == 0 else None)
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if checkpoint.state["data"] != data:
        raise UserError(f"{path} was trained on other data: give its --data to continue it, or another --run-dir")
    check_same(str(path), checkpoint.state["config"], config)  # from a mirror it may be another run's
    return checkpoint


def _observer(
    config: JobConfig, folder: RunFolder, trainer: Trainer, checkpointer: Checkpointer, first_step: int, data: str
) -> RunObserver:
    grid = fixed_grid(str(config.data.root), config.loop.samples, config.data.cache_dir)
    folder.open(config)
    setup_logging(folder.log_file)
    options = flatten(config)
    log.info("%s: %s", folder.path, _summary(config, trainer, first_step))
    tags = {
        "mlflow.source.name": "launch/train.py",
        "mlflow.note.content": f"Run folder: `{folder.path.absolute()}`\n\n{_summary(config, trainer, 0)}",
    }
    tracker = Tracker.start(config.task, folder.path.name, options, tags=tags, run_id_file=folder.run_id_file)
    kept = {"data": data, "config": options}
    return RunObserver(folder, tracker, trainer, checkpointer, grid, first_step=first_step, state=kept)


def _summary(config: JobConfig, trainer: Trainer, first_step: int) -> str:
    engine, start = trainer.engine, f", from step {first_step}" if first_step else ""
    return (
        f"{config.method.name} on {config.task}, {trainer.total_steps} steps of {config.optim.global_batch} pairs{start}; "
        f"{engine.kind} x{engine.world_size} on {engine.device}, {config.engine.precision}"
    )


def _fit(trainer: Trainer, loader: UnpairedLoader, first_step: int, observer: Observer) -> None:
    status: Status = "FAILED"
    try:
        if first_step == 0:
            observer.sample(0)
        trainer.fit(loader, first_step, observer)
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        observer.close(status)
