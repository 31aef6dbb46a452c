"""What an engine keeps beside weights and optimisers."""

from pathlib import Path

import torch

from tests.trainer.test_methods import Pairs, at
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, EngineConfig
from trainer.methods import Cut, CutConfig
from trainer.networks.config import ModelConfig
from trainer.optim import OptimConfig
from trainer.state import collect_state, restore_state
from trainer.step import train_step


def in_fp16() -> tuple[Cut, Engine]:
    method = Cut(CutConfig(patches=16), ModelConfig(ngf=4, ndf=4, blocks=6, head_dim=8), seed=0, global_batch=1)
    engine = Engine(EngineConfig(device="cpu", precision="fp16"))
    engine.prepare(method, OptimConfig())
    return method, engine


def test_the_loss_scale_goes_through_a_checkpoint(tmp_path: Path) -> None:
    method, engine = in_fp16()
    fresh = engine.scaler_state()
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for step in range(3):
        train_step(method, engine, [Pairs(images[0], images[1], torch.tensor([0]))], at(step))
    state, reached = collect_state(method, engine, None, 3), engine.scaler_state()
    assert all(reached[phase] != fresh[phase] for phase in method.phases)
    path = Checkpointer(tmp_path, keep=1).save(3, state.tensors, {"step": 3, "scalers": state.scalers})
    later_method, later = in_fp16()
    restore_state(later_method, later, None, Checkpoint(path))
    assert later.scaler_state() == reached
