"""The liveness probe of a run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.errors import Stopped
from launch import alive

HOUR = 3600.0


@pytest.mark.parametrize(
    ("state", "age", "container", "dead"),
    [("RUNNING", 10, HOUR, False), ("RUNNING", 700, HOUR, True), ("RUNNING", 700, 600, False), ("KILLED", 700, HOUR, False),
     ("FINISHED", 700, HOUR, False)],
)  # fmt: skip
def test_a_run_is_dead_that_ended_no_step_for_long_since_its_container_began(
    tmp_path: Path, state: str, age: float, container: float, dead: bool
) -> None:
    """container: its age in seconds; one that is new waits for the others beside the status of the one before."""
    now = time.time()
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "progress": now - age}))
    try:
        alive.check(tmp_path, 600, now - container)
    except Stopped as error:
        assert dead and error.exit_code == 1 and "has ended no step for 70" in str(error)
    else:
        assert not dead


@pytest.mark.parametrize("content", [None, "", '{"state": "RUN', "[]", '{"state": "RUNNING", "progress": null}'])
def test_what_says_nothing_is_no_death(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    alive.check(tmp_path, 0, 0)


@pytest.mark.slow
def test_as_a_probe_calls_it(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "RUNNING", "progress": time.time() - 1}))
    command = [sys.executable, alive.__file__, str(tmp_path), "--within"]
    ended = [subprocess.run([*command, within], capture_output=True, text=True) for within in ("3600", "0.5")]
    assert [each.returncode for each in ended] == [0, 1]
    assert ended[1].stderr.startswith(f"error: the run in {tmp_path} has ended no step for ")
