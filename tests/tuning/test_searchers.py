"""What Ray's searchers propose, asked as `tune.run` asks them."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Experiment, Trial
from ray.tune.search import ConcurrencyLimiter, SearchGenerator

from tuning.algorithms import Progress, make_searcher
from tuning.spaces import Params, parse_space

BETA, T, TAPS = "method.robust.beta", "method.robust.T", "method.robust.taps"
TRIALS = 10  # of a search by default


class Search:
    """Of so many trials in the spaces named, whose outcomes a test makes up."""

    def __init__(
        self,
        *space: str,
        kind: str = "optuna",
        metric: str = "mIoU",
        seed: int = 0,
        trials: int = TRIALS,
        at_once: int = 99,
    ) -> None:
        config = {dimension.field: dimension.domain() for dimension in parse_space(space, [{}])}
        self.metric = metric
        self.searcher = make_searcher(kind, metric, seed=seed, trials=trials, concurrent=at_once)
        self.algorithm: Any = self.searcher
        if isinstance(self.searcher, ConcurrencyLimiter):
            self.algorithm = SearchGenerator(self.searcher)
        self.algorithm.set_search_properties(None, None, config)
        self.algorithm.add_configurations([Experiment("search", print, config=config, num_samples=trials)])

    def begin(self) -> Trial | None:
        return self.algorithm.next_trial()

    def end(self, trial: Trial, value: float, **more: Any) -> None:
        """The last report of a trial, which says how it ended."""
        self.algorithm.on_trial_complete(trial.trial_id, {self.metric: value, **more})

    def run(self, worth: Callable[[Params], float], count: int) -> list[Params]:
        """So many trials from beginning to end, one after the other."""
        done = []
        for _ in range(count):
            trial = self.begin()
            assert trial
            self.end(trial, worth(trial.config), finished=True)
            done.append(trial.config)
        return done


def beta(params: Params) -> float:
    return float(params[BETA])


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_draws_follow_from_the_seed(kind: str) -> None:
    def draws(seed: int) -> list[Params]:
        return Search("beta-T", "taps", kind=kind, seed=seed, trials=60).run(beta, TRIALS)

    assert draws(3) == draws(3)
    assert not {params[BETA] for params in draws(3)} & {params[BETA] for params in draws(4)}
    assert draws(2**40) != draws(2**40 + 1)  # as large a seed as a training takes


def test_draws_fill_the_space() -> None:
    draws = Search("beta-T", "taps", kind="random", trials=60).run(beta, 60)
    assert len({draw[BETA] for draw in draws}) == 60
    assert all(1e-5 <= draw[BETA] <= 1e-3 and 0.01 <= draw[T] <= 0.2 for draw in draws)
    assert 15 < sum(draw[BETA] < 1e-4 for draw in draws) < 45  # half of a loguniform range
    assert len({draw[TAPS] for draw in draws}) == 6
    whole = Search("method.patches=randint(2,4)", kind="random", trials=60).run(lambda _: 0.0, 60)
    assert {draw["method.patches"] for draw in whole} == {2, 3, 4}


@pytest.mark.parametrize(("trials", "seeds"), [(TRIALS, 4), (30, 1)])
@pytest.mark.parametrize("metric", ["mIoU", "Dist"])
def test_optuna_goes_where_the_figures_are_better(metric: str, trials: int, seeds: int) -> None:
    def distance(params: Params) -> float:
        return abs(math.log(params[BETA] / 3e-4)) + 20 * abs(params[T] - 0.05)

    def worth(params: Params) -> float:
        return distance(params) if metric == "Dist" else -distance(params)

    def average(kind: str) -> float:
        """Of the second half of each search."""
        searches = [
            Search("beta-T", "taps", kind=kind, metric=metric, seed=seed, trials=trials).run(worth, trials)
            for seed in range(seeds)
        ]
        return statistics.mean(distance(params) for done in searches for params in done[trials // 2 :])

    assert average("optuna") < 0.7 * average("random")


def test_optuna_learns_within_the_default_number_of_trials() -> None:
    up, down = Search("beta-T").run(beta, TRIALS), Search("beta-T").run(lambda params: -beta(params), TRIALS)
    first = next(number for number in range(TRIALS) if up[number] != down[number])
    assert first <= TRIALS // 2
    assert all(up[number][BETA] != down[number][BETA] for number in range(first, TRIALS))
    assert statistics.median(map(beta, up[first:])) > 5 * statistics.median(map(beta, down[first:]))


def test_optuna_begins_with_chance_for_at_most_ten_trials() -> None:
    def proposal(known: int, best: int) -> Params:
        """The one after `known` trials of a long search, of which number `best` was the best."""
        search = Search("beta-T", trials=90)
        for number in range(known):
            search.run(lambda _, number=number: float(number == best), 1)  # type: ignore[misc]
        (params,) = search.run(beta, 1)
        return params

    assert proposal(9, 0) == proposal(9, 5)
    assert proposal(10, 0) != proposal(10, 5)


def test_optuna_learns_which_choice_is_good() -> None:
    for best in (0, 4, 8, 12), (4, 8, 12, 16):
        drawn = Search("taps", trials=30).run(lambda params, best=best: float(params[TAPS] == best), 30)  # type: ignore[misc]
        assert [params[TAPS] for params in drawn[-8:]].count(best) > 4


def test_optuna_learns_from_finished_trials_alone() -> None:
    def after(metric: float, **ending: Any) -> Params:
        """The proposal after eight trials, better with a higher beta, and two that ended in another way."""
        search = Search("beta-T", trials=30)
        search.run(beta, 8)
        for _ in range(2):
            trial = search.begin()
            assert trial
            search.algorithm.on_trial_result(trial.trial_id, {"mIoU": metric, "training_iteration": 1})
            search.end(trial, metric, **ending)
        (params,) = search.run(beta, 3)[-1:]
        return params

    assert after(1.0) == after(-1.0)  # stopped by a scheduler
    assert after(1.0, cause="G is not a finite number") == after(-1.0, cause="G is not a finite number")
    assert after(1.0, finished=True) != after(-1.0, finished=True)


def test_a_report_without_figures_is_no_fault() -> None:
    search = Search("beta-T")
    trial, other = search.begin(), search.begin()
    assert trial and other
    search.algorithm.on_trial_result(trial.trial_id, {"cause": "no such file"})
    search.algorithm.on_trial_complete(trial.trial_id, {"cause": "no such file"})
    search.algorithm.on_trial_complete(other.trial_id, error=True)
    assert search.begin()


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_search_that_goes_on_proposes_what_it_would_have_and_has_a_limit_of_its_own(
    kind: str, tmp_path: Path
) -> None:
    begun = Search("beta-T", kind=kind, at_once=1)
    begun.run(beta, 5)
    running = begun.begin()
    assert running and begun.begin() is None
    begun.algorithm.save_to_dir(str(tmp_path), session_str="first")

    again = Search("beta-T", kind=kind, at_once=2)
    again.algorithm.restore_from_dir(str(tmp_path))
    Progress("mIoU", TRIALS, again.searcher, 2).setup()
    second = again.begin()
    assert second and again.begin() is None
    begun.searcher.max_concurrent = 2
    expected = begun.begin()
    assert expected and second.config == expected.config and second.experiment_tag == expected.experiment_tag
