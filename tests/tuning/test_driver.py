"""What a search makes of its records: proposals, what is left to do, how it ends."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

import tuning.driver
from infra.config import to_yaml
from infra.errors import Stopped
from tests.tuning.made import BETA, T
from tuning.cluster import Share
from tuning.config import Request, parse_arguments
from tuning.driver import _resumed, _run, _tune
from tuning.folder import Record, SearchFolder
from tuning.settle import design
from tuning.spaces import Params

Propose = Callable[[int, list[Record]], Params]
SHARE = Share(ranks=1, cpus=1, gpus=0, concurrent=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchFolder:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    return folder


def request(metric: str, *arguments: str) -> Request:
    return parse_arguments(["--metric", metric, "--evaluation.every", "1", *arguments])


def proposer(asked: Request, folder: SearchFolder, monkeypatch: pytest.MonkeyPatch) -> Propose:
    """How a search finds the options of a trial: its number and the records so far."""
    seen: list[Any] = []

    def tuner(trial: Any, *, tune_config: Any, run_config: Any) -> Any:
        seen.append(tune_config.search_alg)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(tune, "Tuner", tuner)
    _tune(asked, design(asked), SHARE, folder, {})
    return seen[0].propose


def finished(metric: str, better: Callable[[float], float]) -> list[Record]:
    """Eight trials over the range of beta."""
    betas = [10 ** (-5 + 2 * k / 7) for k in range(8)]
    return [Record(k, {BETA: b, T: 0.1}, "finished", figures={metric: better(b)}) for k, b in enumerate(betas)]


@pytest.mark.parametrize(("metric", "best"), [("mIoU", "high"), ("Dist", "low")])
def test_optuna_is_told_which_way_is_better(
    folder: SearchFolder, monkeypatch: pytest.MonkeyPatch, metric: str, best: str
) -> None:
    propose = proposer(request(metric, "--searcher", "optuna"), folder, monkeypatch)
    records = finished(metric, lambda beta: beta)
    betas = [propose(number, records)[BETA] for number in range(8, 16)]
    assert sum((beta > 1e-4) == (best == "high") for beta in betas) >= 6


def test_optuna_learns_from_finished_trials_alone(folder: SearchFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = proposer(request("mIoU", "--searcher", "optuna"), folder, monkeypatch)
    records = finished("mIoU", lambda beta: beta)
    others = [
        Record(8, {BETA: 1e-5, T: 0.1}, "stopped", figures={"mIoU": 1.0}),
        Record(9, {BETA: 1e-5, T: 0.1}, "failed", figures={"mIoU": 1.0}),
        Record(10, {BETA: 1e-5, T: 0.1}, "running", figures={"mIoU": 1.0}),
        Record(11, {BETA: 1e-5, T: 0.1}, "finished", figures={"pxAcc": 1.0}),
    ]
    assert propose(12, records + others) == propose(12, records)
    assert propose(12, records[:7]) != propose(12, records)


def test_a_seed_and_the_number_of_trials_reach_the_proposals(
    folder: SearchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = finished("mIoU", lambda beta: beta)

    def proposal(*arguments: str) -> Params:
        return proposer(request("mIoU", "--searcher", "optuna", *arguments), folder, monkeypatch)(8, records)

    assert proposal() == proposal("--trials", "10") != proposal("--seed", "1")
    assert proposal("--trials", "30") != proposal()  # still by chance


def test_what_is_given_anew_with_resume(folder: SearchFolder) -> None:
    folder.request_file.write_text(to_yaml(request("mIoU", "--max-concurrent", "3", "--trials", "7").flat()))
    same = _resumed(parse_arguments(["--resume", "made"]), folder)
    assert (same.search.max_concurrent, same.search.trials, same.search.address) == (3, 7, None)
    anew = _resumed(parse_arguments(["--resume", "made", "--max-concurrent", "1", "--address", "auto"]), folder)
    assert (anew.search.max_concurrent, anew.search.trials, anew.search.address) == (1, 7, "auto")


@pytest.mark.parametrize("statuses", [["finished", "running"], ["finished"]])
def test_an_interrupted_search_says_how_it_goes_on(
    folder: SearchFolder, monkeypatch: pytest.MonkeyPatch, statuses: list[Any]
) -> None:
    def interrupted(*_: Any) -> None:
        for number, status in enumerate(statuses):
            folder.write(Record(number, {BETA: 1e-4, T: 0.1}, status))

    monkeypatch.setattr(tuning.driver, "_tune", interrupted)
    monkeypatch.setattr(tuning.driver, "STORE_S", 0.0)
    asked = request("mIoU", "--trials", "2")
    with pytest.raises(Stopped, match="--resume made goes on from here") as stop:
        _run(asked, design(asked), SHARE, folder)
    assert stop.value.exit_code == 130 and not folder.csv_file.exists()
