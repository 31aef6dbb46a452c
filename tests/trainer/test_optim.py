"""The optimisers against their formulas, with every option that they have."""

import math

import pytest
import torch
from torch import nn

from trainer.optim import OptimConfig, make_optimiser

GRADIENTS = (-0.03, 0.2, 0.01)


def stepped(config: OptimConfig) -> list[float]:
    """A weight of 1 after each step."""
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimiser, seen = make_optimiser([weight], config), []
    for gradient in GRADIENTS:
        weight.grad = torch.full_like(weight, gradient)
        optimiser.step()
        seen.append(weight.item())
    return seen


@pytest.mark.parametrize("decay", [0.0, 0.05])  # the second turns the sign of the first gradient
def test_adam(decay: float) -> None:
    """Kingma and Ba 2015, Algorithm 1; the decay is part of the gradient."""
    weight, m, v, expected = 1.0, 0.0, 0.0, []
    for t, gradient in enumerate(GRADIENTS, start=1):
        g = gradient + decay * weight
        m, v = 0.6 * m + 0.4 * g, 0.9 * v + 0.1 * g * g
        weight -= 0.1 * (m / (1 - 0.6**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
        expected.append(weight)
    config = OptimConfig(lr=0.1, beta1=0.6, beta2=0.9, weight_decay=decay)
    assert stepped(config) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_sgd(decay: float) -> None:
    weight, velocity, expected = 1.0, 0.0, []
    for gradient in GRADIENTS:
        velocity = 0.7 * velocity + gradient + decay * weight
        weight -= 0.1 * velocity
        expected.append(weight)
    config = OptimConfig(kind="sgd", lr=0.1, momentum=0.7, weight_decay=decay)
    assert stepped(config) == pytest.approx(expected, rel=1e-12)
