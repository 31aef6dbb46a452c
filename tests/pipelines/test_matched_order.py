"""Training on matched crops: what a position shows, the same for any ranks and restarts."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.storage import LocalStorage
from infra.views import CropWithBox
from pipelines.config import DataConfig
from pipelines.cuts import Cut
from pipelines.loader import Batch, Loader
from pipelines.manifest import load_manifest
from pipelines.matching.lattice import Lattice
from pipelines.matching.make import MatchOptions, make_match
from pipelines.matching.match import file_of, image_weights, load_match
from tests.mutations import mutations
from tests.pipelines.shardmaker import write_root
from tests.pipelines.whole_batches import same, whole_batches

SIZE, CROP, IMAGES = (48, 32), 16, {"source": (4, 3, 4), "target": (3, 4)}
GLOBAL_BATCH = 64
CONFIG = DataConfig(crop=CROP, threads=1, window=2, decoder="pillow", prefetch=1, match="labels")
CPU = torch.device("cpu")
has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage = LocalStorage(tmp_path_factory.mktemp("data"))
    write_root(storage, **IMAGES, size=SIZE, format="png")
    for by in ("labels", "thumbnail"):
        make_match(storage.url, MatchOptions(by=by, name=by, crop=CROP, k=4), progress=False)
    return storage.url


def loader(root: str, config: DataConfig = CONFIG, **options: Any) -> Loader:
    given: dict[str, Any] = {"seed": 3, "global_batch": GLOBAL_BATCH, "device": CPU} | options
    return Loader(root, config, **given)


def planned(
    root: str, positions: range, config: DataConfig = CONFIG, **options: Any
) -> list[list[tuple[int, int, Cut]]]:
    """(shard, sample, cut) of source and target at each position."""
    made = loader(root, config, **options)
    try:
        return [[domain.planned(position) for domain in made._domains] for position in positions]
    finally:
        made.close()


def batches(root: str, first_step: int, steps: int, ranks: int, **options: Any) -> list[Batch]:
    return whole_batches(
        (loader(root, rank=rank, world_size=ranks, first_step=first_step, **options) for rank in range(ranks)), steps
    )


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_many_ranks_and_any_resume_point_give_the_batches_of_one(root: str, ranks: int) -> None:
    whole = batches(root, 0, 4, 1)
    assert same(batches(root, 2, 2, ranks), whole[2:])
    assert whole[0].target_keys != batches(root, 0, 1, 1, config=dataclasses.replace(CONFIG, match=None))[0].target_keys


def drawn_by_ranks(
    root: str, steps: range, global_batch: int, ranks: int, accumulation: int = 1, seed: int = 3
) -> dict[int, list[tuple[int, int, Cut]]]:
    """(shard, sample, cut) of source and target, by position, as all ranks of a run take them in these steps."""
    found: dict[int, list[tuple[int, int, Cut]]] = {}
    for rank in range(ranks):
        made = loader(
            root, global_batch=global_batch, accumulation=accumulation, rank=rank, world_size=ranks, first_step=steps.start,
            seed=seed,
        )  # fmt: skip
        own = [step * global_batch + slot for step in steps for part in made._slots for slot in part]
        assert not found.keys() & set(own)
        found |= {position: [domain.planned(position) for domain in made._domains] for position in own}
        made.close()
    return found


@pytest.mark.parametrize("resume", [0, 1, 5, 10**9])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64])
def test_targets_are_the_same_for_any_ranks_accumulation_and_resume_point(
    root: str, ranks: int, accumulation: int, resume: int
) -> None:
    batch = 192 * accumulation
    run = drawn_by_ranks(root, range(resume, resume + 2), batch, ranks, accumulation)
    positions = range(resume * batch, (resume + 2) * batch)
    assert [run[position] for position in positions] == planned(root, positions) and len(run) == len(positions)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2]), st.integers(1, 3)),
        min_size=2,
        max_size=3,
    ),
    seed=st.integers(0, 2**40),
)
def test_restarts_on_other_ranks_repeat_and_drop_no_pair(
    root: str, parts: list[tuple[int, int, int]], seed: int
) -> None:
    """parts: (ranks, accumulation, steps) between one restart and the next."""
    run: dict[int, list[tuple[int, int, Cut]]] = {}
    step = 0
    for ranks, accumulation, steps in parts:
        more = drawn_by_ranks(root, range(step, step + steps), 24, ranks, accumulation, seed)
        assert not more.keys() & run.keys()
        run, step = run | more, step + steps
    assert [run[position] for position in range(step * 24)] == planned(root, range(step * 24), seed=seed)


def test_the_source_is_what_it_is_without_a_match(root: str) -> None:
    plain = dataclasses.replace(CONFIG, match=None)
    assert [pair[0] for pair in planned(root, range(100))] == [pair[0] for pair in planned(root, range(100), plain)]


def test_a_target_is_a_candidate_of_the_source_at_its_place_moved_and_mirrored_as_that_is(root: str) -> None:
    storage, lattice = LocalStorage(Path(root)), Lattice(SIZE, (CROP, CROP))
    codes = load_match(storage, load_manifest(storage), "labels").codes
    starts = {domain: np.cumsum((0, *sizes)) for domain, sizes in IMAGES.items()}
    room = [whole - CROP for whole in SIZE]
    kinds = set()
    for (shard, sample, source), (target_shard, target_sample, target) in planned(root, range(300)):
        cell = lattice.nearest(source.x, source.y)
        place = lattice.place(cell)
        listed = []
        for code in codes[(starts["source"][shard] + sample) * lattice.cells + cell]:
            image, target_cell = divmod(code // 2, lattice.cells)
            x, y = lattice.place(target_cell)
            x += (-1 if code % 2 else 1) * (source.x - place[0])
            y += source.y - place[1]
            inside = min(max(0, x), room[0]), min(max(0, y), room[1])
            listed.append((image, *inside, source.flip ^ bool(code % 2)))
            kinds.add((source.flip, bool(code % 2)))
        assert (starts["target"][target_shard] + target_sample, target.x, target.y, target.flip) in listed
    assert len(kinds) == 4


def test_a_box_is_drawn_as_without_a_match(root: str) -> None:
    view = CropWithBox(side=4)
    plain = dataclasses.replace(CONFIG, match=None)
    with_match, without = (planned(root, range(50), config, view=view) for config in (CONFIG, plain))
    assert [pair[1][2].box for pair in with_match] == [pair[1][2].box for pair in without]


def test_candidates_of_seldom_listed_images_are_drawn_more_often(root: str) -> None:
    """Of two images, one is listed three times as often: it is drawn a third as often where both are candidates."""
    storage, lattice = LocalStorage(Path(root)), Lattice(SIZE, (CROP, CROP))
    codes, images = load_match(storage, load_manifest(storage), "labels").codes, sum(IMAGES["target"])
    assert image_weights(np.array([[0, 2], [4, 6 * lattice.cells]]), lattice.cells, images)[:4].tolist() == [
        1 / 3,
        1,
        1,
        1,
    ]
    weights = image_weights(codes, lattice.cells, images)
    starts = {domain: np.cumsum((0, *sizes)) for domain, sizes in IMAGES.items()}
    expected, spread, counted, positions = np.zeros(images), np.zeros(images), np.zeros(images), 3000
    for (shard, sample, cut), (target_shard, target_sample, _) in planned(root, range(positions)):
        own = codes[(starts["source"][shard] + sample) * lattice.cells + lattice.nearest(cut.x, cut.y)]
        chances = np.bincount(own // (2 * lattice.cells), weights[own // (2 * lattice.cells)], images)
        chances = chances / chances.sum()
        expected += chances
        spread += chances * (1 - chances)
        counted[starts["target"][target_shard] + target_sample] += 1
    assert (abs(counted - expected) < 4.5 * np.sqrt(spread)).all() and weights.max() > 1.2 * weights.min()


def test_a_sample_that_cannot_be_had_is_replaced_by_the_other_candidates_and_then_by_any_target(root: str) -> None:
    made = loader(root)
    target = made._domains[1]
    for position in range(20):
        tried = [target.planned(position, attempt) for attempt in range(30)]
        assert tried == [target.planned(position, attempt) for attempt in range(30)]
        assert len({(shard, sample, cut.x, cut.y, cut.flip) for shard, sample, cut in tried[:4]}) == 4
        assert len({plan[:2] for plan in tried[4:]}) > 3
        assert target.pick(position, 2).name.endswith(f"{target._split.shards[tried[2][0]].name}")
    made.close()


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_dali_gives_what_pillow_gives(root: str) -> None:
    pillow, dali = (
        batches(root, 0, 2, 1, config=dataclasses.replace(CONFIG, decoder=kind)) for kind in ("pillow", "dali")
    )
    assert same(pillow, dali)


def test_shards_that_positions_ahead_need_are_fetched_in_the_order_of_need(root: str) -> None:
    made = loader(root)
    target = made._domains[1]
    for position in range(0, 60, 7):
        first = target.planned(position)[0]
        assert [shard.name for shard in target.upcoming(position)] == [
            f"train/target/{number:06d}.tar" for number in (first, 1 - first)
        ]
    made.close()


def test_a_mutated_match_is_refused_or_the_same_match(root: str, tmp_path: Path) -> None:
    shutil.copytree(root.removeprefix("file://"), tmp_path / "data")
    storage = LocalStorage(tmp_path / "data")
    manifest, file = load_manifest(storage), file_of("labels", "json")
    whole, refused = load_match(storage, manifest, "labels"), 0
    for mutated in mutations(storage.read(file), 1000):
        (tmp_path / "data" / file).write_bytes(mutated)
        try:
            found = load_match(storage, manifest, "labels")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:  # another crop is refused by the training, whose own it is not
            assert np.array_equal(found.codes, whole.codes)
            if found.facts.shares:
                found.facts.mismatch()
    assert refused > 500
