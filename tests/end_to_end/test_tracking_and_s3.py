"""What a run leaves in its folder, in MLflow and in S3."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from infra.storage import LocalStorage
from pipelines.dataset import ImageDataset
from pipelines.manifest import load_manifest
from tests.conftest import S3Server
from tests.end_to_end.jobs import losses, run, small_data, weights


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data in `data` and a finished run in `run`, started there."""
    folder = tmp_path_factory.mktemp("workplace")
    small_data(str(folder / "data"))
    run("single", "--data", "data", "--run-dir", "run", cwd=folder)
    return folder


def test_the_run_folder_describes_itself(workplace: Path) -> None:
    folder = workplace / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "train.log", "metrics.jsonl", "samples", "checkpoints", "model", "status.json",
        "run.lock", "mlflow_run_id", "mlflow.json", "mlflow_sent.json", "mlflow.lock",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0].keys() >= {
        "epoch",
        "lr",
        "pairs_per_s",
        "memory_gib",
        "G",
        "G_GAN",
        "D_real",
        "D_fake",
        "NCE",
        "robust",
    }
    assert {path.name for path in (folder / "samples").iterdir()} == {"step_0.png", "step_4.png", "step_8.png"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_6", "step_8"}  # the newest two
    assert Image.open(folder / "samples" / "step_8.png").size == (3 * 64 + 2 * 4, 2 * 32 + 4)  # two rows of three
    start = json.loads((folder / "environment.json").read_text())[0]
    assert "--run-dir run" in start["command"]
    assert start["versions"]["torch"]


def test_mlflow_has_the_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    client = mlflow.MlflowClient(tracking_uri="sqlite:///mlflow.db")
    tracked = client.get_run((workplace / "run" / "mlflow_run_id").read_text().strip())
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["method.robust.beta"] == "0.0001"
    assert [metric.step for metric in client.get_metric_history(tracked.info.run_id, "Loss/NCE")] == list(range(1, 9))
    assert tracked.data.metrics.keys() >= {"train/lr", "train/pairs_per_s", "train/memory_gib"}
    assert tracked.inputs is not None
    (data,) = tracked.inputs.dataset_inputs
    manifest = load_manifest(LocalStorage(workplace / "data")).sha256
    assert (data.dataset.name, data.dataset.digest) == ("data", manifest[:36])
    artifacts = {item.path for item in client.list_artifacts(tracked.info.run_id)}
    assert {"images", "checkpoints"} <= artifacts
    assert [item.path for item in client.list_artifacts(tracked.info.run_id, "checkpoints")] == ["checkpoints/step_8"]


def test_the_logged_model_translates_an_image(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    line = next(line for line in (workplace / "run" / "train.log").read_text().splitlines() if "models:/" in line)
    model = mlflow.pyfunc.load_model(line[line.index("models:/") :])
    image, _ = ImageDataset(str(workplace / "data"), "test", "source").read(0)
    translated = model.predict(image)
    assert translated.shape == image.shape
    assert translated.dtype == np.uint8
    assert not np.array_equal(translated, image)


def test_a_complete_run_started_again_changes_nothing(workplace: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (workplace / "run").rglob("*")}
    assert "run is complete: all 8 steps are done" in run("single", "--data", "data", "--run-dir", "run", cwd=workplace)
    assert {path: path.stat().st_mtime_ns for path in (workplace / "run").rglob("*")} == before


def test_a_run_killed_before_it_left_its_model_leaves_it_when_started_again(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "run", tmp_path / "run", ignore=shutil.ignore_patterns("model", "mlflow_run_id"))
    run("single", "--data", str(workplace / "data"), "--run-dir", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "model" / "MLmodel").is_file()
    assert losses(tmp_path / "run") == losses(workplace / "run")


def test_from_s3_the_losses_are_those_from_disk(s3_server: S3Server, workplace: Path, tmp_path: Path) -> None:
    root = f"s3://{s3_server.make_bucket()}/scenes"
    small_data(root)
    options = ["--data", root, "--data.cache-dir", str(tmp_path / "cache")]
    run("single", *options, "--run-dir", "run", cwd=tmp_path)
    assert losses(tmp_path / "run") == losses(workplace / "run")


def test_a_lost_run_folder_is_restored_from_the_mirror(s3_server: S3Server, workplace: Path, tmp_path: Path) -> None:
    options = ["--data", str(workplace / "data"), "--loop.mirror", f"s3://{s3_server.make_bucket()}/run"]
    run("single", *options, "--run-dir", "first", "--max-steps", "6", cwd=tmp_path)
    run("single", *options, "--run-dir", "second", cwd=tmp_path)
    assert [row["step"] for row in losses(tmp_path / "second")] == [7, 8]
    restored, direct = weights(tmp_path / "second", 8), weights(workplace / "run", 8)
    assert all((restored[name] == direct[name]).all() for name in direct)
