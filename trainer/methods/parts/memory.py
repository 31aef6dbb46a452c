"""What a method remembers from step to step, beside its trained networks."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.draws import generator
from trainer.networks import ProjectionHeads, ResnetGenerator


class MemoryBank(nn.Module):
    """The last `size` projected patches of each stream of images and layer, made by a moving average of the encoder
    and its heads, so that old ones stay comparable with new ones.

    As in MoCo the banks begin as random unit vectors. The networks here are trained by no optimiser.
    """

    def __init__(
        self,
        size: int,
        momentum: float,
        encoder: ResnetGenerator,
        heads: ProjectionHeads,
        *,
        streams: Sequence[str],
        taps: Sequence[int],
        dim: int,
        seed: int,
    ) -> None:
        """encoder: the layers of G up to the deepest tap, with weights of its own. heads: copied."""
        super().__init__()
        self.momentum, self.streams, self.taps = momentum, tuple(streams), tuple(taps)
        self.encoder, self.heads = encoder.requires_grad_(False), copy.deepcopy(heads).requires_grad_(False)
        for stream in self.streams:
            for tap in self.taps:
                draw = torch.randn(size, dim, generator=generator("cpu", seed, "bank", stream, tap))
                self.register_buffer(f"{stream}_{tap}", F.normalize(draw, dim=1))

    def negatives(self, stream: str, tap: int) -> Tensor:
        """(size, dim) unit rows, the oldest first."""
        return self.get_buffer(f"{stream}_{tap}")

    def follow(self, encoder: ResnetGenerator, heads: ProjectionHeads) -> None:
        """Move the own networks towards those in training; of `encoder`, layers beyond the deepest tap are not read."""
        for own, trained in ((self.encoder, encoder), (self.heads, heads)):
            for name, average in own.named_parameters():
                average.lerp_(trained.get_parameter(name), 1 - self.momentum)

    def enqueue(self, stream: str, tap: int, rows: Tensor) -> None:
        """Put rows (n, dim) in, in place of the n oldest."""
        bank = self.negatives(stream, tap)
        bank.copy_(torch.cat([bank, rows.to(bank.dtype)])[-len(bank) :])


class RunningMoments(nn.Module):
    """Mean and standard deviation of n quantities over all rows seen, as float64 sums that a checkpoint holds."""

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, quantities: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(quantities, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(quantities, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """rows: (N, n)."""
        rows = rows.double()
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.squares += rows.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """(n,)"""
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """(n,), of the rows seen and not an estimate for others: divided by N."""
        return (self.squares / self.count - self.mean.square()).sqrt()
