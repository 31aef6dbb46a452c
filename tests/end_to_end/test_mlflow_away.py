"""An MLflow server that is killed while a run ends gets what it lacks from the next start of the same command."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from mlflow import MlflowClient

from tests.end_to_end.jobs import OPTIONS, TRAIN, finish, free_port, small_data, spawn, wait_for_step

STEPS = 40


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """Killed at the end."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "server.log").read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.2)
        yield
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()


def test_what_mlflow_lacks_is_sent_by_the_next_start(tmp_path: Path) -> None:
    data, port = small_data(str(tmp_path / "data")), free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, TRAIN, *OPTIONS, "--data", data, "--run-dir", "run", "--max-steps", str(STEPS)]
    with mlflow_server(tmp_path, port):
        job = spawn(command, cwd=tmp_path, MLFLOW_TRACKING_URI=uri)
        wait_for_step(job, tmp_path / "run", 2)
        while not (tmp_path / "run" / "mlflow_run_id").exists() and job.poll() is None:
            time.sleep(0.02)
    assert "has not got everything of this run" in finish(job)
    with mlflow_server(tmp_path, port):
        assert f"is complete: all {STEPS} steps are done" in finish(
            spawn(command, cwd=tmp_path, MLFLOW_TRACKING_URI=uri)
        )
        client = MlflowClient(uri)
        run = client.get_run((tmp_path / "run" / "mlflow_run_id").read_text().strip())
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "Loss/G")
        assert sorted(metric.step for metric in history) == list(range(1, STEPS + 1))
        assert run.outputs and len(run.outputs.model_outputs) == 1
