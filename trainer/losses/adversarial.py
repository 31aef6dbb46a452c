"""Adversarial losses on the raw scores of a discriminator."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError


def adversarial_loss(kind: str, score: Tensor, real: bool, weights: Tensor | None = None) -> Tensor:
    """How far raw scores (B, ...) are from "real" or "fake", as a scalar mean over the batch, float32 or wider.

    lsgan: squared distance from 1 or 0 (Mao et al. 2017). vanilla and nonsaturating: softplus(-score) or
    softplus(score), which are the cross entropy with logits (Goodfellow et al. 2014); the two are one in this form,
    where the generator asks for "real" instead of against "fake". wgangp: the signed mean (Gulrajani et al. 2017),
    without the penalty. weights: of the scores, of their shape.
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    match kind:
        case "lsgan":
            each = (score - float(real)).square()
        case "vanilla" | "nonsaturating":
            each = F.softplus(-score if real else score)
        case "wgangp":
            each = -score if real else score
        case _:
            raise UserError(f"adversarial loss {kind} does not exist: choose lsgan, vanilla, nonsaturating or wgangp")
    return (each if weights is None else each * weights).mean()


def guess(kind: str) -> float:
    """`adversarial_loss` of a discriminator that knows nothing, with 1/2 (lsgan) or 0 everywhere. wgangp has no such value."""
    return {"lsgan": 0.25, "vanilla": math.log(2), "nonsaturating": math.log(2)}[kind]


@torch.no_grad()
def accuracy(kind: str, score: Tensor, real: bool) -> Tensor:
    """The share of raw scores (B, ...) that are on the right side, as a scalar, float32 or wider: of real images above 1/2
    (lsgan) or 0 (vanilla, nonsaturating), of fake ones not. A critic of wgangp has no sides."""
    side = {"lsgan": 0.5, "vanilla": 0.0, "nonsaturating": 0.0}[kind]
    return ((score > side) == real).to(torch.promote_types(score.dtype, torch.float32)).mean()


def confusion_loss(score: Tensor) -> Tensor:
    """How far raw scores are from undecided: the cross entropy with 1/2, as a scalar mean, float32 or wider."""
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    return (F.softplus(score) + F.softplus(-score)).mean() / 2


def multi_scale_loss(kind: str, scores: Sequence[Tensor], real: bool) -> Tensor:
    """`adversarial_loss` of a discriminator at several scales: their sum."""
    return torch.stack([adversarial_loss(kind, score, real) for score in scores]).sum()
