import json
from pathlib import Path

import numpy as np

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
