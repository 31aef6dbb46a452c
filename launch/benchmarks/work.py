"""How much arithmetic a step is, counted by torch while it is taken, and what communication costs.

    python -m launch.benchmarks.work --method srunit                # FLOPs of a step, parameters, the cost of all-reduce

FLOPs are those that a step of ours really does: two for each multiplication with its addition, backward passes included.
"""

import argparse
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from infra import tables
from infra.errors import exits_cleanly
from launch.runs.config import JobConfig, make_config
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.methods.base import Method, StepContext
from trainer.step import train_step

# Ranks, and 10^9 bytes a second and direction of the slowest link of their ring.
LINKS = {"NVLink 4": (8, 450.0), "400 Gb/s for each GPU": (64, 50.0), "100 Gb/s for each GPU": (64, 12.5)}
PROGRESS = 0.5  # of the schedule: every loss has begun


def flops_of(step: Callable[[], Any]) -> float:
    """FLOPs of what this runs."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def step_flops(config: JobConfig) -> float:
    """FLOPs of one step per pair of images of the crop's size. The step is really taken, on a CPU."""
    assert config.data.crop
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    method = config.method.build(seed=0, global_batch=1)
    engine.prepare(method, config.optim)
    images = torch.zeros(1, 3, config.data.crop, config.data.crop)
    batch = SimpleNamespace(source=images, target=images, slots=torch.arange(1))
    return flops_of(lambda: train_step(method, engine, [batch], StepContext(Draws(0, 0), PROGRESS)))


def parameters(method: Method[Any, Any]) -> dict[str, int]:
    """How many each network has, by its name in a checkpoint."""
    networks: dict[str, nn.Module] = {}
    for spec in method.optimisers:
        networks |= dict(method.networks(spec.name).items())
    return {name: sum(each.numel() for each in network.parameters()) for name, network in networks.items()}


def all_reduce_bytes(values: int, ranks: int) -> float:
    """Bytes that each rank of a ring sends (and receives) to add up so many float32 values."""
    return 2 * (ranks - 1) / ranks * 4 * values


def all_reduce(values: int, pairs_per_s: float) -> str:
    """What adding up the gradients costs, and the smallest batch per GPU that keeps 90 % of a lone GPU's rate.

    values: parameters in all. pairs_per_s: of a lone GPU. Nothing is hidden behind the backward pass: the worst case.
    A step of t = batch / pairs_per_s then takes t + c, so 90 % asks for batch >= 9 c pairs_per_s.
    """
    rows = []
    for name, (ranks, gbs) in LINKS.items():
        moved = all_reduce_bytes(values, ranks)
        seconds = moved / gbs / 1e9
        batch = max(1, math.ceil(9 * seconds * pairs_per_s))
        rows.append((f"{ranks} ({name})", f"{gbs:g}", f"{moved / 1e6:.1f}", f"{seconds * 1e3:.2f}", str(batch)))
    return tables.markdown(("GPUs", "GB/s", "MB a step", "ms", "batch for 90 %"), rows)


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="srunit", help="[%(default)s]")
    parser.add_argument("--crop", type=int, default=256, help="side of the images in pixels [%(default)s]")
    parser.add_argument("--pairs-per-s", type=float, default=136, help="of one GPU, assumed [%(default)s]")
    args = parser.parse_args()
    config = make_config({"method.name": args.method, "data.crop": args.crop})
    counts = parameters(config.method.build(seed=0, global_batch=1))
    print(f"{args.method}, {args.crop}x{args.crop}: {step_flops(config) / 1e12:.3g} TFLOP a pair and step")
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()) + " parameters\n")
    print(all_reduce(sum(counts.values()), args.pairs_per_s))


if __name__ == "__main__":
    main()
