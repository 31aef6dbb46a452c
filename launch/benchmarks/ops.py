"""The operators of a step at the job's own shapes, precision and layout, forward and backward: torch's modules and ours.

Measurements, by their keys in the JSON:

OPERATOR/stock, OPERATOR/ours    ms of a forward and a backward pass (the optimiser: of a step); ours only where it differs
OPERATOR/stock_to_ours           their ratio: above 1 ours is faster
matmul                           10^12 FLOPs a second of a large matrix product
copy                             10^9 bytes read and written a second by a large copy
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from launch.benchmarks.measuring import Measurement, copy_gbs, interleaved, matmul_tflops, ratios, seconds_per_run
from launch.runs.config import JobConfig
from trainer.engines import Engine, make_engine
from trainer.networks.config import GeneratorConfig
from trainer.networks.norm import InstanceNorm2d
from trainer.networks.padding import Pad2d
from trainer.networks.resample import BlurDownsample, BlurUpsample
from trainer.optim import make_optimiser

HELP = "the operators of a step at a job's shapes, torch's beside ours, and the machine's matrix rate and bandwidth"
IMAGES = 2  # source and target
AT_LEAST_S = 0.2  # of one measurement, where --steps does not say how many runs that is

Run = Callable[[], Any]


def blur(channels: int) -> nn.Module:
    """As `BlurDownsample`, of torch's modules."""
    return _fixed(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, stride=2, groups=channels, bias=False))


def upsample(channels: int) -> nn.Module:
    """As `BlurUpsample`, of torch's modules."""
    spread = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=3, groups=channels, bias=False)
    return _fixed(nn.ReplicationPad2d(1), spread)


def _fixed(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).requires_grad_(False)


def operators(ngf: int, size: int) -> dict[str, tuple[tuple[int, int, int], list[nn.Module]]]:
    """By name: the shape (C, H, W) of the input on images of size x size; torch's module, and ours where it differs."""
    inner, quarter, half = 4 * ngf, size // 4, size // 2

    def norms(channels: int) -> list[nn.Module]:
        stock = nn.Sequential(nn.InstanceNorm2d(channels), nn.ReLU(inplace=True))
        return [stock, InstanceNorm2d(channels, slope=0.0)]

    return {
        "conv 3x3 of the blocks": ((inner, quarter, quarter), [nn.Conv2d(inner, inner, 3)]),
        "conv 7x7, first": ((3, size + 6, size + 6), [nn.Conv2d(3, ngf, 7)]),
        "conv 7x7, last": ((ngf, size + 6, size + 6), [nn.Conv2d(ngf, 3, 7)]),
        "norm and ReLU, first": ((ngf, size, size), norms(ngf)),
        "norm and ReLU of the blocks": ((inner, quarter, quarter), norms(inner)),
        "reflection pad of the blocks": ((inner, quarter, quarter), [nn.ReflectionPad2d(1), Pad2d(1)]),
        "blur and halve": ((2 * ngf, size, size), [blur(2 * ngf), BlurDownsample(2 * ngf)]),
        "double and blur": ((2 * ngf, half, half), [upsample(2 * ngf), BlurUpsample(2 * ngf)]),
    }


def run(config: JobConfig, repetitions: int, steps: int | None) -> list[Measurement]:
    """Measure every operator, `steps` runs in each repetition."""
    engine = make_engine(config.engine)
    model: GeneratorConfig = getattr(config.method, "generator", GeneratorConfig())
    runs: dict[str, list[Run]] = {
        name: [passes(module, shape, engine) for module in modules]
        for name, (shape, modules) in operators(model.ngf, config.data.crop or 256).items()
    }
    runs["Adam"] = [
        _update(model, engine, lambda parameters: torch.optim.Adam(parameters, lr=config.optim.lr)),
        _update(model, engine, lambda parameters: make_optimiser(parameters, config.optim)),
    ]
    machine = interleaved([lambda: machine_rates(engine)], repetitions)
    return [
        *(metric for name, each in runs.items() for metric in compared(name, each, engine.device, repetitions, steps)),
        Measurement("matmul", "TFLOP/s", machine["matmul"]),
        Measurement("copy", "GB/s", machine["copy"]),
    ]


def passes(module: nn.Module, shape: Sequence[int], engine: Engine) -> Run:
    """A forward and a backward pass on IMAGES inputs of (C, H, W), as the step's autocast has them."""
    layout = torch.channels_last if engine.config.memory_format == "channels_last" else torch.contiguous_format
    module = module.to(engine.device).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(IMAGES, *shape, device=engine.device, dtype=engine.dtype or torch.float32)
    inputs = [x.contiguous(memory_format=layout).requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with engine.autocast():
            return module(inputs[0])

    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def _update(model: GeneratorConfig, engine: Engine, make: Callable[[Any], torch.optim.Optimizer]) -> Run:
    """A step of this optimiser on the generator's parameters."""
    network = model.build().to(engine.device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return make(network.parameters()).step


def machine_rates(engine: Engine) -> Mapping[str, float]:
    return {"matmul": matmul_tflops(engine.device, engine.dtype or torch.float32), "copy": copy_gbs(engine.device)}


def compared(
    name: str, runs: Sequence[Run], device: torch.device, repetitions: int, count: int | None
) -> list[Measurement]:
    """Milliseconds of torch's, and of ours if there are two, in turn, and their ratio."""
    keys = [f"{name}/{which}" for which, _ in zip(("stock", "ours"), runs, strict=False)]
    for one in runs:
        one()  # the first one may choose or compile code
    counts = [count or max(1, int(AT_LEAST_S / seconds_per_run(one, device))) for one in runs]

    def milliseconds(place: int) -> dict[str, float]:
        return {keys[place]: 1e3 * seconds_per_run(runs[place], device, counts[place])}

    found = interleaved([partial(milliseconds, place) for place in range(len(runs))], repetitions)
    metrics = [Measurement(key, "ms", values) for key, values in found.items()]
    if len(runs) == 2:
        metrics.append(Measurement(f"{name}/stock_to_ours", "", ratios(*found.values())))
    return metrics
