"""A run that is killed ten times ends as one that nothing happens to."""

from pathlib import Path

import torch

from tests.end_to_end.jobs import finish, losses, small_data, start, weights
from tests.end_to_end.killed_again import STEPS

SCRIPT = str(Path(__file__).with_name("killed_again.py"))


def test_ten_kills_at_random_moments_change_no_number(tmp_path: Path) -> None:
    data = small_data(str(tmp_path / "data"))
    output = finish(start("single", data, cwd=tmp_path, script=SCRIPT, options=[]))
    assert output.count("killed after step ") == 10, output
    ours, theirs = (tmp_path / name for name in ("killed", "whole"))
    assert [row["step"] for row in losses(ours)] == list(range(1, STEPS + 1))
    assert losses(ours) == losses(theirs)
    assert weights(ours, STEPS).keys() == weights(theirs, STEPS).keys()
    assert all(torch.equal(value, weights(theirs, STEPS)[name]) for name, value in weights(ours, STEPS).items())
