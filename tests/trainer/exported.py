"""Translations of every kind of network that a method has, small, with weights drawn from a seed: for tests of exports."""

from collections.abc import Callable

import torch
from torch import nn

from tests.trainer.small import method_config
from trainer.methods.semst import TwoScales
from trainer.methods.sincut import SincutTranslation
from trainer.networks import ResnetGenerator
from trainer.networks.stylegan2 import StyleGenerator
from trainer.translation import OneGenerator, Translation, TwoGenerators


def _resnet(antialias: bool = True, older: bool = False) -> ResnetGenerator:
    return ResnetGenerator(ngf=4, blocks=1, antialias=antialias, zero_padding=older, affine=older)


NETWORKS: dict[str, Callable[[], Translation]] = {
    "cut": lambda: OneGenerator(_resnet()),
    "cyclegan": lambda: TwoGenerators(_resnet(antialias=False), _resnet(antialias=False)),
    "distancegan": lambda: OneGenerator(_resnet(antialias=False, older=True)),
    "munit": lambda: method_config("munit").translation(),
    "drit": lambda: method_config("drit").translation(),
    "drit-feature-wise": lambda: method_config("drit", generator__attributes="feature-wise").translation(),
    "sincut": lambda: SincutTranslation(StyleGenerator(ngf=1, blocks=2, size=16)),
    "semst": lambda: TwoScales(_resnet(), _resnet(), 8, 48),
}
"""Methods that are not here have the layers of one that is."""


def translation(name: str) -> Translation:
    """Every weight and bias drawn, also those that start at 0 or 1, so that each has an effect."""
    draws = torch.Generator().manual_seed(0)
    made = NETWORKS[name]().eval()
    for parameter in made.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        nn.init.normal_(parameter, std=0.7 * fan**-0.5, generator=draws)
    return made
