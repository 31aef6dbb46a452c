"""A million samples: the loader opens the shards of its windows only, and holds nothing for each sample."""

import dataclasses
import gc
import os
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
import torch

from infra.storage import LocalStorage
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.manifest import DOMAINS, MANIFEST, Manifest, SampleEntry, Split
from pipelines.order import SampleOrder
from tests.pipelines.shardmaker import write_split

pytestmark = pytest.mark.slow

MILLION = 1_000_000
SHARD_SAMPLES = 256
GLOBAL_BATCH = 4
SEED = 3
CONFIG = DataConfig(crop=8, threads=1, window=8, decoder="pillow", prefetch=1)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LocalStorage, Split]]:
    """Per domain, a shard of 256 images of 16x16 pixels."""
    storage = LocalStorage(tmp_path_factory.mktemp("templates"))
    return {
        domain: (storage, write_split(storage, f"train/{domain}", [SHARD_SAMPLES], (16, 16), labelled=False))
        for domain in DOMAINS
    }


def write_large_root(
    root: Path, templates: dict[str, tuple[LocalStorage, Split]], samples: int, first_step: int = 0
) -> Manifest:
    """A data set of so many samples in each domain, rounded up to whole shards, all of the template's content.

    Of its shards only those exist that a run from `first_step` on needs for its first windows.
    """
    splits = {}
    for domain, (storage, template) in templates.items():
        (shard,) = template.shards
        count = -(-samples // SHARD_SAMPLES)
        shards = [dataclasses.replace(shard, name=f"train/{domain}/{number:06d}.tar") for number in range(count)]
        splits[f"train/{domain}"] = dataclasses.replace(template, shards=tuple(shards))
        order = SampleOrder([SHARD_SAMPLES] * count, SEED, domain, CONFIG.window)
        (root / "train" / domain).mkdir(parents=True)
        for number in order.upcoming_shards(first_step * GLOBAL_BATCH):
            os.link(storage.root / shard.name, root / shards[number].name)
    manifest = Manifest(splits)
    LocalStorage(root).write(MANIFEST, manifest.to_json().encode())
    return manifest


def make_loader(root: Path, first_step: int = 0) -> Loader:
    return Loader(
        str(root), CONFIG, seed=SEED, global_batch=GLOBAL_BATCH, device=torch.device("cpu"), first_step=first_step
    )


def living(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


@pytest.mark.parametrize("first_step", [0, 10 * MILLION // GLOBAL_BATCH + 777])
def test_of_four_thousand_shards_those_of_the_first_windows_are_opened(
    tmp_path: Path, templates: dict[str, tuple[LocalStorage, Split]], first_step: int
) -> None:
    manifest = write_large_root(tmp_path, templates, MILLION, first_step)
    sizes = [shard.samples for shard in manifest.splits["train/source"].shards]
    assert len(sizes) == 3907 and len(list(tmp_path.rglob("*.tar"))) == 2 * 2 * CONFIG.window
    entries, loader = living(SampleEntry), make_loader(tmp_path, first_step)
    steps = list(islice(loader, 5))
    assert 0 < living(SampleEntry) - entries <= 2 * 2 * CONFIG.window * SHARD_SAMPLES
    loader.close()
    for domain in DOMAINS:
        order = SampleOrder(sizes, SEED, domain, CONFIG.window)
        keys = [key for (batch,) in steps for key in getattr(batch, f"{domain}_keys")]
        positions = range(first_step * GLOBAL_BATCH, (first_step + 5) * GLOBAL_BATCH)
        assert keys == [f"{domain}_{order.locate(position)[1]:06d}" for position in positions]


def peak_bytes(root: Path) -> int:
    """The most that is allocated at once from reading the manifest to the third batch, in bytes."""
    tracemalloc.start()
    try:
        loader = make_loader(root)
        list(islice(loader, 3))
        loader.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_thousand_times_the_samples_need_little_more_memory(
    tmp_path: Path, templates: dict[str, tuple[LocalStorage, Split]]
) -> None:
    for samples in (1_000, MILLION):
        write_large_root(tmp_path / str(samples), templates, samples)
    peaks = [peak_bytes(tmp_path / str(samples)) for samples in (1_000, MILLION)]
    assert peaks[1] - peaks[0] < 16 * 2 * MILLION  # less than 16 bytes for each sample of both domains


def test_the_order_of_a_million_samples_is_held_a_window_at_a_time() -> None:
    tracemalloc.start()
    try:
        order = SampleOrder([SHARD_SAMPLES] * 3907, 0, "source", 8)
        for position in range(0, 50 * MILLION, 25_000):  # 2,000 windows of 50 epochs
            order.locate(position)
        assert tracemalloc.get_traced_memory()[0] < MILLION  # less than a byte for each sample
    finally:
        tracemalloc.stop()
