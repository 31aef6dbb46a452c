"""A discriminator and the adversarial losses, with the image buffers that D sees translations through."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.draws import Draws
from trainer.losses import accuracy, adversarial_loss
from trainer.losses.adversarial import guess
from trainer.methods.base import Losses, frozen
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.semantic import Balance
from trainer.networks import PatchDiscriminator

ACCURACY = "acc/"  # how the names of what is no loss begin


@dataclass(frozen=True)
class Right:
    """The shares of patches of fake and of real images that a discriminator put on the right side, scalars in [0, 1]."""

    fake: Tensor
    real: Tensor

    @classmethod
    def of(cls, kind: str, fake: Sequence[Tensor], real: Sequence[Tensor]) -> "Right":
        """kind: of the adversarial loss. fake, real: raw scores, each tensor of which counts alike, however large."""
        shares = (torch.stack([accuracy(kind, each, each_real) for each in scores])
                  for scores, each_real in ((fake, False), (real, True)))  # fmt: skip
        return cls(*(share.mean() for share in shares))

    @classmethod
    def mean(cls, each: Sequence["Right"]) -> "Right":
        return cls(torch.stack([one.fake for one in each]).mean(), torch.stack([one.real for one in each]).mean())

    def named(self, discriminator: str) -> Losses:
        """To report: "acc/D_fake" and "acc/D_real" of D."""
        return {f"{ACCURACY}{discriminator}_fake": self.fake, f"{ACCURACY}{discriminator}_real": self.real}


class Adversary:
    """kind: of the adversarial loss. weight: of G's loss. balance: gives patches of target images weights in D's loss; none: all
    count alike."""

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        kind: str,
        weight: float,
        buffers: ImageBuffers,
        balance: Balance | None = None,
    ) -> None:
        self.discriminator, self.kind, self.weight, self.buffers = discriminator, kind, weight, buffers
        self.balance = balance

    @property
    def guess(self) -> float:
        """Either of D's losses if it knew nothing (about: with a balance the real one is near it)."""
        return guess(self.kind)

    def shown(self, fake: Tensor, slots: Tensor, draws: Draws) -> Tensor:
        """What D is to see in place of translations (b, 3, h, w) of these slots: some come from the image buffers."""
        return self.buffers.show(fake, slots, draws)

    def discriminator_losses(
        self, shown: Tensor, real: Tensor, whole: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Right]:
        """D's losses on translations without a gradient, and on as many target images; and how often it was right. whole: the
        target images without a mask, by which they are balanced; None: `real`."""
        score_fake, score_real = self.discriminator(torch.cat([shown, real])).chunk(2)
        weights = self.balance.weights(real if whole is None else whole, score_real) if self.balance else None
        losses = adversarial_loss(self.kind, score_fake, False), adversarial_loss(self.kind, score_real, True, weights)
        return *losses, Right.of(self.kind, [score_fake], [score_real])

    def generator_loss(self, fake: Tensor) -> Tensor:
        """G's loss, times its weight, with D held constant."""
        return adversarial_loss(self.kind, frozen(self.discriminator, fake), True) * self.weight
