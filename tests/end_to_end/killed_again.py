"""Trains in `whole` without a fault, and in `killed`, where each of ten processes is killed at a random moment and the next one
goes on: killed_again.py DATA. All are forks of one process, since starting one takes longer than its training."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from infra.json_lines import read_records
from launch.runs import training
from launch.runs.config import parse_arguments
from launch.runs.translator import train
from tests.end_to_end.jobs import OPTIONS

STEPS, KILLS = 60, 10


def begin(data: str, run_dir: str) -> int:
    """Train in a process of its own; its id."""
    if child := os.fork():
        return child
    try:
        train(parse_arguments([*OPTIONS, "--data", data, "--run-dir", run_dir, "--max-steps", str(STEPS)]))
    finally:  # it must not return into this one's program
        sys.stdout.flush()
        os._exit(0 if sys.exception() is None else 1)


def steps_of(run_dir: str) -> int:
    return max((row["step"] for row in read_records(Path(run_dir, "metrics.jsonl"))), default=0)


def kill(child: int, run_dir: str, further: int, seconds: float) -> None:
    """So many steps, and seconds, after the process has begun with its first."""
    starts, reached = Path(run_dir, "environment.json"), None
    before = starts.stat().st_mtime_ns if starts.exists() else 0
    while reached is None or steps_of(run_dir) < reached + further:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended by itself"
        if reached is None and starts.exists() and starts.stat().st_mtime_ns != before:
            time.sleep(0.05)  # it cuts its metrics to the checkpoint that it goes on from
            reached = steps_of(run_dir)
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed after step", steps_of(run_dir), flush=True)


def main() -> None:
    (data,) = sys.argv[1:]
    without: Any = SimpleNamespace(finish=lambda: None)
    training.Follower = lambda folder: without  # type: ignore[assignment,misc]
    _, status = os.waitpid(begin(data, "whole"), 0)
    assert status == 0
    draws = random.Random(0)
    for _ in range(KILLS):
        kill(begin(data, "killed"), "killed", draws.randint(1, 4), draws.uniform(0.0, 0.1))
    _, status = os.waitpid(begin(data, "killed"), 0)
    assert status == 0


if __name__ == "__main__":
    main()
