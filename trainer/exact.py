"""Arithmetic for metrics that are compared: exact and repeatable rather than fast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, a GPU rounds neither convolutions nor matrix products to TF32 and does not pick kernels by their speed;
    afterwards everything is as before."""
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
