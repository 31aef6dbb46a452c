"""A run folder, which describes itself: what was asked for, with which versions, by which command, and what came out.

config.yaml        every option, resolved, with the format number
environment.json   versions, machine and command of each start
train.log          what the console said
metrics.jsonl      one JSON object per step
evaluations.jsonl  metrics of each evaluation during training
evaluations/       pictures of each
samples/           sample grids, and the pictures of launch/evaluate.py
checkpoints/       see trainer/checkpoint.py
postmortem/        of a step that was not finite and ended the run: step_N is like a checkpoint, and its state.json names
                   the samples and losses under "broken"
model/             the final generator (or segmenter) as an MLflow model
logs/              rank_N.log of each rank above 0
status.json        state: RUNNING, or how the run ended: FINISHED, KILLED (from outside, to be continued), FAILED; and more
                   (launch/runs/status.py). Earlier versions had a file `status` with the state alone
run.lock           held by the process that trains the run: host, pid, time (launch/runs/lock.py)
mlflow_run_id      the MLflow run that this folder belongs to
mlflow.json        what MLflow is told beside the options: experiment, tags, data set
mlflow_sent.json   what MLflow has got so far (launch/runs/follower.py)
evaluation.json    metrics of launch/evaluate.py, once it has run; of a segmenter, its scores on test images
"""

import dataclasses
import json
import logging
import os
import platform
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from infra.config import completed, differing, flatten, read_yaml, to_yaml
from infra.disk import why_unwritable
from infra.errors import FULL, UserError
from infra.json_lines import as_record, read_json, read_records
from infra.redaction import redacted
from infra.storage import TEMPORARY, StorageUnavailable, replacing
from launch.runs.config import TrainingConfig
from launch.runs.lock import is_held
from trainer.methods.former import todays_names

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingConfig)

Status = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]
LONGEST_LINE = 16384  # bytes of the metrics of one step
METHOD, PRECISION = "method.name", "engine.precision"
PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "webdataset", "mlflow", "ray", "boto3", "numpy")


def default_run_dir(name: str) -> str:
    """With a random part, since many runs may begin in one second."""
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def run_around(checkpoint: Path) -> "RunFolder":
    """The run that a checkpoint lies in; of one that was moved elsewhere, the folder around it."""
    around = checkpoint.resolve().parent
    run = RunFolder(around.parent)
    return run if around.name == run.checkpoints.name or run.config_file.is_file() else RunFolder(around)


class RunFolder:
    """Nothing is written before `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.log_file = path / "train.log"
        self.metrics_file = path / "metrics.jsonl"
        self.evaluations_file = path / "evaluations.jsonl"
        self.evaluation_pictures = path / "evaluations"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.postmortem = path / "postmortem"
        self.model = path / "model"
        self.logs = path / "logs"
        self.status_file = path / "status.json"
        self.lock_file = path / "run.lock"
        self._former_status = path / "status"
        self.run_id_file = path / "mlflow_run_id"
        self.about_file = path / "mlflow.json"
        self.sent_file = path / "mlflow_sent.json"
        self.evaluation_file = path / "evaluation.json"

    def check_place(self) -> None:
        """UserError if the folder cannot be made, or written to where it is."""
        reason = why_unwritable(self.path)
        if reason and not os.path.isfile(self.path):  # of a file `check` says more
            raise self._unusable(reason)

    def _unusable(self, reason: object) -> UserError:
        return UserError(f"the run folder {self.path} cannot be written ({reason}): name another --run-dir")

    def saved(self) -> dict[str, Any]:
        """The configuration of the run in the folder, flat, as it was written; empty if there is none, or if it is damaged
        (a checkpoint has it too). UserError if the folder is something else."""
        if not self.path.exists():
            return {}
        if self.config_file.is_file():
            if _is_whole(self.config_file):
                return read_yaml(self.config_file)
            log.warning("%s is damaged: it is written anew, and a checkpoint says how the run began", self.config_file)
            return {}
        # Checkpoints alone: fetched from the mirror by a process that was killed before `open`, or in it.
        early = {self.checkpoints.name, self.lock_file.name, self.samples.name}
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else {""}
        if any(name not in early and not name.startswith(TEMPORARY) for name in names):
            raise UserError(f"{self.path} exists and is not a run folder: name another --run-dir")
        return {}

    def make(self) -> None:
        """UserError if that cannot be done."""
        self._try(lambda: self.path.mkdir(parents=True, exist_ok=True))

    def open(self, config: TrainingConfig) -> None:
        """Make the folder and write down how the run was started. UserError if that cannot be done."""
        self._try(lambda: self._open(config))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except UserError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise StorageUnavailable(
                    f"the run folder {self.path} cannot be made ({error.strerror}): make room"
                ) from None
            raise self._unusable(error.strerror) from None
        except ValueError as error:  # a zero byte in the name
            raise self._unusable(error) from None

    def _open(self, config: TrainingConfig) -> None:
        with replacing(self.config_file) as file:
            file.write(to_yaml(flatten(config)).encode())
        self.samples.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        environment = self.path / "environment.json"
        starts = read_json(environment, list)
        with replacing(environment) as file:
            file.write(json.dumps([*starts, _environment()], indent=1).encode())

    def write_status(self, state: Status, **facts: Any) -> None:
        """facts: see `StatusFile`. A disk that does not take it is no reason to end."""
        with suppress(OSError):
            with replacing(self.status_file, durable=False) as file:
                file.write((json.dumps({"state": state, **facts}, indent=1) + "\n").encode())
            self._former_status.unlink(missing_ok=True)

    def status(self) -> str:
        """The state; KILLED for a run that was running and whose process is gone; "" if it is not known."""
        facts = read_json(self.status_file, dict)
        if not facts and self._former_status.exists():
            return self._former_status.read_text(errors="replace").strip("\0\n ")
        state = str(facts.get("state", ""))
        return "KILLED" if state == "RUNNING" and "pid" in facts and not is_held(self.lock_file) else state

    def rank_log(self, rank: int) -> Path:
        """Its folder is made."""
        if rank:
            self.logs.mkdir(exist_ok=True)
        return self.log_file if rank == 0 else self.logs / f"rank_{rank}.log"

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write down what MLflow gets to describe the run: experiment, tags, data_set (root, digest, about), model (its name)."""
        with replacing(self.about_file) as file:
            file.write(json.dumps(about, indent=1).encode())

    def evaluations(self) -> list[dict[str, Any]]:
        """Metrics of each evaluation during training with its "step", in order; without a line cut short by a kill."""
        return read_records(self.evaluations_file)

    def evaluation_of(self, checkpoint: Path) -> dict[str, Any]:
        """Metrics that the training found of one of its checkpoints; empty where there are none."""
        step = checkpoint.resolve().name.removeprefix("step_")
        return next((row for row in reversed(self.evaluations()) if str(row["step"]) == step), {})

    def steps_done(self) -> int:
        """By the last whole line of the metrics; 0 where there is none."""
        try:
            with self.metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE))
                lines = file.read().rpartition(b"\n")[0].splitlines()
        except FileNotFoundError:
            return 0
        last = next((record for line in reversed(lines) if (record := as_record(line))), None)
        return int(last["step"]) if last else 0


def _is_whole(text_file: Path) -> bool:
    """Whether a file of text ends as it was written, and is no remainder of a crash."""
    content = text_file.read_bytes()
    return content.endswith(b"\n") and b"\0" not in content


def write_png(path: Path, picture: np.ndarray) -> None:
    """picture: uint8 (H, W, 3)."""
    with replacing(path) as file:
        Image.fromarray(picture).save(file, format="png")


def check_same(run: str, saved: Mapping[str, Any], config: TrainingConfig) -> None:
    """UserError if a run was of another configuration, given flat as it was saved, than the one that is to continue it.
    A precision left to the machine agrees with any: the run goes on in its own."""
    before, now = completed(type(config), todays_names(saved)), flatten(config)
    if before.get(METHOD) != now.get(METHOD) and METHOD in before and METHOD in now:
        raise UserError(f"{run} has {METHOD} = {before[METHOD]}, not {now[METHOD]}: "
                        "repeat its options to continue it, or name another --run-dir")  # fmt: skip
    if unknown := sorted(before.keys() - now.keys()):
        raise UserError(f"{run} has the option {unknown[0]}, which is unknown here, so another program or version began it: "
                        "continue it with that, or name another --run-dir")  # fmt: skip
    for name in differing(type(config), before, now):
        if (name, now[name]) != (PRECISION, "auto"):
            raise UserError(f"{run} has {name} = {before[name]}, not {now[name]}: "
                            "repeat its options to continue it, or name another --run-dir")  # fmt: skip


def _environment() -> dict[str, object]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redacted(shlex.join(sys.argv)),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def resolved(config: Config, *, root: str, run_dir: str, precision: str) -> Config:
    """The configuration with everything that was left to the machine filled in."""
    return dataclasses.replace(
        config,
        run_dir=run_dir,
        data=dataclasses.replace(config.data, root=root),
        engine=dataclasses.replace(config.engine, precision=precision),
    )
