"""The losses of steps on their way from the device to the host, which reads them once they are there.

On a CPU they are there at once. A GPU has still to compute them when the host has given it the steps: a report then goes into
pinned memory behind them, and is read when the next one begins, a report late, so that no step waits for the host.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from trainer.engines import Engine
from trainer.methods.base import Losses


@dataclass(frozen=True)
class Pending:
    """A step that is not reported yet, with the samples of its micro-batches. waited: seconds for them."""

    step: int
    losses: Losses
    samples: list[dict[str, list[str]]]
    waited: float


class Moment:
    """A point in the work of a device: on a GPU when it has done what it was given before, on a CPU now."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event:
            self._event.record()
        self._time = time.perf_counter()

    def wait(self) -> None:
        if self._event:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds between two moments that have passed."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


class Report:
    """Some steps in a row. memory_gib: of the process when it was begun."""

    def __init__(self, steps: Sequence[Pending], engine: Engine, began: Moment) -> None:
        self.steps, self._began = steps, began
        self._names = sorted({name for each in steps for name in each.losses})
        zero = torch.zeros((), device=engine.device)
        table = [
            torch.stack([*(each.losses.get(name, zero) for name in self._names), zero + each.waited]) for each in steps
        ]
        self._table = _on_its_way(engine.mean(torch.stack(table)))
        # Here, since the line above has waited for what other ranks had still to do.
        self.end = Moment(engine.device)
        self.memory_gib = _memory_gib(engine.device)

    def read(self) -> tuple[list[dict[str, float]], float, float]:
        """The losses of each step, means over the ranks; the seconds that all steps took, and those of them for batches."""
        self.end.wait()
        *columns, waited = self._table.T.tolist()
        losses = [
            {name: column[place] for name, column in zip(self._names, columns, strict=True) if name in each.losses}
            for place, each in enumerate(self.steps)
        ]
        return losses, self.end.since(self._began), sum(waited)


class Reports:
    """Of the steps that are added. late: whether one is read when the next one begins, and not at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.late = engine, engine.device.type == "cuda"
        self.pending: list[Pending] = []
        self._on_its_way: Report | None = None
        self.restart()

    def restart(self) -> None:
        """What has gone by since the last step counts as no step's time; unless steps are under way, whose it is."""
        if self._on_its_way is None:
            self._since = Moment(self.engine.device)

    def take(self, *, wait: bool) -> list[Report]:
        """Begin a report of the steps since the last one. Returns those to be read now, in order; with `wait` every one."""
        reports = [self._on_its_way] if self._on_its_way else []
        self._on_its_way = None
        if self.pending:
            begun = Report(self.pending, self.engine, self._since)
            self.pending, self._since = [], begun.end
            if self.late and not wait:
                self._on_its_way = begun
            else:
                reports.append(begun)
        return reports


def _on_its_way(table: Tensor) -> Tensor:
    """The same on the host, once the device has come there."""
    if not table.is_cuda:
        return table
    return torch.empty_like(table, device="cpu", pin_memory=True).copy_(table, non_blocking=True)


def _memory_gib(device: torch.device) -> float:
    """Peak memory allocated on a GPU, or the resident memory of this process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30
