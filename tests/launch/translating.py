"""What tests of launch/translate.py have in common: a run with a small generator, and the command line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.config import flatten
from launch import translate as cli
from tests.trainer.small import method_config
from trainer.checkpointer import Checkpointer


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
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["translate.py", *map(str, arguments)])
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


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object
) -> str:
    """The one sentence that a command line ends with; what is in the folder stays as it is."""
    before = contents(folder)
    assert translate(monkeypatch, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and contents(folder) == before
    return lines[0]
