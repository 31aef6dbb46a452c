import torch
from torch import nn

from trainer.average import MovingAverage


def network(value: float) -> nn.Module:
    """A weight of one value and a running mean of another."""
    net = nn.BatchNorm1d(1)
    with torch.no_grad():
        net.weight.fill_(value)
    assert net.running_mean is not None
    net.running_mean.fill_(10 * value)
    return net


def test_the_first_update_copies_and_later_ones_average_the_weights_alone() -> None:
    average = MovingAverage(network(0.0), 0.75)
    for value, weight in ((1.0, 1.0), (2.0, 1.25), (3.0, 1.6875)):
        average.update(network(value))
        averaged = average.module.get_parameter("weight")
        assert averaged.item() == weight and not averaged.grad_fn
        assert float(average.module.get_buffer("running_mean")) == 10 * value
