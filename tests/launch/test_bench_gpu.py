"""launch/bench.py gpu: every measure at toy size on a CPU, taken up again, and its tables."""

import json
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.errors import UserError
from launch import bench, flipping, prepare
from launch.bench import measure
from launch.benchmarks import gpu
from launch.runs.config import parse_arguments
from tests.trainer import published_step

pytestmark = pytest.mark.slow


def call_here(command: Sequence[str], limit: float, log: Path) -> int | None:
    """Run a script in this process, whose imports are done; what is another program in one of its own."""
    if list(command[:2]) == ["-m", "pytest"]:
        return gpu.in_process(command, limit, log)
    kept, sys.argv = sys.argv, ["", *command[1:]]
    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(gpu.ROOT / command[0]), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = kept
    return 0


def test_the_whole_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a training's MLflow has its file
    file = gpu.run(tmp_path, 60.0, toy=True, call=call_here)
    report = json.loads(file.read_text())
    failed = {name: each["end"] for name, each in report["measures"].items() if each["status"] != 0}
    assert not failed
    assert list(report["measures"]) == [each.name for each in gpu.plan(tmp_path, toy=True)]
    for name, each in report["measures"].items():
        assert each["metrics"] or name.startswith(("data/", "parity", "flipping")), name
    assert report["measures"]["training"]["metrics"]["pairs_per_s"] > 0
    text = measure(["gpu", "--table", str(file)])
    assert "| srunit one tap/1/eager |" in text and "images/s, which decoding must keep up with" in text
    assert file.with_suffix(".md").read_text() == text

    def never(command: Sequence[str], limit: float, log: Path) -> int | None:
        raise AssertionError(command)

    gpu.run(tmp_path, 60.0, toy=True, call=never)  # all is there


def test_the_plan_for_a_gpu_has_the_parts_that_are_wanted(tmp_path: Path) -> None:
    names = [each.name for each in gpu.plan(tmp_path, toy=False)]
    for part in ("parity", "rates", "step/published", "step/srunit one tap/64/eager", "step/srunit one tap/16/compiled",
                 "step/srunit one tap/16/graphs",
                 "step/srunit one tap/1/compiled, graphs", "step/semst", "operators", "decode/1024x512",
                 "training", "translate",
                 "flipping"):  # fmt: skip
        assert any(name.startswith(part) for name in names), part
    assert all(each.limit <= 900 for each in gpu.plan(tmp_path, toy=False))


def test_the_commands_for_a_gpu_have_options_that_exist(tmp_path: Path) -> None:
    """A wrong one would be found on a machine that is paid by the hour."""
    parsers = {"launch/prepare.py": prepare.parser(), "launch/flipping.py": flipping.parser()}
    seen = set[str]()
    for each in gpu.plan(tmp_path, toy=False):
        script = next(
            (part for part in each.command if part.endswith(".py") or part == "tests.trainer.published_step"), "pytest"
        )
        options = list(each.command[each.command.index(script) + 1 :])
        seen.add(script)
        if script in parsers:
            parsers[script].parse_args(options)
        elif script != "pytest":
            own = bench.parser() if script == "launch/bench.py" else published_step.parser()
            of_job = options if script == "launch/train.py" else own.parse_known_args(options)[1]
            parse_arguments([*of_job, "--engine.device", "cpu"])
    assert len(seen) == 6, seen


def test_a_measure_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    begin = time.monotonic()
    status = gpu.in_process(["-c", "import subprocess; subprocess.run(['sleep', '60'])"], 1.0, tmp_path / "log")
    assert status is None and time.monotonic() - begin < 30


def test_wheels_are_those_of_cuda() -> None:
    lines = measure(["gpu", "--wheels"]).splitlines()
    assert any(line.startswith("torch==") and "+" not in line for line in lines)
    assert any("cu130" in line for line in lines) and any(line.startswith("deepspeed==") for line in lines)


def test_what_is_impossible_is_refused(tmp_path: Path) -> None:
    for content in (None, "{", "[]", '{"metrics": {}}'):
        if content:
            (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="holds no results of launch/bench.py gpu: measure first"):
            measure(["gpu", "--table", str(tmp_path / "x.json")])
    with pytest.raises(UserError, match="no measure is called nothing"):
        gpu.run(tmp_path, 1.0, only=["nothing"])


def test_where_nothing_is_measured_the_table_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"measures": {}}')
    assert measure(["gpu", "--table", str(tmp_path / "x.json")]).strip() == "Nothing measured yet."
