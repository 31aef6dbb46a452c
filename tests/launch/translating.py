"""What tests of launch/translate.py have in common: a run with a small generator, and the command line."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from infra.config import flatten
from launch import translate as cli
from pipelines.ranks import Ranks
from tests.trainer.small import method_config
from trainer.checkpointer import Checkpointer

T = TypeVar("T")


def make_run(path: Path, method: str = "cut", seed: int = 0, step: int = 7) -> Path:
    """A run folder with one more checkpoint, of a translation with random weights."""
    config = method_config(method)
    torch.manual_seed(seed)
    translation = config.translation()
    networks = {name: network.state_dict() for name, network in translation.named_children()}
    state = {"step": step, "config": flatten(config, "method.") | {"method.name": method, "seed": 0}}
    Checkpointer(path / "checkpoints", keep=9).save(step, networks, state)
    return path


def translate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command line, in fp32 unless it says otherwise."""
    monkeypatch.setattr(sys, "argv", ["translate.py", "--precision", "fp32", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Rank:
    """One of some threads that stand for processes."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.rank, self.world_size, self._barrier, self._values = rank, world_size, barrier, values

    def gather(self, value: Any) -> list[Any] | None:
        self._values[self.rank] = value
        self._barrier.wait()
        everything = list(self._values)
        self._barrier.wait()
        return everything if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        first = self.gather(value)
        self._values[0] = first[0] if first else self._values[0]
        self._barrier.wait()
        return self._values[0]


def in_ranks(world_size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What each of some ranks makes of this. Raises what the first one raised."""
    barrier, values = threading.Barrier(world_size, timeout=60), [None] * world_size
    with ThreadPoolExecutor(world_size) as pool:
        running = [pool.submit(work, _Rank(rank, world_size, barrier, values)) for rank in range(world_size)]
        return [each.result() for each in running]


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object
) -> str:
    """The one sentence that a command line ends with; what is in the folder stays as it is."""
    before = contents(folder)
    assert translate(monkeypatch, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and contents(folder) == before
    return lines[0]
