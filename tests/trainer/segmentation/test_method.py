"""Training a segmenter: its loss, its one phase on the engines, its batch norm, its optimisers."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.engines.faster import use_triton
from trainer.loop import Evaluation, LoopConfig, Trainer
from trainer.methods.base import StepContext
from trainer.optim import OptimConfig
from trainer.schedule import Schedule
from trainer.segmentation.class_weights import ClassWeights
from trainer.segmentation.method import RECIPES, Segmentation
from trainer.state import TrainingState
from trainer.step import train_step

CLASSES = 3


@dataclass
class Labelled:
    images: Tensor
    labels: Tensor
    slots: Tensor


def batch(seed: int, count: int = 4) -> Labelled:
    """Images whose brightest colour is the label, in blocks; the upper left corner is not labelled."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randint(CLASSES, (count, 2, 4), generator=draw)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = nn.functional.one_hot(labels, CLASSES).permute(0, 3, 1, 2) * 1.0 - 0.5
    images += 0.2 * torch.randn(images.shape, generator=draw)
    labels[:, :2, :2] = 255
    return Labelled(images, labels.to(torch.uint8), torch.arange(count))


def network() -> nn.Module:
    """Half the resolution out, with batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))


CONTEXT = StepContext(Draws(0, 0))
CPU = EngineConfig(device="cpu", precision="fp32")


def loss_of(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    data = Labelled(torch.zeros(1), labels, torch.tensor([0]))
    total, named = Segmentation(network()).loss("segmenter", scores, data, CONTEXT)
    assert float(total) == float(named["CE"])
    return float(total), float(named["pxAcc"])


def test_the_loss_is_the_cross_entropy_of_the_labelled_pixels() -> None:
    scores, labels = torch.randn(2, CLASSES, 6, 8), torch.randint(CLASSES, (2, 6, 8), dtype=torch.uint8)
    labels[0, 1] = 255
    kept = labels != 255
    chosen = scores.permute(0, 2, 3, 1)[kept].log_softmax(1)[torch.arange(int(kept.sum())), labels[kept].long()]
    right = (scores.argmax(1)[kept] == labels[kept]).double().mean()
    assert loss_of(scores, labels) == pytest.approx((float(-chosen.mean()), float(right)))


def test_scores_are_resized_and_labels_are_not() -> None:
    scores = torch.zeros(1, CLASSES, 2, 2)
    scores[0, 1, :, 0] = scores[0, 2, :, 1] = 20.0
    labels = torch.tensor([[1, 1, 2, 2]] * 4, dtype=torch.uint8)[None]
    value, share = loss_of(scores, labels)
    assert share == 1 and value < 0.01


def test_a_batch_without_labels_gives_no_loss_and_no_nan() -> None:
    assert loss_of(torch.randn(1, CLASSES, 2, 2), torch.full((1, 4, 4), 255, dtype=torch.uint8)) == (0, 0)


# ---- the global batch, however it is split up ---------------------------------------------------------------------------


def unevenly_labelled(labelled: Sequence[int]) -> Labelled:
    """Images with so many labelled rows each, of 8."""
    data = batch(3, len(labelled))
    for image, rows in enumerate(labelled):
        data.labels[image, rows:] = 255
    return data


def plain_network() -> nn.Module:
    """Without batch norm, whose statistics are those of a micro-batch; float64, so that rounding hides nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)).double()


class OneOfTwo(Engine):
    """One of two ranks, which are threads here: they meet to take means of numbers and of gradients."""

    world: list[Tensor]
    meeting: threading.Barrier

    def _norm(self, name: str) -> Tensor:
        """Of gradients averaged over the ranks, as they are after a backward pass."""
        for parameter in self.parameters[name].values():
            assert parameter.grad is not None
            parameter.grad = self.mean(parameter.grad)
        return super()._norm(name)

    def mean(self, values: Tensor) -> Tensor:
        self.world[self.rank] = values
        self.meeting.wait(60)
        result = torch.stack(self.world).mean(0)
        self.meeting.wait(60)
        return result


SEEDING = threading.Lock()  # torch's generator is shared by all threads
Result = tuple[dict[str, float], dict[str, Tensor]]


def class_weights(power: float, *counts: float) -> ClassWeights:
    weights = ClassWeights(CLASSES, power)
    weights.counts += torch.tensor(counts)
    return weights


def one_step(parts: Sequence[Labelled], engine: Engine | None = None, power: float = 0.0) -> Result:
    """The losses of one step, as the loop reports them, and the network's weights after it. By SGD: Adam would hide a
    wrong scale."""
    with SEEDING:
        method = Segmentation(plain_network(), weights=class_weights(power, 80, 15, 5) if power else None)
    engine = engine or Engine(CPU)
    engine.prepare(method, OptimConfig(kind="sgd", lr=0.5, momentum=0.0, accumulation=len(parts)))
    parts = [Labelled(part.images.double(), part.labels, part.slots) for part in parts]
    losses = train_step(method, engine, parts, CONTEXT)
    names = sorted(losses)
    means = engine.mean(torch.stack([losses[name].double() for name in names]))
    return dict(zip(names, means.tolist(), strict=True)), method.segmenter.state_dict()


def split(data: Labelled, *sizes: int) -> list[Labelled]:
    return [Labelled(*part) for part in zip(*(value.split(sizes) for value in vars(data).values()), strict=True)]


def two_ranks(*shares: Sequence[Labelled], power: float = 0.0) -> list[Result]:
    world, meeting = [torch.empty(0)] * 2, threading.Barrier(2)

    def run(rank: int) -> Result:
        engine = OneOfTwo(CPU)
        engine.rank, engine.world, engine.meeting = rank, world, meeting
        return one_step(shares[rank], engine, power)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


UNEVEN = {
    "some": [8, 1, 0, 3],
    "one rank without": [5, 8, 0, 0],
    "a single row in all": [0, 0, 0, 3],
}


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("labelled", UNEVEN.values(), ids=UNEVEN)
def test_every_labelled_pixel_of_the_global_batch_counts_as_its_class(labelled: list[int], power: float) -> None:
    """Accumulation and two ranks give the losses and weights of one process that takes the whole batch."""
    whole = unevenly_labelled(labelled)
    losses, weights = one_step([whole], power=power)
    kept = whole.labels != 255
    assert 0 < kept.sum() < kept.numel() and losses["CE"] > 0

    first, second = split(whole, 2, 2)
    answers = [one_step([first, second], power=power), one_step(split(whole, 1, 1, 1, 1), power=power)]
    answers += two_ranks([first], [second], power=power)
    answers += two_ranks(split(first, 1, 1), split(second, 1, 1), power=power)
    for other_losses, other_weights in answers:
        assert other_losses == pytest.approx(losses, rel=1e-6)  # the labels' size is reached in float32
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-7)


def test_classes_weigh_by_how_many_pixels_they_have() -> None:
    """Counted over the micro-batches of all ranks before the first step; a class without pixels like one of a thousandth."""
    data = batch(3, 4)
    method = Segmentation(network(), weights=ClassWeights(CLASSES + 1, 0.5), global_batch=8)
    assert method.measured_steps() == 63  # 500 images
    twice = StepContext(Draws(0, 0), all_ranks=lambda rows: (torch.cat([rows, rows]), 0))
    method.measure(split(data, 1, 3), twice)
    counts = torch.stack([(data.labels == each).sum() for each in range(CLASSES + 1)]).double()
    assert method.weights is not None and torch.equal(method.weights.counts, 2 * counts) and counts[-1] == 0
    expected = (counts / counts.sum()).clamp(min=1e-3) ** -0.5
    torch.testing.assert_close(method.weights.table(), expected.float())

    scores = torch.randn(4, CLASSES + 1, 8, 16)
    total, named = method.loss("segmenter", scores, data, CONTEXT)
    kept = data.labels != 255
    labels = data.labels[kept].long()
    each, weight = -scores.permute(0, 2, 3, 1)[kept].log_softmax(1)[range(len(labels)), labels], expected[labels]
    assert float(total) == pytest.approx(float((each * weight).sum() / weight.sum()), rel=1e-5)
    right = scores.argmax(1)[kept] == labels
    assert float(named["pxAcc"]) == pytest.approx(float((right * weight).sum() / weight.sum()), rel=1e-5)
    assert float(method.amount(data)) == pytest.approx(float(weight.sum()), rel=1e-5)


def test_a_step_without_any_labelled_pixel_changes_nothing() -> None:
    parts = split(unevenly_labelled([0, 0, 0, 0]), 2, 2)
    before = plain_network().state_dict()
    for losses, weights in (one_step(parts), *two_ranks(parts[:1], parts[1:])):
        assert losses == {"CE": 0, "pxAcc": 0, "norm/segmenter": 0}
        assert all(torch.equal(value, before[name]) for name, value in weights.items())


# ---- a whole training ---------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []
        self.states: list[TrainingState] = []

    def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
        self.rows += rows

    def measured(self, done: int, count: int) -> None:
        raise AssertionError("a segmenter measures nothing")

    def estimate(self, seconds: float) -> None:
        pass

    def save(self, state: TrainingState, evaluation: Evaluation | None) -> None:
        self.states.append(state)

    def watch(self, trainer: Trainer, steps: Iterator[list[Labelled]], first: int = 0) -> None:
        trainer.fit(steps, first, recorder=self, sample=lambda step: None, evaluate=None, save=self.save)


def trainer(**options: Any) -> Trainer:
    optim = OptimConfig(**{"epochs": 50, "decay_epochs": 0, "lr": 0.02, "global_batch": 4} | options)
    method, engine = Segmentation(network()), Engine(CPU)
    engine.prepare(method, optim)
    return Trainer(method, engine, optim, LoopConfig(), seed=0, source_samples=4)


def steps(first: int = 0, parts: int = 1) -> Iterator[list[Labelled]]:
    while True:
        whole = batch(first)
        pieces = zip(*(value.chunk(parts) for value in vars(whole).values()), strict=True)
        yield [Labelled(*piece) for piece in pieces]
        first += 1


SGD = {"kind": "sgd", "lr": 0.1, "weight_decay": 1e-3}
ADAM = {"kind": "adam", "schedule": "poly", "ema": 0.9}


@pytest.mark.parametrize("options", [SGD, ADAM, {"accumulation": 2}], ids=["sgd", "adam", "accumulation"])
def test_it_learns(options: dict[str, Any]) -> None:
    recorder = Recorder()
    recorder.watch(trainer(**options), steps(parts=options.get("accumulation", 1)), 0)
    assert recorder.rows[0]["CE"] > 0.9 and recorder.rows[-1]["CE"] < 0.5 and recorder.rows[-1]["pxAcc"] > 0.9
    (state,) = recorder.states
    assert set(state.tensors) == {"segmenter", "optimiser", "slots"} | (
        {"segmenter_ema"} if "ema" in options else set()
    )
    assert state.tensors["segmenter"]["1.running_mean"].abs().max() > 0
    kept = {name.split("/")[-1] for name in state.tensors["optimiser"]}
    assert kept == ({"momentum_buffer"} if options is SGD else {"step", "exp_avg", "exp_avg_sq"})


@pytest.mark.parametrize("options", [SGD, ADAM, SGD | {"momentum": 0.0}], ids=["sgd", "adam", "no momentum"])
def test_a_restored_run_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Any) -> None:
    def run(first: int, last: int, state: TrainingState | None = None) -> TrainingState:
        job, recorder = trainer(**options), Recorder()
        job.config = LoopConfig(max_steps=last)
        if state is not None:
            saved = Checkpointer(tmp_path, keep=1).save(first, state.tensors, {"scalers": state.scalers})
            job.restore(Checkpoint(saved))
        recorder.watch(job, steps(first), first)
        return recorder.states[-1]

    whole, resumed = run(0, 9), run(4, 9, run(0, 4))
    for stem, tensors in whole.tensors.items():
        assert all(torch.equal(value, resumed.tensors[stem][name]) for name, value in tensors.items()), stem


def test_sgd_is_torchs() -> None:
    """Decay goes into the gradient, and the momentum begins with the first gradient, as DRN's authors train."""
    job, reference = trainer(**SGD), Segmentation(network())
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step, (data,) in zip(range(3), steps(), strict=False):
        job._step(step, [data])
        optimiser.zero_grad()
        reference.loss("segmenter", reference(data, CONTEXT), data, CONTEXT)[0].backward()
        optimiser.step()
    for ours, theirs in zip(job.method.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_triton_is_refused_where_nothing_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="computes instance norm, which these networks have none of: leave it out"):
        use_triton(network(), "true", torch.device("cpu"))


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1e-4}])
def test_impossible_optimisers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"optim.momentum must lie in \[0, 1\) and optim.weight_decay not be negative"):
        OptimConfig(**wrong)


def test_the_recipe_of_drn_is_that_of_its_authors_with_cuts_numbers() -> None:
    recipe = OptimConfig(**{name.removeprefix("optim."): value for name, value in RECIPES["drn-d-22"].items()})
    assert (recipe.global_batch, recipe.total_epochs, recipe.momentum, recipe.weight_decay) == (32, 250, 0.9, 1e-4)
    schedule = Schedule(recipe, source_samples=32)  # a step is an epoch
    assert [schedule.learning_rate(epoch - 1) for epoch in (1, 100, 101, 201, 250)] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-4, 1e-4]
    )
