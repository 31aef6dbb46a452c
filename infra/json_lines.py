"""Files of one JSON object a line, each with the "step" that it is of."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.disk import flush

log = logging.getLogger(__name__)


class JsonLines:
    """Floats at full precision, and every line with the system when append returns.

    A number that is not finite is written as null, since JSON has no word for it. Opening a file whose writer was killed
    in the middle of a line drops that line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def append(self, record: Mapping[str, Any]) -> None:
        """OSError if the disk does not take it all; the rest comes first when there is room."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._waiting += json.dumps(finite, allow_nan=False).encode() + b"\n"
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def truncate_after(self, step: int) -> None:
        """Drop every record whose "step" is larger: a run resumed at `step` writes them again. What is damaged goes, too."""
        kept = [record for record in self.read() if record["step"] <= step]
        self._file.close()
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        flush(partial)
        partial.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def read(self) -> list[dict[str, Any]]:
        return read_records(self.path)

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record, in the order written; none where there is no file. What a kill or a crash of the machine cut short or
    damaged is left out, with a warning if it is more than the last line."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = [record for line in lines[:-1] if (record := as_record(line)) is not None]
    if damaged := len(lines) - 1 - len(records):
        log.warning("%s: %d damaged line%s left out", path, damaged, " is" if damaged == 1 else "s are")
    return records


def as_record(line: bytes) -> dict[str, Any] | None:
    """A line of such a file; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_json(path: Path, kind: type) -> Any:
    """The JSON value of that kind in a file; an empty one where there is no file, and with a warning where it is damaged."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, kind):
        return value
    log.warning("%s is damaged: it is left out", path)
    return kind()
