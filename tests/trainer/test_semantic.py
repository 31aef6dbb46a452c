"""L_sem, masks and balanced target patches: against direct computations, with a segmenter that stays as it is."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from infra.errors import UserError
from launch.runs.training import check_given
from tests.trainer import segmenters
from tests.trainer.small import method_config
from tests.trainer.test_methods import Pairs, Ranks, at, close, make, pairs, play, step_with_coin
from trainer.checkpoint import Checkpoint
from trainer.checkpointer import Checkpointer
from trainer.draws import Draws
from trainer.engines import Engine, EngineConfig
from trainer.losses.semantics import sure_labels
from trainer.methods import Cut
from trainer.methods.base import StepContext
from trainer.methods.parts import semantic
from trainer.methods.parts.semantic import ClassCounts, middles
from trainer.optim import OptimConfig
from trainer.segmentation.jitter import jittered
from trainer.segmentation.trained import weights_hash
from trainer.state import collect_state, restore_state
from trainer.step import train_step

pytestmark = pytest.mark.slow

SEEN = 0.6  # a probability that the untrained network is as sure of in some pixels, and in others not


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A segmenter's."""
    folder = tmp_path_factory.mktemp("segmenter")
    segmenters.save(folder, 1, segmenter=segmenters.network(1))
    return str(folder)


def labelled(count: int = 4, size: int = 32, seed: int = 0) -> Pairs:
    """Pairs whose sources have labels, in blocks, unequally many of them; the last source has none."""
    batch = pairs(count, size, seed)
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randint(segmenters.CLASSES, (count, size // 4, size // 4), generator=draw, dtype=torch.uint8)
    batch.source_labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for image in range(count):
        batch.source_labels[image, : image * size // (count - 1)] = 255
    return batch


def part(batch: Pairs, places: slice) -> Pairs:
    assert batch.source_labels is not None
    return Pairs(batch.source[places], batch.target[places], batch.slots[places], batch.source_labels[places])


def with_segmenter(run: str, name: str = "cut", **options: Any) -> Any:
    return make(name, semantic__segmenter=run, **options)


def scores_of(images: Tensor) -> Tensor:
    """By hand, at the size of the images."""
    small = segmenters.network(1).double()(images)
    return F.interpolate(small, images.shape[2:], mode="bilinear")


def network_of(method: Cut) -> Any:
    """The segmenter as it was trained: `make` multiplies every weight."""
    segmenter: Any = method.get_submodule("source_segmenter")
    segmenter.network.load_state_dict(segmenters.network(1).double().state_dict())
    return method


def slow_loss(images: Tensor, labels: Tensor) -> Tensor:
    """One pixel at a time."""
    log_probabilities, means = scores_of(images).log_softmax(1), []
    for image in range(len(images)):
        places = (labels[image] != 255).nonzero().tolist()
        found = [-log_probabilities[image, int(labels[image, y, x]), y, x] for y, x in places]
        means.append(torch.stack(found).mean() if found else images.sum() * 0)
    return torch.stack(means).mean()


# ---- L_sem --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_loss_and_its_gradient_are_those_of_single_pixels(run: str, strength: float) -> None:
    batch, weight = labelled(3), 2.0
    assert batch.source_labels is not None
    without = play(make("cut"), batch, at())
    method = network_of(with_segmenter(run, semantic__weight=weight, semantic__jitter=strength))
    losses, gradients = play(method, batch, at())
    method = make("cut")
    fake = method(batch, at()).fake
    shown = jittered(fake, batch.slots, strength, at().draws) if strength else fake
    slow = slow_loss(shown, batch.source_labels)
    slow.backward()
    assert float(losses["semantic"]) == pytest.approx(slow.item(), rel=1e-9)
    for name, parameter in method.named_parameters():
        added = gradients[name] - without[1][name]
        expected = torch.zeros_like(added) if parameter.grad is None else weight * parameter.grad
        assert torch.allclose(added, expected, rtol=1e-7, atol=1e-9), name
    assert expected.numel() and gradients.keys() == without[1].keys()  # none of the segmenter


@pytest.mark.parametrize("side", [True, False])
def test_labels_are_mirrored_with_what_the_generator_sees(run: str, side: bool) -> None:
    batch, step = labelled(2), step_with_coin(side)
    method = network_of(with_segmenter(run, "fastcut", semantic__weight=1.0))
    labels = batch.source_labels
    assert labels is not None
    outputs = method(batch, at(step))
    value = method.loss("generator", outputs, batch, at(step))[1]["semantic"]
    own, other = (slow_loss(outputs.fake, each).item() for each in (labels, labels.flip(2)))
    assert value.item() == pytest.approx(other if side else own, rel=1e-9) and own != pytest.approx(other, rel=1e-3)


def test_predicted_labels_are_what_the_segmenter_is_sure_of_in_the_source(run: str) -> None:
    batch, step = pairs(2), step_with_coin(True)
    method = network_of(
        with_segmenter(run, "fastcut", semantic__weight=1.0, semantic__labels="predicted", semantic__sure=SEEN)
    )
    outputs = method(batch, at(step))
    value = method.loss("generator", outputs, batch, at(step))[1]["semantic"]
    likeliest, classes = scores_of(batch.source.flip(3)).softmax(1).max(1)
    labels = torch.where(likeliest < SEEN, 255, classes)
    assert 0.05 < (labels == 255).double().mean() < 0.95
    assert value.item() == pytest.approx(slow_loss(outputs.fake, labels).item(), rel=1e-9)


def test_a_class_is_sure_from_the_threshold_on() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.5, 0.25], [0.4, 0.2, 0.4]])).double().T[None, :, None]
    assert sure_labels(scores, 0.45).tolist() == [[[0, 1, 255]]]


def test_it_begins_at_its_start(run: str) -> None:
    method, batch = with_segmenter(run, semantic__weight=1.0, semantic__start=0.5), labelled(2)
    assert "semantic" not in play(method, batch, at(progress=0.49))[0]
    assert "semantic" in play(method, batch, at(progress=0.5))[0]
    assert method.late_losses() == {"method.semantic.start": 0.5}


def test_it_asks_for_labels_where_it_reads_them_alone(run: str) -> None:
    def view(**options: Any) -> Any:
        return method_config("cut", semantic__segmenter=run, **options).view

    assert view(semantic__weight=1.0).source_labels
    assert not view(semantic__weight=1.0, semantic__labels="predicted").source_labels
    assert view(semantic__mask=True).source_labels
    assert not view(semantic__mask=True, semantic__labels="predicted").source_labels
    assert not view().source_labels and not view(semantic__balance=2.0).source_labels


OPTIONS = [
    {"semantic__weight": 1.0},
    {"semantic__weight": 1.0, "semantic__labels": "predicted", "semantic__sure": SEEN, "semantic__balance": 3.0},
    {"semantic__mask": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_two_ranks_with_unequally_many_labels_have_the_losses_and_gradients_of_one(
    run: str, options: dict[str, Any]
) -> None:
    whole = network_of(with_segmenter(run, **options))
    halves, ranks, batch = [copy.deepcopy(whole) for _ in range(2)], Ranks(), labelled(4)

    def half(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own, context = (
            part(batch, slice(2 * rank, 2 * rank + 2)),
            StepContext(Draws(0, 0), 1.0, lambda rows: ranks.gather(rank, rows)),
        )
        halves[rank].measure([own], context)
        return play(halves[rank], own, context)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(half, range(2)))
    whole.measure([batch], at())
    losses, gradients = play(whole, batch, at())
    close({key: (parts[0][0][key] + parts[1][0][key]) / 2 for key in losses}, losses)
    close({key: (parts[0][1][key] + parts[1][1][key]) / 2 for key in gradients}, gradients)
    for name, value in whole.memory().state_dict().items():
        assert torch.equal(halves[0].memory().state_dict()[name], value) and value.sum() == 4 * 32 * 32


# ---- the segmenter ------------------------------------------------------------------------------------------------------


def single(step: int) -> Pairs:
    batch = labelled(2, seed=step)
    return Pairs(batch.source.float(), batch.target.float(), batch.slots, batch.source_labels)


def steps(method: Cut, count: int, engine: Engine, first: int = 0) -> Iterator[Any]:
    for step in range(first, first + count):
        yield train_step(method, engine, [single(step)], at(step))


def prepared(run: str) -> tuple[Cut, Engine]:
    options = {"semantic__weight": 1.0, "semantic__balance": 2.0, "semantic__segmenter": run, "patches": 8}
    method = method_config("cut", **options).build(seed=0, global_batch=2)
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    engine.prepare(method, OptimConfig(global_batch=2))
    assert isinstance(method, Cut)
    return method, engine


def test_it_stays_as_it_is_in_no_checkpoint_and_a_restored_run_goes_on_bit_for_bit(run: str, tmp_path: Path) -> None:
    whole, engine = prepared(run)
    whole.measure([single(9)], at())
    whole.train()  # batch norm goes by what it has learnt all the same
    list(steps(whole, 2, engine))
    state = collect_state(whole, engine, None, 2)
    assert set(state.tensors) == {"generator", "discriminator", "heads", "class_counts", "optimiser", "slots"}
    path = Checkpointer(tmp_path, keep=1).save(2, state.tensors, {"step": 2, "scalers": {}})
    again, other = prepared(run)
    restore_state(again, other, None, Checkpoint(path))
    one, two = list(steps(whole, 2, engine, 2)), list(steps(again, 2, other, 2))
    assert [{k: v.item() for k, v in row.items()} for row in one] == [
        {k: v.item() for k, v in row.items()} for row in two
    ]
    for method in (whole, again):
        segmenter: Any = method.get_submodule("source_segmenter")
        assert weights_hash(segmenter.network) == weights_hash(segmenters.network(1))
        assert all(parameter.grad is None for parameter in segmenter.parameters())
    assert whole.given() == {"method.semantic.segmenter": weights_hash(segmenters.network(1))}


def test_a_run_goes_on_with_the_same_segmenter_wherever_it_lies_and_with_no_other(run: str, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    segmenters.save(moved, 7, segmenter=segmenters.network(1))
    segmenters.save(other, 1, segmenter=segmenters.network(2))

    def begun_with(path: str) -> Any:
        return SimpleNamespace(
            state={"given": prepared(path)[0].given()}, checkpoint="some", folder=SimpleNamespace(path="r")
        )

    check_given(begun_with(run), prepared(str(moved))[0])
    with pytest.raises(
        UserError, match="the run in r began with another network as --method.semantic.segmenter: give that"
    ):
        check_given(begun_with(run), prepared(str(other))[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": -1.0}, "weight = -1.0 is negative"),
        ({"sure": 1.5}, "sure = 1.5 is a probability"),
        ({"start": 2.0}, "start = 2.0 is a share"),
        ({"balance": 1.0}, "balance = 1.0 is the largest weight: give 0 .without. or more than 1"),
        ({"weight": 1.0}, "needs a segmenter: give method.semantic.segmenter"),
        ({"balance": 2.0}, "needs a segmenter"),
        ({"mask": True}, "needs a segmenter"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"method.semantic.*{words}"):
        method_config("cut", **{f"semantic__{name}": value for name, value in options.items()})


def test_a_segmenter_that_nothing_uses_is_named_in_the_log(run: str) -> None:
    (note,) = with_segmenter(run).notes()
    assert note.startswith("no method.semantic option uses method.semantic.segmenter: give a weight")
    assert with_segmenter(run, semantic__mask=True).notes() == []


def test_a_path_that_is_no_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a run folder nor a checkpoint"):
        prepared(str(tmp_path))
    with pytest.raises(UserError, match="sincut trains on tiles without any: leave out method.semantic"):
        method_config("sincut", semantic__weight=1.0, semantic__segmenter="x")


# ---- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["true", "predicted"])
@pytest.mark.parametrize("side", [True, False])
def test_d_sees_both_where_the_target_has_the_class_of_the_source(run: str, labels: str, side: bool) -> None:
    batch, step = labelled(3), step_with_coin(side)
    options = {"semantic__mask": True, "semantic__labels": labels, "semantic__sure": SEEN}
    method = network_of(with_segmenter(run, "fastcut", **options))
    outputs = method(batch, at(step))
    mirrored, target = (images.flip(3) if side else images for images in (batch.source, batch.target))
    seen = scores_of(target).argmax(1)
    if labels == "true":
        assert batch.source_labels is not None
        classes = batch.source_labels.flip(2) if side else batch.source_labels
    else:
        likeliest, found = scores_of(mirrored).softmax(1).max(1)
        classes = torch.where(likeliest < SEEN, 255, found)
    mask = torch.zeros_like(batch.target)
    for image, y, x in (seen == classes).nonzero().tolist():
        mask[image, :, y, x] = 1
    assert 0.005 < mask.mean() < 0.95
    _, named = method.loss("discriminator", outputs, batch, at(step))
    fake, real = (method.discriminator(images * mask) for images in (outputs.fake, target))
    assert named["D_fake"].item() == pytest.approx(fake.square().mean().item(), rel=1e-9)
    assert named["D_real"].item() == pytest.approx((real - 1).square().mean().item(), rel=1e-9)
    _, named = method.loss("generator", outputs, batch, at(step))
    assert named["G_GAN"].item() == pytest.approx((fake - 1).square().mean().item(), rel=1e-9)


def test_a_step_in_micro_batches_hides_what_a_whole_one_does(run: str) -> None:
    """In micro-batches G's phase has a pass of its own, which D's mask is not known to."""

    def trained(micro_batches: int) -> tuple[dict[str, Tensor], Cut]:
        method, size = network_of(with_segmenter(run, semantic__mask=True)), 4 // micro_batches
        engine, batch = Engine(EngineConfig(device="cpu", precision="fp32")), labelled(4)
        engine.prepare(method, OptimConfig(global_batch=4, accumulation=micro_batches))
        parts = [part(batch, slice(place, place + size)) for place in range(0, 4, size)]
        return train_step(method, engine, parts, at()), method

    (whole, one), (parts, two) = trained(1), trained(2)
    close(parts, whole, 1e-8)
    close(dict(two.named_parameters()), dict(one.named_parameters()), 1e-8)


# ---- balanced patches ---------------------------------------------------------------------------------------------------


def test_the_loss_of_real_patches_is_weighed_by_shares_of_their_classes(run: str) -> None:
    batch, clip = pairs(2), 1.5
    method = network_of(with_segmenter(run, semantic__balance=clip))
    shown = [pairs(2, seed=seed) for seed in (5, 6)]
    for each in shown:
        method.measure([each], at())
    sources, targets = (
        torch.cat([scores_of(getattr(each, name)).argmax(1) for each in shown]) for name in ("source", "target")
    )
    seen, scores = scores_of(batch.target).argmax(1), method.discriminator(batch.target)
    side = scores.shape[2]
    terms, weights = [], []
    for image, y, x in [(i, y, x) for i in range(2) for y in range(side) for x in range(side)]:
        middle = [round(8 * (place - (side - 1) / 2) + 31 / 2) for place in (y, x)]
        this = seen[image, *middle]
        ratio = (sources == this).sum() / (targets == this).sum()
        weights.append(min(max(ratio.item(), 1 / clip), clip))
        terms.append(weights[-1] * (scores[image, 0, y, x] - 1) ** 2)
    assert len(set(weights)) > 2
    named, _ = play(method, batch, at())
    assert named["D_real"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    plain, _ = play(make("cut"), batch, at())
    assert named["D_fake"].item() == plain["D_fake"].item() and named["D_real"].item() != plain["D_real"].item()
    assert method.measured_steps() == semantic.MEASURED // 4


def test_patches_are_weighed_by_what_the_segmenter_sees_without_the_mask(run: str) -> None:
    """A hidden class is still the patch's."""
    batch = labelled(2)
    method = network_of(with_segmenter(run, semantic__balance=1.5, semantic__mask=True))
    method.measure([batch], at())
    outputs = method(batch, at())
    _, named = method.loss("discriminator", outputs, batch, at())
    scores = method.discriminator(outputs.masked(batch.target))
    seen, whole = (
        method.adversary.balance.weights(each, scores) for each in (outputs.masked(batch.target), batch.target)
    )
    assert not torch.equal(seen, whole)
    assert named["D_real"].item() == pytest.approx((whole * (scores - 1) ** 2).mean().item(), rel=1e-9)


def test_shares_that_were_not_counted_weigh_nothing_and_absent_classes_as_much_as_may_be() -> None:
    counts = ClassCounts(4)
    assert counts.ratios().tolist() == [1, 1, 1, 1]
    counts.source += torch.tensor([2, 0, 2, 0])
    counts.target += torch.tensor([1, 3, 0, 0])
    assert counts.ratios().tolist() == [2, 0, float("inf"), 1]


def test_patches_lie_around_the_middle_of_the_image() -> None:
    assert middles(6, 64, 8, torch.device("cpu")).tolist() == [12, 20, 28, 36, 44, 52]
