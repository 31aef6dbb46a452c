"""Which trials there are after any number of kills, and what their records say."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tuning.plan
from tests.tuning.made import BETA
from tuning.folder import Record, SearchFolder
from tuning.plan import Plan


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchFolder:
    error = tmp_path / "error.pkl"
    error.write_bytes(pickle.dumps(MemoryError("all used up")))
    stand_in = partial(SimpleNamespace, pickled_error_file=error)
    monkeypatch.setattr(tuning.plan, "Trial", lambda run, **options: stand_in(**options))
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    return folder


def plan(folder: SearchFolder, *, total: int = 4, concurrent: int = 2) -> Plan:
    def propose(number: int, done: list[Record]) -> dict[str, Any]:
        return {BETA: 1e-5 * (number + 1), "known": len(done)}

    made = Plan(folder, propose, total, concurrent, "mIoU")
    made.spec = {"run": "trial", "storage": None, "checkpoint_config": None}
    return made


def report(**more: Any) -> Mapping[str, Any]:
    return {"mIoU": 0.3, "step": 8, "node": "here/1", f"config/{BETA}": 1e-5, **more}


def statuses(folder: SearchFolder) -> list[str]:
    return [record.status for record in folder.records()]


def begun(made: Plan) -> list[str]:
    ids = []
    while trial := made.next_trial():
        ids.append(trial.trial_id)
    return ids


def test_trials_go_through_and_are_written_down(folder: SearchFolder) -> None:
    made = plan(folder)
    assert begun(made) == ["0000", "0001"]
    assert statuses(folder) == ["running", "running"]  # before they run
    made.on_trial_complete("0000", report(finished=True))
    assert begun(made) == ["0002"]
    made.on_trial_complete("0001", report())
    made.on_trial_complete("0002", report(cause="G is not a finite number"))
    assert not made.is_finished() and begun(made) == ["0003"] and made.is_finished()
    made.on_trial_complete("0003", error=True)
    assert statuses(folder) == ["finished", "stopped", "failed", "failed"]
    assert [record.cause[:15] for record in folder.records()] == ["", "", "G is not a fini", "died 3 times: M"]
    assert folder.records()[2].params["known"] == 2


def test_a_killed_search_runs_what_is_left_and_no_more(folder: SearchFolder) -> None:
    first = plan(folder)
    begun(first)
    first.on_trial_complete("0000", report(finished=True))
    begun(first)  # 0001 and 0002 run, and all is killed
    again = plan(folder)
    assert begun(again) == ["0001", "0002"]
    for trial in ("0001", "0002"):
        again.on_trial_complete(trial, report(finished=True))
    assert begun(again) == ["0003"] and again.is_finished()
    again.on_trial_complete("0003", report(finished=True))
    assert begun(plan(folder)) == [] and statuses(folder) == ["finished"] * 4


def test_a_trial_that_took_over_has_the_new_parameters(folder: SearchFolder) -> None:
    made = plan(folder)
    begun(made)
    made.on_trial_result("0000", report(**{f"config/{BETA}": 7e-4}))
    assert folder.records()[0].params[BETA] == 7e-4


def test_a_report_without_figures_keeps_the_last_ones(folder: SearchFolder) -> None:
    made = plan(folder)
    begun(made)
    made.on_trial_result("0000", report())
    made.on_trial_result("0001", report())
    made.on_trial_complete("0000", {"cause": "G is not a finite number", "node": "here/1"})
    made.on_trial_complete("0001", error=True)
    assert statuses(folder)[:2] == ["failed", "failed"]
    assert [(record.figures, record.step) for record in folder.records()[:2]] == [({"mIoU": 0.3}, 8)] * 2
