"""PBT's exploit: a run goes on from another run's checkpoint with options of its own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.config import read_yaml
from infra.errors import UserError
from infra.storage import open_storage
from launch.config import JobConfig, make_config
from launch.job import train
from launch.run_folder import RunFolder
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tuning.trial import cause_of, take_over

TINY = {
    "data.crop": 32, "data.decoder": "pillow", "model.ngf": 2, "model.ndf": 2, "model.blocks": 6, "model.head_dim": 4,
    "method.taps": (0, 4), "method.patches": 8, "method.buffer": 2, "engine.precision": "fp32", "loop.samples": 1,
    "loop.checkpoint_every": 4, "evaluation.every": 0.5, "optim.epochs": 1.0, "optim.decay_epochs": 1.0,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    root = str(tmp_path / "data")
    prepare(street_scenes(8, 2), open_storage(root), Encoding((64, 32)), progress=False)
    return root


def test_weights_and_optimisers_are_the_others(data: str, tmp_path: Path) -> None:
    def config(name: str, lr: float, steps: int) -> JobConfig:
        own = {"data.root": data, "run_dir": str(tmp_path / name), "optim.lr": lr, "loop.max_steps": steps}
        return make_config(TINY, own)

    heard: list[int] = []
    good = RunFolder(train(config("good", 1e-3, 8), listener=lambda row: heard.append(row["step"])))
    assert heard == [4]  # the evaluation at the end is told by what is in the folder
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
    assert bad.evaluations() == good.evaluations() != []

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


def test_a_cause_is_one_line() -> None:
    assert cause_of(UserError("no such thing: mend it")) == "no such thing: mend it"
    assert cause_of(ValueError("first\nsecond")) == "ValueError: first"
    wrapped = RuntimeError("of Ray")
    wrapped.worker_failures = {0: KeyError("x")}  # type: ignore[attr-defined]
    assert cause_of(wrapped) == "KeyError: 'x'"
    wrapped.worker_failures[1] = UserError("the true one")  # type: ignore[attr-defined]
    assert cause_of(wrapped) == "the true one"
