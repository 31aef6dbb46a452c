"""The Triton kernels of instance norm against its definition in float64; with TRITON_INTERPRET=1 on a CPU."""

import itertools
from typing import Any

import torch

from trainer.networks import norm_fused, norm_triton
from trainer.networks.norm import EPSILON, FLAT, plain_norm_activation

SHAPES = (2, 70, 20, 19), (3, 8, 5, 4), (1, 3, 96, 90)  # runs of pixels, blocks of them and of channels full and not

CASES = (torch.float32, 2e-6, 0.0), (torch.bfloat16, 1e-2, 0.2)  # dtype, tolerance, slope


def check(device: str) -> None:
    """AssertionError where a result or a gradient is off by more than the rounding of its dtype."""
    for (dtype, tolerance, slope), shape in itertools.product(CASES, SHAPES):
        draws = torch.Generator().manual_seed(0)
        x, gradient = (
            torch.randn(shape, generator=draws).to(device, dtype, memory_format=torch.channels_last) for _ in range(2)
        )
        x += 3
        wide = x.double().requires_grad_()
        expected = plain_norm_activation(wide, slope)
        (slopes,) = torch.autograd.grad(expected, wide, gradient.double())
        y, mean, rstd = norm_fused.forward(x, slope, EPSILON, -1.0)
        actual = norm_fused.backward(gradient, x, mean, rstd, slope)
        for result, reference in ((y, expected), (actual, slopes)):
            assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(result.double(), reference.double(), rtol=tolerance, atol=tolerance)


def check_flat_channels(device: str) -> None:
    """A channel without variance passes no gradient back, and says so by its deviation, where that is asked for."""
    x = torch.randn(2, 5, 20, 19, generator=torch.Generator().manual_seed(0)).to(
        device, memory_format=torch.channels_last
    )
    x[1, 2] = 0.3
    gradient = torch.ones_like(x).normal_()
    for flat in (FLAT, -1.0):
        _, mean, rstd = norm_fused.forward(x, 0.2, EPSILON, flat)
        slopes = norm_fused.backward(gradient, x, mean, rstd, 0.2)
        assert (rstd == 0).nonzero().tolist() == ([[1, 2]] if flat > 0 else [])
        assert bool(slopes[1, 2].abs().max() == 0) == (flat > 0)


def check_kernels(device: str) -> None:
    """A call starts as many kernels as it says."""
    started: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            started.append(self.name)
            return self.kernel[grid]

    for name in ("_moments", "_combine", "_normalise", "_gradient_sums", "_average", "_input_gradient"):
        setattr(norm_triton, name, Counted(name, getattr(norm_triton, name)))
    x = torch.randn(1, 4, 8, 8).to(device, memory_format=torch.channels_last)
    y, mean, rstd = norm_fused.forward(x, 0.2, EPSILON, -1.0)
    assert len(started) == norm_fused.KERNELS["instance_norm::forward"]
    norm_fused.backward(y, x, mean, rstd, 0.2)
    assert len(started) == sum(norm_fused.KERNELS.values())


if __name__ == "__main__":
    check("cpu")
    check_flat_channels("cpu")
    check_kernels("cpu")
