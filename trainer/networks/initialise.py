"""How weights begin, by the rule of each paper's code."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.networks.stylegan2 import Equalised

Rule = Literal["xavier", "normal", "kaiming"]
GAIN = 0.02


def init_weights(
    module: nn.Module, generator: torch.Generator, rule: Rule = "xavier", *, uniform_biases: bool = False
) -> None:
    """Draw the weights of all convolutions and linear layers anew.

    rule: xavier: N(0, (0.02 sqrt(2 / (fan_in + fan_out)))^2), as in CUT. normal: N(0, 0.02^2), as in CycleGAN. kaiming:
    N(0, 2 / fan_in), as in MUNIT. Biases are 0, or with uniform_biases U(-1, 1) / sqrt(fan_in), which is torch's own, where a
    published code draws weights alone. Affine instance norms get N(1, 0.02^2) by the rule normal, other norms stay as they are,
    and equalised layers have N(0, 1) by any rule. The draws depend on the generator alone. It must be on the module's device;
    the CPU gives the same weights on every machine.
    """
    for layer in module.modules():
        if isinstance(layer, Equalised):
            nn.init.normal_(layer.weight, generator=generator)
        if isinstance(layer, nn.InstanceNorm2d) and layer.affine and rule == "normal":
            nn.init.normal_(layer.weight, 1.0, GAIN, generator=generator)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if rule == "xavier":
                nn.init.xavier_normal_(layer.weight, gain=GAIN, generator=generator)
            else:
                spread = GAIN if rule == "normal" else math.sqrt(2 / fan_in(layer.weight))
                nn.init.normal_(layer.weight, 0.0, spread, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
                if uniform_biases:
                    bound = 1 / math.sqrt(fan_in(layer.weight))
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def fan_in(weight: Tensor) -> int:
    """As torch counts it: of a transposed convolution, whose weight is (in, out, k, k), it is out k k."""
    return weight[0].numel()
