"""The cross entropy of a segmenter that does not learn: what a translation still shows of its source's classes."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255  # the label of no class


def semantic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of class scores (b, C, h, w) with labels (b, h, w), as a scalar, float32 or wider.

    The mean over the labelled pixels of each image, then over images; an image without any counts as 0. So an image weighs the
    same whatever is labelled in it and whichever others it shares a batch with: the mean over micro-batches and ranks of equally
    many images is that of the global batch, as of all losses of a translator.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    each = F.cross_entropy(scores, labels.long(), ignore_index=IGNORE, reduction="none")
    labelled = (labels != IGNORE).flatten(1).sum(1).clamp(min=1)
    return (each.flatten(1).sum(1) / labelled).mean()


def sure_labels(scores: Tensor, sure: float) -> Tensor:
    """uint8 (b, h, w): the likeliest class by scores (b, C, h, w) where its probability is `sure` or more, else 255."""
    likeliest, classes = scores.softmax(1).max(1)
    return torch.where(likeliest >= sure, classes, IGNORE).to(torch.uint8)
