"""Instance norm with its activation as two operators of torch's dispatcher, computed by our Triton kernels (norm_triton.py).

As operators they have shapes and layouts without being run, so that tracing and a simulated device see them. Where Triton is
missing only these are known.
"""

import torch
from torch import Tensor

KERNELS = {"instance_norm::forward": 3, "instance_norm::backward": 3}  # that one call starts

_LIBRARY = torch.library.Library("instance_norm", "DEF")
_LIBRARY.define("forward(Tensor x, float slope, float epsilon, float flat) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("backward(Tensor gradient, Tensor x, Tensor mean, Tensor rstd, float slope) -> Tensor")


def forward(x: Tensor, slope: float, epsilon: float, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    """See norm_triton.forward."""
    return torch.ops.instance_norm.forward(x, slope, epsilon, flat)


def backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    """See norm_triton.backward."""
    return torch.ops.instance_norm.backward(gradient, x, mean, rstd, slope)


def _forward(x: Tensor, slope: float, epsilon: float, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    from trainer.networks import norm_triton

    return norm_triton.forward(x, slope, epsilon, flat)


def _backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    from trainer.networks import norm_triton

    return norm_triton.backward(gradient, x, mean, rstd, slope)


def _shapes_of_forward(x: Tensor, slope: float, epsilon: float, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _shapes_of_backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("instance_norm::forward", _shapes_of_forward, lib=_LIBRARY)
torch.library.register_fake("instance_norm::backward", _shapes_of_backward, lib=_LIBRARY)
