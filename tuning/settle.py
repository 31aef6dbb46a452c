"""From what was asked for to what can be run, checked before any trial starts: trials, data, segmenter and metric."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.config import flatten, leaves
from infra.errors import UserError
from launch.runs.config import JobConfig, make_config, merged
from launch.runs.data import find_data
from launch.runs.evaluation import Evaluator
from trainer.engines import Engine, EngineConfig
from tuning import ablations, embedded
from tuning.config import QUIET, Request
from tuning.spaces import Dimension, Params, grid, parse_space

TRIALS = 10  # where their number is left open
EVALUATIONS = 4  # of a trial, likewise
ROUNDING = 1e-9  # of a quotient of epochs


@dataclass(frozen=True)
class Design:
    """The trials to come. table: the ablations whose rows they are, if any. grid: values of each field whose combinations
    are the trials; None where they are drawn."""

    table: str | None
    space: tuple[Dimension, ...]
    grid: dict[str, list[Any]] | None
    total: int

    def param_space(self) -> dict[str, Any]:
        """For Ray Tune."""
        if self.grid:
            return {field: {"grid_search": values} for field, values in self.grid.items()}
        return {dimension.field: dimension.domain() for dimension in self.space}

    def variants(self) -> list[Params]:
        """What trials differ in: the options of each row of the table, or each value of the space by itself."""
        if self.table:
            return [dict(row) for row in ablations.TABLES[self.table].rows.values()]
        return [{dimension.field: value} for dimension in self.space for value in dimension.values]


def design(request: Request) -> Design:
    """UserError for a space, a number of trials or a scheduler that make no sense."""
    search, options = request.search, request.options
    points: dict[str, list[Any]] | None = None
    space: tuple[Dimension, ...]
    if search.ablations:
        first = make_config(options).seed
        seeds, rows = range(first, first + search.seeds), ablations.TABLES[search.ablations].rows
        space = (Dimension("seed", "choice", tuple(seeds)), Dimension(ablations.ROW, "choice", tuple(rows)))
        points = {dimension.field: list(dimension.values) for dimension in space}
    else:
        space = parse_space(request.space, [options])
        only_choices = not any(dimension.is_range for dimension in space)
        if search.searcher == "grid" or (only_choices and search.trials is None):
            points = grid(space, search.trials)
    total = math.prod(map(len, points.values())) if points else search.trials or TRIALS
    made = Design(search.ablations, space, points, total)
    for variant in made.variants():
        make_config(options, variant)
    if search.scheduler == "pbt":
        _check_pbt(request, made)
    return made


def _check_pbt(request: Request, made: Design) -> None:
    if made.total < 2 or made.table:
        raise UserError("pbt needs a space, and trials that take over from each other: give --trials 4, say")
    if request.search.searcher == "optuna":
        raise UserError("pbt changes options itself, so no searcher learns beside it: leave out --searcher optuna")
    job = type(make_config(request.options))
    adjustable = [name for name, field, _ in leaves(job) if field.metadata["adjustable"]]
    for dimension in made.space:
        if not dimension.is_range or dimension.field not in adjustable:
            raise UserError(f"pbt changes options in the middle of a run, which {dimension.field} does not bear: "
                            f"give ranges of {', '.join(adjustable)}, or another --scheduler")  # fmt: skip


def settle(request: Request, *, gpu: bool) -> Request:
    """Fill in everything that was left open. Where no data was named, scenes are drawn and a segmenter is trained on
    some, of a size for a GPU or a CPU, which takes minutes the first time. UserError for what cannot work."""
    if request.embedded:
        options = {**QUIET, **_embedded(request, embedded.LARGE if gpu else embedded.SMALL)}
    else:
        options = {**QUIET, **request.options}
    root = find_data(make_config(options).task, make_config(options).data.root)
    options |= {"data.root": _absolute(root)}
    for name in ("evaluation.segmenter", "evaluation.inception", "method.semantic.segmenter"):
        if options.get(name):
            options[name] = _absolute(str(options[name]))
    config = make_config(options)
    metric = _metric(request, config)
    every = config.evaluation.every or config.optim.total_epochs / EVALUATIONS
    options |= {"evaluation.best": metric, "evaluation.every": every}
    typed = flatten(make_config(options))  # a command line gives texts
    options = {
        name: typed.get(name, value) for name, value in options.items()
    }  # a file has options of other methods, too
    settled = replace(request, search=replace(request.search, metric=metric), options=options)
    if request.search.scheduler != "none":
        first_decision(settled, design(settled))
    return settled


def evaluations(request: Request) -> int:
    """Of one trial, the last one at its end."""
    config = make_config(request.options)
    return math.ceil(config.optim.total_epochs / config.evaluation.every - ROUNDING)


def first_decision(request: Request, made: Design) -> int:
    """The evaluation, counted from 1, at which a scheduler first compares trials: the first one that has, since the losses
    under search began, a whole interval behind it. Until they begin, trials that differ in them alone are equal.

    UserError if a trial has no such evaluation before its end.
    """
    flats = [flatten(make_config(request.options, variant)) for variant in made.variants()]

    def latest(name: str) -> float:
        return max(flat[name] for flat in flats if name in flat)

    names = {name for flat in flats for name in flat}
    searched = {name.rpartition(".")[0] for name in names if len({str(flat.get(name)) for flat in flats}) > 1}
    starts = [latest(f"{section}.start") for section in searched if f"{section}.start" in names]
    start, epochs = max(starts, default=0.0), latest("optim.epochs") + latest("optim.decay_epochs")
    first = 1 + math.ceil(start * epochs / latest("evaluation.every") - ROUNDING)
    if first >= evaluations(request):
        begun = (
            f", a whole interval after what is searched begins to act (at {start:.0%} of the epochs)" if start else ""
        )
        raise UserError(f"{request.search.scheduler} needs an evaluation before the end of a trial{begun}: "
                        f"give a lower --evaluation.every{' or an earlier start' if start else ''}")  # fmt: skip
    return first


def _embedded(request: Request, size: embedded.Setup) -> dict[str, Any]:
    if request.search.metric in ("FID", "KID") and not request.options.get("evaluation.inception"):
        raise UserError(f"{request.search.metric} needs the weights of Inception V3: give --evaluation.inception, "
                        "or another --metric")  # fmt: skip
    options = merged(embedded.options(size), request.options) | {"data.root": str(embedded.draw(size))}
    if "evaluation.segmenter" not in options and request.search.metric != "Dist":
        options["evaluation.segmenter"] = str(embedded.segmenter(size))
    return options


def _absolute(path: str) -> str:
    """Ray's workers may have other working folders."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _metric(request: Request, config: JobConfig) -> str:
    """The metric asked for, or the first that is available. UserError if there will be none."""
    engine = Engine(EngineConfig(kind="single", device="cpu", precision="fp32"))
    evaluator = Evaluator(
        str(config.data.root), config.task, engine, config.evaluation, config.data.cache_dir, progress=False
    )
    return evaluator.best_metric(request.search.metric or config.evaluation.best)
