"""Arithmetic for metrics that are compared: exact and repeatable rather than fast."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_inside = 0  # threads and nested blocks
_before = ExitStack()  # puts back what was before the first of them


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, a GPU rounds neither convolutions nor matrix products to TF32 and does not pick kernels by their speed; when the
    last thread is out again, everything is as before. (The settings are those of the process.)"""
    global _inside
    with _lock:
        if _inside == 0:
            _before.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            _before.enter_context(flags)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _before.close()
