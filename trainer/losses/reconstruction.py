"""How far an image is from what it should be."""

import torch
from torch import Tensor


def l1_distance(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| as a scalar mean over images, channels and pixels; float32 or wider."""
    difference = one.to(torch.promote_types(one.dtype, torch.float32)) - other
    # Not `mean`, whose gradient torch makes contiguous.
    return difference.abs().sum() / difference.numel()
