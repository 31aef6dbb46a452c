"""When ASHA stops a trial and what PBT makes of one, without a training."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from tests.tuning.made import BETA, T
from tuning.algorithms import TIME, make_scheduler
from tuning.folder import SearchFolder
from tuning.spaces import Params, parse_space

PATCHES = "method.patches"


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    return folder


class Trial:
    """As far as ASHA looks at one of Ray's."""

    def __init__(self, number: int, *, over: bool = False) -> None:
        self.trial_id, self.over = f"id{number}", over
        self.number = number

    def __str__(self) -> str:
        return f"{self.number:04}"

    def is_finished(self) -> bool:
        return self.over


class Asha:
    """Of trials with four evaluations each, the first compared at evaluation `first`."""

    def __init__(self, folder: SearchFolder, *, first: int) -> None:
        self.made = make_scheduler("asha", parse_space(["beta-T"], [{}]), 4, first, "mIoU", folder)

    def add(self, trial: Trial) -> None:
        self.made.on_trial_add(cast(Any, None), cast(Any, trial))

    def told(self, number: int, count: int, miou: float) -> str:
        """What it says to an evaluation."""
        trial = Trial(number)
        if count == 1:
            self.add(trial)
        return self.made.on_trial_result(cast(Any, None), cast(Any, trial), {TIME: count, "mIoU": miou})


def evaluated(folder: SearchFolder, number: int, *metrics: float) -> None:
    """The run folder of a trial with evaluations."""
    folder.run_dir(number).mkdir()
    rows = [f'{{"step": {8 * k}, "mIoU": {metric}}}\n' for k, metric in enumerate(metrics, start=1)]
    (folder.run_dir(number) / "evaluations.jsonl").write_text("".join(rows))


def test_asha_knows_after_a_restart_what_it_knew(folder: SearchFolder) -> None:
    asha = Asha(folder, first=1)
    for number, metric in enumerate((0.5, 0.6)):
        evaluated(folder, number, *[metric] * 4)
        asha.add(Trial(number, over=True))
    assert asha.told(2, 1, 0.4) == TrialScheduler.STOP  # the halves are those of both trials before
    assert asha.told(3, 1, 0.7) == TrialScheduler.CONTINUE
    assert asha.told(3, 3, 0.1) == TrialScheduler.STOP


def test_asha_knows_the_stopped_ones_too_and_each_evaluation_at_its_time(folder: SearchFolder) -> None:
    asha = Asha(folder, first=1)
    evaluated(folder, 0, 0.5, 0.9, 0.9, 0.9)  # finished
    evaluated(folder, 1, 0.7)  # stopped
    evaluated(folder, 2, 0.9)  # to be continued, which tells of it again
    for number in range(3):
        asha.add(Trial(number, over=number < 2))
    assert asha.told(3, 1, 0.55) == TrialScheduler.STOP  # halves meet at 0.6
    assert asha.told(4, 1, 0.65) == TrialScheduler.CONTINUE
    assert asha.told(2, 1, 0.4) == TrialScheduler.STOP  # of which it has decided nothing yet


def test_asha_stops_no_trial_before_the_first_decision(folder: SearchFolder) -> None:
    asha = Asha(folder, first=2)
    for number, miou in enumerate((0.3, 0.2, 0.1)):
        assert asha.told(number, 1, miou) == TrialScheduler.CONTINUE
    decisions = [asha.told(number, 2, miou) for number, miou in enumerate((0.3, 0.2, 0.4))]
    assert decisions == [TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.CONTINUE]


class Paused:
    """A trial of Ray that waits with its checkpoint, as far as PBT looks at it."""

    status, checkpoint, experiment_tag = "PAUSED", "weights", ""

    def __init__(self, number: int, params: Params) -> None:
        self.trial_id, self.config = f"{number:04}", params
        self.temporary_state = SimpleNamespace(saving_to=None)
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return False

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, params: Params) -> None:
        self.config = params


class Population:
    """Two trials of a PBT over beta, T and patches, and Ray's controller of them. The first is always the better one."""

    search_alg = None

    def __init__(self, folder: SearchFolder, better: Params, worse: Params, *, first: int = 1) -> None:
        space = parse_space(["beta-T", f"{PATCHES}=randint(16,20)"], [{}])
        self.scheduler = make_scheduler("pbt", space, 99, first, "mIoU", folder)
        self.trials = [Paused(0, better), Paused(1, worse)]
        for trial in self.trials:
            self.scheduler.on_trial_add(cast(Any, self), cast(Any, trial))

    def get_trials(self) -> list[Paused]:
        return self.trials

    get_live_trials = get_trials

    def evaluated(self, count: int) -> list[Params]:
        """Both trials have their evaluation number `count`: their options then."""
        for trial, miou in zip(self.trials, (0.4, 0.3), strict=True):
            self.scheduler.on_trial_result(cast(Any, self), cast(Any, trial), {TIME: count, "mIoU": miou})
        return [trial.config for trial in self.trials]


def params(beta: float, t: float, patches: int) -> Params:
    return {BETA: beta, T: t, PATCHES: patches}


def test_pbt_changes_no_trial_before_the_first_decision(folder: SearchFolder) -> None:
    better, worse = params(1e-4, 0.1, 17), params(5e-4, 0.02, 19)
    population = Population(folder, better, worse, first=3)
    assert [population.evaluated(count) for count in (1, 2)] == [[better, worse]] * 2
    after = population.evaluated(3)
    assert after[0] == better and after[1] not in (better, worse)


@pytest.mark.parametrize("better", [params(1e-3, 0.2, 20), params(1e-5, 0.01, 16)])
def test_pbt_stays_in_the_space(folder: SearchFolder, better: Params) -> None:
    random.seed(0)
    np.random.seed(0)
    population = Population(folder, better, params(1e-4, 0.1, 17))
    taken = [population.evaluated(count)[1] for count in range(1, 201)]
    assert all(1e-5 <= each[BETA] <= 1e-3 and 0.01 <= each[T] <= 0.2 for each in taken)
    assert all(isinstance(each[PATCHES], int) and 16 <= each[PATCHES] <= 20 for each in taken)
    assert {16, 20} <= {each[PATCHES] for each in taken}
    for name in better:  # the end itself, a step away from it, and what is drawn anew
        assert len({each[name] for each in taken}) > 2 and better[name] in {each[name] for each in taken}
