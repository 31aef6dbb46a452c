"""PatchNCE, the contrastive loss of CUT."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The published code puts -10 where the positive stands among the negatives and keeps it as one more negative.
_MASKED_SIMILARITY = -10.0


def patch_nce(query: Tensor, key: Tensor, groups: int, temperature: float = 0.07, first_positive: int = 0) -> Tensor:
    """Cross entropy of finding each patch's own key among the keys of its group (Park et al. 2020, Eqn. 3 and 4).

    query: (N, C) unit rows from the translation, image-major. key: (M, C) unit rows from the source; no gradient
    flows into them. Both are cut into `groups` equal runs; a query sees the keys of its own run only.
    Negatives from the same image: groups = images. From the whole batch: groups = 1. From the batch of all ranks:
    groups = 1, `key` gathered in rank order and first_positive = the number of rows gathered from lower ranks.
    In a group, the positive of row i is key first_positive + i.
    Returns (N,), one loss for each patch, in nats; float32 or wider, autocast is off inside.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query_gnc = query.to(dtype).unflatten(0, (groups, -1))
        key_gmc = key.detach().to(dtype).unflatten(0, (groups, -1))
        similarity = query_gnc @ key_gmc.transpose(1, 2)
        logits = F.pad(similarity, (0, 1), value=_MASKED_SIMILARITY).flatten(0, 1) / temperature
        positive = first_positive + torch.arange(query_gnc.shape[1], device=query.device)
        return F.cross_entropy(logits, positive.repeat(groups), reduction="none")
