"""One evaluation of a finished or unfinished run. `launch/evaluate.py` runs it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from infra.console import setup_logging
from infra.disk import why_unwritable
from infra.errors import UserError
from launch.runs.config import JobConfig
from launch.runs.evaluation import Evaluator
from launch.runs.folder import run_around
from launch.runs.follower import send
from launch.runs.report import metrics_table, write
from trainer.checkpoint import Checkpoint, find_checkpoint
from trainer.engines import Engine, make_engine
from trainer.engines.base import EngineConfig
from trainer.evaluation.config import EvaluationConfig
from trainer.translator import load_translator

log = logging.getLogger(__name__)


def evaluate(
    run: Path,
    wanted: EvaluationConfig,
    *,
    beside: Sequence[Path] = (),
    data: str | None = None,
    json_file: Path | None = None,
) -> None:
    """Evaluate a run (its newest checkpoint) or a checkpoint; print the table, write the files, log to MLflow.

    beside: others, shown in the table and the picture of translations alone. data: another data root than the one trained on.
    json_file: instead of evaluation.json in the run folder, which then stays as it is, as MLflow does: pictures go into a folder
    beside the file. Raises UserError before anything is written for what cannot work.
    """
    if json_file:
        _check_takes_files(json_file)
    engine = make_engine(EngineConfig())
    setup_logging(None, engine.rank)
    try:
        _evaluate(run, beside, wanted, engine, data, json_file)
    finally:
        engine.close()


def _check_takes_files(json_file: Path) -> None:
    """UserError for a --json that can hold no metrics, or no pictures beside it, before the evaluation takes its time."""
    if json_file.suffix != ".json" or json_file.is_dir():
        raise UserError(f"--json {json_file} is no name of a JSON file: give one that ends in .json")
    for folder in (json_file.parent, json_file.with_suffix("")):
        if reason := why_unwritable(folder):
            raise UserError(f"cannot write the metrics and pictures of {json_file} ({reason}): name another --json")


def _evaluate(
    run: Path,
    beside: Sequence[Path],
    wanted: EvaluationConfig,
    engine: Engine,
    data: str | None,
    json_file: Path | None,
) -> None:
    checkpoint, *others = (Checkpoint(find_checkpoint(path)) for path in (run, *beside))
    config = checkpoint.config(JobConfig)
    translators = [load_translator(each.folder, engine.device) for each in (checkpoint, *others)]
    root = data or config["data.root"]
    evaluator = Evaluator(root, config["task"], engine, wanted, config["data.cache_dir"])
    for each in (checkpoint, *others):
        evaluator.check_judge(each.config(JobConfig), each.state.get("given", {}))
    outcome, *compared = map(evaluator, translators)
    if outcome is None:
        return
    others_there = [each for each in compared if each is not None]
    outcome = outcome.beside(others_there)
    folder, elsewhere = run_around(checkpoint.folder), json_file is not None
    json_file = json_file or folder.evaluation_file
    pictures = json_file.with_suffix("") if elsewhere else folder.samples
    csv_file = json_file.with_suffix(".csv")
    about = {
        "images": outcome.images, "data": root, "checkpoint": str(checkpoint.folder),
        "step": checkpoint.state["step"], "segmenter": evaluator.segmenter and evaluator.segmenter.name,
    }  # fmt: skip
    write(outcome, about, json_file, csv_file, pictures)
    if folder.run_id_file.is_file() and not elsewhere:
        try:
            send(folder, create=False)
        except UserError as error:  # the metrics are in the folder
            log.warning("%s", error)
    without = f"{root} has no pairs, no --segmenter was given, and FID is {outcome.metrics['FID']}"
    rows = {str(path): each.metrics for path, each in zip(beside, others_there, strict=True)}
    print(metrics_table(outcome.metrics, rows) or f"nothing to measure: {without}")
    print(f"{outcome.images} test images of {root}, translated by {checkpoint.folder}")
    if evaluator.segmenter:
        print(f"segmenter: {evaluator.segmenter.name}")
    print(f"metrics:  {json_file}, {csv_file}")
    print(f"pictures: {', '.join(f'{name}.png' for name in outcome.pictures)} in {pictures}")
