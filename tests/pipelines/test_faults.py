"""Shards from a real S3 server behind a proxy that injects faults: the same bytes as without them, or one sentence."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.config import Config
from botocore.retries.standard import ExponentialBackoff

from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage, StorageUnavailable
from pipelines import cache
from pipelines.cache import ShardCache, UnusableShard
from pipelines.config import DataConfig
from pipelines.health import DataHealth
from pipelines.loader import Loader
from pipelines.manifest import Shard, load_manifest
from pipelines.prepare import Encoding, prepare
from pipelines.shards import index_tar, read_shard, write_shard
from pipelines.sources.drawn import street_scenes
from tests.conftest import S3Server
from tests.faulty_s3 import Fault, FaultyS3, now_and_then
from tests.pipelines.shardmaker import write_root

pytestmark = pytest.mark.slow

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Root:
    """A data set in S3. shards: of its source domain. content: what they hold, by their names."""

    bucket: str
    shards: tuple[Shard, ...]
    content: dict[str, bytes]

    def cache(self, directory: Path, **options: Any) -> ShardCache:
        return ShardCache(S3Storage(self.bucket), directory, **options)

    def check(self, shards: ShardCache) -> None:
        """Every sample of every shard is as it is on disk."""
        for shard in self.shards:
            opened, tar = shards.open(shard), self.content[shard.name]
            assert list(opened.entries) == index_tar(shard.name, BytesIO(tar))
            for offset, length in (part for entry in opened.entries for part in (entry.image, entry.label) if part):
                assert opened.read((offset, length)) == tar[offset : offset + length]
            del opened  # or it would be in use while the next one is opened


@pytest.fixture(scope="module")
def root(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Root:
    local, bucket = LocalStorage(tmp_path_factory.mktemp("data")), s3_server.make_bucket()
    shards = write_root(local).splits["train/source"].shards
    for name in local.list("train/source/"):
        S3Storage(bucket).upload(local.root / name, name)
    return Root(bucket, shards, {shard.name: local.read(shard.name) for shard in shards})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    monkeypatch.setattr(S3Storage, "_CONFIG", S3Storage._CONFIG.merge(Config(read_timeout=0.5)))
    monkeypatch.setattr(cache, "WAIT_SECONDS", (0.001, 0.002))
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.2)


@pytest.mark.parametrize("fault", ["busy", "cut", "empty", "hang", "stall", "reset", "flip"])
def test_one_fault_changes_nothing_and_is_counted(
    root: Root, faulty_server: FaultyS3, tmp_path: Path, fault: Fault
) -> None:
    faulty_server.faults = [None, fault]
    health = DataHealth()
    root.check(root.cache(tmp_path, health=health))
    assert health.retries == 1
    assert len(faulty_server.requests) == len(root.shards) + 1


def test_a_loader_asks_for_the_manifest_and_once_for_each_shard(
    s3_server: S3Server, faulty_server: FaultyS3, tmp_path: Path
) -> None:
    store = S3Storage(s3_server.make_bucket())
    manifest = write_root(store)
    for name in store.list():
        if name.endswith(".index.json"):
            store.delete(name)
    config = DataConfig(crop=16, threads=1, decoder="pillow", cache_dir=str(tmp_path))
    for fetched in (len(manifest.splits["train/source"].shards) + len(manifest.splits["train/target"].shards), 0):
        faulty_server.requests.clear()
        loader = Loader(store.url, config, seed=0, global_batch=4, device=torch.device("cpu"))
        list(islice(loader, 9))  # three epochs
        loader.close()
        asked = [request.path for request in faulty_server.requests if request.method == "GET"]
        assert len(asked) == len(faulty_server.requests) == len(set(asked)) == 1 + fetched, asked


def test_the_flipped_byte_leaves_the_tar_intact(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    """Only the SHA-256 can tell."""
    shard = root.shards[0]
    faulty_server.faults = ["flip"]
    S3Storage(root.bucket).download(shard.name, tmp_path / "flipped")
    flipped = (tmp_path / "flipped").read_bytes()
    assert flipped != root.content[shard.name]
    assert index_tar(shard.name, BytesIO(flipped)) == index_tar(shard.name, BytesIO(root.content[shard.name]))


def test_30_percent_of_1000_requests_fail(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    """What the server saw more than it was asked for was asked for again, whoever broke the answer."""
    faulty_server.faults = now_and_then("busy", 0.3)
    storage, health, wanted = S3Storage(root.bucket), DataHealth(), 0
    while len(faulty_server.requests) < 1000:
        root.check(ShardCache(storage, tmp_path, health=health))
        shutil.rmtree(tmp_path)
        wanted += len(root.shards)
    assert health.retries == len(faulty_server.requests) - wanted > 250


def test_a_shard_that_stays_wrong_is_unusable(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    faulty_server.faults = lambda request: "flip" if request.path.endswith(".tar") else None
    shards, name = root.cache(tmp_path), root.shards[0].name
    with pytest.raises(UnusableShard, match=rf"^s3://{root.bucket}/{name} is damaged .*SHA-256 .*: prepare .* again"):
        shards.open(root.shards[0])
    assert [request.path for request in faulty_server.requests].count(f"/{root.bucket}/{name}") == 3
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".tmp*"))


def test_a_missing_shard_is_unusable_at_once(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    faulty_server.faults = lambda request: "missing" if request.path.endswith(".tar") else None
    with pytest.raises(UnusableShard, match=f"^s3://{root.bucket}/{root.shards[0].name} is missing, though"):
        root.cache(tmp_path).open(root.shards[0])
    assert len([request for request in faulty_server.requests if request.method == "GET"]) == 1


def test_denied_access_stops_at_once(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    faulty_server.faults = lambda _: "denied"
    with pytest.raises(UserError, match=f"^access to s3://{root.bucket} is denied") as caught:
        root.cache(tmp_path).open(root.shards[0])
    assert not isinstance(caught.value, UnusableShard | StorageUnavailable)
    assert len(faulty_server.requests) == 1


@pytest.mark.parametrize("fault", ["busy", "reset", "cut"])
def test_an_outage_is_outlived_up_to_a_time_and_then_stops_the_run(
    root: Root, faulty_server: FaultyS3, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own retries of a request, the store counts as away only after 8 (5 for a body) in a row."""
    faulty_server.faults = [fault] * 50
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 60.0)
    root.check(root.cache(tmp_path / "outlived"))
    assert faulty_server.faults == []

    faulty_server.faults = lambda _: fault
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(StorageUnavailable, match=f"^cannot fetch s3://{root.bucket}/.* (keeps answering|cannot be)"):
        root.cache(tmp_path / "given up").open(root.shards[0])
    assert {path.name for path in (tmp_path / "given up").iterdir()} <= {"locks"}


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Writing beyond that many bytes fails in this process, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("faulty_server")
def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_file(root: Root, tmp_path: Path) -> None:
    shard = root.shards[0]
    with (
        files_end_at(shard.bytes // 2),
        pytest.raises(UserError, match=rf"^cannot write .*\({os.strerror(errno.EFBIG)}\): .* free space$") as caught,
    ):
        root.cache(tmp_path).open(shard)
    assert not isinstance(caught.value, UnusableShard | StorageUnavailable)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    root.check(root.cache(tmp_path))


def test_a_cache_smaller_than_the_working_set(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    limit, health = int(1.5 * root.shards[0].bytes), DataHealth()
    shards = root.cache(tmp_path, keep=1, limit_bytes=limit, health=health)
    for _ in range(3):
        root.check(shards)
        assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file()) <= limit
    tars = [request for request in faulty_server.requests if request.path.endswith(".tar")]
    assert health.evictions == len(tars) - 1 >= 2 * len(root.shards)


def test_a_process_killed_during_a_download_leaves_nothing_that_is_taken_for_a_shard(
    root: Root, faulty_server: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Storage, "_CONFIG", S3Storage._CONFIG.merge(Config(read_timeout=60)))
    faulty_server.faults = [None, "stall"]
    killed = fork.Process(target=lambda: root.check(root.cache(tmp_path)))
    killed.start()
    _wait_until(lambda: len(faulty_server.requests) == 2 and len(list(tmp_path.glob(".tmp-*"))) == 1)
    assert killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(20)
    (left,) = tmp_path.glob(".tmp-*")

    faulty_server.requests.clear()
    root.check(root.cache(tmp_path))
    assert not left.exists()
    assert len(faulty_server.requests) == len(root.shards) - 1  # the first was there


def test_runs_at_once_download_each_file_once(root: Root, faulty_server: FaultyS3, tmp_path: Path) -> None:
    runs = [fork.Process(target=lambda: root.check(root.cache(tmp_path))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    paths = [request.path for request in faulty_server.requests]
    assert len(paths) == len(set(paths)) == len(root.shards)


@pytest.mark.usefixtures("faulty_server")
def test_a_run_keeps_what_another_one_would_remove(root: Root, tmp_path: Path) -> None:
    first, second = fork.Event(), fork.Event()

    def hold() -> None:
        shards = root.cache(tmp_path)
        opened = shards.open(root.shards[0])
        first.set()
        assert second.wait(30)
        assert opened.read((0, opened.path.stat().st_size)) == root.content[root.shards[0].name]

    holder = fork.Process(target=hold)
    holder.start()
    assert first.wait(30)
    health = DataHealth()
    shards = root.cache(tmp_path, keep=1, limit_bytes=2 * root.shards[0].bytes, health=health)
    for shard in root.shards[1:]:
        shards.open(shard)
    assert health.evictions == 1
    second.set()
    holder.join(30)
    assert holder.exitcode == 0


def test_an_upload_that_was_damaged_is_repeated(root: Root, s3_server: S3Server, faulty_server: FaultyS3) -> None:
    store, tar = S3Storage(s3_server.make_bucket()), root.content[root.shards[0].name]
    faulty_server.faults = ["flip"]
    write_shard(store, "a.tar", tar)
    assert store.read("a.tar") == tar


def test_a_store_that_damages_all_uploads_is_refused(root: Root, s3_server: S3Server, faulty_server: FaultyS3) -> None:
    store, tar = S3Storage(s3_server.make_bucket()), root.content[root.shards[0].name]
    faulty_server.faults = lambda request: "flip" if request.method == "PUT" else None
    with pytest.raises(UserError, match="a.tar"):
        write_shard(store, "a.tar", tar)


def test_the_health_of_the_data_in_figures_and_log(caplog: pytest.LogCaptureFixture) -> None:
    health = DataHealth()
    for _ in range(23):
        health.count_retry()
    health.count_eviction()
    health.count_fetched(3 * 2**19)
    health.bad_shard("a.tar", "is missing")
    health.bad_shard("a.tar", "is missing")
    health.bad_sample("x in b.tar", "is no JPEG")
    assert health.metrics() == {
        "data/retries": 23, "data/evictions": 1, "data/fetched_MiB": 1.5, "data/bad_shards": 1, "data/bad_samples": 1
    }  # fmt: skip
    assert caplog.messages == [
        "the store of the data has failed to answer: retry 1",
        "the store of the data has failed to answer: retry 10",
        "bad shard a.tar: is missing",
        "bad sample x in b.tar: is no JPEG",
    ]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_preparations_of_one_root_do_not_disturb_each_other(s3_server: S3Server, tmp_path: Path) -> None:
    source, encoding = street_scenes(count=6, test_count=2), Encoding((64, 32), shard_size=2)
    alone = prepare(source, LocalStorage(tmp_path), encoding, progress=False)
    store = S3Storage(s3_server.make_bucket())
    runs = [fork.Process(target=prepare, args=(source, store, encoding, 1, False)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert load_manifest(store) == alone
    assert store.list() == LocalStorage(tmp_path).list()
    for split in alone.splits.values():
        facts = [read_shard(store, shard.name) for shard in split.shards]
        assert [each.shard for each in facts if each] == list(split.shards)
