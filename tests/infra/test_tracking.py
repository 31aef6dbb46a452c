import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from infra import tracking
from infra.tracking import Journal, Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose MLflow database exists, which takes a second."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        Tracker.start("first", "first", {}, run_id_file=folder / "first").finish()
    return folder


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(store)
    return MlflowClient(tracking_uri=tracking.store_uri())


def artifacts(client: MlflowClient, run_id: str, folder: str) -> list[str]:
    return [Path(entry.path).name for entry in client.list_artifacts(run_id, folder)]


def test_everything_arrives(client: MlflowClient, store: Path, tmp_path: Path) -> None:
    many = {f"section.option_{i}": i for i in range(150)}
    params = {"seed": 7, "long": "x" * 9000, **many}
    tracker = Tracker.start("streets", "one", params, tags={"task": "gta2city"}, run_id_file=tmp_path / "run_id")
    losses = {"loss/nce": 1 / 3, "loss/robust": float("inf"), **{f"m{i}": 0.0 for i in range(60)}}
    for step in range(50):
        tracker.metrics(step, losses)
    tracker.image("samples", 20, np.full((32, 64, 3), 128, np.uint8))
    (tmp_path / "weights").write_bytes(b"w")
    tracker.artifacts(tmp_path / "weights", "checkpoints/step_1")
    tracker.finish()

    assert tracker.run_id == (tmp_path / "run_id").read_text().strip()
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "one" and run.data.tags["task"] == "gta2city"
    assert run.data.params["seed"] == "7" and len(run.data.params) == 152
    assert run.data.params["long"].startswith("x" * 400)  # cut to what MLflow takes
    history = client.get_metric_history(tracker.run_id, "loss/nce")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / 3) for step in range(50)]
    assert len(client.get_metric_history(tracker.run_id, "m59")) == 50
    assert any(name.startswith("samples+step+20+") for name in artifacts(client, tracker.run_id, "images"))
    assert artifacts(client, tracker.run_id, "checkpoints/step_1") == ["weights"]
    assert (store / "mlartifacts" / tracker.run_id).is_dir()


def test_a_run_is_continued_by_its_id_file(client: MlflowClient, tmp_path: Path) -> None:
    run_ids = set()
    for start, batch in ((0, 4), (5, 8)):
        tracker = Tracker.start("streets", "two", {"batch": batch, f"p{start}": 1}, run_id_file=tmp_path / "run_id")
        for step in range(start, start + 5):
            tracker.metrics(step, {"loss": float(step)})
        tracker.finish("FAILED" if start == 0 else "FINISHED")
        run_ids.add(tracker.run_id)
    (run_id,) = run_ids
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == list(range(10))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"batch": "4", "p0": "1", "p5": "1"}

    client.delete_run(run_id)  # by hand, in the UI: the next start makes a new run
    tracker = Tracker.start("streets", "two", {}, run_id_file=tmp_path / "run_id")
    tracker.finish()
    assert tracker.run_id not in run_ids and tracker.run_id == (tmp_path / "run_id").read_text().strip()


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "FINISHED"])
def test_a_continued_run_is_running_until_it_ends(client: MlflowClient, tmp_path: Path, status: str) -> None:
    Tracker.start("streets", "on and off", {}, run_id_file=tmp_path / "run_id").finish(status)  # type: ignore[arg-type]
    again = Tracker.start("streets", "on and off", {}, run_id_file=tmp_path / "run_id")
    while again.run_id is None:
        time.sleep(0.01)
    assert client.get_run(again.run_id).info.status == "RUNNING"
    again.finish("KILLED")
    assert client.get_run(again.run_id).info.status == "KILLED"


def test_an_experiment_is_one_of_model_training_and_a_run_names_its_data(client: MlflowClient, tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    for root in ("s3://bucket/streets/", "s3://bucket/streets/", "data/other"):  # a continued run names it again
        tracker = Tracker.start("kinds", "trained", {}, run_id_file=tmp_path / "run_id")
        tracker.data_set(root, digest, {"images": {"train/source": 4}})
        tracker.finish()
    run = client.get_run(tracker.run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    inputs = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 2 and inputs.keys() == {"streets", "other"}
    data = inputs["streets"].dataset
    assert data.digest == digest[:36] and data.source_type == "s3" and inputs["other"].dataset.source_type == "local"
    assert json.loads(data.source) == {"uri": "s3://bucket/streets/"} and "train/source" in data.profile
    assert [(tag.key, tag.value) for tag in inputs["streets"].tags] == [("mlflow.data.context", "training")]


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FINISHED"])
def test_a_visit_adds_to_a_run_and_leaves_its_status(client: MlflowClient, tmp_path: Path, status: str) -> None:
    training = Tracker.start("streets", "trained", {"seed": 7}, run_id_file=tmp_path / "run_id")
    if status == "RUNNING":
        training.metrics(1, {"loss": 1.0})
    else:
        training.finish(status)  # type: ignore[arg-type]
    while training.run_id is None:
        time.sleep(0.01)
    ended = client.get_run(training.run_id).info.end_time

    visitor = Tracker.start("streets", "trained", {"seed": 8, "new": 1}, run_id_file=tmp_path / "run_id", visit=True)
    visitor.metrics(5, {"eval/mIoU": 0.5})
    visitor.finish("FAILED")
    assert visitor.run_id == training.run_id
    run = client.get_run(training.run_id)
    assert (run.info.status, run.info.end_time) == (status, ended)
    assert run.data.params == {"seed": "7", "new": "1"} and run.data.metrics["eval/mIoU"] == 0.5

    if status == "RUNNING":  # it goes on undisturbed
        training.metrics(2, {"loss": 0.5})
        training.finish("FINISHED")
        assert [row.step for row in client.get_metric_history(training.run_id, "loss")] == [1, 2]
        assert client.get_run(training.run_id).info.status == "FINISHED"


def test_a_visitor_that_finds_no_run_makes_one_and_ends_it(client: MlflowClient, tmp_path: Path) -> None:
    visitor = Tracker.start("streets", "visitor", {}, run_id_file=tmp_path / "run_id", visit=True)
    visitor.finish()
    assert visitor.run_id == (tmp_path / "run_id").read_text().strip()
    assert client.get_run(visitor.run_id).info.status == "FINISHED"


def test_tags_are_set_and_replaced_at_any_time(client: MlflowClient, tmp_path: Path) -> None:
    tracker = Tracker.start("streets", "tagged", {}, tags={"task": "gta2city"}, run_id_file=tmp_path / "run_id")
    tracker.tags({"best.step": "100", "best.mIoU": "0.4"})
    tracker.tags({"best.step": "200"})
    tracker.finish()
    tags = client.get_run(tracker.run_id).data.tags
    assert (tags["task"], tags["best.step"], tags["best.mIoU"]) == ("gta2city", "200", "0.4")


def test_old_checkpoints_can_be_deleted(client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.start("streets", "three", {}, run_id_file=tmp_path / "run_id")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "generator.safetensors").write_bytes(b"g")
    for step in (1, 2, 3):
        tracker.artifacts(tmp_path / "checkpoint", f"checkpoints/step_{step}")
        tracker.delete_artifacts(f"checkpoints/step_{step - 1}")
    tracker.finish()
    assert artifacts(client, tracker.run_id, "checkpoints") == ["step_3"]
    assert not caplog.records


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
    caplog.set_level(logging.INFO, logger="infra")
    tracker = Tracker.start("streets", "four", {}, run_id_file=tmp_path / "run_id")
    tracker.model("generator", tmp_path / "saved")
    tracker.finish()
    uri = next(r.getMessage().split()[-1] for r in caplog.records if "logged model" in r.getMessage())
    folder = download_artifacts(uri, tracking_uri=tracking.store_uri())
    assert (mlflow.pyfunc.load_model(folder).predict(np.ones(2)) == 2).all()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.store_uri())
    assert (mlflow.pyfunc.load_model(uri).predict(np.ones(2)) == 2).all()


def test_refused_work_costs_one_warning_and_the_rest_arrives(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.start("streets", "five", {}, run_id_file=tmp_path / "run_id")
    for name in ("gone", "gone too"):
        tracker.artifacts(tmp_path / name, "checkpoints")
    tracker.finish()
    (record,) = caplog.records
    assert "did not take artifacts" in record.getMessage()
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_dead_server_costs_one_warning_and_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "RETRY_S", 0.05)
    tracker = Tracker.start("streets", "six", {"a": 1}, run_id_file=tmp_path / "run_id")
    image_HWC = np.zeros((256, 256, 3), np.uint8)
    started = time.perf_counter()
    for step in range(1000):
        tracker.metrics(step, {"loss": 1.0})
        tracker.image("samples", step, image_HWC)
        tracker.artifacts(tmp_path, "checkpoints")
    assert time.perf_counter() - started < 1.0  # a third of a millisecond a call, on a busy machine
    time.sleep(0.3)  # several attempts
    started = time.perf_counter()
    tracker.finish(timeout=5)
    assert time.perf_counter() - started < 5.5
    (record,) = caplog.records
    assert "http://127.0.0.1:9 does not answer" in record.getMessage() and "\n" not in record.getMessage()
    assert tracker.run_id is None and not (tmp_path / "run_id").exists()


def test_what_does_not_arrive_in_time_costs_one_warning(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.start("streets", "slow", {}, run_id_file=tmp_path / "run_id")
    arrives = threading.Event()
    monkeypatch.setattr(MlflowClient, "set_tag", lambda *_: arrives.wait(30))
    tracker.tags({"a": "b"})
    tracker.finish(timeout=0.2)
    (record,) = caplog.records
    assert "did not take everything within 0 s" in record.getMessage()
    arrives.set()


def test_a_server_that_comes_back_gets_what_waited(
    client: MlflowClient, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "RETRY_S", 0.05)
    caplog.set_level(logging.INFO, logger="infra")
    tracker = Tracker.start("streets", "seven", {}, run_id_file=tmp_path / "run_id")
    while tracker.run_id is None:
        time.sleep(0.01)
    real, outage = MlflowClient.log_batch, {"left": 3}

    def failing(self: MlflowClient, *args: object, **kwargs: object) -> None:
        if outage["left"]:
            raise ConnectionError("reset")
        real(self, *args, **kwargs)

    def search(self: MlflowClient, max_results: int) -> None:
        outage["left"] -= 1
        raise ConnectionError("reset")

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    monkeypatch.setattr(MlflowClient, "search_experiments", search)
    for step in range(30):
        tracker.metrics(step, {"loss": 1.0})
    deadline = time.monotonic() + 20
    while not any("answers again" in r.getMessage() for r in caplog.records) and time.monotonic() < deadline:
        time.sleep(0.02)
    tracker.finish()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert {m.step for m in client.get_metric_history(tracker.run_id, "loss")} == set(range(30))


def test_processes_may_create_the_store_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from pathlib import Path; from infra.console import setup_logging; setup_logging(None)\n"
        "from infra.tracking import Tracker\n"
        "t = Tracker.start('trials', sys.argv[1], {}, run_id_file=Path(sys.argv[1]))\n"
        "t.metrics(1, {'loss': 1.0}); t.finish(timeout=50)"
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


def test_a_disabled_tracker_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.disabled()
    tracker.metrics(1, {"loss": 1.0})
    tracker.artifacts(tmp_path, "x")
    tracker.tags({"a": "b"})
    tracker.finish()
    assert tracker.run_id is None and not list(tmp_path.iterdir())


def test_ui_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.ui_command() == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    assert tracking.ui_command() == "https://tracking.example"


def test_the_journal_keeps_every_digit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    value = float(np.nextafter(1 / 3, 1))
    journal.append({"step": 1, "loss": value, "grad": float("nan")})
    line = journal.path.read_text()  # before close: a killed run must leave it
    assert json.loads(line) == {"step": 1, "loss": value, "grad": None}
    journal.close()


def test_the_journal_drops_a_torn_line_and_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for step in range(1, 6):
        journal.append({"step": step, "loss": 0.1})
    journal.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    journal = Journal(path)
    assert [r["step"] for r in journal.read()] == [1, 2, 3, 4, 5]
    journal.truncate_after(3)
    journal.append({"step": 4, "loss": 0.2})
    assert journal.read()[2:] == [{"step": 3, "loss": 0.1}, {"step": 4, "loss": 0.2}]
    journal.close()
    path.write_text('{"step"')
    assert Journal(path).read() == []
