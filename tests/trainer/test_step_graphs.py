"""Steps that are captured and replayed have the numbers of those that are not. In place of CUDA's capture stands one that
records torch's operators with the tensors that they had, and calls them on those again: no line of Python runs anew."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infra.errors import UserError
from tests.trainer import segmenters
from tests.trainer.small import BATCHES, IN_USE, crop_of, small_method
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.engines.base import tell_fused
from trainer.loop import LoopConfig, Trainer
from trainer.methods import METHODS
from trainer.methods.base import Losses, StepContext
from trainer.methods.cut import Cut
from trainer.optim import OptimConfig
from trainer.state import collect_state
from trainer.step_graphs import Run, StepGraphs

aten = torch.ops.aten
REPLAYED = [name for name in METHODS if METHODS[name].config.__name__ != "SemstConfig"]


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor


class Operators(TorchDispatchMode):
    """Records calls of operators. RuntimeError where the host reads a number, as a capture would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a number of a step that is captured")
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        return result

    def replay(self) -> None:
        for operator, args, kwargs, result in self.calls:
            found = operator(*args, **kwargs)
            for before, now in zip(tensors(result), tensors(found), strict=True):
                if before.untyped_storage().data_ptr() != now.untyped_storage().data_ptr():  # else a view, or in place
                    before.copy_(now)


def tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]


class Recorded:
    """A capture by `Operators`."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Run, /) -> tuple[Losses, Run]:
        with Operators() as operators:
            static = run()
        self.captured += 1

        def losses() -> Losses:
            return {name: value.clone() for name, value in static.items()}

        def replay() -> Losses:
            self.replayed += 1
            with torch.no_grad():
                operators.replay()
            return losses()

        return losses(), replay

    def warming(self) -> AbstractContextManager[None]:
        return nullcontext()


class AsOnGpu(Engine):
    """Never asks on the host whether a step is broken."""

    def _withhold(self, name: str, broken: Tensor) -> None:
        tell_fused(self.optimisers[name], broken)


def trainer_of(name: str, graphs: bool, *, capture: Any = None, accumulation: int = 1, **options: Any) -> Trainer:
    """Of a small method. Ten steps are all its epochs, the rate falls in the last five."""
    batch = BATCHES.get(name, 2)
    method = small_method(
        name, global_batch=batch, **{key.replace(".", "__"): v for key, v in (IN_USE[name] | options).items()}
    )
    kind = AsOnGpu if isinstance(capture, Recorded) else Engine
    engine = kind(EngineConfig(device="cpu", precision="fp32", graphs=graphs))
    optim = OptimConfig(lr=2e-3, global_batch=batch, accumulation=accumulation, epochs=5, decay_epochs=5)
    engine.prepare(method, optim)
    trainer = Trainer(method, engine, optim, LoopConfig(), seed=3, source_samples=batch)
    if capture is not None:
        trainer._take = StepGraphs(method, engine, capture).take
    return trainer


def batches_of(name: str, step: int, parts: int = 1) -> list[Pairs]:
    count, side = BATCHES.get(name, 2), crop_of(name)
    draw = torch.Generator().manual_seed(step)
    images = (torch.rand(2, count, side, side, 3, generator=draw) * 2 - 1).permute(0, 1, 4, 2, 3)
    chunks = zip(images[0].chunk(parts), images[1].chunk(parts), torch.arange(count).chunk(parts), strict=True)
    return [Pairs(source, target, slots) for source, target, slots in chunks]


def take(trainer: Trainer, name: str, steps: range, parts: int = 1) -> list[Losses]:
    trainer.reports.pending = []
    for step in steps:
        trainer._step(step, batches_of(name, step, parts))
    return [pending.losses for pending in trainer.reports.pending]


def assert_same(one: Trainer, other: Trainer, losses: list[Losses], others: list[Losses]) -> None:
    for step, (own, given) in enumerate(zip(losses, others, strict=True)):
        assert own.keys() == given.keys()
        for name, value in own.items():
            assert torch.equal(value, given[name]), (step, name, float(value), float(given[name]))
    states = [collect_state(each.method, each.engine, None, 0).tensors for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    for group, held in states[0].items():
        assert held.keys() == states[1][group].keys()
        for name, value in held.items():
            assert torch.equal(value, states[1][group][name]), (group, name)


def test_replayed_steps_by_a_segmenter_have_the_numbers_of_those_that_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """L_sem of jittered looks, its mask and its balance."""
    segmenters.save(tmp_path, 1, segmenter=segmenters.network(1))
    given: dict[str, Any] = {
        "segmenter": str(tmp_path),
        "labels": "predicted",
        "sure": 0.6,
        "weight": 1.0,
        "jitter": 0.5,
    }
    options = {
        f"semantic.{name}": value for name, value in (given | {"mask": True, "balance": 2.0, "start": 0.3}).items()
    }
    capture = Recorded()
    eager, replayed = trainer_of("fastcut", False, **options), trainer_of("fastcut", True, capture=capture, **options)
    for each in (eager, replayed):
        each.method.measure(batches_of("fastcut", 99), StepContext(Draws(3, 0), 0.0))
    losses, others = (take(each, "fastcut", range(10)) for each in (eager, replayed))
    assert_same(eager, replayed, losses, others)
    assert "semantic" in losses[-1] and capture.captured and capture.replayed and not caplog.records


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_steps_have_the_numbers_of_those_that_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Late losses, turns, random draws and a falling rate included, by operators that were recorded in an earlier step."""
    capture = Recorded()
    eager, replayed = trainer_of(name, False), trainer_of(name, True, capture=capture)
    steps = range(10)
    assert_same(eager, replayed, take(eager, name, steps), take(replayed, name, steps))
    assert capture.captured and capture.replayed and not caplog.records


# Name, options, and the parts of a step.
RUNS: list[tuple[str, dict[str, Any], int]] = [
    ("cut", {"buffer": 5}, 1),
    ("srunit", {"robust.start": 0.15, "robust.taps": (4, 8), "robust.per_step": "one"}, 2),
    ("cyclegan", {}, 1),
]


@pytest.mark.parametrize(("name", "options", "parts"), RUNS)
@pytest.mark.parametrize("graphs", ["at first", "later", "later, captured"])
def test_a_run_may_go_on_with_graphs_or_without(graphs: str, name: str, options: dict[str, Any], parts: int) -> None:
    """Past the start of L_robust, by random taps, in two parts, with image buffers that fill."""
    capture = Recorded() if "captured" in graphs else None
    whole, before, after = (
        trainer_of(name, on, capture=capture if on else None, accumulation=parts, **options)
        for on in (False, graphs == "at first", graphs != "at first")
    )
    losses = take(before, name, range(3), parts)
    move(before, after)
    losses += take(after, name, range(3, 8), parts)
    assert_same(whole, after, take(whole, name, range(8), parts), losses)


def move(one: Trainer, other: Trainer) -> None:
    """Put the state of a training into another one, as a checkpoint does."""
    other.method.load_state_dict(one.method.state_dict())
    for spec in one.method.optimisers:
        other.engine.load_optimiser_state(spec.name, one.engine.optimiser_state(spec.name))
    other.method.load_slot_state(one.method.slot_state())


def test_the_operators_of_a_step_are_recorded_once_for_each_kind() -> None:
    """L_robust begins in the fifth step; the first step of a kind is not recorded."""
    capture = Recorded()
    options: dict[str, Any] = {"robust.start": 0.4}
    trainer = trainer_of("srunit", True, capture=capture, **options)
    done = [
        (take(trainer, "srunit", range(step, step + 1)), (capture.captured, capture.replayed))[1] for step in range(8)
    ]
    assert done == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 2), (2, 2), (2, 3), (2, 4)]


def test_where_a_capture_fails_the_training_goes_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    capture = Recorded()
    failing = trainer_of("cut", True)
    failing._take = StepGraphs(failing.method, failing.engine, capture).take  # whose engine reads a norm on the host
    eager = trainer_of("cut", False)
    assert_same(eager, failing, take(eager, "cut", range(4)), take(failing, "cut", range(4)))
    assert not capture.captured
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith(
        "a training step cannot be captured as a CUDA graph (the host reads a number of a step that is"
    )


def test_too_many_kinds_of_step_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.step_graphs.LIMIT", 1)
    capture = Recorded()
    options: dict[str, Any] = {"robust.start": 0.4}
    eager, limited = trainer_of("srunit", False, **options), trainer_of("srunit", True, capture=capture, **options)
    assert_same(eager, limited, take(eager, "srunit", range(8)), take(limited, "srunit", range(8)))
    assert (capture.captured, capture.replayed) == (1, 2)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "there are more than 1 kinds of training step"
    ]


def test_a_step_that_draws_otherwise_is_refused() -> None:
    """Of a kind that was seen, or a replay would have the numbers of another draw."""
    trainer = trainer_of("cut", True)
    take(trainer, "cut", range(2))
    method: Any = trainer.method
    method.contrast.config = replace(method.contrast.config, patches=8)
    with pytest.raises(RuntimeError, match="a step of a kind that was seen before draws otherwise"):
        take(trainer, "cut", range(2, 3))


class Failing(Recorded):
    """Fails before it has computed anything, as CUDA's does."""

    def __call__(self, run: Run, /) -> tuple[Losses, Run]:
        raise RuntimeError("out of memory")


def test_where_a_capture_fails_a_step_draws_as_it_would_have_without(caplog: pytest.LogCaptureFixture) -> None:
    """And not what the first step of its kind did: its draws may be why."""
    eager, failing = trainer_of("cut", False), trainer_of("cut", True, capture=Failing())
    taken = []
    for trainer in (eager, failing):
        losses, method = take(trainer, "cut", range(1)), trainer.method
        assert isinstance(method, Cut)
        method.contrast.config = replace(method.contrast.config, patches=8)
        taken.append(losses + take(trainer, "cut", range(1, 3)))
    assert_same(eager, failing, *taken)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_method_whose_steps_are_not_alike_is_refused() -> None:
    with pytest.raises(
        UserError, match="--engine.graphs true cannot capture steps of Semst, which cuts images elsewhere"
    ):
        trainer_of("semst", graphs=True)
