"""A password is in nothing that a run wrote or said: its folder, its checkpoints and their mirror, MLflow, the screen."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.storage import LocalStorage, S3Storage
from launch.runs.config import parse_arguments
from launch.runs.translator import train
from tests.conftest import S3Server
from tests.launch.test_bad_input import SMALL
from tests.pipelines.shardmaker import write_root

pytestmark = pytest.mark.slow

PASSWORD, KEY, TOKEN = "correct-horse", "wJalrXUtnFEMI/K7MDENG", "eyJhbGciOiJIUzI1NiJ9"


@pytest.fixture(params=["store away", "store there"])
def written(
    request: pytest.FixtureRequest, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[dict[str, bytes]]:  # fmt: skip
    """All that a run with a mirror leaves, by its place."""
    bucket = s3_server.make_bucket()
    write_root(LocalStorage(tmp_path / "data"))
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "store away":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:{PASSWORD}@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_API_KEY", KEY)
    line = [*SMALL, "--data", str(tmp_path / "data"), "--run-dir", "run", "--loop.mirror", f"s3://{bucket}/run"]
    monkeypatch.setattr("sys.argv", ["launch/train.py", *line, "--comment", f"https://alice:{PASSWORD}@host", KEY])
    train(parse_arguments(line))
    shown = capfd.readouterr()
    found = {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    mirror = S3Storage(bucket, "run")
    found |= {f"{mirror.url}/{name}": mirror.read(name) for name in mirror.list()}
    yield found | {"the screen": (shown.out + shown.err).encode()}


def test_a_scan_of_all_that_a_run_wrote_finds_no_secret(written: dict[str, bytes]) -> None:
    assert {"run/train.log", "run/environment.json", "run/config.yaml", "run/mlflow.json"} <= written.keys()
    assert any(name.startswith("s3://") for name in written)
    assert b"***" in written["run/environment.json"]
    if any(name.endswith("mlflow.db") for name in written):
        assert b"FINISHED" in written["mlflow.db"]
    else:
        assert b"http://***@127.0.0.1:1" in written["run/train.log"]
    secrets = {PASSWORD, KEY, TOKEN, os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]}
    for secret in secrets:
        assert [name for name, content in written.items() if secret.encode() in content] == []
