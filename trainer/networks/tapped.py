"""What every generator gives whose features are contrasted."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from infra.errors import UserError
from trainer.networks.compiling import Compilable
from trainer.networks.sizes import Sizes


class TappedGenerator(Compilable, ABC):
    """(B, 3, H, W) to the same shape, with taps: numbers of modules whose outputs are features.

    valid_taps: those that there are.
    """

    valid_taps: range

    @property
    @abstractmethod
    def sizes(self) -> Sizes:
        """The images whose translation has their size."""

    @abstractmethod
    def tap_channels(self, taps: Sequence[int]) -> list[int]:
        """The channels of the features at each tap. UserError for a tap that does not exist or is named twice."""

    @abstractmethod
    def forward_with_features(self, x: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The translation and the features at each tap, in the order of `taps`."""

    @abstractmethod
    def encode(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """The features at each tap, in the order of `taps`; nothing runs after the deepest."""

    @abstractmethod
    def copy_encoder(self, taps: Sequence[int]) -> Self:
        """A copy of the layers that `encode` at these taps runs, with weights of its own."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order: where most of the time goes."""

    def compiled_parts(self) -> list[nn.Module]:
        """See `Method.compiled_parts`."""
        return self.blocks()

    def _check(self, taps: Sequence[int]) -> None:
        for tap in taps:
            if tap not in self.valid_taps:
                raise UserError(f"tap {tap} does not exist in this generator: choose from 0 to {self.valid_taps[-1]}")
        if len(set(taps)) < len(taps):
            raise UserError(f"taps {', '.join(map(str, taps))} name one twice: name each tap once")
