"""MLflow follows the run folder: what is in the folder is sent, from where the last sending stopped.

A run needs no MLflow: everything is written into its folder first (`launch/runs/folder.py`), and what was not sent, because
the store was away, the run was killed or trained offline, is sent by the next start of the same command, or by
`python launch/track.py RUN`. mlflow_sent.json says what has arrived.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from infra.config import read_yaml
from infra.errors import UserError, first_line
from infra.images import open_image
from infra.json_lines import as_record, read_json
from infra.signals import current
from infra.storage import replacing
from infra.tracking import METRICS_PER_REQUEST, MlflowRun, quiet_mlflow, read_run_id, store_uri
from launch.runs.folder import RunFolder
from launch.runs.recorder import NOT_LOSSES
from launch.runs.report import PICTURES, scalars
from trainer.checkpoint import checkpoints_in

log = logging.getLogger(__name__)

POLL_S = 2.0  # between looks at the folder
RETRY_S = 30.0  # between attempts while the store is away
PATIENCE_S = 60.0  # at the end of a run, without anything that arrives


class TrackingUnavailable(Exception):
    """The store does not answer; what waits can be sent later."""


@dataclass
class Sent:
    """What has arrived in the run `run_id`. metrics, evaluations: the last step of each. about, evaluation, model: hashes of
    mlflow.json, evaluation.json and the model's description. pictures, checkpoints: names."""

    run_id: str = ""
    about: str = ""
    metrics: int = 0
    evaluations: int = 0
    evaluation: str = ""
    model: str = ""
    status: str = ""
    pictures: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)


class Sender:
    """Sends what is new in a run folder. Only one process does so at a time."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.arrived = 0  # things, of any kind
        self._offsets: dict[Path, int] = {}  # in files of lines: how far they were read
        self._refused: set[str] = set()
        self._run: MlflowRun | None = None
        self._about: dict[str, Any] = {}  # what the training says of itself; nothing, in a folder of an earlier version
        self._sent = Sent()
        self._lock = FileLock(folder.path / "mlflow.lock")

    def send(self, *, create: bool = True) -> bool:
        """Send all that is there. Raises TrackingUnavailable; filelock.Timeout if another process is sending. False where the
        store does not know the run and create is false."""
        with self._lock.acquire(timeout=0):
            try:
                if not self._open(create):
                    return False
                self._options()
                self._metrics()
                self._evaluations()
                self._pictures()
                self._checkpoints()
                self._model()
                self._evaluation()
                self._status()
            except BaseException:
                self._offsets = {}  # what was read may not have arrived: the cursor knows
                raise
        return True

    def _open(self, create: bool) -> bool:
        """Find or make the run, and what it has."""
        self._about = read_json(self.folder.about_file, dict)
        if create and not self._about:
            raise UserError(f"{self.folder.path} is of a version that did not write down what MLflow needs: continue the run by "
                            "its own command, which does")  # fmt: skip
        if self._run is None:
            known = read_run_id(self.folder.run_id_file) is not None
            if not known and (
                former := _read(self.folder.sent_file).run_id
            ):  # a crash of the machine took the one file
                with replacing(self.folder.run_id_file) as file:
                    file.write(f"{former}\n".encode())
            if create and not known and not self.folder.sent_file.exists():
                # Before the run has an id: one that is found without this file is taken for an earlier version's, all sent.
                self._keep()
            try:
                self._run = MlflowRun.open(
                    self.folder.run_id_file, self._about.get("experiment", ""), self.folder.path.name, create=create
                )
            except Exception as error:  # whatever a store or a driver comes up with
                raise TrackingUnavailable(first_line(error)) from error
            if self._run is None:
                return False
            if known and not self.folder.sent_file.exists():
                self._sent = self._all_there(self._run.id)  # a version without this file sent while it trained
                self._keep()
        self._sent = _read(self.folder.sent_file)
        if self._sent.run_id != self._run.id:
            self._sent, self._offsets = Sent(self._run.id), {}
        return True

    def _all_there(self, run_id: str) -> Sent:
        metrics, evaluations = (
            max((row["step"] for row in self._new_rows(path, 0)), default=0)
            for path in (self.folder.metrics_file, self.folder.evaluations_file)
        )
        pictures = [name for name, *_ in self._shown()]
        checkpoints = [path.name for path in self._wanted_checkpoints()]
        return Sent(run_id, metrics=metrics, evaluations=evaluations, pictures=pictures, checkpoints=checkpoints,
                    model=_hash(self._model_file))  # fmt: skip

    def _keep(self) -> None:
        self.arrived += 1
        with replacing(self.folder.sent_file, durable=False) as file:
            file.write(json.dumps(asdict(self._sent), indent=1).encode())

    def _deliver(self, kind: str, action: Callable[..., None], *given: Any) -> None:
        """What the store refuses (it cannot delete, say) counts as sent, with one warning per kind. Raises
        TrackingUnavailable."""
        assert self._run is not None
        try:
            action(self._run, *given)
        except Exception as error:  # whatever a store, a driver or a disk comes up with, training goes on
            # A locked database is away, too.
            if getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE" or not self._run.store_answers():
                raise TrackingUnavailable(first_line(error)) from error
            if kind not in self._refused:
                self._refused.add(kind)
                log.warning("MLflow at %s did not take %s: %s", store_uri(), kind, first_line(error))

    # ---- what a folder holds ------------------------------------------------------------------------------------------

    def _options(self) -> None:
        if (key := _hash(self.folder.about_file)) in ("", self._sent.about):
            return
        self._about = read_json(
            self.folder.about_file, dict
        )  # after its hash: what is written in between is sent next time
        params = read_yaml(self.folder.config_file)
        self._deliver("the parameters", MlflowRun.params, params)
        self._deliver("tags", MlflowRun.tags, self._about["tags"])
        self._deliver("the data set", MlflowRun.data_set, *self._about["data_set"].values())
        self._sent.about = key
        self._keep()

    def _metrics(self) -> None:
        batch: list[tuple[int, float, Mapping[str, float]]] = []
        count = 0
        for row in self._new_rows(self.folder.metrics_file, self._sent.metrics):
            values = grouped(row)
            if batch and count + len(values) > METRICS_PER_REQUEST:
                self._send_metrics(batch)
                batch, count = [], 0
            batch.append((row["step"], row["time"], values))
            count += len(values)
        if batch:
            self._send_metrics(batch)

    def _send_metrics(self, batch: list[tuple[int, float, Mapping[str, float]]]) -> None:
        self._deliver("metrics", MlflowRun.metrics, batch)
        self._sent.metrics = batch[-1][0]
        self._keep()

    def _evaluations(self) -> None:
        for row in self._new_rows(self.folder.evaluations_file, self._sent.evaluations):
            self._deliver("metrics", MlflowRun.metrics, [(row["step"], row["time"], dict(scalars(row)))])
            self._sent.evaluations = row["step"]
            self._keep()

    def _new_rows(self, path: Path, after: int) -> Iterator[dict[str, Any]]:
        """Whole lines that were not read before, of later steps than `after`."""
        if not path.exists():
            return
        if path.stat().st_size < self._offsets.get(path, 0):  # a resumed run cut the file
            self._offsets[path] = 0
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break
                row = as_record(line)
                if row and row["step"] > after:
                    yield {"time": path.stat().st_mtime, **row}
                self._offsets[path] = self._offsets.get(path, 0) + len(line)

    def _shown(self) -> Iterator[tuple[str, str, int, Path]]:
        """(name in the folder, key in MLflow, step, file) of each sample grid and picture of an evaluation, by step."""
        files = [(path, "samples", path.stem) for path in self.folder.samples.glob("step_*.png")]
        files += [(path, path.stem, path.parent.name) for path in self.folder.evaluation_pictures.glob("step_*/*.png")]
        for path, key, step in sorted(files, key=lambda found: (int(found[2].removeprefix("step_")), found[1])):
            yield path.relative_to(self.folder.path).as_posix(), key, int(step.removeprefix("step_")), path

    def _pictures(self) -> None:
        sent = set(self._sent.pictures)
        for name, key, step, path in self._shown():
            if name not in sent:
                self._deliver("a picture", _send_picture, key, step, path)
                self._sent.pictures.append(name)
                self._keep()

    def _checkpoints(self) -> None:
        """The newest loop.keep_logged of those that are there; those that were sent before and are older go."""
        wanted = self._wanted_checkpoints()
        for path in wanted:
            if path.name not in self._sent.checkpoints:
                self._deliver("a checkpoint", _send_checkpoint, path)
                self._sent.checkpoints.append(path.name)
                self._keep()
        if wanted:
            for name in [name for name in self._sent.checkpoints if name not in {path.name for path in wanted}]:
                self._deliver("a deletion", MlflowRun.delete_artifacts, f"checkpoints/{name}")
                self._sent.checkpoints.remove(name)
                self._keep()

    def _wanted_checkpoints(self) -> list[Path]:
        keep = int(self._about.get("keep_logged", 0))
        return checkpoints_in(self.folder.checkpoints)[-keep:] if keep else []

    @property
    def _model_file(self) -> Path:
        return self.folder.model / "MLmodel"

    def _model(self) -> None:
        if (key := _hash(self._model_file)) not in ("", self._sent.model):
            name = str(self._about.get("model", "model"))
            self._deliver("the model", MlflowRun.model, name, self.folder.model)
            self._sent.model = key
            self._keep()

    def _evaluation(self) -> None:
        """What launch/evaluate.py measured last, or a segmenter's scores."""
        file = self.folder.evaluation_file
        if (key := _hash(file)) in ("", self._sent.evaluation):
            return
        row = read_json(file, dict)
        if "step" in row:
            step, values = row["step"], dict(scalars(row))
            self._deliver("metrics", MlflowRun.metrics, [(step, file.stat().st_mtime, values)])
            for path in (self.folder.samples / f"{name}.png" for name in PICTURES):
                if path.exists():
                    self._deliver("a picture", _send_picture, path.stem, step, path)
        self._sent.evaluation = key
        self._keep()

    def _status(self) -> None:
        if (status := self.folder.status()) not in ("", self._sent.status):
            self._deliver("the status", MlflowRun.status, status)
            self._sent.status = status
            self._keep()


class Follower:
    """A thread that sends what a run leaves in its folder. Nothing here stops or delays training: while the store is away,
    one warning says so, and the folder keeps what waits."""

    def __init__(self, folder: RunFolder) -> None:
        quiet_mlflow()
        self._sender = Sender(folder)
        self._folder = folder
        self._closing = threading.Event()
        self._complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Send the rest. Waits as long as things arrive, and PATIENCE_S more; warns if something is left."""
        self._closing.set()
        while self._thread.is_alive():
            arrived = self._sender.arrived
            self._thread.join(_patience())
            if self._sender.arrived == arrived:
                break
        if not self._complete:
            log.warning(
                "MLflow at %s has not got everything of this run: send it with python launch/track.py %s",
                store_uri(), self._folder.path,
            )  # fmt: skip

    def _work(self) -> None:
        away = False
        while not self._complete:
            closing, pause = self._closing.is_set(), POLL_S
            try:
                self._sender.send()
                self._complete = closing
                if away:
                    log.info("MLflow at %s answers again", store_uri())
                away = False
            except Timeout:  # another process is sending
                time.sleep(0.1)
            except Exception as error:  # the store is away, or the disk is full: training goes on
                if not away:
                    what = "does not answer" if isinstance(error, TrackingUnavailable) else "cannot be told"
                    log.warning(
                        "MLflow at %s %s; training goes on, and the run folder keeps everything (%s)",
                        store_uri(), what, first_line(error),
                    )  # fmt: skip
                if closing:
                    return
                away, pause = True, RETRY_S
            if not closing:
                self._closing.wait(pause)


def _patience() -> float:
    """Seconds. Of a process that is told to stop less, so that it ends by itself: the rest is sent by the next start."""
    stop = current()
    return min(PATIENCE_S, stop.time_left / 3) if stop.told else PATIENCE_S


def is_sent(folder: RunFolder) -> bool:
    """Whether a run has ended and all that it left has arrived: its status is sent last. True of a run that an earlier
    version ended, which sent while it trained."""
    return not folder.about_file.exists() or _read(folder.sent_file).status == "FINISHED"


def send(folder: RunFolder, *, create: bool) -> None:
    """Send now what a run folder holds. UserError if the store is away, or does not know the run and is not to make it."""
    try:
        known = Sender(folder).send(create=create)
    except Timeout:
        log.info("%s is being sent by the process that trains it", folder.path)
        return
    except TrackingUnavailable as error:
        raise UserError(f"MLflow at {store_uri()} does not answer ({error}): start it, or set MLFLOW_TRACKING_URI, and send "
                        f"the run with python launch/track.py {folder.path}") from None  # fmt: skip
    if not known:
        raise UserError(f"MLflow at {store_uri()} does not know the run of {folder.path}: set MLFLOW_TRACKING_URI to the one "
                        f"that does, or make it there with python launch/track.py {folder.path}")  # fmt: skip


def grouped(row: Mapping[str, float]) -> dict[str, float]:
    """A row of metrics by their names in MLflow, whose UI makes a section of each prefix, sections with a capital first:
    "Loss/NCE", "train/lr"; "data/…" stays. A loss that was no number has none."""
    names = {name: name if "/" in name else f"{'train' if name in NOT_LOSSES else 'Loss'}/{name}" for name in row}
    return {names[k]: v for k, v in row.items() if k not in ("step", "time") and v is not None}


def _send_picture(run: MlflowRun, key: str, step: int, path: Path) -> None:
    with open_image(path, ("PNG",)) as image:
        run.image(key, step, np.asarray(image.convert("RGB")))


def _send_checkpoint(run: MlflowRun, path: Path) -> None:
    if path.is_dir():  # the training may have deleted it meanwhile; a newer one will be there then
        run.artifacts(path, f"checkpoints/{path.name}")


def _hash(path: Path) -> str:
    """Of a file; "" if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _read(path: Path) -> Sent:
    known = {each.name for each in fields(Sent)}
    return Sent(**{name: value for name, value in read_json(path, dict).items() if name in known})
