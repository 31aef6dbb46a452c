"""A trial from Ray Tune's side: what it reports, and what of its failures is worth another start."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tuning.trial
from infra.errors import Stopped, UserError
from launch.runs.config import JobConfig, make_config
from launch.runs.folder import RunFolder
from launch.runs.training import Listener
from launch.runs.translator import train
from tests.tuning.made import BETA, TINY
from tuning.cluster import Share
from tuning.config import parse_arguments
from tuning.folder import SearchFolder
from tuning.results import cause_of
from tuning.settle import design, first_decision, settle
from tuning.trial import Settings, run_trial


def test_a_cause_is_one_line() -> None:
    assert cause_of(UserError("no such thing: mend it")) == "no such thing: mend it"
    assert cause_of(ValueError("first\nsecond")) == "ValueError: first"
    wrapped = OfRanks(KeyError("x"))
    assert cause_of(wrapped) == "KeyError: 'x'"
    wrapped.worker_failures[1] = UserError("the true one")
    assert cause_of(wrapped) == "the true one"


class OfRanks(Exception):
    """As Ray Train raises what happened to the ranks of a trial."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("a rank failed")
        self.worker_failures = dict(enumerate(failures))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a search with two ranks a trial, in which trial 3 runs."""
    here = SimpleNamespace(get_trial_name=lambda: "0003")
    monkeypatch.setattr(tuning.trial.tune, "get_context", lambda: here)
    monkeypatch.setattr(tuning.trial.tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(tuning.trial, "_node", lambda: "here/1")
    SearchFolder(tmp_path).trials.mkdir()
    return Settings(tmp_path, {}, None, {}, "http://127.0.0.1:9", Share(2, 1, 0, 1), exchange=False)


def outcome(settings: Settings, error: Exception, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Tune is told by a trial whose ranks end with this error."""
    reports: list[dict[str, Any]] = []

    def fail(*_: Any) -> None:
        raise error

    patch.setattr(tuning.trial.tune, "report", reports.append)
    patch.setattr(tuning.trial, "_train_on_ranks", fail)
    run_trial({BETA: 1e-4}, settings)
    return reports


@pytest.mark.parametrize(
    "mistake",
    [
        OfRanks(UserError("no such data: name another"), ConnectionError("rank 0 is gone")),
        OfRanks(ConnectionError("rank 1 is gone"), Stopped("G is not a finite number", 3)),
        UserError("no such data: name another"),
        ValueError("of our own"),
    ],
)
def test_a_mistake_is_a_cause_and_not_tried_again(
    settings: Settings, mistake: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome(settings, mistake, monkeypatch) == [{"cause": cause_of(mistake), "node": "here/1"}]


def test_a_failure_keeps_the_figures_that_there_were(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(SearchFolder(settings.folder).run_dir(3))
    folder.path.mkdir()
    folder.evaluations_file.write_text('{"step": 4, "Dist": 7.0}\n{"step": 8, "Dist": 5.0}\n')
    (report,) = outcome(settings, ValueError("of our own"), monkeypatch)
    assert report == {"step": 8, "Dist": 5.0, "cause": "ValueError: of our own", "node": "here/1"}


def test_a_death_of_a_rank_is_left_to_ray_to_start_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    death = OfRanks(ConnectionError("rank 1 is gone"), SystemError("killed"))
    with pytest.raises(OfRanks):
        outcome(settings, death, monkeypatch)


def test_what_tune_is_told_of_a_trial(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluations by their number, in which schedulers reckon, and at the end, without one, the last metrics."""
    reports: list[dict[str, Any]] = []
    rows = [{"step": step, "Dist": 9.0 - step, "FID": None, "scenes": "some"} for step in (4, 8, 12, 14)]

    def job(config: JobConfig, settings: Settings, listener: Listener) -> None:
        folder = RunFolder(Path(str(config.run_dir)))
        folder.path.mkdir()
        folder.evaluations_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows[:-1]:
            listener(row)

    monkeypatch.setattr(tuning.trial.tune, "report", reports.append)
    monkeypatch.setattr(tuning.trial, "_train", job)
    run_trial({BETA: 1e-4}, replace(settings, share=Share(1, 1, 0, 1)))
    assert reports == [
        *({"step": 4 * k, "Dist": 9.0 - 4 * k, "evaluation": k, "node": "here/1"} for k in (1, 2, 3)),
        {"step": 14, "Dist": -5.0, "node": "here/1", "finished": True},
    ]


def test_trials_that_differ_in_beta_alone_differ_at_the_first_decision(data: str, tmp_path: Path) -> None:
    request = parse_arguments(["--data", data, "--scheduler", "asha"])
    request = settle(replace(request, options=TINY | {"data.root": data}), gpu=False)
    first = first_decision(request, design(request))

    def metrics(beta: float) -> list[dict[str, Any]]:
        own = {"run_dir": str(tmp_path / str(beta)), BETA: beta, "loop.max_steps": 4 * first}
        rows = RunFolder(train(make_config(request.options, own))).evaluations()
        return [{name: value for name, value in row.items() if name != "time"} for row in rows]

    low, high = metrics(1e-5), metrics(1e-3)
    assert low[: first - 1] == high[: first - 1] != []
    assert low[first - 1]["Dist"] != high[first - 1]["Dist"]
