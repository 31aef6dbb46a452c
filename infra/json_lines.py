"""Files of one JSON object a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
