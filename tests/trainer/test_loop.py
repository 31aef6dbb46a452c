"""The loop and its schedule, with a small method and pictures of noise."""

import copy
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.errors import Stopped
from infra.signals import ToldToStop
from tests.trainer.small import small_method
from trainer import state
from trainer.engines import Engine, EngineConfig
from trainer.loop import Evaluation, LoopConfig, Trainer
from trainer.optim import OptimConfig
from trainer.schedule import Schedule
from trainer.state import TrainingState

# ---- the loop ---------------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor


def steps_of_noise(first: int = 0) -> Iterator[list[Pairs]]:
    step = first
    while True:
        draw = torch.Generator().manual_seed(step)
        source, target = (torch.rand(1, 3, 16, 16, generator=draw) * 2 - 1 for _ in range(2))
        yield [Pairs(source, target, torch.tensor([0]))]
        step += 1


class Recorder:
    """Keeps what the loop has it write, draw, evaluate and save; may act when a step is done."""

    def __init__(self, after: Callable[[int], None] = lambda done: None) -> None:
        self.rows: list[Mapping[str, float]] = []
        self.states: list[TrainingState] = []
        self.sampled: list[int] = []
        self.estimates: list[float] = []
        self.measurements: list[tuple[int, int]] = []
        self.evaluated: list[int] = []
        self.best: tuple[int, ...] = ()
        self.calls, self.after = 0, after

    def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
        self.rows += rows
        self.calls += 1
        self.after(self.calls)

    def measured(self, done: int, count: int) -> None:
        self.measurements.append((done, count))
        self.after(done)

    def estimate(self, seconds: float) -> None:
        self.estimates.append(seconds)

    def sample(self, step: int) -> None:
        self.sampled.append(step)

    def evaluate(self, step: int) -> Evaluation:
        assert self.rows[-1]["step"] == step, "its step is not written"
        self.evaluated.append(step)
        return Evaluation(step, {"Dist": 1.0}, best=False, keep=step in self.best)

    def save(self, state: TrainingState, evaluation: Evaluation | None) -> None:
        assert (evaluation and evaluation.step) == (state.step if state.step in self.evaluated else None)
        assert [row["step"] for row in self.rows] == list(range(1, state.step + 1)), "a step before it is not written"
        self.states.append(copy.deepcopy(state))

    def watch(self, trainer: Trainer, first: int = 0) -> None:
        """Train to the end."""
        trainer.fit(
            steps_of_noise(first), first, recorder=self, sample=self.sample, evaluate=self.evaluate, save=self.save
        )


def make(steps: int = 6, *, ema: float = 0.0, evaluate_every: float = 0.0, **options: Any) -> Trainer:
    method = small_method(taps=(0, 4), patches=8, buffer=2, discriminator__layers=1)
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    optim = OptimConfig(epochs=1, decay_epochs=1, ema=ema)
    engine.prepare(method, optim)
    return Trainer(
        method, engine, optim, LoopConfig(max_steps=steps, **options), seed=0, source_samples=4,
        evaluate_every=evaluate_every,
    )  # fmt: skip


def test_every_step_has_a_row_whatever_the_rhythm() -> None:
    recorders = {every: Recorder() for every in (1, 4, 100)}
    for every, recorder in recorders.items():
        recorder.watch(make(7, report_every=every))
        assert [row["step"] for row in recorder.rows] == list(range(1, 8)) and recorder.calls == 7
        assert [row["epoch"] for row in recorder.rows] == [1, 1, 1, 1, 2, 2, 2]
        assert [row["lr"] for row in recorder.rows] == pytest.approx([2e-4] * 4 + [1e-4] * 3)
    timed = ("pairs_per_s", "memory_gib", "data/wait", "save/pause")
    one, *others = ([{k: v for k, v in row.items() if k not in timed} for row in r.rows] for r in recorders.values())
    assert all(other == one for other in others)
    assert {"D_fake", "D_real", "G", "G_GAN", "NCE", "NCE_Y"} <= one[0].keys() and "robust" not in one[1]
    assert "robust" in one[2]  # 8 steps in all: from a quarter on
    assert all(row[name] > 0 for row in recorders[4].rows for name in timed[:2])


class Clock:
    """Stands in for the time module in the loop; tests move it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("trainer.loop.time", self)
        monkeypatch.setattr("trainer.reports.time", self)

    def perf_counter(self) -> float:
        return self.now


def test_pairs_per_s_counts_the_wait_for_the_accelerator_and_nothing_that_is_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An accelerator is still busy when a step's code has run: the wait for its results belongs to the steps. The time
    of pictures, evaluations and checkpoints does not."""
    clock = Clock(monkeypatch)
    trainer = make(12, report_every=5, samples_every=4, checkpoint_every=7)
    queued = 0

    def train_step(*_: Any) -> dict[str, Tensor]:
        nonlocal queued
        queued += 1
        clock.now += 0.25  # to launch it
        return {"G": torch.zeros(())}

    def mean(table: Tensor) -> Tensor:
        nonlocal queued
        clock.now += 0.75 * queued  # until it is done
        queued = 0
        return table

    class Slow(Recorder):
        def sample(self, step: int) -> None:
            clock.now += 1000
            super().sample(step)

        def save(self, state: TrainingState, evaluation: Evaluation | None) -> None:
            clock.now += 1000
            super().save(state, evaluation)

    monkeypatch.setattr(trainer, "_take", train_step)
    monkeypatch.setattr(trainer.engine, "mean", mean)
    trainer.schedule = Schedule(trainer.schedule.optim, 100)
    recorder = Slow()
    recorder.watch(trainer)
    assert [row["pairs_per_s"] for row in recorder.rows] == pytest.approx([1.0] * 12)
    assert recorder.estimates == pytest.approx([10.0])  # steps of a second each


def test_a_report_has_the_share_of_time_spent_waiting_for_data_and_the_pause_of_the_save_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of three seconds of each step goes by in the loader; a save's does not count. Each report has one of them."""
    clock = Clock(monkeypatch)
    trainer = make(8, report_every=3, checkpoint_every=4)

    def slow_loader() -> Iterator[list[Pairs]]:
        for batches in steps_of_noise():
            clock.now += 1.0
            yield batches

    def train_step(*_: Any) -> dict[str, Tensor]:
        clock.now += 2.0
        return {"G": torch.zeros(())}

    class Slow(Recorder):
        def save(self, state: TrainingState, evaluation: Evaluation | None) -> None:
            clock.now += 60.0

    monkeypatch.setattr(trainer, "_take", train_step)
    recorder = Slow()
    trainer.fit(slow_loader(), 0, recorder=recorder, sample=recorder.sample, evaluate=None, save=recorder.save)
    waits = {int(row["step"]): row["data/wait"] for row in recorder.rows if "data/wait" in row}
    assert waits == pytest.approx(dict.fromkeys([1, 2, 3, 4, 6, 8], 1 / 3), rel=1e-6)
    assert {int(row["step"]): row["save/pause"] for row in recorder.rows if "save/pause" in row} == {6: 60.0}


def test_the_rate_that_is_logged_is_the_rate_in_use() -> None:
    trainer, used = make(8), []
    optimisers = trainer.engine.optimisers.values()
    recorder = Recorder(lambda done: used.append({group["lr"] for each in optimisers for group in each.param_groups}))
    recorder.watch(trainer)
    assert used == [{row["lr"]} for row in recorder.rows]
    assert len({row["lr"] for row in recorder.rows}) == 2


def test_samples_and_checkpoints_come_in_their_rhythm_and_at_the_end() -> None:
    recorder = Recorder()
    recorder.watch(make(7, samples_every=3, checkpoint_every=2))
    assert recorder.sampled == [3, 6, 7]
    assert [state.step for state in recorder.states] == [2, 4, 6, 7]
    assert len(recorder.estimates) == 1 and recorder.estimates[0] > 0


@pytest.mark.parametrize(("every", "steps"), [(0, []), (0.5, [2, 4, 6, 7]), (0.4, [2, 4, 5, 7]), (1, [4, 7]), (9, [7])])
def test_evaluations_come_by_epochs_and_at_the_end(every: float, steps: list[int]) -> None:
    recorder = Recorder()
    recorder.watch(make(7, report_every=100, evaluate_every=every))
    assert recorder.evaluated == steps


def test_the_best_is_saved_between_checkpoints() -> None:
    recorder = Recorder()
    recorder.best = (2, 4)
    recorder.watch(make(7, checkpoint_every=3, evaluate_every=0.5))
    assert [state.step for state in recorder.states] == [2, 3, 4, 6, 7]


def test_the_schedule_ends_the_run_and_a_finished_run_does_nothing() -> None:
    trainer, recorder = make(100), Recorder()
    assert trainer.total_steps == 8
    recorder.watch(trainer, 8)
    assert not recorder.rows and not recorder.states


def test_a_loss_that_is_no_number_stops_with_its_name_and_exit_code_3() -> None:
    trainer = make(9, report_every=1)

    def poison(done: int) -> None:
        if done == 3:
            with torch.no_grad():
                trainer.method.get_parameter("generator.model.1.bias").fill_(math.nan)

    recorder = Recorder(poison)
    with pytest.raises(Stopped, match=r"^G, G_GAN, NCE.* is not a finite number at step 4: .*--run-dir") as stop:
        recorder.watch(trainer)
    assert stop.value.exit_code == 3
    assert len(recorder.rows) == 3 and not recorder.states


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_ends_with_its_code(number: int, code: int) -> None:
    """Whatever the rhythm of reports and checkpoints is. No row is lost."""
    before = signal.getsignal(number)
    recorder = Recorder(lambda done: os.kill(os.getpid(), number) if done == 4 else None)
    trainer = make(20, report_every=50)
    trainer.schedule = Schedule(trainer.schedule.optim, 40)
    with pytest.raises(Stopped, match="told to stop after step 4, which is saved: the same command") as stop:
        recorder.watch(trainer)
    assert stop.value.exit_code == code
    assert [state.step for state in recorder.states] == [4]
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4]
    assert signal.getsignal(number) == before


def test_a_step_that_is_saved_already_is_not_saved_again() -> None:
    recorder = Recorder(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 4 else None)
    with pytest.raises(Stopped, match="after step 4"):
        recorder.watch(make(7, checkpoint_every=4))
    assert [state.step for state in recorder.states] == [4]


def test_a_signal_while_it_waits_for_data_saves_the_step_before() -> None:
    trainer, recorder = make(7, report_every=50), Recorder()

    def three_steps_then_nothing() -> Iterator[list[Pairs]]:
        yield from itertools.islice(steps_of_noise(), 3)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(30)
        raise AssertionError("it waited on")

    with pytest.raises(Stopped, match="after step 3, which is saved"):
        trainer.fit(
            three_steps_then_nothing(), 0, recorder=recorder, sample=recorder.sample, evaluate=None, save=recorder.save
        )
    assert [state.step for state in recorder.states] == [3]


@pytest.mark.parametrize("steps", [7, 2], ids=["in the middle", "at the end"])
def test_an_evaluation_gives_way_to_a_signal_and_is_made_by_the_next_start(steps: int) -> None:
    class Evaluates(Recorder):
        def evaluate(self, step: int) -> Evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
            raise ToldToStop

    stopped, whole, recorder = Evaluates(), Recorder(), Recorder()
    with pytest.raises(Stopped, match="after step 2, which is saved"):
        stopped.watch(make(steps, evaluate_every=0.5))
    assert [(state.step, state.owed) for state in stopped.states] == [(2, True)]

    whole.watch(make(steps, evaluate_every=0.5))
    trainer = make(steps, evaluate_every=0.5)
    recorder.rows = [*stopped.rows]
    trainer.fit(
        steps_of_noise(2), 2, recorder=recorder, sample=recorder.sample, evaluate=recorder.evaluate, save=recorder.save,
        owed=True,
    )  # fmt: skip
    assert recorder.evaluated == whole.evaluated
    assert recorder.states[0].step == 2 and not recorder.states[0].owed


def test_the_moving_average_is_one() -> None:
    trainer, seen = make(4, ema=0.5), []
    weight = trainer.method.get_parameter("generator.model.1.weight")
    recorder = Recorder(lambda done: seen.append(weight.detach().clone()))
    recorder.watch(trainer)
    average = seen[0]
    for later in seen[1:]:
        average = 0.5 * average + 0.5 * later
    averaged = trainer.product.get_parameter("generator.model.1.weight")
    torch.testing.assert_close(averaged, average)
    assert not torch.equal(average, seen[-1])
    assert torch.equal(recorder.states[-1].tensors["generator_ema"]["model.1.weight"], averaged)
    assert make().product is not None and make().averaged is None


def test_a_saved_state_is_a_copy_that_later_steps_do_not_change() -> None:
    """It is written while they run."""

    class Keeper(Recorder):
        def save(self, state: TrainingState, evaluation: Evaluation | None) -> None:
            super().save(state, evaluation)
            self.kept.append(state)

        kept: list[TrainingState] = []  # noqa: RUF012

    keeper = Keeper()
    keeper.watch(make(6, ema=0.5, checkpoint_every=2))
    for kept, then in zip(keeper.kept, keeper.states, strict=True):
        for group, tensors in then.tensors.items():
            assert all(torch.equal(kept.tensors[group][name], value) for name, value in tensors.items()), group
    assert not torch.equal(*(state.tensors["generator"]["model.1.weight"] for state in keeper.kept[:2]))


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_gpus_state_goes_into_pinned_memory_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    empty_like, copy_ = torch.empty_like, Tensor.copy_

    def made(like: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        assert device == "cpu" and pin_memory
        return empty_like(like.as_subclass(Tensor))

    def copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        events.append("on its way" if non_blocking else "waited for")
        return copy_(to, source.as_subclass(Tensor))

    class Stream:
        def synchronize(self) -> None:
            events.append("all there")

    monkeypatch.setattr(torch, "empty_like", made)
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    tensors = {name: torch.tensor([value]).as_subclass(OnGpu) for name, value in (("a", 1.0), ("b", 2.0))}
    copies = state._copies({"group": tensors})
    assert events == ["on its way", "on its way", "all there"]
    assert [copies["group"][name].item() for name in "ab"] == [1.0, 2.0]
