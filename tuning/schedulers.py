"""Ray Tune's schedulers, which count time in evaluations of a trial."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from launch.runs.folder import RunFolder
from tuning.folder import SearchFolder
from tuning.spaces import Dimension

TIME = "evaluation"
HALVING = 2  # asha keeps the better half at its first decision, and whenever the time has doubled since


def make_scheduler(
    kind: str,
    space: Sequence[Dimension],
    evaluations: int,
    first: int,
    metric: str,
    *,
    maximise: bool,
    folder: SearchFolder,
) -> TrialScheduler:
    """evaluations: of one trial, the last one at its end, of which no scheduler is told. first: the one, counted from 1,
    at which trials are first compared."""
    mode = "max" if maximise else "min"
    if kind == "none":
        return FIFOScheduler()
    if kind == "asha":
        asha = AsyncHyperBandScheduler(
            TIME, metric, mode, grace_period=first, max_t=evaluations - 1, reduction_factor=HALVING,
            stop_last_trials=False,
        )  # fmt: skip
        _recall(asha, folder)
        return asha
    return PopulationBasedTraining(
        TIME, metric, mode, burn_in_period=first, perturbation_interval=1, require_attrs=False, log_config=False,
        synch=True,  # or else who takes over from whom depends on which process is quicker
        hyperparam_mutations={dimension.field: _domain(dimension) for dimension in space},
        custom_explore_fn=partial(_clipped, space),
    )  # fmt: skip


def _recall(asha: TrialScheduler, folder: SearchFolder) -> None:
    """Tell a new scheduler what it was told of earlier trials before the search was killed."""
    for record in folder.records():
        if record.status in ("finished", "stopped"):
            trial = cast(Trial, SimpleNamespace(trial_id=f"{record.number:04}"))
            asha.on_trial_add(None, trial)  # type: ignore[arg-type]
            for count, figures in enumerate(RunFolder(folder.run_dir(record.number)).evaluations(), start=1):
                asha.on_trial_result(None, trial, {**figures, TIME: count})  # type: ignore[arg-type]


def _domain(dimension: Dimension) -> Any:
    low, high = dimension.values
    if dimension.kind == "randint":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if dimension.kind == "loguniform" else tune.uniform(low, high)


def _clipped(space: Sequence[Dimension], params: dict[str, Any]) -> dict[str, Any]:
    """Back into the space: PBT multiplies by 0.8 or 1.2 without looking."""
    result = dict(params)
    for dimension in space:
        low, high = dimension.values
        value = min(max(params[dimension.field], low), high)
        result[dimension.field] = round(value) if dimension.kind == "randint" else value
    return result
