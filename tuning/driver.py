"""A search from beginning to end: settle what was asked for, run the trials, say what came out."""

import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import Timeout
from PIL import Image

from infra.config import to_yaml
from infra.console import setup_logging
from infra.errors import INTERRUPTED, Stopped, UserError
from infra.json_lines import read_json
from infra.ray_cluster import this_machine
from infra.storage import replacing
from infra.tracking import MlflowRun, store_uri, ui_command
from launch.runs.config import JobConfig, make_config
from launch.runs.data import data_identity
from launch.runs.folder import RunFolder
from trainer.segmentation.load import load_segmenter, weights_sha256
from tuning import ablations
from tuning.cluster import Share, connected, share_out
from tuning.config import Request, default_name, from_file
from tuning.folder import SearchFolder
from tuning.landscape import landscape
from tuning.registry import SearchRun, end_runs, register
from tuning.results import RETRIES, Record, best_record, of_run, record_of, shown, table, write_best, write_csv
from tuning.settle import Design, design, evaluations, first_decision, settle

if TYPE_CHECKING:  # importing it takes seconds
    from ray.tune.experiment import Trial

log = logging.getLogger(__name__)

NOTHING_FINISHED = 1  # exit code
TRIAL_MEMORY = 200 * 2**20  # bytes, of the process that watches over a trial's ranks
CHECKPOINTS = 4  # kept by Ray of each trial, for others to take over


def search(request: Request) -> str:
    """Run, or continue, a search to its end; returns what to print. Raises UserError before any trial starts for what
    cannot work, Stopped if it was interrupted."""
    setup_logging(None)
    folder = _folder(request)
    if request.search.resume:
        request = _resumed(request, folder)
    made = design(request)
    with ExitStack() as stack:
        machines = stack.enter_context(connected(request.search)) if request.search.address else [this_machine()]
        share = share_out(request.search, machines)
        if not request.search.resume:
            request = settle(request, gpu=share.gpus > 0)
            made = design(request)  # with the taps and ranges that hold for this data
        folder.trials.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(folder.lock().acquire(timeout=0))
        except Timeout:
            raise UserError(
                f"the search {folder.name} is running in another process: wait for it, or stop it"
            ) from None
        _keep_made_of(folder, make_config(request.options))
        with replacing(folder.request_file) as file:
            file.write(to_yaml(request.flat()).encode())
        setup_logging(folder.log_file)
        if not request.search.address:
            stack.enter_context(connected(request.search))
        return _run(request, made, share, folder)


def _folder(request: Request) -> SearchFolder:
    """UserError if there is none to continue, or one in the way."""
    search = request.search
    folder = SearchFolder.named(search.resume or search.name or default_name(request))
    begun = folder.request_file.exists()
    if search.resume and not begun:
        raise UserError(f"there is no search runs/search-{search.resume} to resume: check the name")
    if search.resume and list(folder.trials.glob("*.json")):
        raise UserError(f"{folder.path} was begun by an earlier version, and cannot go on: begin another search")
    if begun and not search.resume:
        raise UserError(f"{folder.path} exists: continue it with --resume {folder.name}, or give another --name")
    return folder


def _resumed(request: Request, folder: SearchFolder) -> Request:
    """The search as it was begun, with what may be given anew."""
    before, now = from_file(folder.request_file), request.search
    again: dict[str, Any] = {
        "address": now.address, "dashboard": now.dashboard,
        "max_concurrent": now.max_concurrent or before.search.max_concurrent,
    }  # fmt: skip
    return replace(before, search=replace(before.search, **again))


def _keep_made_of(folder: SearchFolder, config: JobConfig) -> None:
    """Write down what data the trials have and what evaluates them. UserError if that has changed since the search began: its
    trials would not compare."""
    judge, extractor = config.evaluation.segmenter, config.evaluation.inception
    found = {
        "data.root": data_identity(str(config.data.root), config.data.match),
        "evaluation.segmenter": weights_sha256(load_segmenter(Path(judge))) if judge else None,
        "evaluation.inception": hashlib.sha256(Path(extractor).read_bytes()).hexdigest() if extractor else None,
    }
    before = read_json(folder.made_of_file, dict)
    if changed := [name for name in before if before[name] != found.get(name)]:
        raise UserError(f"what the search {folder.name} has as {changed[0]} has changed since it began: put it back, or begin "
                        "another search")  # fmt: skip
    with replacing(folder.made_of_file) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())


def _run(request: Request, made: Design, share: Share, folder: SearchFolder) -> str:
    config = make_config(request.options)
    metric = str(request.search.metric)
    options = {name: str(value) for name, value in request.flat().items()}
    parent = SearchRun(folder, config.task)
    parent.send(MlflowRun.status, "RUNNING")
    parent.send(MlflowRun.params, options)
    parent.send(MlflowRun.tags, {"mlflow.source.name": "tuning/search.py", **_description(folder, "")})
    tags = {"search": folder.name, **parent.tags}
    status: Any = "FAILED"
    try:
        log.info("%s: %d trials, %d at once, best in %s", folder.path, made.total, share.concurrent, metric)
        records = _tune(request, made, share, folder, tags)
        end_runs(folder, records)
        if len(records) < made.total or any(record.status == "running" for record in records):
            status = "KILLED"
            raise Stopped(f"stopped: --resume {folder.name} goes on from here", INTERRUPTED)
        text = _leave(request, made, folder, parent, records)
        for checkpoint in folder.ray_experiment.glob("*/checkpoint_*"):  # of no use to trials that are over
            shutil.rmtree(checkpoint)
        status = "FINISHED"
        return text
    finally:
        parent.send(MlflowRun.status, status)


def _description(folder: SearchFolder, results: str) -> dict[str, str]:
    """The tag that MLflow shows as a run's description, in Markdown."""
    return {"mlflow.note.content": f"Search folder: `{folder.path}`\n\n{results}"}


def _tune(request: Request, made: Design, share: Share, folder: SearchFolder, tags: Mapping[str, str]) -> list[Record]:
    """Run the trials that are left; all there are, by number."""
    from ray import tune

    from tuning.algorithms import Progress, make_scheduler, make_searcher
    from tuning.trial import Settings, run_trial

    metric, kind = str(request.search.metric), request.search.scheduler
    searcher = "grid" if made.grid else request.search.searcher
    seed = make_config(request.options).seed
    settings = Settings(folder.path, request.options, made.table, tags, store_uri(), share, exchange=kind == "pbt")

    def trial(params: dict[str, Any]) -> None:
        run_trial(params, settings)

    random.seed(seed)  # from both of which PBT draws
    np.random.seed(seed % 2**32)
    first = first_decision(request, made) if kind != "none" else 1
    # All of PBT's trials are alive at once, and take turns.
    concurrent = 0 if kind == "pbt" else share.concurrent
    search = make_searcher(searcher, metric, seed=seed, trials=made.total, concurrent=concurrent)
    begins_at = 1 if searcher == "optuna" else 0  # Ray's count of trials

    def name(trial: "Trial") -> str:
        return f"{int(trial.experiment_tag.split('_')[0]) - begins_at:04}"

    # The ranks of a trial ask for places of their own.
    place: dict[str, float] = {"CPU": share.cpus, "GPU": share.gpus} if share.ranks == 1 else {"memory": TRIAL_MEMORY}
    tune.run(
        trial, name=folder.ray_experiment.name, storage_path=str(folder.ray), resume="AUTO", config=made.param_space(),
        search_alg=search, scheduler=make_scheduler(kind, made.space, evaluations(request), first, metric, folder),
        num_samples=1 if made.grid else made.total, resources_per_trial=place, max_failures=RETRIES,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=CHECKPOINTS), trial_name_creator=name,
        trial_dirname_creator=name, raise_on_failed_trial=False, verbose=0,
        callbacks=[Progress(metric, made.total, search, concurrent)],
    )  # fmt: skip
    # As they were saved: an interrupted search says of every trial that it has ended.
    trials = tune.ExperimentAnalysis(str(folder.ray_experiment)).trials or []
    return sorted(map(record_of, trials), key=lambda record: record.number)


def _leave(request: Request, made: Design, folder: SearchFolder, parent: SearchRun, records: Sequence[Record]) -> str:
    """Write the results down, here and in MLflow, and say what they are."""
    config, metric = make_config(request.options), str(request.search.metric)
    write_csv(folder, records)
    parent.send(MlflowRun.artifacts, folder.csv_file, "search")
    best = best_record(records, metric)
    lines = [table(records, metric), ""]
    if best is None:
        log.info("%s", lines[0])
        raise Stopped(f"no trial was finished: their causes are in {folder.csv_file}", NOTHING_FINISHED)
    parent.send(MlflowRun.metrics, [(record.number, time.time(), record.metrics) for record in records])
    if request.search.ablations:
        finished = [
            (record.params, record.metrics | of_run(RunFolder(folder.run_dir(record.number))))
            for record in records
            if record.status == "finished"
        ]
        text = ablations.render(ablations.TABLES[request.search.ablations], finished)
        with replacing(folder.ablations_file) as file:
            file.write(text.encode())
        parent.send(MlflowRun.tags, _description(folder, text))
        lines = [text, f"the table    {folder.ablations_file}"]
    else:
        write_best(folder, best)
        picture = landscape(records, made.space, metric)
        with replacing(folder.landscape_file) as file:
            Image.fromarray(picture).save(file, format="png")
        parent.send(MlflowRun.image, "landscape", 0, picture)
        parent.send(MlflowRun.tags, _description(folder, f"```\n{lines[0]}\n```"))
        parent.send(MlflowRun.artifacts, folder.best_file, "search")
        lines += [
            f"best         trial {best.number:04}: {metric} {best.metrics[metric]:.4g} with {shown(best.params)}",
            f"             python launch/train.py --config {folder.best_file}",
            f"the picture  {folder.landscape_file}",
        ]
        if version := register(folder.run_dir(best.number), f"srunit-{config.task}"):
            lines.append(f"its model    {version}")
    return "\n".join([*lines, f"all trials   {folder.csv_file}", f"MLflow       {ui_command()}"])
