"""The Triton kernels of instance norm against its definition in float64; with TRITON_INTERPRET=1 on a CPU."""

import itertools

import torch

from trainer.networks import norm_triton
from trainer.networks.norm import EPSILON, plain_norm_activation

SHAPES = (2, 70, 20, 19), (3, 8, 5, 4)  # runs of pixels and blocks of channels full and not

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
        y, mean, rstd = norm_triton.forward(x, slope, EPSILON)
        actual = norm_triton.backward(gradient, x, mean, rstd, slope)
        for result, reference in ((y, expected), (actual, slopes)):
            assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(result.double(), reference.double(), rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    check("cpu")
