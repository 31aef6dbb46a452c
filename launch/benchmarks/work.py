"""How much arithmetic and memory traffic a step is, counted from the modules (on the meta device, nothing runs).

FLOPs are those of the convolutions: two for each multiplication with its addition. Heads, PatchNCE, resampling, norms
and activations come to less than 1 % more. They are the step's own work (a generator pass on source and target, the
encoder on both translations, the two passes of each perturbed tap, D, all with their backward passes), not what a
program happens to do: the published code's second encoding of the originals and recomputed activations do not count.

    python -m launch.benchmarks.work                      # the roofline of an H200, and the cost of all-reduce
    python -m launch.benchmarks.work --tflops 0.2 --gbs 20 --bytes 4
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.benchmarks import published
from trainer.methods.config import CutConfig
from trainer.networks import ProjectionHeads, ResnetGenerator
from trainer.networks.config import ModelConfig

# Elements that a layer moves forward and backward as multiples of its input and of its output. A convolution reads x and
# writes y, then reads both twice more or writes dx; a norm reads x once more for its moments, and x and dy twice backward.
TRAFFIC: dict[type[nn.Module], tuple[float, float]] = {
    nn.Conv2d: (3, 3),
    nn.InstanceNorm2d: (4, 4),
    nn.ReLU: (2.5, 2.5),
    nn.LeakyReLU: (2.5, 2.5),
    nn.Tanh: (2.5, 2.5),
    nn.ReflectionPad2d: (2, 2),
    nn.ReplicationPad2d: (2, 2),
    published.Blur: (2, 2),
    published.Upsample: (2, 2),
    published.Block: (3, 3),  # the addition
}


# Ranks, and 10^9 bytes a second and direction of the slowest link of their ring.
LINKS = {
    "NVLink 4": (8, 450.0),
    "400 Gb/s for each GPU": (64, 50.0),
    "100 Gb/s for each GPU": (64, 12.5),
}


@dataclass(frozen=True)
class Layer:
    """One operator on one image. at: the module of the network that it is part of. macs: multiplications of the forward
    pass. moved: elements read and written by forward and backward passes together."""

    at: int
    kind: str
    shape: tuple[int, ...]
    macs: int
    moved: float


def layers(network: nn.Sequential, size: int) -> list[Layer]:
    """The operators of a network on an image of (1, 3, size, size), in the order they run."""
    found: list[Layer] = []

    def note(at: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs, kind = 0, type(module).__name__
        if isinstance(module, nn.Conv2d):
            macs, kind = output.numel() * module.weight[0].numel(), "{}x{} convolution".format(*module.kernel_size)
        from_input, from_output = TRAFFIC[type(module)]
        moved = from_input * inputs[0].numel() + from_output * output.numel()
        found.append(Layer(at, kind, tuple(output.shape[1:]), macs, moved))

    network = network.to("meta")
    for at, top in enumerate(network):
        for module in top.modules():
            if type(module) in TRAFFIC:
                module.register_forward_hook(lambda *seen, at=at: note(at, *seen))
    network(torch.empty(1, 3, size, size, device="meta"))
    return found


def _macs(network: nn.Sequential, size: int) -> list[int]:
    """Of the forward pass on one image, by module."""
    macs = [0] * len(network)
    for layer in layers(network, size):
        macs[layer.at] += layer.macs
    return macs


def step_flops(method: CutConfig, model: ModelConfig, size: int) -> float:
    """FLOPs of one step per pair of size x size images, L_robust included where its beta is not 0."""
    by_module = _macs(published.generator(model.ngf, model.blocks), size)
    scores = _macs(published.discriminator(model.ndf, model.layers), size)
    generator, discriminator = sum(by_module), sum(scores)
    encoder = sum(by_module[: max(method.taps) + 1])
    images = 2 if method.identity else 1
    # A pass costs three times its forward: the gradients of weights and of inputs as much again. Where the input is an
    # image, the first convolution has no gradient of it.
    macs = images * (3 * generator - by_module[1])
    macs += 2 * (3 * discriminator - scores[0])
    macs += 2 * discriminator  # D is constant in G's loss: no gradients of its weights
    macs += images * 3 * encoder
    if method.robust.beta > 0:
        # From any tap to the end and then up to the tap again: together one pass of the whole generator.
        taps = len(method.robust_taps) if method.robust.per_step == "all" else 1
        macs += taps * 3 * generator
    return 2.0 * macs


def parameters(model: ModelConfig, method: CutConfig) -> dict[str, int]:
    """How many each network has, by its name in a checkpoint."""
    with torch.device("meta"):
        generator: Any = ResnetGenerator(ngf=model.ngf, blocks=model.blocks, antialias=model.antialias)
        networks = {
            "generator": generator,
            "discriminator": model.discriminator(),
            "heads": ProjectionHeads(generator.tap_channels(method.taps), model.head_dim),
        }
    return {name: sum(each.numel() for each in network.parameters()) for name, network in networks.items()}


def all_reduce_bytes(values: int, ranks: int) -> float:
    """Bytes that each rank of a ring sends (and receives) to add up so many float32 values."""
    return 2 * (ranks - 1) / ranks * 4 * values


# ---- tables for people ----------------------------------------------------------------------------------------------


def roofline(found: Sequence[Layer], tflops: float, gbs: float, size_of: int) -> str:
    """Forward and backward per image, convolutions of a shape and other layers of a kind together: which side binds.

    tflops: 10^12 FLOPs a second. gbs: 10^9 bytes a second. size_of: bytes of an element.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in found:
        name = f"{layer.kind} to {'x'.join(map(str, layer.shape))}" if layer.macs else layer.kind
        groups.setdefault(name, []).append(layer)
    lines = ["| layers | GFLOP | MB | FLOPs a byte | ms, arithmetic | ms, memory | binds |", "|---" * 7 + "|"]
    totals = [0.0, 0.0, 0.0]
    for name, members in groups.items():
        flops = 6.0 * sum(layer.macs for layer in members)
        moved = size_of * sum(layer.moved for layer in members)
        arithmetic, memory = flops / tflops / 1e9, moved / gbs / 1e6
        totals = [totals[0] + flops, totals[1] + moved, totals[2] + max(arithmetic, memory)]
        lines.append(
            f"| {len(members)} {name} | {flops / 1e9:.1f} | {moved / 1e6:.0f} "
            f"| {flops / moved:.0f} | {arithmetic:.3g} | {memory:.3g} | {'arithmetic' if arithmetic > memory else 'memory'} |"
        )
    flops, moved, limit = totals
    lines.append(
        f"| all | {flops / 1e9:.1f} | {moved / 1e6:.0f} | {flops / moved:.0f} | {flops / tflops / 1e9:.3g} "
        f"| {moved / gbs / 1e6:.3g} | at least {limit:.3g} ms |"
    )
    return "\n".join(lines)


def all_reduce(values: int, pairs_per_s: float) -> str:
    """What adding up the gradients costs, and the smallest batch per GPU that keeps 90 % of a lone GPU's rate.

    values: parameters in all. pairs_per_s: of a lone GPU. Nothing is hidden behind the backward pass: the worst case.
    A step of t = batch / pairs_per_s then takes t + c, so 90 % asks for batch >= 9 c pairs_per_s.
    """
    lines = ["| GPUs | GB/s | MB a step | ms | batch for 90 % |", "|---" * 5 + "|"]
    for name, (ranks, gbs) in LINKS.items():
        moved = all_reduce_bytes(values, ranks)
        seconds = moved / gbs / 1e9
        batch = max(1, math.ceil(9 * seconds * pairs_per_s))
        lines.append(f"| {ranks} ({name}) | {gbs:g} | {moved / 1e6:.1f} | {seconds * 1e3:.2f} | {batch} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels [%(default)s]")
    parser.add_argument("--tflops", type=float, default=989, help="matrix rate of the device [%(default)s]")
    parser.add_argument("--gbs", type=float, default=4800, help="its memory's GB/s [%(default)s]")
    parser.add_argument("--bytes", type=int, default=2, help="of an activation [%(default)s]")
    parser.add_argument("--pairs-per-s", type=float, default=136, help="of one GPU, assumed [%(default)s]")
    args = parser.parse_args()
    model, method = ModelConfig(), CutConfig()
    print(f"generator, {args.size}x{args.size}, one image, forward and backward\n")
    print(roofline(layers(published.generator(model.ngf, model.blocks), args.size), args.tflops, args.gbs, args.bytes))
    print("\ndiscriminator\n")
    print(
        roofline(layers(published.discriminator(model.ndf, model.layers), args.size), args.tflops, args.gbs, args.bytes)
    )
    counts = parameters(model, method)
    print("\n" + ", ".join(f"{name} {count:,}" for name, count in counts.items()) + " parameters\n")
    print(all_reduce(sum(counts.values()), args.pairs_per_s))


if __name__ == "__main__":
    main()
