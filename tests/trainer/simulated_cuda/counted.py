"""Training steps on the simulated device, counted. A process of its own counts them:

    python tests/trainer/simulated_cuda/counted.py LIBRARY < REQUESTS > LINES

takes a line of JSON for each step (the arguments of `counted`) and prints one for it (what `Calls` of
launch/benchmarks/counting.py has).
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from tests.trainer.simulated_cuda import library

    library.load(Path(sys.argv[1]))

import torch

from infra.config import build
from launch.benchmarks.counting import Calls
from tests.trainer.simulated_cuda.cases import EPOCHS, pairs, ready
from tests.trainer.simulated_cuda.device import simulated_cuda
from trainer.methods import METHODS
from trainer.optim import OptimConfig

COUNTED = ("calls", "bytes", "operators", "copies", "casts", "returns", "waits", "places")


def counted(
    method: str, options: Mapping[str, Any], *, batch: int, size: int, engine: Mapping[str, Any], ema: float = 0.0
) -> dict[str, dict[str, int]]:
    """One step in the middle of the schedule, on crops of this size: what `Calls` counts, by its names.

    options: of the method's section, by dotted name without `method.`, over those of its paper.
    """
    family = METHODS[method]
    own = {name.removeprefix("method."): value for name, value in family.options.items() if name.startswith("method.")}
    config = build(family.config, own | {name: _tupled(value) for name, value in options.items()})
    optim = OptimConfig(epochs=EPOCHS, decay_epochs=0, global_batch=1, ema=ema)
    with simulated_cuda():
        trainer, batches = ready(
            lambda: (config.build(seed=0, global_batch=batch), [pairs(range(batch), size)]), dict(engine), optim
        )
        for optimiser in trainer.engine.optimisers.values():  # have states, as after a first step
            for group in optimiser.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimiser.step()
        with Calls() as calls:
            trainer._step(EPOCHS // 2, batches)
    return {name: dict(getattr(calls, name)) for name in COUNTED}


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(counted(**json.loads(line))), flush=True)
    os._exit(0)  # torch's threads for the device do not outlive the stand-ins in every order
