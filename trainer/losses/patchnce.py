"""PatchNCE, the contrastive loss of CUT."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The published code puts -10 where the positive stands among the negatives and keeps it as one more negative.
_MASKED_SIMILARITY = -10.0


def patch_nce(
    query: Tensor,
    key: Tensor,
    groups: int,
    temperature: float = 0.07,
    first_positive: int = 0,
    *,
    external: Tensor | None = None,
    teach_keys: bool = False,
) -> Tensor:
    """Cross entropy of finding each patch's own key among the keys of its group (Park et al. 2020, Eqn. 3 and 4).

    query: (N, C) unit rows from the translation, image-major. key: (M, C) unit rows from the source; gradients
    flow into them only if `teach_keys`. Both are cut into `groups` equal runs; a query sees the keys of its own run only.
    Negatives from the same image: groups = images. From the whole batch: groups = 1. From the batch of all ranks:
    groups = 1, `key` gathered in rank order and first_positive = the number of rows gathered from lower ranks.
    In a group, the positive of row i is key first_positive + i.
    external: (E, C) unit rows that are negatives of every query (patches of other images); with groups = N, one key to a
    group, they are the only ones.
    Returns (N,), one loss for each patch, in nats; float32 or wider, autocast is off inside.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query_gnc = query.to(dtype).unflatten(0, (groups, -1))
        key_gmc = (key if teach_keys else key.detach()).to(dtype).unflatten(0, (groups, -1))
        similarity = query_gnc @ key_gmc.transpose(1, 2)
        logits = F.pad(similarity, (0, 1), value=_MASKED_SIMILARITY).flatten(0, 1)
        if external is not None:
            logits = torch.cat([logits, query.to(dtype) @ external.to(dtype).T], dim=1)
        positive = first_positive + torch.arange(query_gnc.shape[1], device=query.device)
        return F.cross_entropy(logits / temperature, positive.repeat(groups), reduction="none")
