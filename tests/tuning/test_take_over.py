"""PBT's exploit: a run goes on from another run's checkpoint with options of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infra.config import flatten, leaves, read_yaml
from infra.errors import UserError
from launch.runs.config import JobConfig, job_class, make_config
from launch.runs.folder import RunFolder
from launch.runs.translator import train
from tests.tuning.made import TINY
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, EngineConfig
from trainer.loop import Evaluation, LoopConfig, Trainer
from trainer.state import TrainingState
from tuning.spaces import Params
from tuning.trial import take_over

pytestmark = pytest.mark.slow


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


def test_equal_options_are_no_reason_to_keep_poor_weights(data: str, tmp_path: Path) -> None:
    """PBT ends both at the end of the range."""

    def run(name: str, seed: int) -> RunFolder:
        own = {"data.root": data, "run_dir": str(tmp_path / name), "optim.lr": 1e-3, "seed": seed, "loop.max_steps": 4}
        return RunFolder(train(make_config(TINY, own)))

    good, bad = run("good", 0), run("bad", 1)
    theirs, own = (load_file(each.checkpoints / "step_4" / "generator.safetensors") for each in (good, bad))
    take_over(bad, bad.checkpoints / "step_4", {"optim.lr": 1e-3})  # its own
    assert all(torch.equal(v, own[k]) for k, v in load_file(bad.checkpoints / "step_4/generator.safetensors").items())
    take_over(bad, good.checkpoints / "step_4", {"optim.lr": 1e-3})
    assert all(
        torch.equal(v, theirs[k]) for k, v in load_file(bad.checkpoints / "step_4/generator.safetensors").items()
    )


def test_a_listener_hears_of_earlier_evaluations_again(data: str, tmp_path: Path) -> None:
    own = {"data.root": data, "run_dir": str(tmp_path / "run"), "optim.lr": 1e-3}
    train(make_config(TINY, own, {"loop.max_steps": 9}))
    heard: list[int] = []
    train(make_config(TINY, own), listener=lambda row: heard.append(row["step"]))
    assert heard == [4, 8, 9, 12]


# ---- what may change in the middle of a run ---------------------------------------------------------------------------

ADJUSTABLE = {name: kind for name, field, kind in leaves(job_class("srunit")) if field.metadata["adjustable"]}
IN_USE = TINY | {
    "method.bank.size": 16, "method.robust.start": 0.0, "method.constraint.start": 0.0, "method.constraint.smoothness": 1.0,
    "method.constraint.consistency": 1.0, "method.constraint.lipschitz": 1.0, "optim.weight_decay": 0.01,
}  # fmt: skip


class Pairs(NamedTuple):
    source: Tensor
    target: Tensor
    slots: Tensor


class Silent:
    def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
        pass

    def measured(self, done: int, count: int) -> None:
        pass

    def estimate(self, seconds: float) -> None:
        pass


def trained(options: Params, before: Checkpoint | None, steps: int) -> TrainingState:
    """A run of these options until so many steps, on noise, from its beginning or a checkpoint."""
    config = make_config(options)
    method = config.method.build(seed=0, global_batch=1)
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    engine.prepare(method, config.optim)
    trainer = Trainer(method, engine, config.optim, LoopConfig(max_steps=steps), seed=0, source_samples=8)
    if before:
        trainer.restore(before)
    first = before.state["step"] if before else 0
    states: list[TrainingState] = []

    def save(state: TrainingState, evaluation: Evaluation | None) -> None:
        states.append(state)

    draws = [torch.Generator().manual_seed(step) for step in range(steps)]
    images = [[torch.rand(1, 3, 32, 32, generator=draw) * 2 - 1 for _ in range(2)] for draw in draws]
    batches = [[Pairs(source, target, torch.tensor([0]))] for source, target in images[first:]]
    trainer.fit(batches, first, recorder=Silent(), sample=lambda step: None, evaluate=None, save=save)
    return states[-1]


@pytest.mark.parametrize(
    ("kind", "names"),
    # L_sem needs a trained segmenter: tests/trainer/test_semantic.py has its weight.
    [
        ("adam", ADJUSTABLE.keys() - {"optim.momentum", "method.semantic.weight"}),
        ("sgd", {"optim.lr", "optim.momentum"}),
    ],
)
def test_an_adjustable_option_takes_effect_in_the_middle_of_a_run(kind: str, names: set[str], tmp_path: Path) -> None:
    options = IN_USE | {"optim.kind": kind}
    flat = flatten(make_config(options))
    state = trained(options, None, 2)
    about = {"step": state.step, "scalers": state.scalers}
    half = Checkpoint(Checkpointer(tmp_path, keep=1).save(state.step, state.tensors, about))

    def after(changed: Params) -> dict[str, Tensor]:
        tensors = trained(options | changed, half, 4).tensors
        return {f"{file}/{name}": value for file, named in tensors.items() for name, value in named.items()}

    unchanged = after({})
    again = after({})
    assert all(torch.equal(again[key], unchanged[key]) for key in unchanged)
    for name in sorted(names):
        now = after({name: ADJUSTABLE[name](0.75 * flat[name])})
        assert now.keys() == unchanged.keys(), name
        assert any(not torch.equal(now[key], unchanged[key]) for key in now), name
