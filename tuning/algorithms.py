"""Ray Tune's searchers and schedulers, with what they lack for a search here (docs/tuning.md)."""

import logging
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from launch.runs.folder import RunFolder
from trainer.evaluation.config import BETTER
from tuning.folder import SearchFolder
from tuning.results import FINISHED, record_of, shown
from tuning.spaces import Dimension

log = logging.getLogger(__name__)

TIME = "evaluation"  # in which schedulers count
HALVING = 2  # asha keeps the better half at its first decision, and whenever the time has doubled since

Searcher = BasicVariantGenerator | ConcurrencyLimiter


def mode(metric: str) -> str:
    return "max" if BETTER[metric] == "more" else "min"


# ---- searchers ------------------------------------------------------------------------------------------------------


def make_searcher(kind: str, metric: str, *, seed: int, trials: int, concurrent: int) -> Searcher:
    """kind: "optuna" (TPE, which learns from finished trials); others draw what is not a grid by chance. concurrent: how
    many trials at once, 0 for as many as there is room for."""
    seeds = np.random.SeedSequence(seed)
    if kind != "optuna":
        return BasicVariantGenerator(random_state=np.random.default_rng(seeds), max_concurrent=concurrent)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", "Choices for a categorical distribution")  # tuples, which no data base is to keep
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # gamma goes with Optuna 6
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=_by_chance(trials), gamma=_good, seed=int(seeds.generate_state(1)[0])
        )
    return ConcurrencyLimiter(FinishedOnly(metric=metric, mode=mode(metric), sampler=sampler), concurrent)


class FinishedOnly(OptunaSearch):
    """Ray's own takes the last metric of a trial that was stopped, or failed, for what its options are worth."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing is learned from evaluations in between."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        finished = not error and bool(result and result.get(FINISHED))
        super().on_trial_complete(trial_id, result if finished else None, error=not finished)


def _by_chance(trials: int) -> int:
    """How many trials TPE waits for before it learns. Optuna's ten would be all of a search of the default length."""
    return min(10, max(3, trials // 3))


def _good(done: int) -> int:
    """How many of the trials done are the good ones that TPE stays near. Optuna's tenth would be one of the first ten,
    and around one alone its kernel is as wide as the space."""
    return min(25, math.ceil(done / 4))


# ---- schedulers -----------------------------------------------------------------------------------------------------


def make_scheduler(
    kind: str, space: Sequence[Dimension], evaluations: int, first: int, metric: str, folder: SearchFolder
) -> TrialScheduler:
    """evaluations: of one trial, the last one at its end, which schedulers do not see. first: the one, counted from 1,
    at which trials are first compared."""
    if kind == "none":
        return FIFOScheduler()
    if kind == "asha":
        return RememberingAsha(
            folder, time_attr=TIME, metric=metric, mode=mode(metric), grace_period=first, max_t=evaluations - 1,
            reduction_factor=HALVING, stop_last_trials=False,
        )  # fmt: skip
    warnings.filterwarnings("ignore", "Consider boosting PBT")  # with actors used again, whose memory fills up
    return PopulationBasedTraining(
        TIME, metric, mode(metric), burn_in_period=first, perturbation_interval=1, require_attrs=False, log_config=False,
        synch=True,  # or else who takes over from whom depends on which process is quicker
        hyperparam_mutations={dimension.field: dimension.domain() for dimension in space},
        custom_explore_fn=partial(_clipped, space),
    )  # fmt: skip


class RememberingAsha(AsyncHyperBandScheduler):
    """Ray saves no scheduler's state: after a restart this one learns again from the trials that are over."""

    def __init__(self, folder: SearchFolder, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        if trial.is_finished():
            rows = RunFolder(self.folder.run_dir(int(str(trial)))).evaluations()
            for count, row in enumerate(rows, start=1):
                self.on_trial_result(tune_controller, trial, {**row, TIME: count})


def _clipped(space: Sequence[Dimension], params: dict[str, Any]) -> dict[str, Any]:
    """Back into the space: PBT multiplies by 0.8 or 1.2 without looking."""
    result = dict(params)
    for dimension in space:
        low, high = dimension.values
        value = min(max(params[dimension.field], low), high)
        result[dimension.field] = round(value) if dimension.kind == "randint" else value
    return result


# ---- on the way -----------------------------------------------------------------------------------------------------


class Progress(Callback):
    """Logs the course of the trials. metric: the metric to show. total: number of trials. concurrent: see
    `make_searcher`; a searcher that Ray restored has that of the search before."""

    def __init__(self, metric: str, total: int, searcher: Searcher, concurrent: int) -> None:
        self.metric, self.total, self.searcher, self.concurrent = metric, total, searcher, concurrent

    def setup(self, *_: Any, **__: Any) -> None:
        self.searcher.max_concurrent = self.concurrent

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._say(trial, f" begins: {shown(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        if TIME in result and self.metric in result:
            self._say(trial, f", step {result['step']}: {self.metric} {result[self.metric]:.4g}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        record = record_of(trial, over=True)
        value = record.metrics.get(self.metric)
        score = "nothing measured" if value is None else f"{self.metric} {value:.4g}"
        self._say(trial, f" {record.status}: {record.cause or score}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)

    def _say(self, trial: Trial, words: str) -> None:
        log.info("trial %d/%d%s", int(str(trial)) + 1, self.total, words)
