"""A discriminator, what it is shown, and the two sides of its game."""

from typing import Any

import torch
from torch import Tensor

from trainer.draws import Draws
from trainer.losses import adversarial_loss
from trainer.methods.base import Batch, frozen
from trainer.methods.parts.image_buffers import ImageBuffers
from trainer.methods.parts.part import Outputs
from trainer.networks import PatchDiscriminator


class Adversary:
    """kind: of the adversarial loss. weight: of G's side of it."""

    def __init__(self, discriminator: PatchDiscriminator, kind: str, weight: float, buffers: ImageBuffers) -> None:
        self.discriminator, self.kind, self.weight, self.buffers = discriminator, kind, weight, buffers

    def judge(self, outputs: Outputs, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """D's losses on translations, from the image buffers, and on target images. Keeps in `outputs` what D was shown."""
        outputs.shown = self.buffers.show(outputs.fake, batch.slots, draws)
        score_fake, score_real = self.discriminator(torch.cat([outputs.shown, batch.target])).chunk(2)
        return self._loss(score_fake, False), self._loss(score_real, True)

    def persuade(self, fake: Tensor) -> Tensor:
        """G's loss, times its weight, with D held constant."""
        return self._loss(frozen(self.discriminator, fake), True) * self.weight

    def _loss(self, score: Tensor, real: bool) -> Tensor:
        kind: Any = self.kind
        return adversarial_loss(kind, score, real)
