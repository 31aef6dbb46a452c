"""CUT, FastCUT and SRUNIT as a game: against plain loops, for any cut of the batch, and whom each loss trains."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from tests.trainer import drawn
from tests.trainer.small import CUT, IN_USE, SMALL, crop_of, small_method
from trainer.draws import Draws, Stream, generator
from trainer.engines import Engine, EngineConfig
from trainer.losses import patch_nce
from trainer.methods import METHODS, Cut
from trainer.methods.base import StepContext
from trainer.networks import init_weights
from trainer.optim import OptimConfig
from trainer.step import train_step

pytestmark = pytest.mark.slow

TAPS = (0, 4, 8, 12, 16)


@dataclass
class Pairs:
    source: Tensor
    target: Tensor
    slots: Tensor
    source_labels: Tensor | None = None

    @property
    def source_boxes(self) -> Tensor:
        """For those that take windows of images: another for each slot."""
        return 8 * torch.stack([self.slots % 4, (self.slots + 1) % 5], dim=1)

    @property
    def target_boxes(self) -> Tensor:
        return self.source_boxes.flip(1)

    def __getitem__(self, part: slice) -> "Pairs":
        return Pairs(self.source[part], self.target[part], self.slots[part])


def pairs(count: int = 4, size: int = 32, seed: int = 0) -> Pairs:
    draw = torch.Generator().manual_seed(seed)
    source, target = (torch.rand(count, 3, size, size, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Pairs(source, target, torch.arange(count))


def make(name: str = "srunit", global_batch: int = 4, seed: int = 0, **options: Any) -> Any:
    """A small method in float64. options: its own, "__" for a dot."""
    in_use = {"patches": 20, "buffer": 4} if SMALL[name] is CUT else IN_USE[name]
    method = small_method(name, seed=seed, global_batch=global_batch, **in_use | options).double()
    with torch.no_grad():  # as after some training, so that no number is as small as with the gain of 0.02
        for parameter in method.parameters():
            parameter.mul_(3 if name == "drit" else 10)  # most of DRIT's layers have no norm
    return method


def at(step: int = 0, progress: float = 1.0) -> StepContext:
    return StepContext(Draws(0, step), progress)


def play(method: Cut, batch: Pairs, context: StepContext) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name, and the gradients by the names of the parameters that have one, of one step without an update."""
    method.zero_grad()
    outputs = method(batch, context)
    d_loss, d_named = method.loss("discriminator", outputs, batch, context)
    g_loss, g_named = method.loss("generator", outputs, batch, context)
    d_loss.backward()
    g_loss.backward()
    return {**d_named, **g_named}, {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, other[name].detach().abs().max().item())
        assert (one[name] - other[name]).detach().abs().max().item() <= tolerance * scale, name


# ---- any cut of the global batch ----------------------------------------------------------------------------------------


class Ranks:
    """Two threads in the place of two ranks: gathers rows as `Engine.all_ranks` does."""

    def __init__(self) -> None:
        self.barrier, self.rows = threading.Barrier(2, timeout=60), [torch.empty(0), torch.empty(0)]

    def gather(self, rank: int, rows: Tensor) -> tuple[Tensor, int]:
        self.rows[rank] = rows
        self.barrier.wait()
        joined = torch.cat(self.rows)
        self.barrier.wait()
        return joined, rank * len(rows)


SPLITTABLE = [
    ("cut", {}),
    ("fastcut", {}),
    ("srunit", {"buffer": 4}),
    ("srunit", {"robust__per_step": "one", "robust__rule": "published"}),
    ("srunit", {"robust__rule": "relative"}),
    ("cut", {"all_negatives": True}),
    ("cyclegan", {}),
    ("gcgan", {}),
    ("src", {}),
    ("distancegan", {}),
    ("distancegan", {"distances": "self", "both": False, "lambda_a": 0.0}),
    ("semst", {}),
    ("semst", {"adversarial": "fused", "ts__space": "pixels"}),
    ("sincut", {"patches": 1}),
]


@pytest.mark.parametrize(("name", "options"), SPLITTABLE)
def test_two_ranks_with_half_the_batch_have_the_losses_and_gradients_of_one(name: str, options: dict[str, Any]) -> None:
    whole = make(name, **options)
    halves, ranks = [copy.deepcopy(whole) for _ in range(2)], Ranks()
    for step in range(3):  # from the second on, the image buffers are full
        batch = pairs(size=crop_of(name), seed=step)

        def half(rank: int, step: int = step, batch: Pairs = batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            context = StepContext(Draws(0, step), 1.0, lambda rows: ranks.gather(rank, rows))
            return play(halves[rank], batch[2 * rank : 2 * rank + 2], context)

        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(half, range(2)))
        losses, gradients = play(whole, batch, at(step))
        close({key: (parts[0][0][key] + parts[1][0][key]) / 2 for key in losses}, losses)
        close({key: (parts[0][1][key] + parts[1][1][key]) / 2 for key in gradients}, gradients)


def test_all_negatives_are_those_of_the_whole_batch() -> None:
    batch = pairs(2)
    few, many = (play(make("cut", all_negatives=both), batch, at())[0]["NCE"] for both in (False, True))
    assert float(many) > float(few)  # every row has the same positive and more negatives


def trained(micro_batches: int, steps: int = 3) -> tuple[list[dict[str, Tensor]], Cut]:
    method, engine = make(buffer=4), Engine(EngineConfig(device="cpu", precision="fp32"))
    engine.prepare(method, OptimConfig(global_batch=4, accumulation=micro_batches))
    size, losses = 4 // micro_batches, []
    for step in range(steps):
        batch = pairs(seed=step)
        parts = [batch[i : i + size] for i in range(0, 4, size)]
        losses.append(train_step(method, engine, parts, at(step)))
    return losses, method


def test_accumulation_equals_one_batch() -> None:
    (whole, one), (parts, two) = trained(1), trained(2)
    for expected, given in zip(whole, parts, strict=True):
        close(given, expected, 1e-8)
    close(dict(two.named_parameters()), dict(one.named_parameters()), 1e-8)
    assert not torch.equal(one.get_parameter("generator.model.1.weight"), make().generator.model[1].weight)
    close(two.slot_state(), one.slot_state(), 1e-8)


# ---- whom each loss trains ----------------------------------------------------------------------------------------------


def with_gradient(method: Cut) -> set[str]:
    found = [n for n, p in method.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("name", METHODS)
def test_each_loss_reaches_the_networks_of_its_phase_only(name: str) -> None:
    method, batch, context = make(name), pairs(2, crop_of(name)), at()
    outputs = {forward: method(batch, context, forward) for forward in {phase.forward for phase in method.phases}}
    for phase in method.phases:
        method.zero_grad()
        # The first loss must not free what the next ones go through.
        method.loss(phase.name, outputs[phase.forward], batch, context)[0].backward(retain_graph=True)
        assert with_gradient(method) == set(phase.moves or method.networks(phase.optimiser))
        others = {name for name, _ in method.named_children()} - {"product", *method.networks(phase.optimiser)}
        assert all(p.grad is None for name in others for p in method.get_submodule(name).parameters())


def test_every_parameter_belongs_to_one_phase() -> None:
    method = make()
    owned = [id(p) for spec in method.optimisers for p in method.networks(spec.name).parameters()]
    assert sorted(owned) == sorted(id(p) for p in method.parameters())


@pytest.mark.parametrize(("gradient", "heads_learn"), [("both", True), ("generator", False)])
def test_whom_robustness_trains(gradient: str, heads_learn: bool) -> None:
    batch, context = pairs(2), at()
    without = play(make(robust__beta=0.0), batch, context)[1]
    with_it = play(make(robust__beta=1.0, robust__gradient=gradient), batch, context)[1]
    moved = {name.split(".")[0] for name in without if not torch.equal(without[name], with_it[name])}
    assert moved == {"generator", "heads"} if heads_learn else moved == {"generator"}


# ---- options ------------------------------------------------------------------------------------------------------------


def step_with_coin(side: bool) -> int:
    return next(step for step in range(100) if drawn.coin(Draws(0, step), "flip") == side)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("side", [True, False])
def test_flip_equivariance_mirrors_the_input_and_the_features_back(side: bool, identity: bool) -> None:
    method, batch, step = make("fastcut", identity=identity), pairs(2), step_with_coin(side)
    outputs = method(batch, at(step))

    def contrast(images: Tensor, translated: Tensor, stream: str) -> float:
        seen = method.generator(images.flip(3) if side else images)
        torch.testing.assert_close(translated, seen, rtol=1e-10, atol=1e-10)
        queries = method.generator.encode(translated, TAPS)
        queries = [query.flip(3) for query in queries] if side else queries
        keys = method.generator.encode(images, TAPS)
        places = [key.shape[2] * key.shape[3] for key in keys]
        ids = [drawn.patch_ids(at(step).draws, stream, *place, 20) for place in zip(TAPS, places, strict=True)]
        rows = zip(method.heads(queries, ids), method.heads(keys, ids), strict=True)
        return torch.stack([patch_nce(query, key, 2).mean() for query, key in rows]).mean().item() * 10

    _, named = method.loss("generator", outputs, batch, at(step))
    assert float(named["NCE"]) == pytest.approx(contrast(batch.source, outputs.fake, "nce"), rel=1e-10)
    assert (outputs.identity is not None) == ("NCE_Y" in named) == identity
    if outputs.identity is not None:
        expected = contrast(batch.target, outputs.identity, "identity")
        assert float(named["NCE_Y"]) == pytest.approx(expected, rel=1e-10)


def test_identity_is_the_translation_of_the_target() -> None:
    method, batch = make("cut"), pairs(2)
    outputs = method(batch, at())
    torch.testing.assert_close(outputs.identity, method.generator(batch.target), rtol=1e-10, atol=1e-10)
    assert "NCE_Y" not in play(make("cut", identity=False), batch, at())[0]


def test_the_buffer_of_a_slot_outlives_a_save_and_belongs_to_the_slot() -> None:
    method = make(buffer=8)
    for step in range(4):
        play(method, pairs(seed=step), at(step))
    saved = method.slot_state()
    assert {name: tuple(images.shape) for name, images in saved.items()} == {
        f"buffer/{slot}": (2, 3, 32, 32) for slot in range(4)
    }
    other = make(buffer=8)
    other.load_slot_state(saved)
    batch, context = pairs(seed=4), at(4)
    close(play(other, batch[2:], context)[0], play(method, batch[2:], context)[0], 0)
    assert sorted(other.slot_state()) == ["buffer/2", "buffer/3"]  # what this rank has met


@pytest.mark.parametrize(("images", "each"), [(1, 1), (4, 1), (6, 2), (9, 3)])
def test_the_buffers_of_all_slots_hold_together_what_is_asked_for_or_a_little_more(images: int, each: int) -> None:
    method = make("cut", buffer=images)
    for step in range(each + 1):
        play(method, pairs(seed=step), at(step))
    assert [len(kept) for kept in method.slot_state().values()] == [each] * 4


def test_the_seed_fixes_the_initial_weights() -> None:
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(one.generator.model[1].weight, same.generator.model[1].weight)
    for name, parameter in one.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other.get_parameter(name)), name


@dataclass(frozen=True)
class NotedDraws(Draws):
    """Draws as ever, and notes from which streams."""

    noted: set[tuple[Any, ...]] = field(default_factory=set)

    def stream(self, *name: int | str, device: Any = "cpu") -> Stream:
        self.noted.add(name)
        return super().stream(*name, device=device)


def test_the_streams_of_a_step_are_pinned() -> None:
    """Their numbers are pinned in test_draws.py. Under another name a continued run would draw others."""
    every: dict[str, Any] = {"constraint__smoothness": 1.0, "constraint__consistency": 1.0, "flip_equivariance": True}
    noted: set[tuple[Any, ...]] = set()
    for per_step in "all", "one":
        method = make(robust__per_step=per_step, buffer=8, **every)
        play(method, pairs()[2:], StepContext(NotedDraws(0, 0, noted), 1.0))
    ids = {(stream, "ids", tap) for stream in ("nce", "identity", "robust", "consistency") for tap in TAPS}
    others = {("smoothness", "ids", 0), ("flip", "coin"), ("robust", "choice"), ("buffer", 2), ("buffer", 3)}
    assert noted == ids | others | {("tau", tap, slot) for tap in TAPS for slot in (2, 3)}


def test_the_first_weights_come_from_streams_that_are_pinned() -> None:
    method = make(seed=3, separate_encoder=True, bank__size=4)
    for name in ("generator", "discriminator", "heads", "output_encoder", "output_heads"):
        fresh = copy.deepcopy(getattr(method, name))
        init_weights(fresh.float(), generator("cpu", 3, "init", name))
        for one, other in zip(fresh.parameters(), getattr(method, name).parameters(), strict=True):
            torch.testing.assert_close(10 * one.double(), other)  # `make` scales them
    for stream, tap in itertools.product(("nce", "identity"), TAPS):
        drawn = torch.randn(4, 8, generator=generator("cpu", 3, "bank", stream, tap))
        torch.testing.assert_close(method.bank.negatives(stream, tap).float(), F.normalize(drawn, dim=1))


def test_a_tap_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="tap 99 does not exist"):
        make(taps=(0, 99))
