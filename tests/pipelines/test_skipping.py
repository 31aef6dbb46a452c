"""Samples and shards that are skipped: others take their places, and nothing else changes."""

import dataclasses
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage
from infra.views import LabelledCrop
from pipelines.cache import UnusableShard
from pipelines.config import DataConfig
from pipelines.decode import DaliDecoder, PillowDecoder, Undecodable
from pipelines.health import DataHealth
from pipelines.loader import Loader
from pipelines.manifest import MANIFEST, Manifest, Split
from pipelines.matching.make import MatchOptions, make_match
from pipelines.order import SampleOrder
from pipelines.shards import LABEL_SPACE, Sample, build_tar, write_shard
from tests.pipelines.shardmaker import break_samples, write_root

pytestmark = pytest.mark.slow

has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
kinds = pytest.mark.parametrize(
    "kind", ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))]
)
CONFIG = DataConfig(
    crop=16, threads=1, window=2, decoder="pillow", prefetch=2, on_bad_sample="skip", on_bad_shard="skip"
)
STEPS = 9  # of 4 pairs: three epochs of the 11 sources, five of the 7 targets
Seen = dict[tuple[str, int], tuple[str, bytes]]  # (domain, position): (key, pixels)


def read(root: Path, config: DataConfig = CONFIG, **options: Any) -> tuple[Seen, DataHealth]:
    """What a rank gets at its positions until step 9, and the health of its data."""
    given: dict[str, Any] = {"seed": 5, "global_batch": 4, "device": torch.device("cpu"), "first_step": 0} | options
    loader = Loader(str(root), config, **given)
    seen: Seen = {}
    try:
        for step, batches in enumerate(islice(loader, STEPS - given["first_step"]), given["first_step"]):
            for batch in batches:
                for domain in ("source", "target"):
                    images, keys = getattr(batch, domain), getattr(batch, f"{domain}_keys")
                    for slot, key, image in zip(batch.slots.tolist(), keys, images, strict=True):
                        seen[domain, 4 * step + slot] = key, image.numpy().tobytes()
    finally:
        loader.close()
    return seen, loader.health


def same_for_ranks_and_resume_points(root: Path, whole: Seen, config: DataConfig = CONFIG) -> None:
    for options in ({"world_size": 2}, {"world_size": 2, "accumulation": 2}, {"first_step": 4}):
        parts = [read(root, config, rank=rank, **options)[0] for rank in range(options.get("world_size", 1))]
        first = 4 * options.get("first_step", 0)
        expected = {place: sample for place, sample in whole.items() if place[1] >= first}
        assert {place: sample for part in parts for place, sample in part.items()} == expected


@kinds
def test_broken_images_are_replaced_and_no_other_position_changes(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, decoder=kind)
    write_root(LocalStorage(tmp_path))
    intact, health = read(tmp_path, config)
    assert not any(health.metrics().values())
    broken = {"source_000001", "source_000006", "target_000004"}
    break_samples(tmp_path, *broken)

    whole, health = read(tmp_path, config)
    assert health.bad_samples.keys() == {
        "source_000001 in train/source/000000.tar",
        "source_000006 in train/source/000001.tar",
        "target_000004 in train/target/000001.tar",
    }
    assert all("cannot be decoded" in reason for reason in health.bad_samples.values())
    assert whole.keys() == intact.keys()
    for place, (key, pixels) in intact.items():
        if key in broken:
            assert whole[place][0] not in broken and whole[place][0].startswith(place[0])
        else:
            assert whole[place] == (key, pixels)
    same_for_ranks_and_resume_points(tmp_path, whole, config)


@kinds
def test_an_image_that_failed_costs_only_batches_begun_by_then(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_root(LocalStorage(tmp_path))
    break_samples(tmp_path, "source_000001")
    lost = []
    decoder: type[Any] = {"dali": DaliDecoder, "pillow": PillowDecoder}[kind]
    original = decoder._finish

    def watched(self: Any, crops: Sequence[Any], pixels: Callable[[], torch.Tensor]) -> torch.Tensor:
        try:
            return original(self, crops, pixels)
        except Undecodable:
            lost.append(len(crops))
            raise

    monkeypatch.setattr(decoder, "_finish", watched)
    read(tmp_path, dataclasses.replace(CONFIG, decoder=kind))
    # Two steps are decoded together, and the next two had begun when they failed; alone in the epochs after that.
    assert lost[0] == 16 and lost[1] in (1, 16) and set(lost[2:]) == {1}


@kinds
def test_a_small_image_is_replaced_only_where_it_is_too_small_for_its_crop(kind: str, tmp_path: Path) -> None:
    """Whether a run has seen it fail before must not show: one that is resumed later has not."""
    draw = np.random.default_rng(0)
    sizes = [(48, 32), (40, 32), (48, 32)]
    samples = [
        Sample(f"s{n}", Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), np.uint8)), None)
        for n, size in enumerate(sizes)
    ]
    storage = LocalStorage(tmp_path)
    splits = {}
    for name in ("train/source", "train/target"):
        shards = (write_shard(storage, f"{name}/000000.tar", build_tar(samples, "png")).shard,)
        splits[name] = Split(shards, (48, 32))
    storage.write(MANIFEST, Manifest(splits).to_json().encode())

    config = dataclasses.replace(CONFIG, decoder=kind, crop=30)
    whole, health = read(tmp_path, config)
    assert {name.split()[0] for name in health.bad_samples} == {"s1"}
    used = [place for place, (key, _) in whole.items() if key == "s1"]
    assert 0 < len(used) < 20 and any(position >= 20 for _, position in used)  # a third of 72 are in turn
    same_for_ranks_and_resume_points(tmp_path, whole, config)


@pytest.mark.parametrize(
    ("damage", "domain", "match"),
    [
        ("missing", "source", None),
        ("cut", "source", None),
        ("missing", "source", "labels"),
        ("missing", "target", "labels"),
    ],
)
def test_a_shard_is_skipped_and_no_other_position_changes(
    damage: str, domain: str, match: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_root(LocalStorage(tmp_path))
    config = dataclasses.replace(CONFIG, match=match)
    make_match(str(tmp_path), MatchOptions(by="labels", name="labels", crop=config.crop, k=4), progress=False)
    intact, _ = read(tmp_path, config)
    shard = tmp_path / f"train/{domain}/000001.tar"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(data[:-100])
    with pytest.raises(UnusableShard, match=f"{shard} is (missing|damaged)"):
        read(tmp_path, dataclasses.replace(config, on_bad_shard="fail"))

    lost = {f"{domain}_{n:06d}" for n in ((4, 5, 6) if domain == "source" else (3, 4, 5, 6))}
    assert lost < {key for key, _ in intact.values()}
    with caplog.at_level(logging.WARNING):
        whole, health = read(tmp_path, config)
    assert health.bad_shards.keys() == {f"train/{domain}/000001.tar"} and not health.bad_samples
    assert len([record for record in caplog.records if f"train/{domain}/000001.tar" in record.getMessage()]) == 1
    assert whole.keys() == intact.keys()
    for place, (key, pixels) in intact.items():
        assert whole[place][0] not in lost if key in lost else whole[place] == (key, pixels)
    same_for_ranks_and_resume_points(tmp_path, whole, config)


def test_a_shard_that_is_not_fetched_is_skipped_in_a_run_from_s3(s3_server: Any, tmp_path: Path) -> None:
    storage = S3Storage(s3_server.make_bucket())
    write_root(storage)
    storage.delete("train/target/000000.tar")
    loader = Loader(
        storage.url, dataclasses.replace(CONFIG, cache_dir=str(tmp_path)), seed=5, global_batch=4,
        device=torch.device("cpu"),
    )  # fmt: skip
    keys = {key for (batch,) in islice(loader, STEPS) for key in batch.target_keys}
    loader.close()
    assert keys == {f"target_{n:06d}" for n in (3, 4, 5, 6)}
    assert loader.health.bad_shards.keys() == {"train/target/000000.tar"}


def test_data_of_which_nothing_can_be_used_ends_the_run(tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path), target=(3,))
    break_samples(tmp_path, *(f"target_{n:06d}" for n in range(3)))
    with pytest.raises(UserError, match="^none of 100 target samples drawn for one place can be used"):
        read(tmp_path)
    (tmp_path / "train/target/000000.tar").unlink()
    with pytest.raises(UserError, match="^none of 100 target samples drawn for one place can be used"):
        read(tmp_path)


@kinds
@pytest.mark.parametrize("part", ["image", "label"])
def test_a_labelled_sample_goes_whole(kind: str, part: str, tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path))

    def labelled() -> tuple[list[Any], DataHealth]:
        loader = Loader(
            str(tmp_path), dataclasses.replace(CONFIG, decoder=kind), LabelledCrop(domain="target"), seed=5, global_batch=4,
            device=torch.device("cpu"),
        )  # fmt: skip
        try:
            steps = [batch for (batch,) in islice(loader, 7)]
        finally:
            loader.close()
        images, labels = (torch.cat([getattr(batch, name) for batch in steps]) for name in ("images", "labels"))
        keys = [key for batch in steps for key in batch.keys]
        return list(zip(keys, images, labels, strict=True)), loader.health

    intact, _ = labelled()
    break_samples(tmp_path, "target_000002", part=part)
    replaced, health = labelled()
    assert list(health.bad_samples) == ["target_000002 in train/target/000000.tar"]
    for (key, *values), (other, *others) in zip(intact, replaced, strict=True):
        assert other != "target_000002"
        if key != "target_000002":
            assert key == other and all(torch.equal(a, b) for a, b in zip(values, others, strict=True))


def test_a_label_of_unknown_ids_can_be_skipped(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 32))
    samples = [Sample(f"s{n}", image, np.full((32, 48), 33 if n == 1 else n, np.uint8)) for n in range(3)]
    storage = LocalStorage(tmp_path)
    shard = write_shard(storage, "train/target/000000.tar", build_tar(samples, "png")).shard
    split = Split((shard,), (48, 32), LABEL_SPACE)
    storage.write(MANIFEST, Manifest({"train/target": split}).to_json().encode())
    view = LabelledCrop(domain="target")
    loader = Loader(str(tmp_path), CONFIG, view, seed=0, global_batch=3, device=torch.device("cpu"))
    assert {key for (batch,) in islice(loader, 3) for key in batch.keys} == {"s0", "s2"}
    loader.close()
    (reason,) = loader.health.bad_samples.values()
    assert "holds 33, which is no trainId" in reason


def test_replacements_are_uniform_near_the_position_first_and_then_from_all_shards() -> None:
    order = SampleOrder([3, 1, 4, 2, 5, 2, 3, 4], 0, "source", 2)
    near = set(order.upcoming_shards(0))
    assert len(near) == 4
    first = [order.replacement(position, 1) for position in range(5)]
    assert first == [SampleOrder([3, 1, 4, 2, 5, 2, 3, 4], 0, "source", 2).replacement(p, 1) for p in range(5)]
    assert {shard for attempt in range(1, 11) for shard, _ in [order.replacement(0, attempt)]} <= near
    # The tenth attempt is the last one near, at every position.
    for attempt, all_near in ((10, True), (11, False)):
        places = [(order.replacement(p, attempt)[0], order.upcoming_shards(p)) for p in range(order.samples)]
        assert all(shard in upcoming for shard, upcoming in places) == all_near
    drawn = Counter(order.replacement(0, attempt) for attempt in range(11, 2411))
    assert drawn.keys() == {(s, n) for s, size in enumerate([3, 1, 4, 2, 5, 2, 3, 4]) for n in range(size)}
    assert min(drawn.values()) > 60 and max(drawn.values()) < 145  # 100 each: four standard deviations
    other = SampleOrder([3, 1, 4, 2, 5, 2, 3, 4], 0, "target", 2)
    assert [other.replacement(0, attempt) for attempt in range(11, 31)] != list(drawn)[:20]
