"""When the gradients of two ranks are added up: torchrun --nproc_per_node 2 overlapped.py

prints, from rank 0, a line of JSON for each engine and number of micro-batches: of the last of some steps, by optimiser, what
happens in its backward passes ("." a gradient is complete, "R" the sum of a bucket begins), and a hash of all weights after it.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from tests.trainer.small import small_method
from tests.trainer.test_methods import Pairs, at
from trainer.engines import EngineConfig
from trainer.engines.ddp import DdpEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.optim import OptimConfig
from trainer.step import train_step

STEPS = 2  # the first tells DDP in which order gradients come


class Meanwhile(DeepSpeedEngine):
    """As on GPUs."""

    def prepare(self, method: Any, optim: OptimConfig) -> None:
        super().prepare(method, optim)
        self.reduce_meanwhile(method)


def trained(kind: type[DdpEngine], accumulation: int) -> dict[str, Any]:
    engine = kind(EngineConfig(kind="ddp", device="cpu", precision="fp32"))
    pairs = accumulation * engine.world_size
    method = small_method("cut", patches=16, global_batch=pairs, generator__ngf=32, discriminator__ndf=32)
    engine.prepare(method, OptimConfig(global_batch=pairs, accumulation=accumulation))
    events: dict[str, list[str]] = {name: [] for name in engine.modules}
    for name, seen in events.items():
        for parameter in engine.parameters[name].values():
            parameter.register_post_accumulate_grad_hook(lambda _, seen=seen: seen.append("."))
        if module := engine.reducers.get(name) or (engine.modules[name] if kind is DdpEngine else None):

            def reduce(state: Any, bucket: GradBucket, seen: list[str] = seen) -> Future[Tensor]:
                seen.append("R")
                return allreduce_hook(state, bucket)

            module.register_comm_hook(None, reduce)  # type: ignore[operator]
    for step in range(STEPS):
        images = torch.rand(2, pairs, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
        for seen in events.values():
            seen.clear()
        slots = torch.arange(pairs).chunk(engine.world_size)[engine.rank].chunk(accumulation)
        train_step(method, engine, [Pairs(images[0, each], images[1, each], each) for each in slots], at(step))
    weights = b"".join(value.contiguous().numpy().tobytes() for value in method.state_dict().values())
    return {
        "events": {name: "".join(seen) for name, seen in events.items()},
        "weights": hashlib.sha256(weights).hexdigest(),
    }


if __name__ == "__main__":
    for kind in (DdpEngine, DeepSpeedEngine, Meanwhile):
        for accumulation in (1, 2):
            found = trained(kind, accumulation)
            if torch.distributed.get_rank() == 0:
                print(json.dumps({"kind": kind.__name__, "accumulation": accumulation, **found}), flush=True)
    sys.stdout.flush()
    torch.distributed.barrier()
