"""Metrics that are read a report late, as on a GPU: the same lines, and all of them wherever something hangs on them."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from infra.errors import Stopped
from tests.trainer.test_loop import Clock, Recorder, make
from trainer.engines import Engine
from trainer.loop import Trainer
from trainer.schedule import Schedule
from trainer.state import TrainingState

TIMED = ("pairs_per_s", "memory_gib", "data/wait", "save/pause")


class Late(Recorder):
    """Keeps after how many steps how many lines were there."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}

    def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
        super().record(done, rows)
        self.known[done] = len(self.rows)


def late(steps: int, **options: Any) -> Trainer:
    trainer = make(steps, **options)
    trainer.reports.late = True
    trainer.schedule = Schedule(trainer.schedule.optim, 100)
    return trainer


def test_metrics_are_read_a_report_late_and_before_anything_that_needs_them() -> None:
    """`Recorder` asserts that checkpoints and evaluations find the lines of all steps before them."""
    options: dict[str, Any] = {"report_every": 3, "samples_every": 11, "checkpoint_every": 14}
    recorder, plain = Late(), Recorder()
    recorder.watch(late(20, **options))
    now = make(20, **options)
    now.schedule = Schedule(now.schedule.optim, 100)
    plain.watch(now)
    # The first two are read at once, to estimate the time; samples at 11, a checkpoint at 14, and the end at 20 take all.
    assert recorder.known == {
        1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 3, 7: 3, 8: 3, 9: 6, 10: 6, 11: 11, 12: 11, 13: 11, 14: 14, 15: 14, 16: 14,
        17: 14, 18: 15, 19: 15, 20: 20,
    }  # fmt: skip
    steady = [[{k: v for k, v in row.items() if k not in TIMED} for row in each.rows] for each in (recorder, plain)]
    assert steady[0] == steady[1]


def test_a_stop_writes_what_is_on_its_way() -> None:
    recorder = Late()
    recorder.after = lambda calls: os.kill(os.getpid(), signal.SIGTERM) if calls == 8 else None
    with pytest.raises(Stopped, match="after step 8, which is saved"):
        recorder.watch(late(20, report_every=3))
    assert recorder.calls == 9 and recorder.known[8] == 8
    assert [state.step for state in recorder.states] == [8]


class Device:
    """Works through what it is given, a second for each step; moments pass when it comes there."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.free = clock, clock.now

    def step(self, *_: Any) -> dict[str, torch.Tensor]:
        self.clock.now += 0.01  # to launch it
        self.free = max(self.free, self.clock.now) + 1.0
        return {"G": torch.zeros(())}

    def moment(self) -> Any:
        device = self

        class Moment:
            def __init__(self, _: torch.device) -> None:
                self.at = max(device.free, device.clock.now)

            def wait(self) -> None:
                device.clock.now = max(device.clock.now, self.at)

            def since(self, earlier: Any) -> float:
                assert device.clock.now >= self.at, "it has not passed"
                return self.at - earlier.at

        return Moment


def test_the_host_runs_ahead_and_the_rates_are_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    device = Device(clock)
    monkeypatch.setattr("trainer.reports.Moment", device.moment())
    trainer = late(20, report_every=4, checkpoint_every=10)
    monkeypatch.setattr(trainer, "_take", device.step)
    ahead: dict[int, float] = {}

    class Watcher(Recorder):
        def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
            super().record(done, rows)
            ahead[done] = device.free - clock.now  # seconds that the device has still to do

        def save(self, state: TrainingState, evaluation: Any) -> None:
            super().save(state, evaluation)
            clock.now += 1000.0

    recorder = Watcher()
    recorder.watch(trainer)
    assert [row["pairs_per_s"] for row in recorder.rows] == pytest.approx([1.0] * 20, rel=0.02)
    assert {int(row["step"]): row["save/pause"] for row in recorder.rows if "save/pause" in row} == {12: 1000.0}
    # It is waited for where all is needed, and else never left without a whole report of work.
    assert {done for done, seconds in ahead.items() if seconds < 0.5} == {1, 2, 10, 20}
    assert all(ahead[done] > 3.5 for done in (8, 16))


def test_a_cpu_reads_at_once() -> None:
    trainer = make(7, report_every=3)
    assert not trainer.reports.late and isinstance(trainer.engine, Engine)
    recorder = Late()
    recorder.watch(trainer)
    assert recorder.known == {1: 1, 2: 2, 3: 3, 4: 3, 5: 3, 6: 6, 7: 7}
