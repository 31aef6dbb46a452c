"""docs/operations.md has every exit code, signal, warning, metric of health, file of a run and field of its status."""

import ast
import re
import signal
from pathlib import Path

import pytest

from infra import errors
from infra.json_lines import read_json
from infra.signals import STOP_SIGNALS
from launch.runs.folder import RunFolder
from launch.runs.status import StatusFile

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "operations.md").read_text()
PROSE = " ".join(PAGE.split())
ROWS = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("|")]
# Where a training can warn.
WARNING = ["launch/runs/*.py", "pipelines/*.py", "trainer/*.py", "trainer/engines/*.py", "infra/json_lines.py"]


def warnings() -> list[str]:
    """The texts of warnings, other than those that an error or another function words."""
    calls = [
        node
        for pattern in WARNING
        for path in sorted(REPOSITORY.glob(pattern))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.warning"
    ]
    texts = [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]
    return [str(text) for text in texts if text != "%s"]


@pytest.mark.parametrize("text", warnings())
def test_every_warning_is_explained(text: str) -> None:
    """By three words of it, or all where what it fills in leaves fewer."""
    parts = [part.strip(" ,;:()").split() for part in re.split(r"%[.\d]*[sdf]", text)]
    long = [part for part in parts if len(part) > 2] or [part for part in parts if part]
    assert any(" ".join(part[:3]).rstrip(",;:") in PROSE for part in long)


def test_every_exit_code_and_signal_is_explained() -> None:
    names = ("FAULT", "EXIT_USER_ERROR", "DIVERGED", "OUTAGE", "INTERRUPTED", "TERMINATED")
    codes = {0, *(getattr(errors, name) for name in names)}
    assert {int(row) for row in ROWS if row.strip().isdigit()} == codes
    called = {signal.SIGINT: "Ctrl-C"}
    assert all(called.get(number, number.name) in PAGE for number in STOP_SIGNALS)


def test_every_file_of_a_run_and_field_of_its_status_is_explained(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    named = " ".join(row for row in ROWS if "`" in row)
    files = {path.name for key, path in vars(folder).items() if key not in ("path", "_former_status")}
    assert [name for name in sorted(files) if f"`{name}" not in named] == []
    StatusFile(folder, 0, 1)
    assert [name for name in read_json(folder.status_file, dict) if f"`{name}`" not in named] == []


@pytest.mark.parametrize(
    "name", ["norm/", "acc/D_fake", "acc/D_real", "data/wait", "save/pause", "save/write", "save/age"]
)
def test_every_metric_of_health_is_explained(name: str) -> None:
    assert any(f"`{name}" in row for row in ROWS)
