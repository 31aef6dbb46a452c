"""One trial: the job of launch/train.py with other options, in a worker of Ray, or in several."""

import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.queue import Queue

from infra.config import flatten, read_yaml, to_yaml
from infra.errors import Stopped, UserError
from infra.json_lines import read_json
from infra.storage import replacing
from launch.runs.config import JobConfig, make_config, of_any_age
from launch.runs.folder import RunFolder
from launch.runs.training import Listener
from launch.runs.translator import train
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.evaluation.config import BETTER
from tuning import ablations
from tuning.algorithms import TIME
from tuning.cluster import Share
from tuning.folder import SearchFolder
from tuning.results import FINISHED, cause_of
from tuning.spaces import Params, tupled

log = logging.getLogger(__name__)

Row = dict[str, Any]

TAKEN_OVER = "taken_over.json"  # in a run folder: whose checkpoint it went on from last


@dataclass(frozen=True)
class Settings:
    """What all trials of a search have in common.

    folder: the search's. options: flat. table: see `ablations.options`. tags: of the MLflow runs. store: MLflow's address.
    exchange: hand checkpoints to Ray, for trials to take over from each other.
    """

    folder: Path
    options: Mapping[str, Any]
    table: str | None
    tags: Mapping[str, str]
    store: str
    share: Share
    exchange: bool

    def config(self, number: int, params: Params) -> JobConfig:
        run_dir = SearchFolder(self.folder).run_dir(number)
        return make_config(self.options, ablations.options(self.table, params, self.options), {"run_dir": str(run_dir)})


def run_trial(params: dict[str, Any], settings: Settings) -> None:
    """What Ray Tune runs; started again for the same trial it continues. What goes wrong inside becomes the trial's
    `cause` and ends nothing else; only a process that dies is left to Ray to start again."""
    number, params = int(str(tune.get_context().get_trial_name())), tupled(params)
    config = settings.config(number, params)
    folder = RunFolder(Path(str(config.run_dir)))
    reporter = _Reporter(folder, settings.exchange)
    # A trial of a killed search may live on for a moment.
    with SearchFolder(settings.folder).lock(number):
        try:
            if donor := tune.get_checkpoint():
                with donor.as_directory() as path:
                    take_over(folder, Path(path), params)
            if settings.share.ranks == 1:
                _train(config, settings, reporter)
            else:
                _train_on_ranks(config, settings, reporter)
        except Exception as error:
            if _may_be_a_death(error):
                raise
            log.exception("trial %d failed", number)
            outcome: Row = {"cause": cause_of(error)}
        else:
            outcome = {FINISHED: True}
    # Without a count of evaluations, which would have a scheduler stop or change what is over.
    last = folder.evaluations()[-1:]
    tune.report({**(_metrics(last[0]) if last else {}), "node": _node(), **outcome})


def _train(config: JobConfig, settings: Settings, listener: Listener) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = settings.store
    train(config, tags=settings.tags, listener=listener)


# ---- several processes ----------------------------------------------------------------------------------------------


def _train_on_ranks(config: JobConfig, settings: Settings, listener: Listener) -> None:
    """A TorchTrainer of Ray Train runs the job; rank 0 sends its metrics here, the only process that can report to Tune."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    share, news = settings.share, Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _run_rank,
        train_loop_config={"config": config, "settings": settings, "news": news},
        scaling_config=ScalingConfig(
            num_workers=share.ranks, use_gpu=share.gpus > 0,
            resources_per_worker={"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})},
        ),
        run_config=RunConfig(
            name=f"ranks-{tune.get_context().get_trial_id()}", storage_path=str(SearchFolder(settings.folder).ray)
        ),
    )  # fmt: skip
    # Daemon, since it must not keep alive what Tune wants to end.
    follower = threading.Thread(target=_listen, args=(listener, news), daemon=True)
    follower.start()
    try:
        trainer.fit()
    finally:
        news.put(None)
        follower.join()


def _listen(listener: Listener, news: Queue) -> None:
    for row in iter(news.get, None):
        listener(row)


def _run_rank(given: dict[str, Any]) -> None:
    _train(given["config"], given["settings"], given["news"].put)


# ---- what Tune gets ----------------------------------------------------------------------------------------------


class _Reporter:
    """Tells Tune of evaluations, and how far a trial is, in evaluations: the time in which schedulers reckon.

    exchange: give it the checkpoints too, for other trials to take over. Without, a trial that is started again tells of
    everything once more, since Tune has forgotten it.
    """

    def __init__(self, folder: RunFolder, exchange: bool) -> None:
        self.folder, self.exchange = folder, exchange
        self.interval = 0  # steps between evaluations

    def __call__(self, row: Row) -> None:
        self.interval = self.interval or row["step"]
        report = {**_metrics(row), TIME: round(row["step"] / self.interval), "node": _node()}
        checkpoint = self.folder.checkpoints / f"step_{row['step']}"
        if not self.exchange:
            tune.report(report)
        elif checkpoint.is_dir():
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(checkpoint))


def _metrics(row: Row) -> Row:
    return {"step": row["step"], **{name: row[name] for name in BETTER if isinstance(row.get(name), float)}}


def _node() -> str:
    return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"


def _may_be_a_death(error: Exception) -> bool:
    """Whether perhaps a rank's process died, which its fellows only see as a lost connection: worth another start."""
    failures = getattr(error, "worker_failures", {})  # of Ray Train: {rank: error}
    return bool(failures) and not any(isinstance(failure, UserError | Stopped) for failure in failures.values())


# ---- exploit --------------------------------------------------------------------------------------------------------


def take_over(folder: RunFolder, donor: Path, params: Mapping[str, Any]) -> None:
    """Have the run in `folder` go on from another run's checkpoint, weights, optimisers and step, with these options.
    Its evaluations until then become the other run's, since they are of the weights that it has now.

    Does nothing if the checkpoint is the run's own, or was taken over before: then it continues from its newest. A kill in
    between leaves a run that begins anew, or takes over anew, never one that is half the one and half the other.
    """
    own, checkpoint = read_yaml(folder.config_file), Checkpoint(donor)
    origin = {"run_dir": checkpoint.state["config"]["run_dir"], "step": checkpoint.state["step"]}
    if origin["run_dir"] == own["run_dir"] or read_json(folder.path / TAKEN_OVER, dict) == origin:
        return
    config = {**of_any_age(checkpoint.state["config"]), **params, "run_dir": own["run_dir"]}
    tensors = {path.stem: checkpoint.tensors(path.stem) for path in donor.glob("*.safetensors")}
    shutil.rmtree(folder.checkpoints)
    with replacing(folder.config_file) as file:
        file.write(to_yaml(flatten(make_config(config))).encode())
    step = checkpoint.state["step"]
    history = RunFolder(Path(checkpoint.state["config"]["run_dir"])).evaluations()
    with replacing(folder.evaluations_file) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in history if row["step"] <= step)
    Checkpointer(folder.checkpoints, keep=1).save(step, tensors, {**checkpoint.state, "config": config})
    with replacing(folder.path / TAKEN_OVER) as file:
        file.write(json.dumps(origin).encode())
    log.info("took over step %d of %s", step, checkpoint.state["config"]["run_dir"])
