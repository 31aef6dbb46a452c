"""A discriminator and the adversarial losses, with the image buffers that D sees translations through."""

import torch
from torch import Tensor

from trainer.draws import Draws
from trainer.losses import adversarial_loss
from trainer.methods.base import frozen
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.semantic import Balance
from trainer.networks import PatchDiscriminator


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

    def shown(self, fake: Tensor, slots: Tensor, draws: Draws) -> Tensor:
        """What D is to see in place of translations (b, 3, h, w) of these slots: some come from the image buffers."""
        return self.buffers.show(fake, slots, draws)

    def discriminator_losses(self, shown: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """D's losses on translations without a gradient, and on as many target images."""
        score_fake, score_real = self.discriminator(torch.cat([shown, real])).chunk(2)
        weights = self.balance.weights(real, score_real) if self.balance else None
        return adversarial_loss(self.kind, score_fake, False), adversarial_loss(self.kind, score_real, True, weights)

    def generator_loss(self, fake: Tensor) -> Tensor:
        """G's loss, times its weight, with D held constant."""
        return adversarial_loss(self.kind, frozen(self.discriminator, fake), True) * self.weight
