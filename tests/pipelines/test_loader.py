import dataclasses
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.config import build
from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage, open_storage
from pipelines.ahead import Ahead
from pipelines.cache import OpenShard
from pipelines.config import DataConfig
from pipelines.dataset import ImageDataset
from pipelines.decode import DaliDecoder
from pipelines.loader import Batch, Loader
from pipelines.manifest import MANIFEST, Manifest, Shard
from tests.conftest import S3Server
from tests.pipelines.shardmaker import break_samples, write_root, write_split

pytestmark = pytest.mark.slow

has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
kinds = ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali, reason="DALI is not installed"))]
Step = dict[int, tuple[Tensor, Tensor, str, str]]  # by slot: source, target, source key, target key
CONFIG = DataConfig(crop=16, threads=1, window=2, decoder="pillow")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data")
    write_root(LocalStorage(path))  # 11 source and 7 target images of 48x32
    return str(path)


def make(root: str, config: DataConfig = CONFIG, **options: Any) -> Loader:
    given: dict[str, Any] = {"seed": 5, "global_batch": 4, "device": torch.device("cpu")}
    return Loader(root, config, **given | options)


def steps(loader: Loader, count: int) -> list[list[Batch]]:
    """The first `count` steps, and the loader's threads stopped."""
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def by_slot(ranks: Iterable[list[Batch]]) -> Step:
    """One step on all ranks."""
    return {
        int(slot): (batch.source[i], batch.target[i], batch.source_keys[i], batch.target_keys[i])
        for batches in ranks
        for batch in batches
        for i, slot in enumerate(batch.slots)
    }


def same_step(one: Step, other: Step) -> None:
    assert one.keys() == other.keys()
    for slot, (source, target, *keys) in one.items():
        assert keys == list(other[slot][2:])
        assert torch.equal(source, other[slot][0]) and torch.equal(target, other[slot][1])


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_the_images_are_the_same_for_any_ranks_accumulation_and_resume_point(
    root: str, world_size: int, accumulation: int, first_step: int
) -> None:
    whole = [by_slot([batches]) for batches in steps(make(root), 5)][first_step:]
    options: dict[str, Any] = {"world_size": world_size, "accumulation": accumulation, "first_step": first_step}
    ranks = [steps(make(root, rank=rank, **options), 5 - first_step) for rank in range(world_size)]
    assert all(len(batches) == accumulation for rank in ranks for batches in rank)
    for expected, *parts in zip(whole, *ranks, strict=True):
        same_step(expected, by_slot(parts))


@pytest.mark.parametrize("decoder", kinds)
def test_batches_are_what_they_say(root: str, decoder: str) -> None:
    loader = make(root, dataclasses.replace(CONFIG, decoder=decoder), accumulation=2)
    assert loader.epoch_samples == 11
    (batches,) = steps(loader, 1)
    assert [batch.slots.tolist() for batch in batches] == [[0, 1], [2, 3]]
    for batch in batches:
        for images in (batch.source, batch.target):
            assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1
            assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_both_decoders_give_the_same_batches(root: str) -> None:
    pillow, dali = (steps(make(root, dataclasses.replace(CONFIG, decoder=kind)), 4) for kind in ("pillow", "dali"))
    for one, other in zip(pillow, dali, strict=True):
        assert one[0].source_keys == other[0].source_keys and one[0].target_keys == other[0].target_keys
        assert (one[0].source - other[0].source).abs().max() <= 4 / 255
        assert (one[0].target - other[0].target).abs().max() <= 4 / 255


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_dali_has_the_files_of_the_next_call_and_its_memory_is_handed_on(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue of two calls: while one is decoded the next one waits in DALI. On a CPU nothing copies what comes of it."""
    under_way: list[int] = []
    made: list[int] = []
    meet, wait = DaliDecoder._meet, DaliDecoder._wait

    def watched_meet(self: DaliDecoder) -> None:
        under_way.append(len(self._runs))
        meet(self)

    def watched_wait(self: DaliDecoder, run: Any) -> torch.Tensor:
        made.append(wait(self, run).untyped_storage().data_ptr())
        return wait(self, run)

    monkeypatch.setattr(DaliDecoder, "_meet", watched_meet)
    monkeypatch.setattr(DaliDecoder, "_wait", watched_wait)
    taken = steps(make(root, dataclasses.replace(CONFIG, decoder="dali", prefetch=1)), 6)
    assert under_way[:6] == [2] * 6
    for number, batches in enumerate(taken):
        for batch in batches:
            for images in (batch.source, batch.target):
                assert images.untyped_storage().data_ptr() == made[number]


def test_images_are_crops_of_the_named_samples(root: str) -> None:
    samples = {domain: ImageDataset(root, "train", domain) for domain in ("source", "target")}
    for batches in steps(make(root), 3):
        for batch in batches:
            for domain, images, keys in (
                ("source", batch.source, batch.source_keys),
                ("target", batch.target, batch.target_keys),
            ):
                for image, key in zip(images, keys, strict=True):
                    whole, _ = samples[domain].read(samples[domain].keys.index(key))
                    crop = ((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
                    windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16), (0, 1)).transpose(0, 1, 3, 4, 2)
                    assert any((windows == one).all(axis=(2, 3, 4)).any() for one in (crop, crop[:, ::-1]))


def test_an_epoch_has_every_source_image_once_and_both_domains_their_own_length(root: str) -> None:
    batches = [batch for step in steps(make(root, global_batch=1), 14) for batch in step]
    assert len({batch.source_keys[0] for batch in batches[:11]}) == 11
    for epoch in (batches[:7], batches[7:]):
        assert len({batch.target_keys[0] for batch in epoch}) == 7


def test_the_source_makes_the_epoch_even_where_the_target_is_longer(tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path), source=(2, 3), target=(4, 4))
    loader = make(str(tmp_path))
    loader.close()
    assert loader.epoch_samples == 5


def test_shards_are_fetched_ahead_all_through_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a shard is opened it was asked for; of those after the first two windows, only a run under way can."""
    write_root(LocalStorage(tmp_path), source=(2,) * 6, target=(2,) * 6)
    loader = make(str(tmp_path), dataclasses.replace(CONFIG, window=1, prefetch=1), global_batch=2)
    asked, late, opened = set(loader._cache._asked), list[str](), set[str]()
    fetch_ahead, open_shard = loader._cache.prefetch, loader._cache.open

    def prefetch(shards: Iterable[Shard]) -> None:
        wanted = list(shards)
        asked.update(shard.name for shard in wanted)
        fetch_ahead(wanted)

    def open_one(shard: Shard) -> OpenShard:
        opened.add(shard.name)
        late.extend({shard.name} - asked)
        return open_shard(shard)

    monkeypatch.setattr(loader._cache, "prefetch", prefetch)
    monkeypatch.setattr(loader._cache, "open", open_one)
    steps(loader, 6)
    assert len(opened) == 12 and not late


def test_the_seed_changes_order_and_crops(root: str) -> None:
    (one,), (other,) = steps(make(root, global_batch=8), 1), steps(make(root, global_batch=8, seed=6), 1)
    assert one[0].source_keys != other[0].source_keys and not torch.equal(one[0].source, other[0].source)


def test_the_same_batches_come_from_s3(root: str, s3_server: S3Server, tmp_path: Path) -> None:
    bucket = s3_server.make_bucket()
    write_root(S3Storage(bucket, "street/scenes"))
    config = dataclasses.replace(CONFIG, cache_dir=str(tmp_path))
    remote = steps(make(f"s3://{bucket}/street/scenes", config), 4)
    for one, other in zip(steps(make(root), 4), remote, strict=True):
        same_step(by_slot([one]), by_slot([other]))


def test_a_new_iteration_begins_again_and_ends_the_one_before(root: str) -> None:
    loader = make(root, first_step=2)
    first = next(iter(loader))
    second = next(iter(loader))
    same_step(by_slot([first]), by_slot([second]))
    loader.close()


def test_who_waits_for_the_next_step_is_let_go_at_the_end() -> None:
    ahead = Ahead(iter(()), depth=1)
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(list(ahead)), daemon=True)
    waiting.start()
    ahead.close()
    waiting.join(5)
    assert ended == [[]]


def test_stopping_early_leaves_no_thread(root: str) -> None:
    before = set(threading.enumerate())
    loader = make(root)
    for _ in loader:
        break
    started = set(threading.enumerate()) - before
    loader.close()
    for thread in started:
        thread.join(5)
    assert started and not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("decoder", kinds)
@pytest.mark.parametrize("end", ["", "raise SystemExit(3)"])
def test_the_interpreter_exits_while_batches_are_decoded(root: str, decoder: str, end: str) -> None:
    script = f"""
import torch
from pipelines.ahead import Ahead
from pipelines.config import DataConfig
from pipelines.loader import Loader
config = DataConfig(crop=16, decoder={decoder!r}, threads=1)
iterator = iter(Loader({root!r}, config, seed=0, global_batch=4, device=torch.device("cpu")))
next(iterator)
{end}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (3 if end else 0, "")


@pytest.mark.parametrize("decoder", kinds)
def test_a_broken_image_is_named_with_its_shard(tmp_path: Path, decoder: str) -> None:
    write_root(LocalStorage(tmp_path), source=(3,))
    break_samples(tmp_path, "source_000001")
    with pytest.raises(UserError, match="image source_000001 in train/source/000000.tar cannot be decoded"):
        steps(make(str(tmp_path), dataclasses.replace(CONFIG, decoder=decoder)), 3)


def test_a_damaged_shard_reaches_the_consumer(tmp_path: Path) -> None:
    manifest = write_root(LocalStorage(tmp_path), target=(4,))
    path = tmp_path / manifest.splits["train/target"].shards[0].name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        steps(make(str(tmp_path)), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": DataConfig(crop=33)},
            r"crop of 33 pixels is larger than the source images of 48x32: pass --crop 32",
        ),
        ({"world_size": 3}, "global batch of 4 does not divide over 3 ranks"),
        ({"root": "/nowhere/at/all"}, "no prepared data at /nowhere/at/all"),
    ],
)
def test_sizes_and_roots_that_cannot_work_are_refused_at_once(root: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**{"root": root} | change)


def test_an_empty_domain_is_refused(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    manifest = Manifest({"train/source": write_split(storage, "train/source", [2])})
    storage.write(MANIFEST, manifest.to_json().encode())
    with pytest.raises(UserError, match="no train images of the target domain"):
        make(str(tmp_path))


@pytest.mark.parametrize("name", ["crop", "window", "threads", "prefetch"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--data.{name} is 0: give at least 1"):
        build(DataConfig, {name: 0})


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="--data.cache-gb is 0: give more than 0"):
        DataConfig(cache_gb=0.0)


def test_samples_are_read_in_the_order_of_the_shards(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    splits = {
        "test/source": write_split(storage, "test/source", [2, 3], format="png"),
        "test/target": write_split(storage, "test/target", [1], labelled=False),
    }
    storage.write(MANIFEST, Manifest(splits).to_json().encode())
    samples = ImageDataset(str(tmp_path), "test", "source")
    assert len(samples) == 5 and samples.keys == [f"source_{i:06d}" for i in range(5)]
    image, label = samples.read(4)
    assert image.shape == (32, 48, 3) and image.dtype == np.uint8
    assert label is not None and label.shape == (32, 48) and label.max() <= 18
    assert len({samples.read(i)[0].tobytes() for i in range(5)}) == 5
    assert ImageDataset(str(tmp_path), "test", "target").read(0)[1] is None
    with pytest.raises(IndexError):
        samples.read(5)


def test_another_phase_stands_in_only_where_it_is_asked_to(root: str) -> None:
    with pytest.raises(UserError, match="no test images of the target domain"):
        ImageDataset(root, "test", "target")
    assert len(ImageDataset(root, "test", "target", fallback="train")) == 7
    with pytest.raises(UserError, match="no test images"):
        ImageDataset(root, "test", "target", fallback="test")
