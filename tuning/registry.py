"""What a search does in MLflow beside what its trials do themselves."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.errors import first_line
from infra.tracking import MlflowRun, read_run_id, store_uri
from launch.runs.folder import RunFolder
from tuning.folder import SearchFolder
from tuning.results import Record

log = logging.getLogger(__name__)

ALIAS = "best"


class SearchRun:
    """The run that those of the trials belong to. What MLflow does not take costs one warning and stops no search."""

    def __init__(self, folder: SearchFolder, experiment: str) -> None:
        self._run: MlflowRun | None = None
        self._warned = False
        self._try(self._open, folder, experiment)

    def _open(self, folder: SearchFolder, experiment: str) -> None:
        self._run = MlflowRun.open(folder.run_id_file, experiment, folder.path.name)

    @property
    def tags(self) -> dict[str, str]:
        """What nests the trials' runs under this one."""
        return {"mlflow.parentRunId": self._run.id} if self._run else {}

    def send(self, method: Callable[..., None], *given: Any) -> None:
        """method: of MlflowRun."""
        if self._run:
            self._try(method, self._run, *given)

    def _try(self, method: Callable[..., None], *given: Any) -> None:
        try:
            method(*given)
        except Exception as error:  # whatever a store or a driver comes up with
            if not self._warned:
                log.warning("MLflow at %s does not take the search's run (%s)", store_uri(), first_line(error))
            self._warned = True


def end_runs(folder: SearchFolder, records: Sequence[Record]) -> None:
    """Mark the runs of trials that a scheduler stopped or that died as such, which those could not do themselves."""
    from mlflow import MlflowClient

    for record in records:
        run_id = _run_id(folder.run_dir(record.number))
        if record.status in ("stopped", "failed") and run_id:
            try:
                client = MlflowClient(tracking_uri=store_uri())
                client.set_terminated(run_id, "KILLED" if record.status == "stopped" else "FAILED")
            except Exception as error:  # whatever a store or a driver comes up with
                log.warning("MLflow keeps trial %d as running (%s)", record.number, first_line(error))


def register(run_dir: Path, name: str) -> str | None:
    """Register the model of a finished run; its address with the alias "best". None, and a warning, if MLflow does not
    take it."""
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=store_uri(), registry_uri=store_uri())
        run_id = _run_id(run_dir)
        outputs = client.get_run(str(run_id)).outputs
        model = client.get_logged_model(outputs.model_outputs[-1].model_id if outputs else "")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        version = client.create_model_version(name, model.artifact_location, run_id, model_id=model.model_id).version
        client.set_registered_model_alias(name, ALIAS, version)
    except Exception as error:  # whatever a store or a driver comes up with, or a model that is not there
        log.warning("MLflow did not register the model of %s (%s)", run_dir, first_line(error))
        return None
    return f"models:/{name}@{ALIAS} (version {version})"


def _run_id(run_dir: Path) -> str | None:
    return read_run_id(RunFolder(run_dir).run_id_file)
