"""Data for trainings of a few steps."""

from pathlib import Path

import pytest

from infra.storage import open_storage
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Eight scenes of each domain, and no MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    root = str(tmp_path / "data")
    prepare(street_scenes(8, 2), open_storage(root), Encoding((64, 32)), progress=False)
    return root
