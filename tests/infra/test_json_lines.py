import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from infra.json_lines import JsonLines


def test_every_digit_is_kept(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "run" / "metrics.jsonl")
    value = float(np.nextafter(1 / 3, 1))
    file.append({"step": 1, "loss": value, "grad": float("nan")})
    line = file.path.read_text()  # before close: a killed run must leave it
    assert json.loads(line) == {"step": 1, "loss": value, "grad": None}
    file.close()


def test_a_torn_line_and_what_is_done_again_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    for step in range(1, 6):
        file.append({"step": step, "loss": 0.1})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 6, "lo')
    file = JsonLines(path)
    assert [r["step"] for r in file.read()] == [1, 2, 3, 4, 5]
    file.truncate_after(3)
    file.append({"step": 4, "loss": 0.2})
    assert file.read()[2:] == [{"step": 3, "loss": 0.1}, {"step": 4, "loss": 0.2}]
    file.close()
    path.write_text('{"step"')
    assert JsonLines(path).read() == []


def test_rows_that_find_no_room_come_when_there_is(tmp_path: Path) -> None:
    """Half a line fits, then nothing, then all."""
    lines = JsonLines(tmp_path / "x.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it
    try:
        lines.append({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                lines.append({"step": step})
        assert (tmp_path / "x.jsonl").stat().st_size == 20
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines.append({"step": 4})
    assert [record["step"] for record in lines.read()] == [1, 2, 3, 4]
