"""What a device can do at best: its matrix rate and the bandwidth of its memory."""

import time
from collections.abc import Callable
from typing import Any

import torch

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**26, "cuda": 2**28}  # floats: far more than any cache holds


def seconds_per_run(run: Callable[[], Any], device: torch.device, count: int = 1) -> float:
    """The mean of so many runs, until the last is complete."""

    def complete() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    complete()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    complete()
    return (time.perf_counter() - begin) / count


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 FLOPs a second of a large square product: the best of three, the first left out."""
    side = SIDE[device.type]
    factor = torch.randn(side, side, device=device, dtype=dtype)
    seconds = [seconds_per_run(lambda: factor @ factor, device) for _ in range(4)]
    return 2 * side**3 / min(seconds[1:]) / 1e12


def copy_gbs(device: torch.device) -> float:
    """10^9 bytes a second, read and written together: the best of three, the first left out."""
    source = torch.zeros(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    seconds = [seconds_per_run(lambda: target.copy_(source), device) for _ in range(4)]
    return 2 * source.nbytes / min(seconds[1:]) / 1e9
