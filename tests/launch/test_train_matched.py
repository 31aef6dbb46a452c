"""A training on matched crops that is stopped and continued, and one that is to go on with another match."""

import sys
from pathlib import Path

import pytest
import torch

from infra.storage import LocalStorage
from launch import train as script
from pipelines.matching.make import MatchOptions, make_match
from tests.end_to_end.jobs import OPTIONS, losses, weights
from tests.pipelines.shardmaker import write_root

pytestmark = [pytest.mark.usefixtures("place"), pytest.mark.slow]


def train(root: Path, run_dir: str, steps: int) -> int:
    """The exit code of the command line, run in this process."""
    given = ["--data", str(root), "--data.match", "near", "--run-dir", run_dir, "--max-steps", str(steps)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *OPTIONS, "--data.threads", "1", "--engine.device", "cpu", *given])
        try:
            script.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_a_stopped_training_on_matched_crops_ends_like_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    write_root(LocalStorage(root), size=(64, 40))
    make_match(str(root), MatchOptions(by="labels", name="near", crop=32, k=4), progress=False)
    for run_dir, steps in (("whole", 8), ("stopped", 3), ("stopped", 8)):
        assert train(root, run_dir, steps) == 0
    assert losses(Path("stopped")) == losses(Path("whole"))
    whole, stopped = (weights(Path(name), 8) for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)

    (root / "matches" / "near.json").unlink()
    make_match(str(root), MatchOptions(by="thumbnail", name="near", crop=32, k=4), progress=False)
    assert train(root, "whole", 12) == 2
    assert "was trained on other data, or on another match near" in capsys.readouterr().err
