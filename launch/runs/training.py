"""What every training run has in common, from the first line to the last: data -> method -> engine -> loop -> run folder."""

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic

from infra.background import Background
from infra.config import flatten
from infra.console import ProgressLine, setup_logging
from infra.errors import OUTAGE, Stopped, UserError, exit_code_of
from infra.signals import ToldToStop, current, listening
from infra.views import View
from launch.runs.collapse import CollapseWarnings
from launch.runs.data import data_identity, images_by_split
from launch.runs.folder import Config, RunFolder
from launch.runs.follower import Follower, is_sent
from launch.runs.lock import RunLock, check_shared
from launch.runs.recorder import Recorder
from launch.runs.resume import OWED, PARTS, Start, find_start
from launch.runs.sampler import Draw, Sampler
from launch.runs.status import StatusFile
from launch.runs.together import judged, together
from launch.runs.validation import Validation, Validator, best_of
from pipelines.loader import Loader
from trainer.checkpoint import step_of, write_checkpoint
from trainer.checkpointer import PATIENCE_S
from trainer.engines import Engine, make_engine
from trainer.engines.faster import is_on
from trainer.loop import Broken, Evaluation, Trainer
from trainer.methods import Method
from trainer.networks.compiling import keep_compiled
from trainer.networks.sizes import Sizes
from trainer.pyfunc import is_published
from trainer.state import TrainingState

log = logging.getLogger(__name__)

STOPPED_S = 5.0  # for a mirror, when the run is told to end

Listener = Callable[[dict[str, Any]], None]


class Job(ABC, Generic[Config]):
    """What one kind of training run adds to what all have in common. config: with everything filled in.

    script: the entry script, by its path. unit: what a batch counts, "pairs". shorter: how to have a run of minutes.
    model: the name of the finished model. experiment: MLflow's. title: the run in a few words.
    """

    script: ClassVar[str]
    unit: ClassVar[str]
    shorter: ClassVar[str]
    model: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    @staticmethod
    @abstractmethod
    def run_name(config: Config) -> str:
        """What a run folder is called before the time."""

    @staticmethod
    @abstractmethod
    def find_data(config: Config, before: str | None) -> str:
        """The data root, which may have to be made first; before: see `launch.runs.data.find_data`."""

    @staticmethod
    def whole_batch(config: Config) -> bool:
        """Whether the method needs the whole global batch of a rank at once."""
        return False

    @property
    @abstractmethod
    def experiment(self) -> str: ...

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def view(self) -> View:
        """What is wanted of the training images."""

    @abstractmethod
    def method(self) -> Method[Any, Any]: ...

    @abstractmethod
    def sample_picture(self) -> Draw:
        """What draws the sample pictures; reads the images for them once."""

    def validation(self, engine: Engine, given: Mapping[str, str]) -> Validation | None:
        """How the network is evaluated during training, if it is. given: the method's. Called on all ranks."""
        return None

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the training's own state, the data's identity and the configuration."""
        return {}

    @abstractmethod
    def publish(self, folder: RunFolder, checkpoint: Path) -> None:
        """Leave the finished model in the run folder, the last thing that a run does."""


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
    with listening(config.loop.grace) as stop:
        try:
            with stop.interruptible():
                engine = make_engine(config.engine)
                setup_logging(None, engine.rank)
                engine.watch(stop)
                try:
                    return together(engine, lambda lock: _train(kind, config, engine, lock, tags or {}, listener))
                finally:
                    engine.close()
        except ToldToStop:
            others = int(os.environ.get("RANK", 0)) > 0
            raise Stopped(f"told to stop while no step was under way; {stop.saved}: the same command goes on from there",
                          stop.exit_code, said=others) from None  # fmt: skip


def _train(
    kind: type[Job[Config]], asked: Config, engine: Engine, lock: RunLock, tags: Mapping[str, str],
    listener: Listener | None,
) -> Path:  # fmt: skip
    start = find_start(
        asked, engine, lock, kind.run_name(asked), lambda before: kind.find_data(asked, before), kind.whole_batch(asked)
    )
    engine.use_precision(start.config.engine.precision)
    job, folder, optim = kind(start.config), start.folder, start.optim
    loader = Loader(
        str(job.config.data.root), job.config.data, job.view, seed=job.config.seed, global_batch=optim.global_batch,
        accumulation=optim.accumulation, rank=engine.rank, world_size=engine.world_size, device=engine.device,
        first_step=start.step,
    )  # fmt: skip
    with closing(loader):
        method = job.method()
        check_given(start, method)
        images = [split.image_size for split in loader.splits]
        parts = engine.world_size * optim.accumulation
        check_sizes(method.sizes(optim.global_batch // parts), loader.crop, min(min(size) for size in images))
        if is_on(engine.config.compile, engine.device):
            keep_compiled(folder.path.parent)
        engine.prepare(method, optim)
        validation = job.validation(engine, method.given())
        trainer = Trainer(
            method, engine, optim, job.config.loop, seed=job.config.seed, source_samples=loader.epoch_samples,
            evaluate_every=validation.every if validation else 0.0,
        )  # fmt: skip
        if listener and engine.rank == 0:
            for row in folder.evaluations():
                if row["step"] <= min(start.step, trainer.total_steps - 1):
                    listener(row)
        # The model is the last thing a run leaves: without it, a start that was killed at the end is still to publish it.
        published = engine.broadcast(engine.rank == 0 and is_published(folder.model, start.step))
        if start.step >= trainer.total_steps and published:
            log.info("%s is complete: all %d steps are done", folder.path, trainer.total_steps)
            if engine.rank == 0:
                start.checkpointer.finish()
                if folder.status() != "FINISHED":  # killed after the model was left
                    StatusFile(folder, start.step, trainer.total_steps).end(0)
                if not is_sent(folder):
                    Follower(folder).finish()
            return folder.path
        if start.step > trainer.total_steps:
            raise UserError(f"{folder.path} has done {start.step} steps, more than the {trainer.total_steps} asked for: give "
                            f"--max-steps {start.step} or more, or name another --run-dir")  # fmt: skip
        if start.checkpoint:
            trainer.restore(start.checkpoint)
        current().saved = f"step {start.step} is saved" if start.step else "nothing is saved yet"
        _fit(job, start, lock, trainer, loader, validation, tags, listener)
    return folder.path


def _fit(
    job: Job[Config],
    start: Start[Config],
    lock: RunLock,
    trainer: Trainer,
    loader: Loader,
    validation: Validation | None,
    tags: Mapping[str, str],
    listener: Listener | None,
) -> None:
    """The part of a run that writes: rank 0 does, the others take part in what it asks of them."""
    engine, folder = trainer.engine, start.folder
    main = engine.rank == 0
    draw = job.sample_picture() if main else None
    about = _open(job, start, lock, trainer, tags) if main else {}
    check_shared(folder.lock_file, lock.sign() if main else "", engine)
    if not main:
        setup_logging(folder.rank_log(engine.rank), engine.rank)
    status = StatusFile(folder, start.step, trainer.total_steps) if main else None
    if status:
        current().at_end.append(status.end)
    if status and engine.peers:
        engine.peers.at_end.append(status.end)
    line = ProgressLine(
        trainer.total_steps, start.step, batch=job.config.optim.global_batch, unit=job.unit, enabled=main
    )
    metric = validation.metric if validation else None
    collapse = CollapseWarnings(folder, start.checkpointer, trainer.method.guesses(), metric)
    recorder = Recorder(
        folder, engine, loader.health, start.step, line, job.shorter, status.progress if status else lambda step: None,
        collapse.see,
    )  # fmt: skip
    sample = Sampler(folder, trainer, draw)
    evaluate = None
    if validation:
        evaluate = Validator(folder, trainer, validation, start.state, listener is not None, collapse.evaluated)

    writing = Background()  # of checkpoints; a run that ends, however it does, waits for it

    def described(state: TrainingState, best: Mapping[str, Any] | None) -> dict[str, Any]:
        facts = {
            "best": best,
            "data": start.data,
            "config": flatten(job.config),
            "given": trainer.method.given(),
            PARTS: engine.world_size * start.accumulation,
            OWED: state.owed,
        }
        return {**job.facts(), **facts, "step": state.step, "scalers": state.scalers}

    def examine(state: TrainingState, broken: Broken) -> None:
        if main:
            place = folder.postmortem / f"step_{broken.step}"
            about = {**described(state, start.state.get("best")), "broken": broken.as_json()}
            write_checkpoint(place, state.tensors, about, finite=False)
            log.info("%s has the samples and losses of step %d, and the state that it left", place, broken.step)

    def save(state: TrainingState, evaluation: Evaluation | None) -> None:
        if not main:
            return
        best = best_of(folder, validation.metric) if validation else start.state.get("best")
        writing.start(partial(write, state, evaluation, best))
        if listener and evaluation and state.step < trainer.total_steps:
            writing.wait()  # who is told may want the checkpoint
            listener({"step": evaluation.step, **evaluation.metrics})

    def write(state: TrainingState, evaluation: Evaluation | None, best: Mapping[str, Any] | None) -> None:
        is_best, began = evaluation is not None and evaluation.best, time.monotonic()
        path = start.checkpointer.save_if_possible(
            state.step, state.tensors, described(state, best), best=is_best,
            patience=PATIENCE_S if state.step == trainer.total_steps else 0.0,
        )  # fmt: skip
        if path is None:
            return
        current().saved = f"step {state.step} is saved"
        if status:
            status.saved(state.step)
        recorder.saves.written(began)
        log.info("saved %s%s", path, f", the best by {validation.metric} so far" if is_best and validation else "")
        if is_best and validation and best:
            found = {"best_step": str(best["step"]), f"best_{validation.metric}": f"{best[validation.metric]:.6g}"}
            folder.describe({**about, "tags": about["tags"] | found})

    follower = Follower(folder) if main else None
    code = 0
    try:
        if start.step == 0:
            sample(0)
        with current().deferred(), writing:  # a signal does not keep what is being written from its end
            trainer.fit(
                loader, start.step, recorder=recorder, sample=sample, evaluate=evaluate, save=save, examine=examine,
                owed=bool(start.state.get(OWED)),
            )  # fmt: skip
        complete = start.checkpointer.all() if main else []
        if complete and step_of(complete[-1]) == trainer.total_steps:
            job.publish(folder, complete[-1])
        if main:
            start.checkpointer.finish()
    except SystemExit:  # Ray Tune ends a trial
        code = current().exit_code
        raise
    except BaseException as error:
        raised = judged(engine, error)
        code = exit_code_of(raised)
        if main and isinstance(raised, Stopped) and raised is error and code != OUTAGE:
            kept, code = code, OUTAGE
            start.checkpointer.finish(STOPPED_S)
            code = kept
        if raised is error:
            raise
        raise raised from None
    finally:
        recorder.close()
        if status:
            status.end(code)
        if follower:
            follower.finish()


def _open(
    job: Job[Config], start: Start[Config], lock: RunLock, trainer: Trainer, tags: Mapping[str, str]
) -> dict[str, Any]:
    """Make the run folder and log what begins; returns the description for MLflow (`RunFolder.describe`)."""
    folder = start.folder
    folder.make()
    lock.take(folder.lock_file)
    folder.open(job.config)
    setup_logging(folder.log_file)
    log.info("%s: %s", folder.path, _summary(job, trainer, start.step))
    if start.adopted:
        log.info("as the run began, since nothing else was asked for: %s", start.adopted)
    for words in trainer.method.notes():
        log.info("%s", words)
    for words in losses_not_reached(trainer):
        log.warning("%s", words)
    root = str(job.config.data.root)
    tags = {
        "mlflow.source.name": job.script,
        "mlflow.note.content": f"Run folder: `{folder.path.absolute()}`\n\n{_summary(job, trainer, 0)}",
        **tags,
    }
    data = {"images": images_by_split(root), "SHA-256 of manifest.json": data_identity(root)}
    if job.config.data.match is not None:
        data |= {"match": job.config.data.match, "SHA-256 of manifest.json and match": start.data}
    about = {
        "experiment": job.experiment, "model": job.model, "tags": tags, "keep_logged": job.config.loop.keep_logged,
        "data_set": {"root": root, "digest": start.data, "about": data},
    }  # fmt: skip
    folder.describe(about)
    return about


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


def check_given(start: Start[Config], method: Method[Any, Any]) -> None:
    """UserError if a run is to go on with other networks from elsewhere than it began with, under the names that may change."""
    before, now = start.state.get("given", {}), method.given()
    for name in sorted(before.keys() | now.keys()):
        if start.checkpoint and before.get(name) != now.get(name):
            raise UserError(f"the run in {start.folder.path} began with another network as --{name}: "
                            "give that one to continue it, or name another --run-dir")  # fmt: skip


def _summary(job: Job[Config], trainer: Trainer, first_step: int) -> str:
    engine, start = trainer.engine, f", from step {first_step}" if first_step else ""
    config = job.config
    return (
        f"{job.title}, {trainer.total_steps} steps of {config.optim.global_batch} {job.unit}{start}; "
        f"{engine.kind} x{engine.world_size} on {engine.device}, {config.engine.precision}"
    )


def losses_not_reached(trainer: Trainer) -> list[str]:
    """A sentence for each loss that is asked for, and each update, that begins after this run has ended."""
    schedule, steps = trainer.schedule, trainer.total_steps
    resting = [
        f"this run ends after step {steps}, before the update of the {phase.name} begins (step "
        f"{schedule.first_step_at(phase.start) + 1}), so it leaves it untrained: give an earlier start, or more steps"
        for phase in trainer.method.phases
        if schedule.progress(steps - 1) < phase.start
    ]
    return resting + [
        f"this run ends after step {steps}, before the loss of {option} = {start:g} begins (step "
        f"{schedule.first_step_at(start) + 1}), so it trains and times without it: give a smaller --{option}, or more steps"
        for option, start in trainer.method.late_losses().items()
        if schedule.progress(steps - 1) < start
    ]
