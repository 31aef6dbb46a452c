"""The contrastive loss with hard negatives (hDCE) and the semantic relation of patches, of SRC (Jung et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from trainer.losses import hard_negative_weights, hdce, relation_loss
from trainer.methods.base import Batch, Losses, StepContext
from trainer.methods.parts.contrast import PatchConfig, PatchContrast
from trainer.methods.parts.part import Outputs, patch_ids
from trainer.networks import ProjectionHeads


@dataclass(frozen=True, kw_only=True)
class RelationConfig(PatchConfig):
    """The defaults are those of SRC's script for horses and zebras."""

    lambda_hdce: float = option(0.1, "weight of hDCE, the contrastive loss with hard negatives", adjustable=True)
    lambda_src: float = option(0.05, "weight of the semantic relation of patches; 0: without", adjustable=True)
    gamma: float = option(50.0, "hDCE: how alike the weights of hard and easy negatives are at the start")
    gamma_end: float = option(10.0, "what gamma comes to, evenly, at the end of all epochs")
    gamma_step: float = option(1.0, "share of all epochs after which gamma is 1; 1: never")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_hdce <= 0 or self.lambda_src < 0:
            raise UserError(
                "method.lambda_hdce must be positive, since hDCE trains the heads, and method.lambda_src 0 or more"
            )
        if min(self.gamma, self.gamma_end) <= 0:
            raise UserError(
                "method.gamma and method.gamma_end divide similarities: give positive numbers such as 50 and 10"
            )
        if not 0 <= self.gamma_step <= 1:
            raise UserError(
                f"method.gamma_step = {self.gamma_step} is a share of the epochs: give a number from 0 to 1"
            )

    def gamma_at(self, progress: float) -> float:
        """Once a share `progress` of all epochs is done. The published code goes by whole epochs, each as if at its end."""
        if self.gamma_step < 1 and progress >= self.gamma_step:
            return 1.0
        return self.gamma + (self.gamma_end - self.gamma) * progress


class RelationContrast(PatchContrast):
    """hDCE between source and translation, and between target and its identity translation if asked for, and the relation
    of the translation's patches. All are taken at the same places."""

    config: RelationConfig

    def losses(self, outputs: Outputs, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        config, compared, images = self.config, self.compared(outputs, batch), len(batch.source)
        ids = patch_ids(compared.queries, config.taps, config.patches, "hdce", context)
        queries, keys = projected(self.heads, compared.queries, compared.keys, ids)
        gamma = context.number(config.gamma_at)
        total = value = config.lambda_hdce * mean_hdce(queries, keys, images, gamma, config.temperature)
        named = {"hDCE": value}
        if compared.identity:
            rows = projected(self.heads, *compared.identity, ids)
            named["hDCE_Y"] = config.lambda_hdce * mean_hdce(*rows, images, gamma, config.temperature)
            total = (value + named["hDCE_Y"]) / 2
        if config.lambda_src > 0:
            named["SRC"] = config.lambda_src * mean_relation(queries, keys, images)
            total = total + named["SRC"]
        return total, named


def projected(
    heads: ProjectionHeads, queries: Sequence[Tensor], keys: Sequence[Tensor], ids: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of both at these places, for each tap; the keys' without gradient."""
    rows = heads(queries, ids)
    with torch.no_grad():
        return rows, heads(keys, ids)


def mean_hdce(
    queries: Sequence[Tensor], keys: Sequence[Tensor], images: int, gamma: float | Tensor, temperature: float
) -> Tensor:
    """Over taps and patches. Negatives come from the same image."""
    return torch.stack(
        [
            hdce(query, key, hard_negative_weights(key, images, gamma), temperature).mean()
            for query, key in zip(queries, keys, strict=True)
        ]
    ).mean()


def mean_relation(queries: Sequence[Tensor], keys: Sequence[Tensor], images: int) -> Tensor:
    """The mean over taps and images."""
    pairs = zip(queries, keys, strict=True)
    return torch.stack([relation_loss(query, key, images) for query, key in pairs]).mean()
