import itertools

import pytest
import torch

from tests.trainer import drawn
from trainer.draws import Draws, generator


def features(images: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(images, 3, 4, 5, dtype=dtype)


def test_the_same_counter_draws_the_same() -> None:
    one, other = Draws(1, 2), Draws(1, 2)
    slots = torch.tensor([4, 1])
    assert torch.equal(drawn.patch_ids(one, "nce", 8, 100, 20), drawn.patch_ids(other, "nce", 8, 100, 20))
    for a, b in zip(drawn.noise(one, 8, slots, features(2)), drawn.noise(other, 8, slots, features(2)), strict=True):
        assert torch.equal(a, b)
    assert drawn.buffer(one, 3, 50) == drawn.buffer(other, 3, 50)
    assert [drawn.coin(one, "flip"), drawn.choice(one, "robust", 5)] == [
        drawn.coin(other, "flip"),
        drawn.choice(other, "robust", 5),
    ]


def test_no_draw_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    draws = Draws(0, 0)
    (
        drawn.patch_ids(draws, "nce", 0, 9, 4),
        drawn.noise(draws, 0, torch.tensor([0]), features(1)),
        drawn.buffer(draws, 0, 2),
    )
    drawn.coin(draws, "flip"), drawn.choice(draws, "robust", 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "counters", [("seed", [(0, 7), (1, 7)]), ("step", [(7, 0), (7, 1)]), ("swapped", [(1, 2), (2, 1)])]
)
def test_another_seed_or_step_draws_another(counters: tuple[str, list[tuple[int, int]]]) -> None:
    one, other = (Draws(*counter) for counter in counters[1])
    assert not torch.equal(drawn.patch_ids(one, "nce", 8, 100, 20), drawn.patch_ids(other, "nce", 8, 100, 20))
    slots = torch.tensor([0])
    assert not torch.equal(drawn.noise(one, 8, slots, features(1))[0], drawn.noise(other, 8, slots, features(1))[0])
    assert drawn.buffer(one, 0, 50) != drawn.buffer(other, 0, 50)


def test_every_stream_tap_and_slot_has_draws_of_its_own() -> None:
    draws = Draws(0, 0)
    ids = [
        drawn.patch_ids(draws, stream, tap, 1000, 8) for stream in ("nce", "identity", "robust") for tap in (0, 4, 8)
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ids, 2))
    noises = [
        part[i]
        for tap in (0, 4)
        for part in drawn.noise(draws, tap, torch.tensor([0, 1]), features(2))[:1]
        for i in (0, 1)
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(noises, 2))
    assert len({drawn.buffer(draws, slot, 50) for slot in range(20)}) == 20


def test_counters_do_not_run_together() -> None:
    """(1, 23) and (12, 3) are different counters, and so are 1 and "1"."""
    counters = [(1, 23), (12, 3), (123,), ("1", 23)]
    assert len({generator("cpu", *counter).initial_seed() for counter in counters}) == len(counters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_a_slot_does_not_depend_on_the_batch_it_is_in(dtype: torch.dtype) -> None:
    draws = Draws(5, 6)
    whole = drawn.noise(draws, 8, torch.arange(4), features(4, dtype))
    parts = [drawn.noise(draws, 8, torch.tensor(slots), features(len(slots), dtype)) for slots in ([3, 0], [1], [2])]
    for kind in (0, 1):
        assert whole[kind].dtype == dtype
        joined = torch.cat([part[kind] for part in parts])
        assert torch.equal(joined, whole[kind][[3, 0, 1, 2]])


def test_noise_has_the_distributions_it_says() -> None:
    like = torch.empty(2, 16, 40, 40)
    normal, uniform = drawn.noise(Draws(0, 1), 0, torch.arange(2), like)
    assert normal.shape == like.shape and uniform.shape == (2, 1, 40, 40)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


@pytest.mark.parametrize(("positions", "count", "expected"), [(1000, 256, 256), (9, 256, 9)])
def test_patch_ids_are_distinct_places(positions: int, count: int, expected: int) -> None:
    ids = drawn.patch_ids(Draws(0, 0), "nce", 4, positions, count)
    assert ids.dtype == torch.int64 and len(ids) == len(set(ids.tolist())) == expected
    assert ids.min() >= 0 and ids.max() < positions


def test_patch_ids_coins_and_choices_are_fair() -> None:
    steps = [Draws(0, step) for step in range(400)]
    assert 160 < sum(drawn.coin(draws, "flip") for draws in steps) < 240
    counts = torch.bincount(torch.tensor([drawn.choice(draws, "robust", 5) for draws in steps]), minlength=5)
    assert len(counts) == 5 and counts.min() > 50
    places = torch.bincount(torch.cat([drawn.patch_ids(draws, "nce", 0, 16, 4) for draws in steps]), minlength=16)
    assert len(places) == 16 and places.min() > 60  # 100 expected


def test_the_image_buffer_gets_a_draw_and_a_place() -> None:
    pairs = [drawn.buffer(Draws(0, step), 2, 3) for step in range(200)]
    assert all(0 <= uniform < 1 for uniform, _ in pairs) and {place for _, place in pairs} == {0, 1, 2}
    assert 60 < sum(uniform > 0.5 for uniform, _ in pairs) < 140


# ---- pinned: a change of these numbers changes what a continued run draws, so they are part of a checkpoint's format -----

PINNED_IDS = {
    ("nce", 0): [1865, 767, 2086, 3285, 1834],
    ("nce", 16): [1040, 354, 1954, 1969, 3551],
    ("identity", 4): [2111, 4063, 1744, 2569, 2559],
    ("robust", 8): [2457, 1440, 3023, 319, 735],
    ("consistency", 12): [1980, 1919, 1510, 965, 1628],
    ("smoothness", 0): [2854, 4076, 3636, 2053, 2661],
}
PINNED_NOISE = {  # normal and uniform of slots 0 and 5 at one pixel each
    torch.float32: ([[2.6186967, 1.0979654, -1.6928905], [0.8541066, -0.1874710, 0.2527746]], [0.3268597, 0.1711360]),
    torch.float64: ([[0.1655473, -1.1185395, -0.9589536], [-0.6840754, 0.0447953, -1.0697777]], [0.5782915, 0.9049043]),
}


@pytest.mark.parametrize(("stream", "tap"), PINNED_IDS)
def test_patch_ids_are_pinned(stream: str, tap: int) -> None:
    assert drawn.patch_ids(Draws(3, 1000), stream, tap, 4096, 5).tolist() == PINNED_IDS[stream, tap]


def test_coins_choices_and_buffer_draws_are_pinned() -> None:
    assert "".join("HT"[drawn.coin(Draws(3, step), "flip")] for step in range(16)) == "TTTHHHHTTHTTTTTH"
    assert [drawn.choice(Draws(3, step), "robust", 5) for step in range(12)] == [3, 0, 0, 0, 2, 1, 0, 0, 0, 3, 4, 0]
    uniforms, places = zip(*(drawn.buffer(Draws(3, 1000), slot, 50) for slot in range(4)), strict=True)
    assert uniforms == pytest.approx([0.6510693, 0.6318386, 0.7072724, 0.4206530], abs=1e-6)
    assert places == (14, 36, 27, 5)


@pytest.mark.parametrize("dtype", PINNED_NOISE)
def test_noise_is_pinned(dtype: torch.dtype) -> None:
    normal, uniform = drawn.noise(Draws(3, 1000), 8, torch.tensor([0, 5]), torch.empty(2, 3, 4, 4, dtype=dtype))
    expected = PINNED_NOISE[dtype]
    torch.testing.assert_close(normal[:, :, 0, 0], torch.tensor(expected[0], dtype=dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(uniform[:, 0, 3, 3], torch.tensor(expected[1], dtype=dtype), rtol=0, atol=1e-6)


def test_the_start_of_a_network_is_pinned() -> None:
    drawn = torch.rand(2, generator=generator("cpu", 3, "init", "generator")).tolist()
    assert drawn == pytest.approx([0.0071954, 0.3295525], abs=1e-6)
