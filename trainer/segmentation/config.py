"""Which segmentation network is trained, of which size, and how its weights begin."""

from dataclasses import dataclass

import torch
from torch import nn

from infra.config import option
from infra.errors import UserError
from trainer.segmentation.deeplab import STRIDES, DeepLab
from trainer.segmentation.drn import Drn
from trainer.segmentation.ensemble import Ensemble


@dataclass(frozen=True, kw_only=True)
class SegmenterModelConfig:
    network: str = option(
        "deeplab",
        "deeplab: MobileNetV3-Small with LR-ASPP, as SRUNIT measures; drn-d-22: as CUT measures",
        flag="--network",
        choices=("deeplab", "drn-d-22"),
    )
    width: float = option(1.0, "channels as a multiple of the paper's")
    output_stride: int | None = option(
        None,
        "pixels per deepest feature of deeplab, 8 or 4 for small images; none: the paper's 16",
        choices=tuple(STRIDES),
    )
    members: int = option(
        1, "networks trained side by side from other initial weights, whose probabilities are averaged: sees more, for so many "
        "times the work", flag="--members",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.width <= 4:
            raise UserError(f"model.width = {self.width} multiplies channels: give a number above 0 and at most 4")
        if not 1 <= self.members <= 16:
            raise UserError(f"model.members = {self.members} is a number of networks: give 1 to 16, such as 3")
        # torch 2.13's CPU kernel for the weights of a strided 1x1 convolution (a shortcut's) writes past its memory where
        # there are four channels or fewer.
        if self.network == "drn-d-22" and self.width < 0.25:
            raise UserError(f"model.width = {self.width} leaves drn-d-22 too few channels: give 0.25 or more")
        if self.network == "drn-d-22" and self.output_stride is not None:
            raise UserError("model.output_stride is an option of deeplab, and drn-d-22 always has 8: leave it out")

    def build(self, classes: int) -> nn.Module:
        """The network with weights yet to be drawn (`init_weights`) or loaded: (N, 3, h, w) normalised RGB to
        (N, classes, h', w') logits, which the caller resizes; see Drn and DeepLab for h' and w', Ensemble for several."""
        if self.members > 1:
            return Ensemble([self._member(classes) for _ in range(self.members)])
        return self._member(classes)

    def _member(self, classes: int) -> nn.Module:
        if self.network == "drn-d-22":
            return Drn(classes, self.width)
        return DeepLab(classes, self.width, self.output_stride or 16)


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all convolutions anew: He-normal, std = sqrt(2 / fan_in) (He et al., ICCV 2015); biases and the batch
    norms' shifts are 0, their scales 1.

    The draws depend on the generator alone. It must be on the module's device; the CPU gives the same weights
    on every machine.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
