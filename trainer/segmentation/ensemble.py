"""Several networks as one segmenter: their errors differ, so together they see more, and a generator fools one of them sooner."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Networks that differ in their initial weights alone, whose probabilities are averaged (Lakshminarayanan et al., NeurIPS
    2017).

    members: of one kind, (N, 3, h, w) normalised RGB to (N, C, h', w') scores. In training mode all of theirs, one member after
    the other (M·N, C, h', w'), so that each learns by itself; else logarithms of the mean probability (N, C, h', w').
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.stride: Any = members[0].stride

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.stack([member(x) for member in self.members])
        if self.training:
            return scores.flatten(0, 1)
        logarithms = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(2)
        return logarithms.logsumexp(0) - math.log(len(self.members))
