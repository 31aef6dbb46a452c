"""DistanceGAN's distances, what it measures before the first step, and its options; its step is held to recordings in parity/."""

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.errors import Stopped, UserError
from launch.runs.config import make_config
from tests.trainer.small import small_method
from tests.trainer.test_loop import Recorder
from tests.trainer.test_methods import Pairs, Ranks, at, pairs
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.loop import LoopConfig, Trainer
from trainer.losses import pair_distances, self_distances
from trainer.methods.base import StepContext
from trainer.methods.distancegan import DistanceGan
from trainer.networks.padding import Pad2d
from trainer.optim import OptimConfig
from trainer.state import TrainingState

SELF: dict[str, Any] = {"distances": "self"}


def make(global_batch: int = 4, **options: Any) -> DistanceGan:
    method: DistanceGan = small_method("distancegan", global_batch=global_batch, **options).double()
    return method


def mean_distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean().detach())


def losses(method: DistanceGan, batch: Pairs) -> dict[str, float]:
    named = method.loss("generator", method(batch, at()), batch, at())[1]
    return {name: float(value) for name, value in named.items()}


# ---- distances --------------------------------------------------------------------------------------------------------


def test_distances_of_pairs_are_the_plain_loop() -> None:
    method, batch = make(measured=8), pairs(3, 24)
    method.measure([pairs(4, 24, seed=1)], at())
    method.measure([pairs(4, 24, seed=2)], at())
    expected: dict[str, Tensor] = {}
    for domain in ("source", "target"):
        seen = [getattr(pairs(4, 24, seed=seed), domain) for seed in (1, 2)]
        found = [mean_distance(*pair) for images in seen for pair in itertools.combinations(images, 2)]
        expected[domain] = torch.tensor(found, dtype=torch.float64)
    (mean_x, mean_y), (std_x, std_y) = zip(
        *((each.mean(), each.std(correction=0)) for each in expected.values()), strict=True
    )
    fake = method(batch, at())[0].fake
    terms = [
        abs((mean_distance(*x) - mean_x) / std_x - (mean_distance(*y) - mean_y) / std_y)
        for x, y in zip(itertools.combinations(batch.source, 2), itertools.combinations(fake, 2), strict=True)
    ]
    assert losses(method, batch)["Dist_A"] == pytest.approx(float(sum(terms)) / 3)


def test_the_way_back_is_normalised_the_other_way_round() -> None:
    method = make(both=True, measured=8)
    method.measure([pairs(4, 24, seed=1)], at())
    batch = pairs(4, 24)
    mirrored = make(both=True, measured=8)
    mirrored.load_state_dict(method.state_dict())
    for name in ("count", "total", "squares"):
        buffer = mirrored.statistics.get_buffer(name)
        buffer.copy_(buffer.flip(0) if buffer.ndim else buffer)
    mirrored.sides[0].generator.load_state_dict(method.sides[1].generator.state_dict())
    ours = losses(method, batch)
    assert ours["Dist_B"] == pytest.approx(losses(mirrored, Pairs(batch.target, batch.source, batch.slots))["Dist_A"])
    assert ours["Dist_A"] != pytest.approx(ours["Dist_B"], rel=1e-3)


@pytest.mark.parametrize(("halves", "axis"), [("left-right", 3), ("top-bottom", 2)])
def test_self_distances_are_those_of_the_halves(halves: str, axis: int) -> None:
    method, batch = make(**SELF, halves=halves), pairs(2, 24)
    one, other = batch.source.chunk(2, dim=axis)
    found = method.self_distances(batch.source).tolist()
    assert found == pytest.approx([mean_distance(*each) for each in zip(one, other, strict=True)])


def test_distances_of_single_precision_are_exact_enough() -> None:
    rows = torch.rand(3, 3 * 128 * 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        pair_distances(rows, rows), pair_distances(rows.double(), rows.double()).float(), rtol=1e-5, atol=0
    )
    assert pair_distances(rows.bfloat16(), rows.bfloat16()).dtype == torch.float32


# ---- what is measured before the first step ---------------------------------------------------------------------------


class Steps:
    """Starts over whenever it is iterated, and counts what it has given."""

    def __init__(self, micro_batches: int = 1, first: int = 0) -> None:
        self.micro_batches, self.first = micro_batches, first
        self.given: list[int] = []

    def __iter__(self) -> Iterator[list[Pairs]]:
        for step in itertools.count(self.first):
            self.given.append(step)
            batch = pairs(4, 24, seed=step)
            batch = Pairs(batch.source.float(), batch.target.float(), batch.slots)
            size = 4 // self.micro_batches
            yield [batch[start : start + size] for start in range(0, 4, size)]


def train(
    method: DistanceGan, steps: Steps, first: int = 0, recorder: Recorder | None = None, **loop: Any
) -> list[TrainingState]:
    """Two steps in all; returns what is saved."""
    engine, optim = Engine(EngineConfig(device="cpu", precision="fp32")), OptimConfig(epochs=9, global_batch=4)
    engine.prepare(method, optim)
    engine.world_size = loop.pop("ranks", 1)
    trainer = Trainer(method, engine, optim, LoopConfig(max_steps=2, **loop), seed=0, source_samples=4)
    saved: list[TrainingState] = []
    trainer.fit(
        steps, first, recorder=recorder or Recorder(), sample=lambda step: None, evaluate=None,
        save=lambda state, evaluation: saved.append(state),
    )  # fmt: skip
    return saved


def statistics(*seeds: int) -> Tensor:
    """(2, 2): mean and standard deviation of self-distances of both domains, in these steps."""
    found = []
    for domain in ("source", "target"):
        each = torch.cat([self_distances(getattr(pairs(4, 24, seed=seed), domain).float()) for seed in seeds]).double()
        found.append(torch.stack([each.mean(), each.std(correction=0)]))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_it_measures_the_first_images_and_then_trains_on_them(micro_batches: int) -> None:
    method, steps = small_method("distancegan", global_batch=4, **SELF, measured=9), Steps(micro_batches)
    saved = train(method, steps)
    assert steps.given == [0, 1, 2, 0, 1]  # 9 images take three steps of 4
    torch.testing.assert_close(torch.stack([method.statistics.mean, method.statistics.std]), statistics(0, 1, 2))
    assert float(method.statistics.count) == 12
    kept = saved[-1].tensors["statistics"]
    assert all(torch.equal(kept[name], value) for name, value in method.statistics.state_dict().items())


def test_how_much_is_measured_is_told() -> None:
    recorder = Recorder()
    train(small_method("distancegan", global_batch=4, **SELF, measured=9), Steps(), recorder=recorder)
    assert recorder.measurements == [(1, 3), (2, 3), (3, 3)] and recorder.calls == 2


def test_sigterm_while_it_measures_stops_with_143_and_keeps_nothing() -> None:
    before, steps = signal.getsignal(signal.SIGTERM), Steps()
    recorder = Recorder(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else None)
    method = small_method("distancegan", global_batch=4, **SELF, measured=40)
    with pytest.raises(Stopped, match="after 3 of 10 steps that are measured .*: the same command") as stop:
        train(method, steps, recorder=recorder)
    assert stop.value.exit_code == 143
    assert steps.given == [0, 1, 2] and not recorder.calls
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_continued_run_does_not_measure_again() -> None:
    steps = Steps(first=1)
    method = small_method("distancegan", global_batch=4, **SELF, measured=9)
    train(method, steps, first=1)
    assert steps.given == [1] and float(method.statistics.count) == 0


def test_without_measuring_distances_are_as_they_are() -> None:
    steps, method, batch = Steps(), small_method("distancegan", global_batch=4, **SELF, measured=0), pairs(4, 24)
    train(method, steps)
    assert steps.given == [0, 1]
    fake = method.double()(batch, at())[0].fake
    expected = (self_distances(batch.source) - self_distances(fake)).abs().mean().detach()
    assert losses(method, batch)["Dist_A"] == pytest.approx(float(expected))


@pytest.mark.parametrize("options", [SELF, {}], ids=["self", "pairs"])
def test_two_ranks_measure_what_one_process_does(options: dict[str, Any]) -> None:
    whole, halves, ranks = make(**options), [make(**options) for _ in range(2)], Ranks()
    for step in range(2):
        batch = pairs(4, 24, seed=step)

        def measure(rank: int, step: int = step, batch: Pairs = batch) -> None:
            context = StepContext(Draws(0, step), 0.0, lambda rows: ranks.gather(rank, rows))
            halves[rank].measure([batch[2 * rank : 2 * rank + 2]], context)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(measure, range(2)))
        whole.measure([batch], at(step))
    assert float(whole.statistics.count) == (8 if options else 12)
    for half, name in itertools.product(halves, ("mean", "std")):
        torch.testing.assert_close(getattr(half.statistics, name), getattr(whole.statistics, name), rtol=1e-12, atol=0)


def test_images_that_are_all_alike_are_not_divided_by_nothing() -> None:
    method, grey = make(**SELF), torch.full((4, 3, 24, 24), 0.5, dtype=torch.float64)
    method.measure([Pairs(grey, grey, torch.arange(4))], at())
    assert losses(method, pairs(4, 24))["Dist_A"] < 10


# ---- options ----------------------------------------------------------------------------------------------------------


def test_one_way_has_one_generator_and_both_ways_have_two() -> None:
    one, two = make(), make(both=True, lambda_a=10.0)
    assert [*one.networks("generator"), *one.networks("discriminator")] == ["generator", "discriminator"]
    assert one.product.directions == ("AtoB",) and two.product.directions == ("AtoB", "BtoA")
    assert losses(one, pairs(2, 24)).keys() == {"G_A", "Dist_A", "G"}
    assert losses(two, pairs(2, 24)).keys() == {"G_A", "G_B", "Dist_A", "Dist_B", "cycle_A", "G"}


@pytest.mark.parametrize("both", [False, True])
def test_its_own_networks_have_no_reflections_and_norms_with_weights(both: bool) -> None:
    method = make(architecture="distancegan", both=both)
    assert not any(isinstance(module, Pad2d) for module in method.modules())
    for side in method.sides:
        assert "model.1.weight" in side.generator.state_dict()
        assert "model.3.weight" in side.adversary.discriminator.state_dict()
    assert all(torch.isfinite(torch.tensor(list(losses(method, pairs(2, method.sizes(2).first)).values()))))


def test_the_smallest_images_that_it_says_are_the_smallest_that_it_takes() -> None:
    method = make()
    side = method.sizes(2).first
    assert losses(method, pairs(2, side))
    with pytest.raises(RuntimeError):
        losses(method, pairs(2, side - 4))


def test_what_cannot_work_is_refused_with_a_sentence() -> None:
    with pytest.raises(UserError, match="two images in a step: give --global-batch 2 or more"):
        make(global_batch=1)
    make(global_batch=1, **SELF)
    with pytest.raises(UserError, match="a cycle needs the way back"):
        make(lambda_b=1.0)
    for name in ("distance_a", "distance_b", "lambda_a", "measured"):
        with pytest.raises(UserError, match=rf"method.{name} = -1\S* .*give 0"):
            make(**{name: -1})
    pairs_of_two = {"method.name": "distancegan", "optim.accumulation": 2}
    with pytest.raises(UserError, match=r"method.distances pairs needs the whole global batch at once: leave out"):
        make_config(pairs_of_two)
    assert make_config(pairs_of_two, {"method.distances": "self"}).optim.global_batch == 2
