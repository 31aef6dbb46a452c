"""Instance norm with its activation by a few of torch's operators for a whole batch in any layout: on a GPU without Triton.

CUDA's kernels for sums read bf16 and add up in float32, and those for `addcmul` compute in float32 and write bf16: no wider map
is made. On a CPU that does make some, so there `trainer/networks/norm.py` has another way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, slope: float, epsilon: float, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W) to leaky_relu(normalised x), and its mean and 1 / standard deviation (B, C), float32 or wider. The latter is
    0 where the variance is at most `flat`, if that is not negative."""
    mean = x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    variance = torch.empty_like(mean)
    torch.var(x, dim=(2, 3), correction=0, out=variance)
    rstd = variance.add_(epsilon).rsqrt_()
    y = _normalised(x, mean, -rstd)
    return (y if slope == 1 else F.leaky_relu_(y, slope)), mean, without_flat(rstd, epsilon, flat)


def backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    """The gradient of `forward`'s x from that of its result, in the layout of x."""
    minus = -rstd
    y = _normalised(x, mean, minus)
    if slope != 1:
        gradient = torch.ops.aten.leaky_relu_backward(gradient, y, slope, True)
    of_gradient = gradient.mean(dim=(2, 3), dtype=mean.dtype)
    of_product = (gradient * y).mean(dim=(2, 3), dtype=mean.dtype)
    # rstd (gradient - of_gradient - y of_product)
    rest = torch.addcmul(_wide(of_gradient * minus), y, _wide(of_product * minus), out=y)
    return torch.addcmul(rest, gradient, _wide(rstd), out=rest)


def without_flat(rstd: Tensor, epsilon: float, flat: float) -> Tensor:
    """1 / standard deviation, and 0 where the variance is at most `flat`, if that is not negative."""
    return rstd if flat < 0 else rstd.masked_fill(rstd >= (flat + epsilon) ** -0.5, 0.0)


def _normalised(x: Tensor, mean: Tensor, minus_rstd: Tensor) -> Tensor:
    return torch.addcmul(_wide(mean * minus_rstd), x, _wide(minus_rstd), value=-1, out=torch.empty_like(x))


def _wide(statistic_bc: Tensor) -> Tensor:
    return statistic_bc[:, :, None, None]
