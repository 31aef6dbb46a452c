"""Directions of translation, each with its generator and its discriminator: what CycleGAN has two of."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.methods.base import Batch
from trainer.methods.parts.adversary import Adversary, Right
from trainer.networks.split import split_batch


@dataclass
class Translated:
    """What a generator makes of a batch, (b, 3, h, w) each.

    fake: of the images that it translates. identity: of those of the other domain, or None. cycle: `fake`, translated back by
    the other generator, or None. right: how often the discriminator of `fake` was, once it has seen it.
    """

    fake: Tensor
    identity: Tensor | None = None
    cycle: Tensor | None = None
    right: Right | None = None


def translate(generator: nn.Module, images: Tensor, others: Tensor | None) -> Translated:
    """Images, and others of the domain that they are translated to, in one pass."""
    if others is None:
        return Translated(generator(images))
    fake, identity = split_batch(generator(torch.cat([images, others])), [len(images), len(others)])
    return Translated(fake, identity)


@dataclass(frozen=True)
class Side:
    """One direction. letter: A from the source to the target domain, B back, as the published code counts its networks.

    adversary: judges its translations. cycle, identity: weights of its losses; 0: without.
    """

    letter: str
    generator: nn.Module
    adversary: Adversary
    cycle: float = 0.0
    identity: float = 0.0

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those that it translates, and those of the domain that it translates to."""
        return (batch.source, batch.target) if self.letter == "A" else (batch.target, batch.source)

    def translate(self, batch: Batch) -> Translated:
        """All but the cycle."""
        images, others = self.images(batch)
        return translate(self.generator, images, others if self.identity else None)
