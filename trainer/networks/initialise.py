"""The initialisation of every network of CUT and SRUNIT."""

import torch
from torch import nn

GAIN = 0.02


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew: Xavier-normal with gain 0.02 (std = 0.02 * sqrt(2 / (fan_in + fan_out))), biases 0.

    The draws depend on the generator alone. It must be on the module's device; the CPU gives the same weights
    on every machine.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=GAIN, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
