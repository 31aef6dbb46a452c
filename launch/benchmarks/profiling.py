"""Where the time of steps goes, by kind of work, from a torch.profiler trace."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = ("convolution", "norm", "padding", "resampling", "optimiser", "other")

# Looked for, in this order, in the name of an operator and then of what called it, up to the first that is found. A
# backward pass shows no modules, but autograd's nodes, by the names of their operators and functions.
PATTERNS = {
    "optimiser": ("optimizer.", "adam"),
    "norm": ("norm", "relu", "threshold_backward"),  # with the activation, which ours does in one go
    "resampling": ("blur", "_spread"),
    "padding": ("_pad", "pad2d"),
    "convolution": ("conv2d", "conv_", "_convolution", "::convolution"),
}
NOT_NORM = ("linalg_vector_norm", "linalgvectornorm", "normal")  # lengths of vectors, and random numbers


def time_shares(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Run this and share out its time among KINDS: of the operators on a CPU, of the kernels on a GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say that it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as trace:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in trace.events():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[_kind(event)] += own
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}


def _kind(event: Any) -> str:
    while event is not None:
        name = event.name.lower()
        if not any(part in name for part in NOT_NORM):
            for kind, parts in PATTERNS.items():
                if any(part in name for part in parts):
                    return "resampling" if kind == "convolution" and _depthwise(event) else kind
        event = event.cpu_parent
    return "other"


def _depthwise(event: Any) -> bool:
    """Whether a convolution's kernel (C, 1, k, k) sees one channel only: that is how the blurs are computed."""
    weight = event.input_shapes[2 if "backward" in event.name else 1] if len(event.input_shapes) > 2 else []
    return len(weight) == 4 and weight[1] == 1 and weight[0] > 1
