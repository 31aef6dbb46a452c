"""PBT's exploit: a run goes on from another run's checkpoint with options of its own."""

from pathlib import Path

import pytest
import torch
from made import TINY
from safetensors.torch import load_file

from infra.config import read_yaml
from infra.errors import UserError
from launch.config import JobConfig, make_config
from launch.job import train
from launch.run_folder import RunFolder
from tuning.trial import take_over


def test_weights_and_optimisers_are_the_others(data: str, tmp_path: Path) -> None:
    def config(name: str, lr: float, steps: int) -> JobConfig:
        own = {"data.root": data, "run_dir": str(tmp_path / name), "optim.lr": lr, "loop.max_steps": steps}
        return make_config(TINY, own)

    heard: list[int] = []
    good = RunFolder(train(config("good", 1e-3, 12), listener=lambda row: heard.append(row["step"])))
    assert heard == [4, 8]  # the evaluation at the end is told by what is in the folder
    bad = RunFolder(train(config("bad", 1e-5, 4)))
    donor = good.checkpoints / "step_8"
    changed = {"optim.lr": 2e-3}
    take_over(bad, donor, changed)
    for file in sorted(donor.glob("*.safetensors")):
        taken = load_file(bad.checkpoints / "step_8" / file.name)
        theirs = load_file(file)
        assert taken.keys() == theirs.keys() and all(torch.equal(taken[name], theirs[name]) for name in theirs)
    assert not (bad.checkpoints / "step_4").exists()
    assert read_yaml(bad.config_file)["run_dir"] == str(tmp_path / "bad")
    assert [row["step"] for row in bad.evaluations()] == [4, 8]  # and not the donor's later one
    assert bad.evaluations() == good.evaluations()[:2]

    with pytest.raises(UserError, match="optim.lr = 0.002, not 1e-05"):
        train(config("bad", 1e-5, 12))
    train(config("bad", 2e-3, 12))
    after = load_file(bad.checkpoints / "step_12" / "generator.safetensors")
    take_over(bad, donor, changed)  # a second time it is a run of these options, whose own progress counts
    assert all(
        torch.equal(v, after[k]) for k, v in load_file(bad.checkpoints / "step_12" / "generator.safetensors").items()
    )


def test_a_listener_hears_of_earlier_evaluations_again(data: str, tmp_path: Path) -> None:
    own = {"data.root": data, "run_dir": str(tmp_path / "run"), "optim.lr": 1e-3}
    train(make_config(TINY, own, {"loop.max_steps": 9}))
    heard: list[int] = []
    train(make_config(TINY, own), listener=lambda row: heard.append(row["step"]))
    assert heard == [4, 8, 9, 12]
