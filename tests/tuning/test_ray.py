"""Searches of trials that only report, run by Ray itself: what its state is worth after an interruption or a death."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle, tune

import tuning.trial
from infra.ray_cluster import this_machine
from tests.tuning.made import BETA, T
from tuning.algorithms import TIME
from tuning.cluster import Share, connected
from tuning.config import SearchConfig, parse_arguments
from tuning.driver import _tune
from tuning.folder import SearchFolder
from tuning.results import Record
from tuning.settle import design

ONE_AT_A_TIME = Share(ranks=1, cpus=this_machine().cpus, gpus=0, concurrent=1)
EVALUATIONS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which workers cannot import
    with connected(SearchConfig()):
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchFolder:
    monkeypatch.setattr(tuning.trial, "run_trial", report)
    monkeypatch.setattr(tuning.trial, "Settings", settings)
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    return folder


def settings(folder: Path, *_: Any, exchange: bool) -> SimpleNamespace:
    """Of nothing that would have a trial import torch."""
    return SimpleNamespace(folder=folder, exchange=exchange)


def report(params: dict[str, Any], settings: SimpleNamespace) -> None:
    """Instead of a training: four evaluations. A file dies-NUMBER or waits-NUMBER in the search's folder says more."""
    number, donor = int(str(tune.get_context().get_trial_name())), tune.get_checkpoint()
    done = json.loads((Path(donor.path) / "done").read_text()) if donor else 0
    with (settings.folder / "starts").open("a") as file:
        file.write(f"{number}:{done} ")
    if (settings.folder / f"dies-{number}").exists():
        os._exit(1)
    while (settings.folder / f"waits-{number}").exists():
        time.sleep(0.1)
    for count in range(done + 1, EVALUATIONS):
        row = {"mIoU": params[BETA], "step": 8 * count, TIME: count}
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "done").write_text(str(count))
            tune.report(row, checkpoint=tune.Checkpoint(place) if settings.exchange else None)
    tune.report({"mIoU": params[BETA], "step": 8 * EVALUATIONS, "finished": True})


def starts(folder: SearchFolder) -> list[str]:
    """What trials were started, in order, and after which evaluation: "NUMBER:EVALUATION"."""
    return (folder.path / "starts").read_text().split()


def run(folder: SearchFolder, *arguments: str) -> list[Record]:
    every = ["--optim.epochs", "2", "--optim.decay-epochs", "2", "--evaluation.every", "1"]
    asked = parse_arguments(["--metric", "mIoU", "--trials", "2", *every, *arguments])
    return _tune(asked, design(asked), ONE_AT_A_TIME, folder, {})


def when(condition: Callable[[], bool], act: Callable[[], None]) -> None:
    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_an_interrupted_search_goes_on(folder: SearchFolder) -> None:
    waits = folder.path / "waits-1"
    waits.touch()
    begun = lambda: (folder.path / "starts").exists() and "1:0" in starts(folder)  # noqa: E731
    when(begun, lambda: os.kill(os.getpid(), signal.SIGINT))
    first, second = run(folder, "--searcher", "optuna")
    assert (first.status, second.status) == ("finished", "running")
    waits.unlink()
    again = run(folder, "--searcher", "optuna")
    assert again[0] == first and again[0].metrics == {"mIoU": first.params[BETA]}
    assert again[1].status == "finished" and again[1].params == second.params
    assert starts(folder) == ["0:0", "1:0", "1:0"]


def test_a_trial_that_dies_is_started_three_times_and_has_a_cause(folder: SearchFolder) -> None:
    (folder.path / "dies-0").touch()
    died, finished = run(folder)
    assert starts(folder) == ["0:0"] * 3 + ["1:0"]
    assert (died.status, finished.status) == ("failed", "finished")
    assert died.cause.startswith("died 3 times: ") and died.params.keys() == {BETA, T}


def test_trials_of_pbt_take_turns(folder: SearchFolder) -> None:
    """As one population, though there is a place for one of them alone."""
    ended = run(folder, "--scheduler", "pbt")
    assert [record.status for record in ended] == ["finished"] * 2
    assert {start.partition(":")[0] for start in starts(folder)[:2]} == {"0", "1"}
    assert sorted(starts(folder)) == [
        "0:0",
        "0:2",
        "0:3",
        "1:0",
        "1:2",
        "1:3",
    ]  # the first decision is the second evaluation
    assert abs(ended[0].params[BETA] / ended[1].params[BETA] - 1) < 0.5  # the worse one is near the better one
