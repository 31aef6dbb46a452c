"""What MLflow is told of trials that could not say it themselves."""

from pathlib import Path

import mlflow
import pytest

from launch.runs.folder import RunFolder
from tests.tuning.made import records
from tuning.folder import SearchFolder
from tuning.registry import end_runs, register
from tuning.results import Record


def test_runs_of_stopped_and_dead_trials_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SearchFolder(tmp_path / "search-made")
    trials = [*records(), Record(4, {}, "running"), Record(5, {}, "failed"), Record(6, {}, "stopped")]
    for record in trials:
        run = RunFolder(folder.run_dir(record.number))
        run.path.mkdir(parents=True)
        if record.number != 5:  # died before it had a run
            run.run_id_file.write_text(f"id-{record.number}\n")
    ended: dict[str, str] = {}

    class Client:
        def __init__(self, tracking_uri: str) -> None: ...

        def set_terminated(self, run_id: str, status: str) -> None:
            if run_id == "id-3":
                raise mlflow.MlflowException("no such run")
            ended[run_id] = status

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    end_runs(folder, trials)
    assert ended == {"id-2": "KILLED", "id-6": "KILLED"}
    end_runs(folder, [Record(3, {}, "finished"), Record(0, {}, "failed")])
    assert ended == {"id-0": "FAILED", "id-2": "KILLED", "id-6": "KILLED"}


def test_a_store_that_cannot_be_opened_keeps_no_search_from_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuchdatabase://nowhere/db")
    folder = SearchFolder(tmp_path / "search-made")
    run = RunFolder(folder.run_dir(0))
    run.path.mkdir(parents=True)
    run.run_id_file.write_text("id-0\n")
    end_runs(folder, [Record(0, {}, "failed")])
    assert register(folder.run_dir(0), "srunit-gta2city") is None
    assert len(caplog.records) == 2
