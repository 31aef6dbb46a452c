"""Gradients that are not finite: what they leave as it was, what they end, and what is kept of them."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import Stopped
from tests.trainer.test_loop import Recorder, make, steps_of_noise
from trainer.engines.base import tell_fused
from trainer.loop import Broken, Trainer
from trainer.optim import OptimConfig, make_optimiser
from trainer.state import TrainingState, collect_state

D, G = "discriminator", "generator"


class BadGradient(torch.autograd.Function):
    """A finite number whose gradient is none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def poison(trainer: Trainer, phase: str, *steps: int) -> None:
    """Give a phase such gradients in these steps, counted from 1."""
    original = trainer.method.loss

    def loss(name: str, outputs: Any, batch: Any, context: Any) -> Any:
        value, named = original(name, outputs, batch, context)
        bad = name == phase and context.draws.step + 1 in steps
        return BadGradient.apply(value) if bad else value, named

    vars(trainer.method)["loss"] = loss


class Watcher(Recorder):
    """Keeps every state, and what is examined."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(lambda done: self.seen.append(self.state_of(trainer)))
        self.seen: list[Mapping[str, Tensor]] = [self.state_of(trainer)]
        self.examined: list[tuple[TrainingState, Broken]] = []

    @staticmethod
    def state_of(trainer: Trainer) -> dict[str, Tensor]:
        """Weights and the optimisers' state."""
        groups = collect_state(trainer.method, trainer.engine, None, 0).tensors
        return {
            f"{g}/{name}": copy.deepcopy(tensor)
            for g in (G, D, "heads", "optimiser")
            for name, tensor in groups[g].items()
        }

    def watch(self, trainer: Trainer, first: int = 0) -> None:
        trainer.fit(
            steps_of_noise(first), first, recorder=self, sample=self.sample, evaluate=None, save=self.save,
            examine=lambda state, broken: self.examined.append((copy.deepcopy(state), broken)),
        )  # fmt: skip


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The networks whose weights or moments differ."""
    parts = {name.removeprefix("optimiser/").split("/")[0] for name in after
             if name not in before or not torch.equal(before[name], after[name])}  # fmt: skip
    return parts


@pytest.mark.parametrize("report_every", [1, 100])
@pytest.mark.parametrize(("steps", "broken"), [(7, 4), (4, 4)], ids=["at a step that saves", "at the last step"])
def test_a_bad_gradient_ends_the_run_before_anything_is_saved(steps: int, broken: int, report_every: int) -> None:
    trainer = make(steps, report_every=report_every, checkpoint_every=2)
    poison(trainer, G, broken)
    watcher = Watcher(trainer)
    with pytest.raises(
        Stopped, match=rf"^norm/generator is not a finite number at step {broken}: postmortem/step_4"
    ) as end:
        watcher.watch(trainer)
    assert end.value.exit_code == 3
    assert [state.step for state in watcher.states] == [2]
    assert [row["step"] for row in watcher.rows] == [1, 2, 3], "the metrics up to it are written"
    ((state, told),) = watcher.examined
    assert (state.step, told.step, told.names) == (broken - 1, broken, ["norm/generator"])
    assert math.isnan(told.metrics["norm/generator"]) and math.isfinite(told.metrics["G"])
    assert told.as_json()["metrics"]["norm/generator"] == "nan"
    now = Watcher.state_of(trainer)
    assert changed(watcher.seen[3], now) == {D}, "only the phase before it may have changed weights"


def test_no_phase_after_a_bad_gradient_changes_anything() -> None:
    trainer = make(7)
    poison(trainer, D, 4)
    watcher = Watcher(trainer)
    with pytest.raises(Stopped, match="^norm/discriminator is not"):
        watcher.watch(trainer)
    assert not changed(watcher.seen[3], Watcher.state_of(trainer))


def test_a_bad_step_is_left_out_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(7, on_nonfinite="skip", nonfinite_limit=2, report_every=100)
    poison(trainer, G, 3, 4, 6)
    watcher = Watcher(trainer)
    watcher.watch(trainer)
    assert [math.isnan(row["norm/generator"]) for row in watcher.rows] == [False, False, True, True, False, True, False]
    for step in range(1, 8):
        parts = changed(watcher.seen[step - 1], watcher.seen[step])
        assert parts == ({D} if step in (3, 4, 6) else {D, G, "heads"}), step
    assert "step 4 is left out: norm/generator is not a finite number (2 of at most 2 in a row)" in caplog.text
    assert not watcher.examined and all(t.isfinite().all() for t in watcher.seen[-1].values())


def test_too_many_in_a_row_end_it() -> None:
    trainer = make(7, on_nonfinite="skip", nonfinite_limit=2)
    poison(trainer, G, 3, 4, 5)
    watcher = Watcher(trainer)
    with pytest.raises(Stopped, match="at step 5: "):
        watcher.watch(trainer)
    assert [row["step"] for row in watcher.rows] == [1, 2, 3, 4] and watcher.examined[0][1].step == 5


def test_the_norm_is_that_of_the_gradient() -> None:
    """Plain SGD moves the weights by it."""
    trainer = make(3)
    for name, parameters in trainer.engine.parameters.items():
        trainer.engine.optimisers[name] = torch.optim.SGD(parameters.values(), lr=1.0)
    watcher = Watcher(trainer)
    watcher.watch(trainer)
    for row, before, after in zip(watcher.rows, watcher.seen, watcher.seen[1:], strict=False):
        for phase, stems in (("norm/generator", (G, "heads")), ("norm/discriminator", (D,))):
            moved = [after[name] - before[name] for name in before if name.startswith(stems)]
            assert row[phase] == pytest.approx(float(nn.utils.get_total_norm(moved)) / row["lr"], rel=1e-3)
    assert {name for name in watcher.rows[0] if name.startswith("norm/")} == {
        f"norm/{phase.name}" for phase in trainer.method.phases
    }


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("report_every", [1, 3])
def test_where_the_host_does_not_wait_the_state_is_kept_until_it_knows(
    report_every: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: fused optimisers are told on the device, and the loop learns of it when it reads, a report late."""
    trainer = make(9, report_every=report_every)
    trainer.reports.late = late
    engine = trainer.engine
    monkeypatch.setattr(engine, "_withhold", lambda name, broken: tell_fused(engine.optimisers[name], broken))
    monkeypatch.setattr(trainer, "_is_seen_to_break", lambda: False)
    poison(trainer, G, 4)
    watcher = Watcher(trainer)
    with pytest.raises(Stopped, match="at step 4: "):
        watcher.watch(trainer)
    assert [row["step"] for row in watcher.rows] == [1, 2, 3]
    assert watcher.calls == {(1, False): 4, (3, False): 6, (1, True): 5, (3, True): 8}[report_every, late]  # of 8 steps
    assert changed(watcher.seen[3], Watcher.state_of(trainer)) == {D}
    plain, other = make(3), Recorder()
    other.watch(plain)
    timed = ("pairs_per_s", "memory_gib", "data/wait", "save/pause")

    def steady(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        return [{name: value for name, value in row.items() if name not in timed} for row in rows]

    assert steady(watcher.rows) == steady(other.rows), "what is told to an optimiser changes no number"


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_fused_optimiser_that_is_told_changes_nothing(kind: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimiser = make_optimiser([weight], OptimConfig(kind=kind))
    if kind == "sgd":  # on a CPU it is not fused
        optimiser = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.ones(3)
    optimiser.step()
    reached, state = weight.detach().clone(), copy.deepcopy(optimiser.state_dict()["state"])
    weight.grad = torch.full((3,), math.nan)
    tell_fused(optimiser, torch.tensor(True))
    optimiser.step()
    assert torch.equal(weight, reached)
    now = optimiser.state_dict()["state"]
    assert all(torch.equal(now[0][name], value) for name, value in state[0].items() if value is not None)
    weight.grad = torch.ones(3)
    tell_fused(optimiser, torch.tensor(False))
    optimiser.step()
    assert not torch.equal(weight, reached) and weight.isfinite().all()
