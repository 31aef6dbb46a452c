"""What a run leaves for people: a local journal first, then MLflow, which may be slow or away unnoticed by training."""

import contextlib
import json
import logging
import math
import os
import queue
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

log = logging.getLogger(__name__)

JOB_LIMIT = 100  # pictures, artifacts and so on that wait for a store that is slow or away; later ones are dropped
ROW_LIMIT = 10_000  # rows of metrics that wait, likewise
RETRY_S = 30.0  # between attempts while the store is away
METRICS_PER_REQUEST = 1000  # MLflow's limit
PARAMS_PER_REQUEST = 100  # MLflow's limit
DIGEST_LIMIT = 36  # characters of a data set's digest, MLflow's limit
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # what the UI calls model training
ROWS_PER_FLUSH = 20
SQLITE = "sqlite:///"
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the tracker tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # the tracker says in one line what MLflow says in a traceback
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

Status = Literal["FINISHED", "KILLED", "FAILED"]  # KILLED: stopped from outside, to be continued


class Journal:
    """A file of one JSON object a line, floats at full precision, every line with the system when append returns.

    A number that is not finite is written as null, since JSON has no word for it. Opening a journal whose writer was
    killed in the middle of a line drops that line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop every record whose "step" is larger: a run resumed at `step` writes them again."""
        kept = [record for record in self.read() if record["step"] <= step]
        self._file.close()
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def read(self) -> list[dict[str, Any]]:
        """Every record, in the order written."""
        with self.path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._file.close()


def store_uri() -> str:
    """The MLflow store in use: MLFLOW_TRACKING_URI, or else the file mlflow.db in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path.cwd() / 'mlflow.db'}"


def ui_command() -> str:
    """The shell command that shows the runs in a browser, or the address where a server shows them already."""
    uri = store_uri()
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


class Tracker:
    """One MLflow run, kept by a daemon thread: every call returns at once and nothing here stops training.

    When the store does not answer, one warning is printed and the thread tries again every half minute with what
    waits; what does not fit into the queue is dropped, as the journal has the figures. Work that the store refuses
    (a store that cannot delete, a file that is gone) is dropped with one warning per kind of work.
    """

    def __init__(self, worker: "_Worker | None") -> None:
        self._worker = worker

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        *,
        tags: Mapping[str, str] | None = None,
        run_id_file: Path,
        visit: bool = False,
    ) -> "Tracker":
        """Begin a run, or go on with the one that `run_id_file` names.

        The file lives in the run folder; the id is written into it once the store has given one, so that the same
        command, started again, continues the same MLflow run. Parameters of a continued run are kept as they were.
        visit: only add to that run, which may be going on in another process: its status stays what it is.
        """
        return cls(_Worker(experiment, run_name, dict(params), dict(tags or {}), run_id_file, visit))

    @classmethod
    def disabled(cls) -> "Tracker":
        """A tracker that does nothing, for ranks above 0 and for runs that want no MLflow."""
        return cls(None)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, or None as long as the store has not given one."""
        return (self._worker and self._worker.run_id) or None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if self._worker:
            self._worker.add_row(step, values)

    def image(self, key: str, step: int, image_HWC: np.ndarray) -> None:
        """Log a picture, (H, W, 1 or 3) uint8, under a key whose steps the UI shows with a slider."""
        if self._worker:
            self._worker.add_job("a picture", lambda w: w.client.log_image(w.run_id, image_HWC, key=key, step=step))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""

        def put(worker: "_Worker") -> None:
            for name, value in tags.items():
                worker.client.set_tag(worker.run_id, name, value)

        if self._worker:
            self._worker.add_job("tags", put)

    def data_set(self, root: str, digest: str, about: Mapping[str, Any]) -> None:
        """Note what the run trains on, as its input. digest: identifies the content (MLflow takes its first 36 characters).
        about: shown beside it."""
        if self._worker is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=root.rstrip("/").rpartition("/")[2] or root, digest=digest[:DIGEST_LIMIT],
            source_type="s3" if root.startswith("s3://") else "local", source=json.dumps({"uri": root}),
            profile=json.dumps(about),
        )  # fmt: skip
        entry = DatasetInput(data, [InputTag("mlflow.data.context", "training")])
        self._worker.add_job("the data set", lambda w: w.client.log_inputs(w.run_id, [entry]))

    def artifacts(self, path: Path, folder: str) -> None:
        """Copy a file, or what a folder holds, into `folder` among the run's artifacts."""

        def copy(worker: "_Worker") -> None:
            log_one_or_many = worker.client.log_artifacts if path.is_dir() else worker.client.log_artifact
            log_one_or_many(worker.run_id, str(path), folder)

        if self._worker:
            self._worker.add_job("artifacts", copy)

    def delete_artifacts(self, folder: str) -> None:
        """Delete one folder of the run's artifacts (of an old checkpoint, say); one that is not there is no error."""
        if self._worker:
            self._worker.add_job("a deletion of artifacts", lambda w: w.delete_artifacts(folder))

    def model(self, name: str, folder: Path) -> None:
        """Register a saved MLflow model (the folder that mlflow.pyfunc.save_model wrote) as the run's logged model.

        `mlflow.pyfunc.load_model` then loads it as models:/<its id>, which a log line names.
        """
        if self._worker:
            self._worker.add_job("the model", lambda w: w.log_model(name, folder))

    def finish(self, status: Status = "FINISHED", timeout: float = 60.0) -> None:
        """Wait until everything has arrived, at most `timeout` seconds, and end the run with the status given."""
        if self._worker:
            self._worker.finish(status, timeout)


class _Worker:
    """The thread behind a Tracker, with its queue: jobs in order, and rows of metrics that travel together."""

    def __init__(
        self,
        experiment: str,
        run_name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        run_id_file: Path,
        visit: bool,
    ) -> None:
        for name, value in ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        # Imported here, where needed (it takes a second and a half), and by the calling thread: two threads that
        # import at once can each meet the other's half-made modules.
        import mlflow

        logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
        self.client: mlflow.MlflowClient  # made in the thread: it may open a database
        self.run_id = ""  # until the store has given one
        self._uri = store_uri()
        self._experiment, self._run_name, self._params, self._tags = experiment, run_name, params, tags
        self._run_id_file = run_id_file
        self._visits = visit
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[_Worker], Any]] | None] = queue.SimpleQueue()
        self._rows: list[tuple[int, int, Mapping[str, float]]] = []  # step, milliseconds since 1970, values
        self._flush_waits = False
        self._closing = threading.Event()
        self._away = False
        self._refused: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    # Called by training.

    def add_job(self, kind: str, job: "Callable[[_Worker], Any]") -> None:
        if self._thread.is_alive() and self._jobs.qsize() < JOB_LIMIT:
            self._jobs.put((kind, job))

    def add_row(self, step: int, values: Mapping[str, float]) -> None:
        if len(self._rows) < ROW_LIMIT:
            self._rows.append((step, time.time_ns() // 1_000_000, values))
        if not self._flush_waits:
            self._flush_waits = True
            self._jobs.put(("metrics", _Worker.flush_rows))

    def finish(self, status: str, timeout: float) -> None:
        self._jobs.put(("the end of the run", lambda w: w.end_run(status)))
        self._jobs.put(None)
        self._closing.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning(
                "MLflow at %s did not take everything within %.0f s: the rest is lost there", self._uri, timeout
            )

    # Called in the thread.

    def _work(self) -> None:
        if self._done("the run", _Worker.open_run):
            while (job := self._jobs.get()) is not None and self._done(*job):
                pass

    def _done(self, kind: str, job: "Callable[[_Worker], Any]") -> bool:
        """Do one job, trying again while the store is away. False: give up tracking."""
        while True:
            try:
                job(self)
            except Exception as error:  # whatever a store, a driver or a disk comes up with, training goes on
                if self._store_answers(error):
                    if job is _Worker.flush_rows:
                        self._rows.clear()
                    if kind not in self._refused:
                        self._refused.add(kind)
                        log.warning("MLflow at %s did not take %s: %s", self._uri, kind, _first_line(error))
                    return bool(self.run_id)
                if not self._away:
                    self._away = True
                    log.warning(
                        "MLflow at %s does not answer; training goes on, and metrics.jsonl has every figure (%s)",
                        self._uri,
                        _first_line(error),
                    )
                if self._closing.wait(RETRY_S):
                    return False
            else:
                if self._away:
                    self._away = False
                    log.info("MLflow at %s answers again", self._uri)
                return True

    def _store_answers(self, error: Exception) -> bool:
        """Whether a failure lies with the job and not with the store."""
        if getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE":  # a locked database
            return False
        try:
            self.client.search_experiments(max_results=1)
        except Exception:  # as above
            return False
        return True

    def open_run(self) -> None:
        with self._only_one_at_a_time():
            self._open_run()

    def _only_one_at_a_time(self) -> contextlib.AbstractContextManager[Any]:
        """For a SQLite file: processes that create its tables at the same time break each other's migrations."""
        if not self._uri.startswith(SQLITE):
            return contextlib.nullcontext()
        return FileLock(self._uri.removeprefix(SQLITE) + ".lock")

    def _open_run(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=self._uri)
        run = self._earlier_run()
        if run is None:
            run = self.client.create_run(self._experiment_id(), tags=self._tags, run_name=self._run_name)
            partial = self._run_id_file.with_name(self._run_id_file.name + ".partial")
            partial.write_text(run.info.run_id + "\n")
            partial.replace(self._run_id_file)
            self._visits = False  # a run of its own
        elif not self._visits:
            self.client.update_run(run.info.run_id, status="RUNNING")
        new = [Param(name, str(value)) for name, value in self._params.items() if name not in run.data.params]
        for start in range(0, len(new), PARAMS_PER_REQUEST):
            self.client.log_batch(run.info.run_id, params=new[start : start + PARAMS_PER_REQUEST], synchronous=True)
        self.run_id = run.info.run_id

    def end_run(self, status: str) -> None:
        if not self._visits:
            self.client.set_terminated(self.run_id, status)

    def _earlier_run(self) -> Any:
        """The run to continue; None where there is none, or where this store does not have it (any more)."""
        from mlflow import MlflowException

        if not self._run_id_file.exists():
            return None
        try:
            run = self.client.get_run(self._run_id_file.read_text().strip())
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment_id(self) -> str:
        from mlflow import MlflowException

        if found := self.client.get_experiment_by_name(self._experiment):
            return found.experiment_id
        artifacts = None  # a server knows its own place
        if self._uri.startswith(SQLITE):
            artifacts = (Path(self._uri.removeprefix(SQLITE)).absolute().parent / "mlartifacts").as_uri()
        try:
            return self.client.create_experiment(self._experiment, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
        except MlflowException:
            if found := self.client.get_experiment_by_name(self._experiment):  # another process was first
                return found.experiment_id
            raise

    def flush_rows(self) -> None:
        from mlflow.entities import Metric

        self._flush_waits = False
        while rows := self._rows[:ROWS_PER_FLUSH]:
            metrics = [Metric(k, float(v), at, step) for step, at, values in rows for k, v in values.items()]
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                batch = metrics[start : start + METRICS_PER_REQUEST]
                self.client.log_batch(self.run_id, metrics=batch, synchronous=True)
            del self._rows[: len(rows)]

    def delete_artifacts(self, folder: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        uri = self.client.get_run(self.run_id).info.artifact_uri
        get_artifact_repository(uri, tracking_uri=self._uri).delete_artifacts(folder)

    def log_model(self, name: str, folder: Path) -> None:
        from mlflow.entities import LoggedModelOutput

        experiment_id = self.client.get_run(self.run_id).info.experiment_id
        model = self.client.create_logged_model(experiment_id, name=name, source_run_id=self.run_id)
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        log.info("logged model: models:/%s", model.model_id)


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:160] + "…"
