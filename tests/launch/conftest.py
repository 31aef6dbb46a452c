"""Where the tests of this folder work: an empty folder, or beside one MLflow store (making its database takes seconds)."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.tracking import store_uri


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MLflow's database lies."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(store)
    return MlflowClient(tracking_uri=store_uri())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no tracking store that answers."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    return folder
