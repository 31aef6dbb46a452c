import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.order import SampleOrder, augmentation, micro_batch_slots, random_words

SHARD_SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(sizes=SHARD_SIZES, seed=st.integers(-(2**70), 2**70), window=st.integers(1, 12), epoch=st.integers(0, 5))
def test_every_epoch_has_every_sample_once(sizes, seed, window, epoch):
    order = SampleOrder(sizes, seed, "source", window)
    located = [order.locate(epoch * order.samples + i) for i in range(order.samples)]
    assert sorted(located) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@settings(max_examples=40, deadline=None)
@given(sizes=SHARD_SIZES, seed=st.integers(0, 99), window=st.integers(1, 4), positions=st.permutations(range(25)))
def test_a_position_does_not_depend_on_what_was_asked_before(sizes, seed, window, positions):
    used = SampleOrder(sizes, seed, "source", window)
    for position in positions:
        assert used.locate(position) == SampleOrder(sizes, seed, "source", window).locate(position)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4, 8]),
    accumulation=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    seed=st.integers(0, 9),
    resume=st.integers(0, 6),
)
def test_the_sequence_is_the_same_for_any_ranks_accumulation_and_resume_point(
    ranks, accumulation, micro_batch, seed, resume
):
    global_batch, steps = ranks * accumulation * micro_batch, resume + 3
    one = SampleOrder([5, 3, 6], seed, "target", 2)
    expected = [one.locate(p) for p in range(resume * global_batch, steps * global_batch)]
    many = [SampleOrder([5, 3, 6], seed, "target", 2) for _ in range(ranks)]
    seen = []
    for step in range(resume, steps):
        slots = [micro_batch_slots(global_batch, accumulation, rank, ranks) for rank in range(ranks)]
        for m in range(accumulation):
            for rank in range(ranks):
                seen += [many[rank].locate(step * global_batch + slot) for slot in slots[rank][m]]
    assert seen == expected


def test_slots_follow_the_stated_rule():
    assert micro_batch_slots(12, 2, 1, 3) == [range(2, 4), range(8, 10)]


def test_a_global_batch_that_does_not_divide_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="10 does not divide over 2 ranks x 2 micro-batches: make it a multiple of 4"):
        micro_batch_slots(10, 2, 0, 2)


@pytest.mark.parametrize(
    "other", [(1, "source", 0), (0, "target", 0), (0, "source", 1)], ids=["seed", "domain", "epoch"]
)
def test_seeds_domains_and_epochs_have_orders_of_their_own(other):
    def orders(seed, domain, epoch):
        order = SampleOrder([10] * 4, seed, domain, 4)
        return [order.locate(epoch * 40 + i) for i in range(40)]

    assert orders(*other) != orders(0, "source", 0)


def test_the_shuffle_is_uniform_when_the_window_holds_all_shards():
    places = np.zeros((6, 6), int)
    for seed in range(1200):
        order = SampleOrder([2, 3, 1], seed, "source", 3)
        for position in range(6):
            shard, sample = order.locate(position)
            places[position, [0, 2, 5][shard] + sample] += 1
    # 36 cells of Binomial(1200, 1/6): mean 200, standard deviation 12.9.
    assert abs(places - 200).max() < 4.5 * 12.9


def test_windows_mix_their_shards_and_only_theirs():
    order = SampleOrder([50] * 6, 0, "source", 2)
    shards = [order.locate(i)[0] for i in range(300)]
    windows = [set(shards[i : i + 100]) for i in (0, 100, 200)]
    assert [len(window) for window in windows] == [2, 2, 2] and set.union(*windows) == set(range(6))
    changes = sum(a != b for a, b in itertools.pairwise(shards[:100]))
    assert 30 < changes < 70


@pytest.mark.parametrize("position", range(0, 40, 3))
def test_upcoming_shards_are_those_of_this_window_and_the_next(position):
    order = SampleOrder([2] * 5, 0, "source", 2)  # windows of 4, 4 and 2 samples
    starts = [10 * epoch + offset for epoch in range(6) for offset in (0, 4, 8)]
    current = max(i for i, start in enumerate(starts) if start <= position)
    needed = {order.locate(p)[0] for p in range(starts[current], starts[current + 2])}
    assert set(order.upcoming_shards(position)) == needed


def test_a_million_samples_in_four_thousand_shards_cost_a_window_at_a_time():
    order = SampleOrder([250] * 4000, 0, "source", 8)
    begin = time.process_time()
    located = [order.locate(7_000_000 + i) for i in range(4000)]
    assert len(set(located)) == 4000 and time.process_time() - begin < 2.0
    assert len(order._windows) <= 4 and len(order._epochs) <= 2


def test_crops_are_uniform_over_every_place_and_flips_are_even():
    draws = [augmentation(3, "source", p, (10, 9), (8, 8)) for p in range(6000)]
    counts = Counter((x, y) for x, y, _ in draws)
    assert set(counts) == {(x, y) for x in range(3) for y in range(2)}
    assert max(abs(count - 1000) for count in counts.values()) < 4.5 * 29  # Binomial(6000, 1/6)
    assert abs(sum(flip for *_, flip in draws) - 3000) < 4.5 * 39


def test_without_flips_the_crops_stay_the_same():
    for position in range(50):
        x, y, _ = augmentation(1, "target", position, (64, 48), (16, 16))
        assert augmentation(1, "target", position, (64, 48), (16, 16), flip=False) == (x, y, False)


def test_a_crop_of_the_images_size_has_one_place():
    assert {augmentation(0, "source", p, (8, 8), (8, 8))[:2] for p in range(20)} == {(0, 0)}


def test_draws_are_pinned():
    """A change of these numbers changes every run: they are part of the format of a checkpoint."""
    assert random_words(0, "samples/source", (1, 2), 2).tolist() == [6520122762103897241, 4217574959952632123]
    order = SampleOrder([3, 2, 4], 7, "source", 2)
    expected = [(2, 2), (1, 0), (2, 3), (2, 0), (1, 1), (2, 1), (0, 1), (0, 2), (0, 0)]
    assert [order.locate(p) for p in range(9)] == expected
    assert augmentation(7, "source", 2**40, (512, 400), (256, 256)) == (152, 57, False)
