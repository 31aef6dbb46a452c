"""What every training run has in common: data -> method -> engine -> loop -> run folder and MLflow."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic

from infra.config import flatten
from infra.console import setup_logging
from infra.errors import Stopped, UserError
from infra.storage import LocalStorage, Storage, open_storage, why_unwritable
from infra.tracking import Status, Tracker
from launch.runs.data import data_identity, images_by_split
from launch.runs.folder import PRECISION, Config, RunFolder, check_same, default_run_dir, resolved
from launch.runs.recorder import Draw, Judging, Listener, RankObserver, RunObserver
from pipelines.health import DataHealth
from pipelines.loader import Loader
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, make_engine, resolve_precision
from trainer.loop import Observer, Trainer
from trainer.methods import Method
from trainer.networks.sizes import Sizes

log = logging.getLogger(__name__)


class Job(ABC, Generic[Config]):
    """What one kind of training run adds to what all have in common.

    script: the entry script, by its path. unit: what a batch counts, "pairs". shorter: how to have a run of minutes.
    experiment: MLflow's. run_name: what a run folder is called before the time. title: the run in a few words.
    """

    script: ClassVar[str]
    unit: ClassVar[str]
    shorter: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    @abstractmethod
    def experiment(self) -> str: ...

    @property
    @abstractmethod
    def run_name(self) -> str: ...

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def find_data(self, before: str | None) -> str:
        """The data root, which may have to be made first; before: see `launch.runs.data.find_data`. Called on rank 0 alone."""

    @abstractmethod
    def loader(self, **options: Any) -> Loader[Any]:
        """The training batches; options: as `Loader` takes them, from the seed on."""

    @abstractmethod
    def method(self) -> Method[Any, Any]: ...

    @abstractmethod
    def sample_picture(self) -> Draw:
        """What draws the sample pictures; reads the images for them once."""

    def judging(self, engine: Engine) -> Judging | None:
        """How the network is judged during training, if it is. Called on all ranks."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the training's own state, the data's identity and the configuration."""

    @abstractmethod
    def publish(self, folder: RunFolder, checkpoint: Path, tracker: Tracker) -> None:
        """Leave the finished model in the run folder, the last thing that a run does, and in MLflow."""


def run(
    kind: type[Job[Config]],
    config: Config,
    *,
    tags: Mapping[str, str] | None = None,
    listener: Listener | None = None,
) -> Path:
    """Train, or continue, one run to its end on this process's rank; returns the run folder.

    tags: of the MLflow run, more than it has anyway. listener: is told on rank 0 of every evaluation but the one at the
    end, each with its "step", once its checkpoint is saved; of those before this start first. Raises UserError before
    anything is written for what cannot work, Stopped for an early end.
    """
    engine = make_engine(config.engine)
    setup_logging(None, engine.rank)
    try:
        return _train(kind, config, engine, tags or {}, listener)
    finally:
        engine.close()


def _train(
    kind: type[Job[Config]], asked: Config, engine: Engine, tags: Mapping[str, str], listener: Listener | None
) -> Path:
    run_dir = engine.broadcast(asked.run_dir or default_run_dir(kind(asked).run_name))
    folder = RunFolder(Path(run_dir))
    if engine.rank == 0:
        folder.check_place()
    begun = engine.broadcast(folder.saved() if engine.rank == 0 else None)
    if begun:
        check_same(f"the run in {folder.path}", begun, asked)
    root = engine.broadcast(kind(asked).find_data(begun.get("data.root")) if engine.rank == 0 else None)
    data = data_identity(root)
    mirror = _open_mirror(asked.loop.mirror) if asked.loop.mirror else None
    checkpointer = Checkpointer(folder.checkpoints, asked.loop.keep, mirror)
    checkpoint = _newest_checkpoint(checkpointer, engine, asked, data)
    first_step = checkpoint.state["step"] if checkpoint else 0
    begun = begun or (checkpoint.state["config"] if checkpoint else {})  # in the mirror alone
    precision = _precision(engine, asked, begun)
    job = kind(resolved(asked, root=root, run_dir=run_dir, precision=precision))
    config, optim = job.config, job.config.optim
    adopted = _adopted(asked, config, engine) if begun else ""

    loader = job.loader(
        seed=config.seed, global_batch=optim.global_batch, accumulation=optim.accumulation, rank=engine.rank,
        world_size=engine.world_size, device=engine.device, first_step=first_step,
    )  # fmt: skip
    try:
        method = job.method()
        images = [split.image_size for split in loader.splits]
        parts = engine.world_size * optim.accumulation
        check_sizes(method.sizes(optim.global_batch // parts), loader.crop, min(min(size) for size in images))
        engine.prepare(method, optim)
        judging = job.judging(engine)
        trainer = Trainer(
            method, engine, optim, config.loop, seed=config.seed, source_samples=loader.epoch_samples,
            evaluate_every=judging.every if judging else 0.0,
        )  # fmt: skip
        if listener and engine.rank == 0:
            for row in folder.evaluations():
                if row["step"] <= min(first_step, trainer.total_steps - 1):
                    listener(row)
        # The model is the last thing a run leaves: without it, a start that was killed at the end is still to publish it.
        if first_step >= trainer.total_steps and folder.model.is_dir():
            log.info("%s is complete: all %d steps are done", folder.path, trainer.total_steps)
            return folder.path
        if checkpoint:
            trainer.restore(checkpoint)
        observer: Observer
        if engine.rank == 0:
            observer = _observer(
                job, folder, trainer, checkpointer, judging, loader.health, checkpoint, data, adopted, tags, listener
            )
        else:
            observer = RankObserver(trainer, judging, loader.health)
        _fit(trainer, loader, first_step, observer)
    finally:
        loader.close()
    return folder.path


def _open_mirror(url: str) -> Storage:
    """UserError for a folder that cannot be written, which would show only when there is a checkpoint to lose."""
    mirror = open_storage(url)
    if isinstance(mirror, LocalStorage) and (reason := why_unwritable(mirror.root)):
        raise UserError(f"--loop.mirror {url} cannot be written ({reason}): name another place")
    return mirror


def check_sizes(sizes: Sizes, crop: tuple[int, int], prepared: int) -> None:
    """UserError if networks do not take images of a size: crop, (width, height).

    prepared: the shorter side of the images that are cut. Whole images of another size are refused as well, and not cut to
    the largest that fits, since --crop none promises that all of an image is seen.
    """
    if sizes.fit(*crop):
        return
    if (largest := sizes.up_to(min(crop))) is not None:
        remedy = f"pass --crop {largest}, or prepare the images in a size that fits"
    elif sizes.first <= prepared:
        remedy = f"pass --crop {sizes.first} or more"
    else:
        remedy = f"prepare images of {sizes.first}x{sizes.first} or more, or give options of smaller networks"
    raise UserError(
        f"images of {crop[0]}x{crop[1]} pixels do not suit the networks (either side must be {sizes}): {remedy}"
    )


def _precision(engine: Engine, asked: Config, begun: Mapping[str, Any]) -> str:
    """The precision of the run: as asked for, else as the run began, else as this machine has it best. The engine's, too."""
    precision = asked.engine.precision
    if precision == "auto":
        precision = begun.get(PRECISION) or resolve_precision(precision, engine.device)
    engine.use_precision(precision)
    return precision


def _newest_checkpoint(checkpointer: Checkpointer, engine: Engine, asked: Config, data: str) -> Checkpoint | None:
    path = engine.broadcast(checkpointer.latest() if engine.rank == 0 else None)
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if checkpoint.state["data"] != data:
        raise UserError(f"{path} was trained on other data: give its --data to continue it, or another --run-dir")
    check_same(str(path), checkpoint.state["config"], asked)  # from a mirror it may be another run's
    return checkpoint


def _observer(
    job: Job[Config],
    folder: RunFolder,
    trainer: Trainer,
    checkpointer: Checkpointer,
    judging: Judging | None,
    health: DataHealth,
    checkpoint: Checkpoint | None,
    data: str,
    adopted: str,
    tags: Mapping[str, str],
    listener: Listener | None,
) -> RunObserver:
    draw = job.sample_picture()
    folder.open(job.config)
    setup_logging(folder.log_file)
    options = flatten(job.config)
    first_step = checkpoint.state["step"] if checkpoint else 0
    log.info("%s: %s", folder.path, _summary(job, trainer, first_step))
    if adopted:
        log.info("as the run began, since nothing else was asked for: %s", adopted)
    for words in losses_not_reached(trainer):
        log.warning("%s", words)
    tags = {
        "mlflow.source.name": job.script,
        "mlflow.note.content": f"Run folder: `{folder.path.absolute()}`\n\n{_summary(job, trainer, 0)}",
        **tags,
    }
    tracker = Tracker.start(job.experiment, folder.path.name, options, tags=tags, run_id_file=folder.run_id_file)
    root = str(job.config.data.root)
    tracker.data_set(root, data, {"images": images_by_split(root), "SHA-256 of manifest.json": data})

    def publish(finished: Path, tracker: Tracker) -> None:
        job.publish(folder, finished, tracker)

    return RunObserver(
        folder, tracker, trainer, checkpointer, judging=judging, health=health, draw=draw, publish=publish, unit=job.unit,
        shorter=job.shorter, listener=listener,
        begun=checkpoint.state if checkpoint else {}, state={"data": data, "config": options, **job.facts()},
    )  # fmt: skip


def _adopted(asked: Config, config: Config, engine: Engine) -> str:
    """What a continued run has of its beginning, where this start left it open."""
    taken = []
    own = resolve_precision("auto", engine.device)
    if asked.engine.precision == "auto" and config.engine.precision != own:
        taken.append(f"--precision {config.engine.precision} (this machine would choose {own})")
    if asked.data.root is None:
        taken.append(f"--data {config.data.root}")
    return ", ".join(taken)


def _summary(job: Job[Config], trainer: Trainer, first_step: int) -> str:
    engine, start = trainer.engine, f", from step {first_step}" if first_step else ""
    config = job.config
    return (
        f"{job.title}, {trainer.total_steps} steps of {config.optim.global_batch} {job.unit}{start}; "
        f"{engine.kind} x{engine.world_size} on {engine.device}, {config.engine.precision}"
    )


def losses_not_reached(trainer: Trainer) -> list[str]:
    """A sentence for each loss that is asked for and begins after this run has ended."""
    schedule, steps = trainer.schedule, trainer.total_steps
    return [
        f"this run ends after step {steps}, before the loss of {option} = {start:g} begins (step "
        f"{schedule.first_step_at(start) + 1}), so it trains and times without it: give a smaller --{option}, or more steps"
        for option, start in trainer.method.late_losses().items()
        if schedule.progress(steps - 1) < start
    ]


def _fit(trainer: Trainer, loader: Loader[Any], first_step: int, observer: Observer) -> None:
    status: Status = "FAILED"
    try:
        if first_step == 0:
            observer.sample(0)
        trainer.fit(loader, first_step, observer)
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt, SystemExit):  # the last: Ray Tune ends a trial
        status = "KILLED"
        raise
    finally:
        observer.close(status)
