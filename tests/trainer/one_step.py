"""A small step of SRUNIT whose gradients are large enough to compare."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.trainer.small import small_method
from trainer.draws import Draws
from trainer.engines import EngineConfig, make_engine
from trainer.methods.base import Losses, StepContext
from trainer.optim import OptimConfig
from trainer.step import train_step


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor


class Step:
    """One step on two pairs of 32x32, from weights large enough that every path matters."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        options: dict[str, Any] | None = None,
        lr: float = 1e-9,
        **engine: Any,
    ) -> None:
        self.engine = make_engine(EngineConfig(kind="single", device="cpu", **engine))
        robust: dict[str, Any] = {"robust__beta": 0.01, "robust__least": 0.05, "robust__start": 0.0}
        sizes: dict[str, Any] = {
            "generator__ngf": 8,
            "discriminator__ndf": 8,
            "head_dim": 16,
            "patches": 16,
            "buffer": 2,
        }
        self.method = small_method(global_batch=2, **robust, **sizes, **(options or {}))
        for parameter in self.method.parameters():
            parameter.data = parameter.data * 20 if parameter.ndim > 1 else parameter.data + 0.1
        self.method.to(dtype)
        self.engine.prepare(self.method, OptimConfig(lr=lr))
        images = torch.rand(2, 2, 32, 32, 3, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1
        source, target = images.permute(0, 1, 4, 2, 3)
        self.batch = Pairs(source, target, torch.arange(2))

    def take(self, number: int = 0) -> Losses:
        return train_step(self.method, self.engine, [self.batch], StepContext(Draws(0, number)))

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad.double() for name, parameter in self.method.named_parameters()
                if name.endswith("weight") and parameter.grad is not None}  # fmt: skip
