"""status.json: what a run is doing or how it ended, for people, liveness probes and restart policies."""

import os
import socket
import time
from typing import Any

from infra.errors import INTERRUPTED, OUTAGE, TERMINATED
from launch.runs.folder import RunFolder, Status

WRITE_EVERY_S = 5.0
KILLED = (OUTAGE, INTERRUPTED, TERMINATED)  # exit codes after which the same command goes on


def state_of(exit_code: int) -> Status:
    if exit_code == 0:
        return "FINISHED"
    return "KILLED" if exit_code in KILLED else "FAILED"


class StatusFile:
    """Written by rank 0: state, step of total, progress (when the last step ended, in seconds since 1970), checkpoint (the step
    of the last one), exit_code (null while it runs), host, pid, started. A disk that is full does not stop a training here."""

    def __init__(self, folder: RunFolder, step: int, total: int) -> None:
        self._folder = folder
        now = time.time()
        self._facts: dict[str, Any] = {
            "step": step, "total": total, "progress": now, "checkpoint": step or None, "exit_code": None,
            "host": socket.gethostname(), "pid": os.getpid(), "started": now,
        }  # fmt: skip
        self._written = 0.0
        self._ended = False
        self._write("RUNNING")

    def progress(self, step: int) -> None:
        self._facts |= {"step": step, "progress": time.time()}
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self._write("RUNNING")

    def saved(self, step: int) -> None:
        self._facts["checkpoint"] = step
        self._write("RUNNING")

    def end(self, exit_code: int) -> None:
        self._facts["exit_code"] = exit_code
        self._write(state_of(exit_code))
        self._ended = True

    def _write(self, state: Status) -> None:
        if not self._ended:
            self._written = time.monotonic()
            self._folder.write_status(state, **self._facts)
