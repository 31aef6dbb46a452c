"""Recordings that keep, instead of the weights after a step, how far each has moved: those of DRIT and MUNIT.

Networks are filled by the order of their parameters, which is the published one; names are our own.
"""

import torch
from torch import Tensor, nn

from tests.trainer.parity.recorded import Recording


def images(recording: Recording, key: str) -> Tensor:
    """0..7 as [-1, 1], float64."""
    return recording[key].double() / 3.5 - 1


def draws(recording: Recording, key: str) -> Tensor:
    return recording[key].double() / 16


def fill(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights into a network whose parameters and buffers come in this order."""
    ours = network.state_dict()
    assert len(ours) == len(weights), (list(ours), list(weights))
    for (name, own), (theirs, value) in zip(ours.items(), weights.items(), strict=True):
        assert own.numel() == value.numel() and own.shape[0] == value.shape[0], (name, theirs)
        own.copy_(value.reshape(own.shape))


class Changes:
    """How far the parameters of a network have moved since this was made."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.start = [parameter.detach().clone() for parameter in network.parameters()]

    def measured(self) -> Tensor:
        """(parameters, 10): norm, inner product with cos(i + 1), and the change at eight places."""
        rows = []
        for parameter, start in zip(self.network.parameters(), self.start, strict=True):
            change = (parameter.detach() - start).flatten()
            waves = torch.arange(1, len(change) + 1, dtype=change.dtype).cos()
            places = torch.linspace(0, len(change) - 1, 8, dtype=torch.float64).long()
            rows.append(torch.cat([torch.stack([change.norm(), change @ waves]), change[places]]))
        return torch.stack(rows)

    def check(self, recorded: Tensor) -> None:
        measured = self.measured()
        torch.testing.assert_close(measured[:, 2:], recorded[:, 2:], rtol=0, atol=1e-7)
        torch.testing.assert_close(measured[:, :2], recorded[:, :2], rtol=0, atol=1e-6)


def weighted(*outputs: Tensor) -> Tensor:
    """sum(out * cos(i + 1)) over outputs: what recorded gradients are of."""
    return torch.stack(
        [(out.flatten() @ torch.arange(1, out.numel() + 1, dtype=out.dtype).cos()) for out in outputs]
    ).sum()


def assert_drawn_alike(parameters: list[Tensor], spreads: Tensor) -> None:
    """Each parameter has the standard deviation of the recorded one, as two draws of the same distribution have."""
    for parameter, spread in zip(parameters, spreads.tolist(), strict=True):
        count = parameter.numel()
        if count < 10:  # so few numbers say nothing of their spread
            continue
        error = 5 / count**0.5  # of two estimates from n draws, each with a relative standard error of 1 / sqrt(2 n)
        own = float(parameter.std(correction=0))
        assert abs(own - spread) <= error * spread, (tuple(parameter.shape), own, spread)
