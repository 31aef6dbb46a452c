"""Steps of methods whose phases come in another order than CUT's, share an optimiser, or do not run in every step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.methods.base import Losses, Method, OptimiserSpec, Phase, StepContext
from trainer.optim import OptimConfig
from trainer.step import train_step

SGD = OptimConfig(kind="sgd", lr=0.1, momentum=0.0)


@dataclass
class Numbers:
    x: Tensor
    slots: Tensor


@dataclass
class Made:
    y: Tensor
    others: list[Tensor]


def batches(*values: Sequence[float]) -> list[Numbers]:
    return [Numbers(torch.tensor(each, dtype=torch.float64), torch.arange(len(each))) for each in values]


class Game(Method[Numbers, Made]):
    """y = g x, and D sees d y: with plain numbers, so that a step can be done on paper."""

    def __init__(self, phases: tuple[Phase, ...], optimisers: tuple[OptimiserSpec, ...] | None = None) -> None:
        super().__init__()
        self.phases = phases
        self.optimisers = optimisers or (
            OptimiserSpec(name="g", networks=("g",)),
            OptimiserSpec(name="d", networks=("d",)),
        )
        self.g, self.d = (nn.Linear(1, 1, bias=False).double() for _ in range(2))
        nn.init.constant_(self.g.weight, 2.0)
        nn.init.constant_(self.d.weight, 3.0)
        self.product = nn.ModuleDict({"g": self.g})
        self.forwards: list[tuple[str, bool]] = []

    def forward(self, batch: Numbers, context: StepContext, name: str = "translate") -> Made:
        self.forwards.append((name, torch.is_grad_enabled()))
        y = self.g(batch.x[:, None])
        return Made(y, [y * 2])

    def loss(self, phase: str, outputs: Made, batch: Numbers, context: StepContext) -> tuple[Tensor, Losses]:
        if phase.startswith("d"):
            value = self.d(outputs.y.detach()).mean()
        else:
            value = (outputs.others[0] / 2).mean() * self.d.weight.detach().squeeze()
        return value, {phase: value.detach()}

    @property
    def weights(self) -> tuple[float, float]:
        return self.g.weight.item(), self.d.weight.item()


def play(game: Game, steps: Sequence[Sequence[Numbers]], optim: OptimConfig = SGD) -> list[Losses]:
    engine = Engine(EngineConfig(device="cpu", precision="fp32", memory_format="contiguous"))
    engine.prepare(game, optim)
    return [train_step(game, engine, step, StepContext(Draws(0, number))) for number, step in enumerate(steps)]


G = Phase(name="g", optimiser="g", differentiates=True)
D = Phase(name="d", optimiser="d")


def test_d_first_g_plays_against_the_new_d() -> None:
    game = Game((D, G))
    losses = play(game, [batches([1.0, 3.0])])
    assert losses[0]["d"] == 12 and game.d.weight.item() == pytest.approx(3 - 0.1 * 4)  # d y = 3 * 2 * 2
    assert losses[0]["g"] == pytest.approx(4 * 2.6) and game.g.weight.item() == pytest.approx(2 - 0.1 * 2 * 2.6)


@pytest.mark.parametrize("micro", [([1.0, 3.0],), ([1.0], [3.0])], ids=["whole", "micro-batches"])
def test_g_first_d_sees_what_was_made_before_gs_update(micro: tuple[list[float], ...]) -> None:
    game = Game((G, D))
    losses = play(game, [batches(*micro)])
    assert losses[0]["g"] == 12 and game.g.weight.item() == pytest.approx(2 - 0.1 * 2 * 3)
    assert losses[0]["d"] == 12 and game.d.weight.item() == pytest.approx(3 - 0.1 * 4)  # not of g = 1.4
    assert game.forwards == [("translate", True)] * len(micro)


@pytest.mark.parametrize("order", [(D, G), (G, D)], ids=["d first", "g first"])
def test_micro_batches_add_up_to_the_whole_batch(order: tuple[Phase, ...]) -> None:
    whole, parts = Game(order), Game(order)
    steps = [[1.0, 3.0, -2.0, 0.5], [0.25, 1.0, 2.0, -1.0]]
    one = play(whole, [batches(step) for step in steps])
    other = play(parts, [batches(step[:2], step[2:]) for step in steps])
    assert parts.weights == pytest.approx(whole.weights, abs=1e-12)
    for a, b in zip(one, other, strict=True):
        assert {name: float(value) for name, value in a.items()} == pytest.approx({k: float(v) for k, v in b.items()})


def test_a_phase_may_have_a_forward_pass_of_its_own() -> None:
    """As MUNIT's discriminator, and DRIT's second update of the generators: it sees the weights of its turn."""
    again = Phase(name="g again", optimiser="g", forward="again", differentiates=True)
    game = Game((G, again))
    losses = play(game, [batches([2.0])])
    assert game.forwards == [("translate", True), ("again", True)]
    assert losses[0]["g"] == 12 and losses[0]["g again"] == pytest.approx((2 - 0.1 * 6) * 2 * 3)


def test_phases_that_share_an_optimiser_share_its_moments() -> None:
    again = Phase(name="g again", optimiser="g", forward="again", differentiates=True)
    momentum = OptimConfig(kind="sgd", lr=0.1, momentum=0.5)
    game = Game((G, again))
    play(game, [batches([1.0])], momentum)
    assert game.g.weight.item() == pytest.approx(2 - 0.1 * 3 - 0.1 * (3 + 0.5 * 3))


class Through(Game):
    """Every loss reaches both networks."""

    def loss(self, phase: str, outputs: Made, batch: Numbers, context: StepContext) -> tuple[Tensor, Losses]:
        value = self.d(outputs.y).mean() if phase == "d" else super().loss(phase, outputs, batch, context)[0]
        return value, {phase: value.detach()}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("game", [Game, Through])
def test_a_phase_may_move_some_networks_of_its_optimiser_alone(game: type[Game], kind: str) -> None:
    """As DRIT's second update. The others keep weights and moments, whatever decay and their gradient would do."""
    optim = OptimConfig(kind=kind, lr=0.1, momentum=0.5, weight_decay=0.1)
    own = [Phase(name=name, optimiser=name, forward=name, differentiates=True) for name in "gd"]
    one = Game(tuple(own))
    two = game(
        tuple(replace(phase, optimiser="all", moves=(phase.name,)) for phase in own),
        (OptimiserSpec(name="all", networks=("g", "d")),),
    )
    steps = [batches([1.0, 3.0]), batches([-2.0, 0.5]), batches([0.25, 1.0])]
    for step, (ours, theirs) in enumerate(zip(play(two, steps, optim), play(one, steps, optim), strict=True)):
        assert ours == theirs, step
    assert two.weights == one.weights


def test_zero_refuses_a_phase_that_moves_some_networks_alone() -> None:
    engine = object.__new__(DeepSpeedEngine)  # made without the other processes
    engine.config = EngineConfig(zero_stage=1)
    game = Game((G, Phase(name="d", optimiser="g", moves=("d",))), (OptimiserSpec(name="g", networks=("g", "d")),))
    with pytest.raises(UserError, match="give --engine.zero-stage 0"):
        engine.prepare(game, SGD)


def test_phases_run_in_the_steps_that_are_theirs() -> None:
    """As DRIT's: two of three steps train one discriminator alone."""
    alone = Phase(name="d alone", optimiser="d", forward="encode", every=3, at=(0, 1))
    whole = [Phase(name=phase.name, optimiser=phase.optimiser, differentiates=phase.differentiates, every=3, at=(2,))
             for phase in (D, G)]  # fmt: skip
    game = Game((alone, *whole))
    losses = play(game, [batches([1.0])] * 6)
    alone_row, whole_row = ["d alone", "norm/d alone"], ["d", "g", "norm/d", "norm/g"]
    assert [sorted(each) for each in losses] == [alone_row, alone_row, whole_row] * 2
    assert game.forwards == [("encode", False), ("encode", False), ("translate", True)] * 2


@pytest.mark.parametrize("micro", [([1.0, 3.0],), ([1.0], [3.0])], ids=["whole", "micro-batches"])
def test_a_phase_may_begin_late_in_the_schedule(micro: tuple[list[float], ...]) -> None:
    """As G's in the published SRUNIT. Until then no graph is kept for it, its weights stay and its moments too."""
    game = Game((D, replace(G, start=0.5)))
    engine = Engine(EngineConfig(device="cpu", precision="fp32", memory_format="contiguous"))
    engine.prepare(game, OptimConfig(kind="sgd", lr=0.1, momentum=0.5, weight_decay=0.1))
    reported, held = [], []
    for step, progress in enumerate((0.0, 0.4999, 0.5)):
        reported.append(sorted(train_step(game, engine, batches(*micro), StepContext(Draws(0, step), progress))))
        held.append((game.g.weight.item(), bool(engine.optimiser_state("g"))))
    assert reported == [["d", "norm/d"], ["d", "norm/d"], ["d", "g", "norm/d", "norm/g"]]
    assert held[0] == held[1] == (2.0, False) and held[2][0] != 2 and held[2][1]
    assert game.forwards[: 2 * len(micro)] == [("translate", False)] * 2 * len(micro)
    assert game.d.weight.item() != 3


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"rate": 0.4}, 3 - 0.04 * 4),
        ({"clip": 0.5}, 3 - 0.1 * 0.5),
        ({"clip": 5.0}, 3 - 0.1 * 4),
        ({"weight_decay": 0.1}, 3 - 0.1 * (4 + 0.1 * 3)),
    ],
)  # fmt: skip
def test_an_optimiser_may_differ_from_the_runs_options(spec: dict[str, Any], expected: float) -> None:
    own = OptimiserSpec(name="d", networks=("d",), **spec)
    game = Game((D, G), (own, OptimiserSpec(name="g", networks=("g",))))
    play(game, [batches([1.0, 3.0])])
    assert game.d.weight.item() == pytest.approx(expected)
    assert game.g.weight.item() == pytest.approx(2 - 0.1 * 2 * expected)  # with the run's own


def test_an_optimiser_may_have_betas_of_its_own() -> None:
    own = OptimiserSpec(name="d", networks=("d",), betas=(0.25, 0.5))
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    engine.prepare(Game((D, G), (own, OptimiserSpec(name="g", networks=("g",)))), OptimConfig())
    assert engine.optimisers["d"].param_groups[0]["betas"] == (0.25, 0.5)
    assert engine.optimisers["g"].param_groups[0]["betas"] == (0.5, 0.999)
