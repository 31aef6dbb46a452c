import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from infra import tracking
from infra.tracking import MlflowRun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose MLflow database exists, which takes a second."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        MlflowRun.open(folder / "first", "first", "first")
    return folder


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(store)
    return MlflowClient(tracking_uri=tracking.store_uri())


def opened(folder: Path, name: str = "one") -> MlflowRun:
    run = MlflowRun.open(folder / "run_id", "streets", name)
    assert run is not None
    return run


def artifacts(client: MlflowClient, run_id: str, folder: str) -> list[str]:
    return [Path(entry.path).name for entry in client.list_artifacts(run_id, folder)]


def test_everything_arrives(client: MlflowClient, store: Path, tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.params({"seed": 7, "long": "x" * 9000, **{f"section.option_{i}": i for i in range(150)}})
    run.params({"seed": 8, "new": 1})  # of a continued run
    run.tags({"task": "gta2city", "best_step": "100"})
    run.tags({"best_step": "200"})
    losses = {"loss/nce": 1 / 3, **{f"m{i}": 0.0 for i in range(60)}}
    rows = [(step, 1000.5 + step, losses) for step in range(50)]
    run.metrics(rows)
    run.metrics(rows[20:])  # a kill before it was written down that they had arrived
    run.image("samples", 20, np.full((32, 64, 3), 128, np.uint8))
    (tmp_path / "weights").write_bytes(b"w")
    run.artifacts(tmp_path / "weights", "checkpoints/step_1")
    run.status("KILLED")

    assert run.id == (tmp_path / "run_id").read_text().strip()
    there = client.get_run(run.id)
    assert there.info.status == "KILLED" and there.info.run_name == "one"
    assert (there.data.tags["task"], there.data.tags["best_step"]) == ("gta2city", "200")
    assert there.data.params["seed"] == "7" and there.data.params["new"] == "1" and len(there.data.params) == 153
    assert there.data.params["long"].startswith("x" * 400)  # cut to what MLflow takes
    history = client.get_metric_history(run.id, "loss/nce")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / 3) for step in range(50)]
    assert history[0].timestamp == 1_000_500
    assert len(client.get_metric_history(run.id, "m59")) == 50
    assert any(name.startswith("samples+step+20+") for name in artifacts(client, run.id, "images"))
    assert artifacts(client, run.id, "checkpoints/step_1") == ["weights"]
    assert (store / "mlartifacts" / run.id).is_dir()
    run.status("RUNNING")
    assert client.get_run(run.id).info.status == "RUNNING"


def test_a_run_is_continued_by_its_id_file(client: MlflowClient, tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert opened(tmp_path).id == first.id
    assert MlflowRun.open(tmp_path / "none", "streets", "none", create=False) is None

    client.delete_run(first.id)  # by hand, in the UI: the next start makes a new run
    assert MlflowRun.open(tmp_path / "run_id", "streets", "one", create=False) is None
    again = opened(tmp_path)
    assert again.id != first.id and again.id == (tmp_path / "run_id").read_text().strip()


def test_an_experiment_is_one_of_model_training_and_a_run_names_its_data(client: MlflowClient, tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    run = opened(tmp_path)
    for root in ("s3://bucket/streets/", "s3://bucket/streets/", "data/other"):  # a continued run names it again
        run.data_set(root, digest, {"images": {"train/source": 4}})
    there = client.get_run(run.id)
    experiment = client.get_experiment(there.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert there.inputs is not None
    inputs = {entry.dataset.name: entry for entry in there.inputs.dataset_inputs}
    assert len(there.inputs.dataset_inputs) == 2 and inputs.keys() == {"streets", "other"}
    data = inputs["streets"].dataset
    assert data.digest == digest[:36] and data.source_type == "s3" and inputs["other"].dataset.source_type == "local"
    assert json.loads(data.source) == {"uri": "s3://bucket/streets/"}
    assert data.profile is not None and "train/source" in data.profile
    assert [(tag.key, tag.value) for tag in inputs["streets"].tags] == [("mlflow.data.context", "training")]


def test_old_checkpoints_can_be_deleted(client: MlflowClient, tmp_path: Path) -> None:
    run = opened(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "generator.safetensors").write_bytes(b"g")
    for step in (1, 2, 3):
        run.artifacts(tmp_path / "checkpoint", f"checkpoints/step_{step}")
        run.delete_artifacts(f"checkpoints/step_{step - 1}")
    assert artifacts(client, run.id, "checkpoints") == ["step_3"]


def test_a_saved_model_loads_from_the_store(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    (tmp_path / "doubling.py").write_text(
        "import mlflow\n"
        "class Doubling(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input):\n"
        "        return model_input * 2\n"
        "mlflow.models.set_model(Doubling())\n"
    )
    mlflow.pyfunc.save_model(tmp_path / "saved", python_model=str(tmp_path / "doubling.py"), pip_requirements=[])
    caplog.set_level("INFO", logger="infra")
    opened(tmp_path).model("generator", tmp_path / "saved")
    uri = next(r.getMessage().split()[-1] for r in caplog.records if "logged model" in r.getMessage())
    folder = download_artifacts(uri, tracking_uri=tracking.store_uri())
    assert (mlflow.pyfunc.load_model(folder).predict(np.ones(2)) == 2).all()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.store_uri())
    assert (mlflow.pyfunc.load_model(uri).predict(np.ones(2)) == 2).all()


def test_processes_may_create_the_store_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from pathlib import Path; from infra.tracking import MlflowRun\n"
        "MlflowRun.open(Path(sys.argv[1]), 'trials', sys.argv[1]).metrics([(1, 1.0, {'loss': 1.0})])\n"
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [sys.executable, "-c", program]
    trials = [
        subprocess.Popen([*command, f"trial{i}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) for i in range(3)
    ]
    assert [trial.communicate()[1] for trial in trials] == ["", "", ""]  # first creation is silent, too
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(tracking_uri=tracking.store_uri())
    experiment = client.get_experiment_by_name("trials")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["trial0", "trial1", "trial2"]
    assert all(run.data.metrics == {"loss": 1.0} for run in runs)


def test_ui_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.ui_command() == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    assert tracking.ui_command() == "https://tracking.example"


DYING = """
import os, signal
from pathlib import Path
from sqlalchemy import Engine, event
from infra.tracking import MlflowRun

def die(connection, cursor, statement, *_):
    if "CREATE TABLE _alembic_tmp_trace_info" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "after_cursor_execute", die)
MlflowRun.open(Path("run_id"), "streets", "one")
"""


def test_a_process_killed_while_it_makes_the_database_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in the middle of a migration, with a table for that left behind."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", DYING], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    run = opened(tmp_path)
    assert MlflowClient(tracking_uri=tracking.store_uri()).get_run(run.id).info.run_name == "one"
    assert not list(tmp_path.glob("*.unfinished*"))
