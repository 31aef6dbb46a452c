"""The losses of SRC: Jung et al. 2022, "Exploring Patch-wise Semantic Relation for Contrastive Learning in Image-to-Image
Translation Tasks"."""

import torch
from torch import Tensor

from trainer.networks.heads import normalise

_MASKED_SIMILARITY = -10.0  # as in PatchNCE


def hard_negative_weights(key: Tensor, groups: int, gamma: float | Tensor) -> Tensor:
    """How much each key counts as a negative of each other one: (G, N, N) in [0, 1], float32 or wider, no gradient.

    key: (G * N, C) rows of the source, in `groups` equal runs. gamma: above 0; the larger, the more alike the weights (infinity:
    all 1). A row is exp(similarity / gamma), divided by its largest: the hardest negative has 1.
    """
    with torch.autocast(key.device.type, enabled=False):
        similarity = _masked(_similarity(key.detach(), groups))
        return ((similarity - similarity.amax(dim=2, keepdim=True)) / gamma).exp()


def hdce(query: Tensor, key: Tensor, weights: Tensor, temperature: float = 0.07) -> Tensor:
    """The contrastive loss with hard negatives, hDCE, of each patch: (G * N,) in nats, float32 or wider.

    query: (G * N, C) unit rows of the translation. key: those of the source at the same places; no gradient flows into them.
    weights: (G, N, N) of `hard_negative_weights`; they multiply the similarities of the negatives.
    Value and gradient are those of two functions, as in the published code. The value is the cross entropy of finding the
    positive among all keys; the gradient is decoupled, that of the logarithm of the sum over the negatives alone.
    """
    groups = len(weights)
    with torch.autocast(query.device.type, enabled=False):
        query_gnc, key_gnc = _runs(query, groups), _runs(key.detach(), groups)
        positive_gn1 = (query_gnc * key_gnc).sum(dim=2, keepdim=True) / temperature
        negatives = _masked(weights * (query_gnc @ key_gnc.transpose(1, 2))) / temperature
        decoupled = (negatives - positive_gn1).logsumexp(dim=2)
        # log(1 + exp(d)) is the cross entropy.
        reported = torch.nn.functional.softplus(decoupled.detach())
        return (reported + (decoupled - decoupled.detach())).flatten()


def relation_loss(query: Tensor, key: Tensor, groups: int) -> Tensor:
    """How differently the patches of the translation and those of the source are related among themselves, a scalar: the
    Jensen-Shannon divergences of each patch's similarities to all patches of its run, summed over a run (so the loss
    grows with the number of patches), averaged over the runs; float32 or wider.

    query: (G * N, C) rows of the translation, of any length. key: those of the source; no gradient flows into them.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, p = (_similarity(rows, groups).log_softmax(dim=2) for rows in (query, key.detach()))
        middle = ((q.exp() + p.exp()) / 2).log()
        divergence = (q.exp() * (q - middle) + p.exp() * (p - middle)) / 2
        return divergence.sum(dim=(1, 2)).mean()


def _similarity(rows: Tensor, groups: int) -> Tensor:
    """(G, N, N) cosines of rows (G * N, C) with each other."""
    unit = normalise(_runs(rows, groups), "cut")
    return unit @ unit.transpose(1, 2)


def _masked(similarity: Tensor) -> Tensor:
    """A patch is no negative of itself."""
    itself = torch.eye(similarity.shape[2], dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(itself, _MASKED_SIMILARITY)


def _runs(rows: Tensor, groups: int) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(0, (groups, -1))
