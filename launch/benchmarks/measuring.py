"""Measurements of a benchmark: repeated, in turn with what they are compared with, shown as a table and as JSON."""

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from infra import tables
from infra.storage import replacing

REPORTED = ("torch", "numpy", "pillow", "deepspeed", "nvidia-dali")  # packages, by how their names begin
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**26, "cuda": 2**28}  # floats: far more than any cache holds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One measured quantity. name: its key in the JSON. values: one per repetition, in this unit."""

    name: str
    unit: str
    values: Sequence[float]

    def summary(self) -> dict[str, float]:
        return {"median": statistics.median(self.values), "least": min(self.values), "most": max(self.values)}


def interleaved(measures: Sequence[Callable[[], Mapping[str, float]]], repetitions: int) -> dict[str, list[float]]:
    """What the measures give, {name: value}, as the values of all repetitions by name.

    All measures are taken in turn, so that what disturbs the machine hits them alike.
    """
    values: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        for measure in measures:
            for name, value in measure().items():
                values.setdefault(name, []).append(value)
                log.info("  %d of %d: %s %.4g", repetition + 1, repetitions, name, value)
    return values


def ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """ours / other of each repetition: what slowed the machine down in one repetition cancels."""
    return [one / two for one, two in zip(ours, other, strict=True)]


def table(metrics: Sequence[Measurement]) -> str:
    """Median, least and most of every metric, as text for a terminal."""
    rows = [(each.name, *(f"{value:.4g}" for value in each.summary().values()), each.unit) for each in metrics]
    return tables.plain(("", "median", "least", "most", ""), rows)


def write_report(path: Path, benchmark: str, options: Mapping[str, Any], metrics: Sequence[Measurement]) -> None:
    """Write the metrics as JSON (keys: see launch/bench.py)."""
    report = {
        "benchmark": benchmark,
        "options": dict(options),
        "machine": machine(),
        "versions": versions(),
        "metrics": {each.name: {"unit": each.unit, **each.summary(), "values": list(each.values)} for each in metrics},
    }
    with replacing(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def machine() -> dict[str, Any]:
    """What the metrics were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cpu": (models or [platform.machine()])[0], "cores": cores, "gpus": gpus}


def versions() -> dict[str, str]:
    named = {package.metadata["Name"].lower(): package.version for package in distributions()}
    found = {name: number for name, number in named.items() if name.startswith(REPORTED)}
    return {"python": platform.python_version(), **found}


# ---- the machine: what a device can do at best ------------------------------------------------------------------------


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
