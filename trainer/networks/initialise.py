"""How weights begin, by the rule of each paper's code."""

import math

import torch
from torch import Tensor, nn

from infra.errors import UserError

GAIN = 0.02
LAYERS = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def init_weights(
    module: nn.Module, generator: torch.Generator, *, rule: str = "xavier", uniform_biases: bool = False
) -> None:
    """Draw the weights of all convolutions and linear layers anew.

    rule: xavier: N(0, (0.02 sqrt(2 / (fan_in + fan_out)))^2), CUT's. normal: N(0, 0.02^2), CycleGAN's. kaiming:
    N(0, 2 / fan_in), MUNIT's. uniform_biases: U(-1, 1) / sqrt(fan_in), torch's own, where a code draws weights alone; else 0.
    An affine norm is left as it is. The draws depend on the generator alone, which must live on the module's device; the CPU
    gives the same weights on every machine.
    """
    for layer in module.modules():
        if isinstance(layer, LAYERS):
            _draw(layer.weight, generator, rule)
            if layer.bias is not None:
                bound = 1 / math.sqrt(fan_in(layer.weight)) if uniform_biases else 0.0
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator) if bound else nn.init.zeros_(
                    layer.bias
                )


def _draw(weight: Tensor, generator: torch.Generator, rule: str) -> None:
    match rule:
        case "xavier":
            nn.init.xavier_normal_(weight, gain=GAIN, generator=generator)
        case "normal":
            nn.init.normal_(weight, 0.0, GAIN, generator=generator)
        case "kaiming":
            nn.init.normal_(weight, 0.0, math.sqrt(2 / fan_in(weight)), generator=generator)
        case _:
            raise UserError(f"initialisation {rule} does not exist: choose xavier, normal or kaiming")


def fan_in(weight: Tensor) -> int:
    """As torch counts it: of a transposed convolution, whose weight is (in, out, k, k), that is out k k."""
    return weight[0].numel()
