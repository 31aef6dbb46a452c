"""Which sizes of images networks take, found from their layers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from trainer.networks.padding import Pad2d
from trainer.networks.resample import BlurDownsample, BlurUpsample


@dataclass(frozen=True)
class Sizes:
    """Either side of an image, in pixels, is a multiple of `multiple` and at least `smallest`."""

    multiple: int = 1
    smallest: int = 1

    def __and__(self, other: "Sizes") -> "Sizes":
        """What both take."""
        return Sizes(math.lcm(self.multiple, other.multiple), max(self.smallest, other.smallest))

    def __str__(self) -> str:
        return f"multiples of {self.multiple} from {self.first} up" if self.multiple > 1 else f"{self.first} or more"

    @property
    def first(self) -> int:
        """The smallest side that is taken."""
        return -(-self.smallest // self.multiple) * self.multiple

    def fit(self, width: int, height: int) -> bool:
        return all(side >= self.first and side % self.multiple == 0 for side in (width, height))

    def up_to(self, side: int) -> int | None:
        """The largest side that is taken and no larger than this one; None if there is none."""
        largest = side // self.multiple * self.multiple
        return largest if largest >= self.first else None


def smallest_side(layers: Iterable[nn.Module], after: int = 1) -> int:
    """The smallest side of an image of which a chain of layers leaves `after` pixels or more, each getting what it needs."""
    for layer in reversed(list(layers)):
        after = _smallest_before(layer, after)
    return after


def _smallest_before(layer: nn.Module, after: int) -> int:
    if isinstance(layer, nn.Conv2d):
        (kernel, _), (stride, _), (dilation, _) = layer.kernel_size, layer.stride, layer.dilation
        assert not isinstance(layer.padding, str)
        return max(1, (after - 1) * stride + dilation * (kernel - 1) + 1 - 2 * layer.padding[0])
    if isinstance(layer, nn.ConvTranspose2d):
        return -(-after // layer.stride[0])  # with the paddings of a layer that multiplies a side by its stride
    if isinstance(layer, Pad2d):
        before, behind = layer.widths[:2]
        needed = max(before, behind) + 1 if layer.mode == "reflect" else 1
        return max(needed, after - before - behind)
    if isinstance(layer, BlurDownsample):
        return max(_smallest_before(layer.pad, 1), 2 * after - 1)
    if isinstance(layer, nn.AvgPool2d):
        assert isinstance(layer.kernel_size, int) and isinstance(layer.stride, int) and isinstance(layer.padding, int)
        return max(1, (after - 1) * layer.stride + layer.kernel_size - 2 * layer.padding)
    if isinstance(layer, BlurUpsample | nn.Upsample):  # which doubles
        return -(-after // 2)
    return smallest_side(layer.children(), after)  # a chain of its own, or a layer that leaves the size alone
