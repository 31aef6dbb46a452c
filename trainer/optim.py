"""The optimiser, its batch and its schedule: by default as CUT has them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infra.config import option
from infra.errors import UserError

SCHEDULES = ("linear", "step", "cosine", "cosine-published", "poly")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    global_batch: int = option(1, "pairs (a segmenter: images) per step, over all ranks", flag="--global-batch")
    accumulation: int = option(
        1, "micro-batches per step and rank; above 1 CUT's G runs twice per step", resumable=True
    )
    kind: str = option("adam", "optimiser", choices=("adam", "sgd"))
    lr: float = option(2e-4, "learning rate", adjustable=True)
    beta1: float = option(0.5, "Adam's beta1", adjustable=True)
    beta2: float = option(0.999, "Adam's beta2", adjustable=True)
    momentum: float = option(0.9, "SGD's momentum", adjustable=True)
    weight_decay: float = option(0.0, "share of each weight added to its gradient", adjustable=True)
    epochs: float = option(200.0, "epochs (of the source) at the full learning rate")
    decay_epochs: float = option(200.0, "epochs over which it then falls to zero (schedule linear)")
    schedule: str = option(
        "linear",
        "how the learning rate falls: cosine and poly over all epochs, step at once after every step_epochs",
        choices=SCHEDULES,
    )
    step_epochs: int = option(50, "schedule step: epochs between two falls")
    step_factor: float = option(0.1, "schedule step: what the rate is multiplied by at each")
    ema: float = option(
        0.0, "decay of the exponential moving average of the generator (or segmenter), e.g. 0.999; 0: none"
    )

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.accumulation < 1:
            raise UserError("optim.global_batch and optim.accumulation count pairs and passes: they must be 1 or more")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise UserError(f"optim.momentum must lie in [0, 1) and optim.weight_decay not be negative (got "
                            f"{self.momentum} and {self.weight_decay}): 0.9 and 0.0001 are usual")  # fmt: skip
        if self.lr <= 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"Adam needs lr > 0 and 0 <= beta < 1 (got lr {self.lr}, betas {self.beta1}, {self.beta2})")
        if self.epochs < 0 or self.decay_epochs < 0 or self.total_epochs <= 0:
            raise UserError("optim.epochs and optim.decay_epochs must not be negative, and not both 0")
        if self.step_epochs < 1 or (self.schedule == "cosine-published" and self.epochs == 0):
            raise UserError(
                "optim.step_epochs must be 1 or more, and optim.epochs above 0 for schedule cosine-published"
            )
        if not 0 < self.step_factor <= 1:
            raise UserError(f"optim.step_factor = {self.step_factor} must lie in (0, 1]: 0.1 and 0.5 are usual")
        if not 0 <= self.ema < 1:
            raise UserError(f"optim.ema = {self.ema} must lie in [0, 1): 0.999 is usual, 0 turns it off")

    @property
    def total_epochs(self) -> float:
        return self.epochs + self.decay_epochs


def read_rate_from_device(optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """Have its learning rate in a tensor there, which a captured step reads anew each time. CUDA's fused kernels take one in
    float32 alone, so that the rate is rounded to 1 in 10^7; a CPU's take float64, which changes no number."""
    on_gpu = device.type == "cuda"
    for group in optimiser.param_groups:
        dtype = torch.float32 if on_gpu else torch.float64
        group["lr"] = torch.full((), group["lr"], dtype=dtype, device=device)
        group["capturable"] = on_gpu
    vars(optimiser)["_warned_capturable_if_run_uncaptured"] = True  # which it does in a first step of each kind


def make_optimiser(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    *,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
) -> torch.optim.Optimizer:
    """Adam or SGD as published. One over several networks equals one for each. What is given replaces the config's."""
    decay = config.weight_decay if weight_decay is None else weight_decay
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": decay}
    if config.kind == "sgd":
        parameters = list(parameters)
        # Fused, it can pass over a step without the host's knowing; on a CPU it would round otherwise than it always has.
        fused = any(parameter.device.type != "cpu" for parameter in parameters) or None
        optimiser = torch.optim.SGD(parameters, momentum=config.momentum, fused=fused, **shared)
        if fused and config.momentum:  # which a first step that changes nothing would leave as memory happened to be
            for parameter in parameters:
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimiser
    return torch.optim.Adam(parameters, betas=betas or (config.beta1, config.beta2), fused=True, **shared)
