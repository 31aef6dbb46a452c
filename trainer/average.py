"""The exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """module: a copy of a network in training, whose parameters keep a share `decay` of themselves in each update and take
    the rest from the network; its buffers are the network's. The first update copies.

    Like torch's AveragedModel, which has the host wait for a GPU in each update: it brings its count to the device.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network)
        self.decay = decay
        self.started = False  # whether `module` holds an average that the next update continues

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(network.parameters())
        if self.started:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        else:
            torch._foreach_copy_(averages, weights)
        for own, other in zip(self.module.buffers(), network.buffers(), strict=True):
            own.copy_(other)
        self.started = True
