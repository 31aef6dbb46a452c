"""The order of the samples: complete, the same for any ranks and restarts, and well shuffled."""

import importlib.util
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.storage import LocalStorage
from pipelines.config import DataConfig
from pipelines.cuts import augmentation
from pipelines.loader import Batch, Loader
from pipelines.manifest import DOMAINS, MANIFEST, Manifest
from pipelines.order import SampleOrder, micro_batch_slots, random_words
from tests.pipelines.shardmaker import write_split
from tests.pipelines.whole_batches import same, whole_batches

pytestmark = pytest.mark.slow

SHARD_SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9)
PROVED = settings(max_examples=40, deadline=None, derandomize=True)
RANKS = (1, 2, 3, 4, 8, 64)
DIVIDES = 192  # a global batch for each of these numbers of ranks
has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")


# By position: each domain's sample, as (shard, place in it), and its crop and flip.
Drawn = dict[int, list[tuple[tuple[int, int], tuple[int, int, bool]]]]


def drawn(sizes: dict[str, list[int]], positions: Iterable[int], seed: int = 0, window: int = 2) -> Drawn:
    """What a run takes at these positions."""
    orders = {domain: SampleOrder(sizes[domain], seed, domain, window) for domain in DOMAINS}
    return {
        position: [
            (orders[domain].locate(position), augmentation(seed, domain, position, (48, 32), (16, 16)))
            for domain in DOMAINS
        ]
        for position in positions
    }


def drawn_by_ranks(
    sizes: dict[str, list[int]],
    steps: Iterable[int],
    global_batch: int,
    ranks: int,
    accumulation: int = 1,
    **options: Any,
) -> Drawn:
    """The same of all ranks of a run in these steps, each of which knows only its own slots."""
    whole: Drawn = {}
    for rank in range(ranks):
        slots = [slot for part in micro_batch_slots(global_batch, accumulation, rank, ranks) for slot in part]
        own = drawn(sizes, [step * global_batch + slot for step in steps for slot in slots], **options)
        assert not own.keys() & whole.keys()
        whole |= own
    return whole


@PROVED
@given(sizes=SHARD_SIZES, seed=st.integers(-(2**70), 2**70), window=st.integers(1, 12), epoch=st.integers(0, 5))
def test_every_epoch_has_every_sample_once(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = SampleOrder(sizes, seed, "source", window)
    located = [order.locate(epoch * order.samples + i) for i in range(order.samples)]
    assert sorted(located) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@PROVED
@given(sizes=SHARD_SIZES, seed=st.integers(0, 99), window=st.integers(1, 4), positions=st.permutations(range(25)))
def test_a_position_does_not_depend_on_what_was_asked_before(
    sizes: list[int], seed: int, window: int, positions: list[int]
) -> None:
    used = SampleOrder(sizes, seed, "source", window)
    for position in positions:
        assert used.locate(position) == SampleOrder(sizes, seed, "source", window).locate(position)


@PROVED
@given(
    source=SHARD_SIZES,
    target=SHARD_SIZES,
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    accumulation=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_the_ranks_together_see_every_sample_of_an_epoch_once(
    source: list[int],
    target: list[int],
    ranks: int,
    accumulation: int,
    micro_batch: int,
    seed: int,
    window: int,
    epoch: int,
) -> None:
    sizes, global_batch = {"source": source, "target": target}, ranks * accumulation * micro_batch
    for domain in DOMAINS:
        begin, end = epoch * sum(sizes[domain]), (epoch + 1) * sum(sizes[domain])
        steps = range(begin // global_batch, -(-end // global_batch))  # of which the ends may hold other epochs too
        run = drawn_by_ranks(sizes, steps, global_batch, ranks, accumulation, seed=seed, window=window)
        seen = sorted(run[position][DOMAINS.index(domain)][0] for position in range(begin, end))
        assert seen == [(shard, i) for shard, size in enumerate(sizes[domain]) for i in range(size)]


@pytest.mark.parametrize("resume", [0, 1, 5, 10**9])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_samples_pairs_crops_and_flips_are_the_same_for_any_ranks_and_resume_point(
    ranks: int, accumulation: int, resume: int
) -> None:
    sizes, global_batch = {"source": [40, 7, 90, 63], "target": [30, 20]}, DIVIDES * accumulation
    run = drawn_by_ranks(sizes, range(resume, resume + 2), global_batch, ranks, accumulation)
    assert run == drawn(sizes, range(resume * global_batch, (resume + 2) * global_batch))


@PROVED
@given(
    source=SHARD_SIZES,
    target=SHARD_SIZES,
    parts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2]), st.integers(1, 3)),
        min_size=2,
        max_size=3,
    ),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 4),
)
def test_restarts_on_other_ranks_repeat_and_drop_nothing(
    source: list[int], target: list[int], parts: list[tuple[int, int, int]], seed: int, window: int
) -> None:
    """parts: (ranks, accumulation, steps) between one restart and the next."""
    sizes, options, step = {"source": source, "target": target}, {"seed": seed, "window": window}, 0
    run: Drawn = {}
    for ranks, accumulation, steps in parts:
        more = drawn_by_ranks(sizes, range(step, step + steps), 24, ranks, accumulation, **options)
        assert not more.keys() & run.keys()
        run, step = run | more, step + steps
    assert run == drawn(sizes, range(step * 24), **options)


def test_a_source_image_meets_another_target_in_every_epoch() -> None:
    run = drawn({"source": [50] * 4, "target": [50] * 4}, range(400), window=4)
    partners = [
        dict((run[position][0][0], run[position][1][0]) for position in epoch)
        for epoch in (range(200), range(200, 400))
    ]
    assert sum(partners[0][source] == partners[1][source] for source in partners[0]) < 8  # expected: 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """500 source and 130 target images of 16x16 pixels."""
    storage = LocalStorage(tmp_path_factory.mktemp("data"))
    sizes = {"source": (100, 90, 110, 100, 100), "target": (60, 70)}
    splits = {
        f"train/{domain}": write_split(storage, f"train/{domain}", sizes[domain], (16, 16), labelled=False)
        for domain in DOMAINS
    }
    storage.write(MANIFEST, Manifest(splits).to_json().encode())
    return storage.url


CONFIG = DataConfig(crop=8, threads=1, window=2, decoder="pillow", prefetch=1)


def load(
    root: str, first_step: int, steps: int, ranks: int = 1, config: DataConfig = CONFIG, global_batch: int = DIVIDES
) -> list[Batch]:
    """Per step, the global batch as the loaders of all ranks give it, in the order of its slots."""
    options: dict[str, Any] = {
        "seed": 3,
        "global_batch": global_batch,
        "device": torch.device("cpu"),
        "first_step": first_step,
    }
    return whole_batches((Loader(root, config, rank=rank, world_size=ranks, **options) for rank in range(ranks)), steps)


@pytest.fixture(scope="module")
def expected(root: str) -> list[Batch]:
    return load(root, 0, 4)


@pytest.mark.parametrize("ranks", [3, 8, 64])
def test_loaders_of_many_ranks_give_the_batches_of_one(root: str, expected: list[Batch], ranks: int) -> None:
    assert expected[0].slots.tolist() == list(range(DIVIDES))
    assert same(load(root, 1, 2, ranks), expected[1:3])


def test_a_run_that_changes_its_ranks_within_an_epoch_sees_every_image_once(root: str, expected: list[Batch]) -> None:
    run = load(root, 0, 1, 3) + load(root, 1, 1, 8) + load(root, 2, 2, 2)
    assert same(run, expected)
    keys = [key for batch in run for key in batch.source_keys]
    assert len(set(keys[:500])) == 500 and len(set(keys[500:])) == 4 * DIVIDES - 500


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 4), (4, 1), (3, 3)])
@pytest.mark.parametrize(
    "decoder", ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))]
)
def test_decoding_threads_and_prefetch_change_nothing(root: str, decoder: str, threads: int, prefetch: int) -> None:
    few = load(root, 0, 6, config=replace(CONFIG, decoder=decoder), global_batch=12)
    more = replace(CONFIG, decoder=decoder, threads=threads, prefetch=prefetch)
    assert same(load(root, 0, 6, config=more, global_batch=12), few)


def test_slots_follow_the_stated_rule() -> None:
    assert micro_batch_slots(12, 2, 1, 3) == [range(2, 4), range(8, 10)]


def test_a_global_batch_that_does_not_divide_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match="10 does not divide over 2 ranks x 2 micro-batches: make it a multiple of 4"):
        micro_batch_slots(10, 2, 0, 2)


@pytest.mark.parametrize("sizes", [[40], [1] * 40], ids=["of samples", "of shards"])
@pytest.mark.parametrize(
    "other", [(1, "source", 0), (0, "target", 0), (0, "source", 1)], ids=["seed", "domain", "epoch"]
)
def test_seeds_domains_and_epochs_have_orders_of_their_own(other: tuple[int, str, int], sizes: list[int]) -> None:
    def orders(seed: int, domain: str, epoch: int) -> list[tuple[int, int]]:
        order = SampleOrder(sizes, seed, domain, 1)
        return [order.locate(epoch * 40 + i) for i in range(40)]

    assert orders(*other) != orders(0, "source", 0)


def test_the_shuffle_is_uniform_when_the_window_holds_all_shards() -> None:
    places = np.zeros((6, 6), int)
    for seed in range(1200):
        order = SampleOrder([2, 3, 1], seed, "source", 3)
        for position in range(6):
            shard, sample = order.locate(position)
            places[position, [0, 2, 5][shard] + sample] += 1
    # 36 cells of Binomial(1200, 1/6): mean 200, standard deviation 12.9.
    assert abs(places - 200).max() < 4.5 * 12.9


def test_windows_mix_their_shards_and_only_theirs() -> None:
    order = SampleOrder([50] * 6, 0, "source", 2)
    shards = [order.locate(i)[0] for i in range(300)]
    windows = [set(shards[i : i + 100]) for i in (0, 100, 200)]
    assert [len(window) for window in windows] == [2, 2, 2] and set.union(*windows) == set(range(6))
    changes = sum(a != b for a, b in itertools.pairwise(shards[:100]))
    assert 30 < changes < 70


@pytest.mark.parametrize("position", range(0, 40, 3))
def test_upcoming_shards_are_those_of_this_window_and_the_next(position: int) -> None:
    order = SampleOrder([2] * 5, 0, "source", 2)  # windows of 4, 4 and 2 samples
    starts = [10 * epoch + offset for epoch in range(6) for offset in (0, 4, 8)]
    current = max(i for i, start in enumerate(starts) if start <= position)
    needed = {order.locate(p)[0] for p in range(starts[current], starts[current + 2])}
    assert set(order.upcoming_shards(position)) == needed


def shuffling(order: np.ndarray, shard: np.ndarray) -> dict[str, float]:
    """How well an epoch is shuffled.

    order: int64 (N,), the place in storage of the sample at each position of the epoch. shard: int64 (N,), its shard.
    """
    position = np.argsort(order)  # of each sample, in storage order
    by_shard = np.argsort(shard, kind="stable")  # positions, those of one shard together and ascending
    gaps = np.diff(by_shard)[np.diff(shard[by_shard]) == 0]
    apart = np.diff(position)[np.diff(shard[position]) == 0]
    return {
        "rank correlation with storage": float(np.corrcoef(order, np.arange(len(order)))[0, 1]),
        "next sample from the same shard": float((np.diff(shard) == 0).mean()),
        "positions to the next of the same shard": float(gaps.mean()),
        "next sample is a neighbour in storage": float((abs(np.diff(order)) == 1).mean()),
        "positions between neighbours of one shard": float(abs(apart).mean()),
    }


@pytest.mark.parametrize("window", [1, 8, 64, 98])
def test_shuffling_quality_is_that_of_uniform_shuffles_within_windows(window: int) -> None:
    """At the size of GTA5. `pytest -rP` prints the figures of docs/data.md."""
    sizes, epochs = np.array([256] * 97 + [168]), 4
    starts = np.cumsum(sizes) - sizes
    samples, order = int(sizes.sum()), SampleOrder(sizes.tolist(), 0, "source", window)
    located = np.array([order.locate(p) for p in range(epochs * samples)]).reshape(epochs, samples, 2)
    all_figures = [shuffling(starts[shard] + place, shard) for shard, place in located.transpose(0, 2, 1)]
    figures = {name: np.mean([abs(one[name]) for one in all_figures]) for name in all_figures[0]}
    print(f"window {window}:", ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))

    windows = [window] * (98 // window) + [98 % window] * (98 % window > 0)  # shards in each
    mates = np.average(windows, weights=windows)  # shards in the window of a sample, on average
    correlation, same_shard, gap, neighbours, apart = figures.values()
    # Over windows, shards move as one: the correlation is as uncertain as that of 98 numbers.
    assert correlation < 4.5 / np.sqrt(samples if window == 98 else 97)
    assert same_shard == pytest.approx(len(windows) / 98, rel=0.1)
    assert gap == pytest.approx(mates, rel=0.1)
    assert neighbours < 2 * (2 * len(windows) / samples)  # two pairs per window are expected
    assert apart == pytest.approx(256 * mates / 3, rel=0.1)


def test_the_orders_of_two_epochs_have_nothing_in_common() -> None:
    order = SampleOrder([100] * 20, 0, "source", 8)
    starts = 100 * np.arange(20)
    epochs = np.array([starts[shard] + place for shard, place in map(order.locate, range(4000))]).reshape(2, 2000)
    one, other = (np.argsort(epoch) for epoch in epochs)
    assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(19)


def test_crops_are_uniform_over_every_place_and_flips_are_even() -> None:
    draws = [augmentation(3, "source", p, (10, 9), (8, 8)) for p in range(6000)]
    counts = Counter((x, y) for x, y, _ in draws)
    assert set(counts) == {(x, y) for x in range(3) for y in range(2)}
    assert max(abs(count - 1000) for count in counts.values()) < 4.5 * 29  # Binomial(6000, 1/6)
    assert abs(sum(flip for *_, flip in draws) - 3000) < 4.5 * 39


def test_without_flips_the_crops_stay_the_same() -> None:
    for position in range(50):
        x, y, _ = augmentation(1, "target", position, (64, 48), (16, 16))
        assert augmentation(1, "target", position, (64, 48), (16, 16), flip=False) == (x, y, False)


def test_a_crop_of_the_images_size_has_one_place() -> None:
    assert {augmentation(0, "source", p, (8, 8), (8, 8))[:2] for p in range(20)} == {(0, 0)}


PINNED = {  # by domain: two words; the samples of the first epoch and of the second; replacements; crops and flips
    "source": (
        [6520122762103897241, 4217574959952632123],
        [(2, 2), (1, 0), (2, 3), (2, 0), (1, 1), (2, 1), (0, 1), (0, 2), (0, 0)],
        [(2, 0), (0, 2), (0, 0), (2, 2), (0, 1), (2, 3), (2, 1), (1, 0), (1, 1)],
        [(1, 0), (2, 1), (0, 1), (0, 0)],
        [(0, 93, True), (86, 41, False), (152, 57, False)],
    ),
    "target": (
        [8797414254035909297, 9081197381511897436],
        [(0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (2, 2), (2, 3), (2, 0), (2, 1)],
        [(2, 0), (2, 3), (1, 1), (1, 0), (2, 1), (2, 2), (0, 0), (0, 1), (0, 2)],
        [(0, 2), (2, 3), (2, 1), (2, 2)],
        [(161, 143, True), (45, 67, False), (149, 93, False)],
    ),
}


@pytest.mark.parametrize("domain", PINNED)
def test_draws_are_pinned(domain: str) -> None:
    """A change of these numbers changes every run: they are part of the format of a checkpoint."""
    words, first, second, replacements, cuts = PINNED[domain]
    assert random_words(0, f"samples/{domain}", (1, 2), 2).tolist() == words
    order = SampleOrder([3, 2, 4], 7, domain, 2)
    assert [order.locate(p) for p in range(18)] == first + second
    assert [order.replacement(4, attempt) for attempt in (1, 2, 3, 10)] == replacements
    assert [augmentation(7, domain, p, (512, 400), (256, 256)) for p in (0, 1, 2**40)] == cuts
