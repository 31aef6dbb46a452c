"""What an engine keeps beside weights and optimisers."""

from pathlib import Path
from typing import Any

import torch

from tests.trainer.small import small_method
from tests.trainer.test_methods import Pairs, at
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.engines import Engine, EngineConfig
from trainer.optim import OptimConfig
from trainer.state import collect_state, restore_state
from trainer.step import train_step


def in_fp16() -> tuple[Any, Engine]:
    method = small_method(patches=16)
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
    assert all(reached[spec.name] != fresh[spec.name] for spec in method.optimisers)
    path = Checkpointer(tmp_path, keep=1).save(3, state.tensors, {"step": 3, "scalers": state.scalers})
    later_method, later = in_fp16()
    restore_state(later_method, later, None, Checkpoint(path))
    assert later.scaler_state() == reached
