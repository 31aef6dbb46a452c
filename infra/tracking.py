"""MLflow: which store is in use, and one run in it. What a training sends, and when: `launch/runs/follower.py`."""

import contextlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from infra.redaction import holds_secret, redacted
from infra.storage import replacing

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

METRICS_PER_REQUEST = 1000  # MLflow's limit
PARAMS_PER_REQUEST = 100  # MLflow's limit
DIGEST_LIMIT = 36  # characters of a data set's digest, MLflow's limit
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # what the UI calls model training
SQLITE = "sqlite:///"
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we try again ourselves
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # we say in one line what MLflow says in a traceback
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def store_uri() -> str:
    """The MLflow store in use: MLFLOW_TRACKING_URI, or else the file mlflow.db in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path.cwd() / 'mlflow.db'}"


def ui_command() -> str:
    """The shell command that shows the runs in a browser, or the address where a server shows them already."""
    uri = store_uri()
    if uri.startswith("http"):
        return redacted(uri)
    # Where it has a password, the command takes the variable instead.
    shown = '"$MLFLOW_TRACKING_URI"' if holds_secret(uri) else shlex.quote(uri)
    return f"mlflow ui --backend-store-uri {shown}"


def quiet_mlflow() -> None:
    """Import MLflow with settings that suit a program which tries again by itself. It takes a second and a half; two
    threads that import at once can each meet the other's half-made modules, so the main thread should do it."""
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Any:
    """For a SQLite file, which is made here if there is none: processes that create its tables at the same time break each
    other's migrations, and one that is killed on the way leaves tables with which no later one can go on. So the file gets
    its name when all tables are there."""
    if not uri.startswith(SQLITE):
        yield
        return
    file = Path(uri.removeprefix(SQLITE))
    with FileLock(f"{file}.lock"):
        if not file.exists():
            from mlflow import MlflowClient

            unfinished = file.with_name(f"{file.name}.unfinished")
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=f"{SQLITE}{unfinished}").search_experiments(max_results=1)
            unfinished.rename(file)
        yield


def experiment_id(client: "MlflowClient", name: str, uri: str) -> str:
    """The experiment of that name, made if there is none."""
    from mlflow import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    artifacts = None  # a server knows its own place
    if uri.startswith(SQLITE):
        artifacts = (Path(uri.removeprefix(SQLITE)).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS))
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process was first
            return str(found.experiment_id)
        raise


def read_run_id(file: Path) -> str | None:
    """The id of the run that a file names; None where there is no file, or a damaged one."""
    content = file.read_bytes().strip() if file.exists() else b""
    return content.decode() if content and re.fullmatch(rb"[\w-]+", content) else None


class MlflowRun:
    """One run in the store. Every call returns when the store has taken it, and raises what MLflow raises."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client, self.id = client, run_id

    @classmethod
    def open(cls, run_id_file: Path, experiment: str, name: str, *, create: bool = True) -> "MlflowRun | None":
        """The run that `run_id_file` names; where there is none, or this store does not have it (any more), a new one whose
        id is written there (create), or None."""
        quiet_mlflow()
        from mlflow import MlflowClient, MlflowException

        uri = store_uri()
        with one_at_a_time(uri):
            client = MlflowClient(tracking_uri=uri)
            if run_id := read_run_id(run_id_file):
                try:
                    run = client.get_run(run_id)
                    if run.info.lifecycle_stage == "active":
                        return cls(client, run.info.run_id)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
            if not create:
                return None
            run = client.create_run(experiment_id(client, experiment, uri), run_name=name)
        with replacing(run_id_file) as file:
            file.write(f"{run.info.run_id}\n".encode())
        return cls(client, run.info.run_id)

    def params(self, params: Mapping[str, Any]) -> None:
        """Those that the run does not have yet: MLflow keeps a parameter as it was first."""
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params
        new = [Param(name, str(value)) for name, value in params.items() if name not in known]
        for start in range(0, len(new), PARAMS_PER_REQUEST):
            self.client.log_batch(self.id, params=new[start : start + PARAMS_PER_REQUEST], synchronous=True)

    def metrics(self, rows: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
        """rows: (step, seconds since 1970, values). A row sent twice with the same time is kept once."""
        from mlflow.entities import Metric

        metrics = [Metric(k, float(v), int(at * 1000), step) for step, at, values in rows for k, v in values.items()]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            batch = metrics[start : start + METRICS_PER_REQUEST]
            self.client.log_batch(self.id, metrics=batch, synchronous=True)

    def tags(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_tag(self.id, name, value)

    def data_set(self, root: str, digest: str, about: Mapping[str, Any]) -> None:
        """Note what the run trains on, as its input. digest: identifies the content (MLflow takes its first 36 characters).
        about: shown beside it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=root.rstrip("/").rpartition("/")[2] or root, digest=digest[:DIGEST_LIMIT],
            source_type="s3" if root.startswith("s3://") else "local", source=json.dumps({"uri": root}),
            profile=json.dumps(about),
        )  # fmt: skip
        self.client.log_inputs(self.id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])

    def image(self, key: str, step: int, image_HWC: np.ndarray) -> None:
        """Log a picture, (H, W, 1 or 3) uint8, under a key whose steps the UI shows with a slider."""
        self.client.log_image(self.id, image_HWC, key=key, step=step)

    def artifacts(self, path: Path, folder: str) -> None:
        """Copy a file, or what a folder holds, into `folder` among the run's artifacts."""
        send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        send(self.id, str(path), folder)

    def delete_artifacts(self, folder: str) -> None:
        """Delete one folder of the run's artifacts; one that is not there is no error."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        uri = self.client.get_run(self.id).info.artifact_uri
        get_artifact_repository(uri, tracking_uri=store_uri()).delete_artifacts(folder)

    def model(self, name: str, folder: Path) -> None:
        """Register a saved MLflow model (the folder that mlflow.pyfunc.save_model wrote) as the run's logged model.

        `mlflow.pyfunc.load_model` then loads it as models:/<its id>, which a log line names.
        """
        from mlflow.entities import LoggedModelOutput

        model = self.client.create_logged_model(
            self.client.get_run(self.id).info.experiment_id, name=name, source_run_id=self.id
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        log.info("logged model: models:/%s", model.model_id)

    def status(self, status: str) -> None:
        """RUNNING, or how it ended: FINISHED, KILLED (from outside, to be continued), FAILED."""
        if status == "RUNNING":
            self.client.update_run(self.id, status=status)
        else:
            self.client.set_terminated(self.id, status)

    def store_answers(self) -> bool:
        """Whether the store is well, so that a failure lies with what was asked of it."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception:  # whatever a store, a driver or a disk comes up with
            return False
        return True
