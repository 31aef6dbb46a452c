"""The operators of a step at the step's own shapes, forward and backward: torch's stock modules against ours.

Figures, OPERATOR/PRECISION/LAYOUT/… by their keys in the JSON:

stock, ours     ms of a forward and a backward pass (the optimiser: of a step); ours only where it differs
to_stock        ratio stock / ours of neighbouring repetitions: above 1 ours is faster
matmul/PRECISION    10^12 FLOPs a second of a large matrix product
copy                10^9 bytes read and written a second by a large copy
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from launch.benchmarks import measuring, published
from launch.benchmarks.measuring import (
    Figure,
    copy_gbs,
    interleaved,
    matmul_tflops,
    pick_device,
    ratios,
    seconds_per_run,
)
from launch.benchmarks.step import SIZES
from trainer.engines.base import PRECISIONS
from trainer.networks.config import GeneratorConfig
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.padding import Pad2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.optim import OptimConfig, make_optimiser

HELP = "the operators of a step at its shapes, stock against ours, and the machine's matrix rate and memory bandwidth"
IMAGES = 2  # source and target
AT_LEAST_S = 0.2  # of one measurement

Module = Callable[[], nn.Module]


@dataclass(frozen=True)
class Operator:
    """shape: (C, H, W) of its input at full size. ours: None where it is torch's."""

    shape: tuple[int, int, int]
    stock: Module
    ours: Module | None = None


def operators(model: GeneratorConfig, size: int) -> dict[str, Operator]:
    """The step's operators, by name, on images of size x size."""
    ngf, inner = model.ngf, 4 * model.ngf
    quarter = size // 4

    def norm(channels: int, side: int) -> Operator:
        stock = partial(nn.Sequential, nn.InstanceNorm2d(channels), nn.ReLU(inplace=True))
        return Operator((channels, side, side), stock, partial(InstanceNorm2d, channels, slope=0.0))

    return {
        "conv 3x3 of the blocks": Operator((inner, quarter, quarter), partial(nn.Conv2d, inner, inner, 3)),
        "conv 7x7, first": Operator((3, size + 6, size + 6), partial(nn.Conv2d, 3, ngf, 7)),
        "conv 7x7, last": Operator((ngf, size + 6, size + 6), partial(nn.Conv2d, ngf, 3, 7)),
        "norm and ReLU, first": norm(ngf, size),
        "norm and ReLU of the blocks": norm(inner, quarter),
        "reflection pad of the blocks": Operator((inner, quarter, quarter), partial(nn.ReflectionPad2d, 1), partial(Pad2d, 1)),
        "blur and halve": Operator((2 * ngf, size, size), partial(published.Blur, 2 * ngf), partial(BlurDownsample, 2 * ngf)),
        "double and blur": Operator(
            (2 * ngf, size // 2, size // 2), partial(published.Upsample, 2 * ngf), partial(BlurUpsample, 2 * ngf)
        ),
    }  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute [%(default)s]")
    option("--size", choices=SIZES, default="full", help="full: 256x256, ngf 64; small: 64x64, ngf 8 [%(default)s]")
    option("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="[%(default)s]")
    option(
        "--layout", nargs="+", choices=("contiguous", "channels_last"), default=["contiguous", "channels_last"],
        help="[%(default)s]",
    )  # fmt: skip


def run(args: argparse.Namespace) -> list[Figure]:
    """Measure every operator in every precision and layout. UserError if there is no GPU and one was asked for."""
    device = pick_device(args.device)
    sizes = SIZES[args.size]
    model = GeneratorConfig(ngf=sizes.get("methods.srunit.generator.ngf", 64))
    figures = machine_figures(device, args.precision, args.repetitions)
    for name, operator in operators(model, sizes["data.crop"]).items():
        for precision, layout in itertools.product(args.precision, args.layout):
            dtype = PRECISIONS[precision] or torch.float32
            memory_format = getattr(torch, "contiguous_format" if layout == "contiguous" else layout)
            runs = {
                which: passes(module(), operator.shape, device, dtype, memory_format)
                for which, module in (("stock", operator.stock), ("ours", operator.ours))
                if module
            }
            figures += compared(f"{name}/{precision}/{layout}", runs, device, args.repetitions)
    figures += compared("Adam/fp32/contiguous", optimisers(model, device), device, args.repetitions)
    return figures


def passes(
    module: nn.Module,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Callable[[], Any]:
    """A forward and a backward pass on IMAGES inputs of (C, H, W), as the step's autocast has them."""
    module = module.to(device)
    if memory_format == torch.channels_last:
        module = module.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.randn(IMAGES, *shape, device=device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return module(x)

    gradient = torch.randn_like(forward())

    def both() -> None:
        inputs = [x, *module.parameters()]
        torch.autograd.grad(forward(), inputs, gradient)

    return both


def optimisers(model: GeneratorConfig, device: torch.device) -> dict[str, Callable[[], Any]]:
    """A step of Adam on the generator's parameters: torch's default against the engine's choice."""
    steps: dict[str, Callable[[], Any]] = {}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "stock": lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        "ours": lambda parameters: make_optimiser(parameters, OptimConfig()),
    }
    for which, make in makers.items():
        network = model.build().to(device)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        steps[which] = make(network.parameters()).step
    return steps


def compared(name: str, runs: Mapping[str, Callable[[], Any]], device: torch.device, repetitions: int) -> list[Figure]:
    """Milliseconds of each run, in turn, and their ratio where there are two."""
    counts = {which: _count(one, device) for which, one in runs.items()}

    def milliseconds(which: str) -> dict[str, float]:
        return {f"{name}/{which}": 1e3 * seconds_per_run(runs[which], device, counts[which])}

    found = interleaved([partial(milliseconds, which) for which in runs], repetitions)
    figures = [Figure(key, key, "ms", values) for key, values in found.items()]
    if "ours" in runs:
        gain = ratios(found[f"{name}/stock"], found[f"{name}/ours"])
        figures.append(Figure(f"{name}/to_stock", f"{name}: stock / ours", "", gain))
    return figures


def machine_figures(device: torch.device, precisions: Sequence[str], repetitions: int) -> list[Figure]:
    """The matrix rate in each precision, and the bandwidth of the memory."""

    def product(precision: str) -> dict[str, float]:
        return {f"matmul/{precision}": matmul_tflops(device, PRECISIONS[precision] or torch.float32)}

    products = [partial(product, precision) for precision in precisions]
    found = interleaved([*products, lambda: {"copy": copy_gbs(device)}], repetitions)
    bandwidth = Figure("copy", "memory, read and written by a copy", "GB/s", found.pop("copy"))
    return [*(Figure(name, f"{name}, large", "TFLOP/s", values) for name, values in found.items()), bandwidth]


def _count(run: Callable[[], Any], device: torch.device) -> int:
    """How many runs fill AT_LEAST_S; the first one, which may choose or compile code, does not count."""
    run()
    return max(1, int(AT_LEAST_S / seconds_per_run(run, device)))


def table(figures: Sequence[Figure]) -> str:
    """A row for each operator, then the machine."""
    of_machine = [figure for figure in figures if figure.unit in ("TFLOP/s", "GB/s")]
    rows = [figure for figure in figures if figure not in of_machine]
    shown = measuring.grid(rows, {"stock": "stock, ms", "ours": "ours, ms", "to_stock": "stock / ours"})
    return f"{shown}\n\n{measuring.table(of_machine)}"
