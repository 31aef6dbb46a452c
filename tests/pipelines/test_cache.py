import hashlib
import multiprocessing
import time

import pytest
from shardmaker import write_root

from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage, StorageUnavailable
from pipelines import cache
from pipelines.cache import ShardCache
from pipelines.manifest import Manifest


class FaultyS3(S3Storage):
    """A real S3 store whose first downloads go wrong: "down" (out of reach), "cut" (half of the bytes arrive)."""

    def __init__(self, bucket, faults=()):
        super().__init__(bucket)
        self.faults = list(faults)
        self.downloads = 0

    def download(self, name, path):
        self.downloads += 1
        fault = self.faults.pop(0) if self.faults else None
        if fault == "down":
            raise StorageUnavailable("the S3 endpoint cannot be reached")
        super().download(name, path)
        if fault == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(cache, "BACKOFF_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def bucket(s3_server):
    """(a bucket with a data set, its manifest)"""
    name = s3_server.make_bucket()
    return name, write_root(S3Storage(name))


def first_shard(manifest: Manifest):
    return manifest.splits["train/source"].shards[0]


def test_a_local_root_is_used_in_place(tmp_path):
    manifest = write_root(LocalStorage(tmp_path / "data"))
    shard = first_shard(manifest)
    opened = ShardCache(LocalStorage(tmp_path / "data"), tmp_path / "cache").open(shard)
    assert opened.path == tmp_path / "data" / shard.name and not (tmp_path / "cache").exists()
    assert [entry.key for entry in opened.entries] == [f"source_{i:06d}" for i in range(4)]
    assert opened.read(opened.entries[2].image).startswith(b"\xff\xd8\xff")
    assert opened.read(opened.entries[2].label).startswith(b"\x89PNG")


@pytest.mark.parametrize("file", ["name", "index_name"])
@pytest.mark.parametrize("damage", ["flip a byte", "truncate", "remove"])
def test_a_damaged_local_file_is_named(tmp_path, file, damage):
    shard = first_shard(write_root(LocalStorage(tmp_path)))
    path = tmp_path / getattr(shard, file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip a byte" else data[: len(data) // 2])
    if damage == "remove":
        path.unlink()
    with pytest.raises(UserError, match=f"{path} is {'missing' if damage == 'remove' else 'damaged'}"):
        ShardCache(LocalStorage(tmp_path)).open(shard)


def test_a_remote_shard_is_fetched_once_and_shared_by_later_runs(bucket, tmp_path):
    name, manifest = bucket
    shard, storage = first_shard(manifest), FaultyS3(name)
    for _ in range(2):
        shards = ShardCache(storage, tmp_path)
        assert shards.open(shard) is shards.open(shard)
    path = shards.open(shard).path
    assert path == tmp_path / f"{shard.sha256}.tar"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert storage.downloads == 2  # the tar and its index


def test_a_cached_file_that_went_bad_is_fetched_again(bucket, tmp_path):
    name, manifest = bucket
    shard = first_shard(manifest)
    path = ShardCache(FaultyS3(name), tmp_path).open(shard).path
    path.write_bytes(b"bad")
    assert ShardCache(FaultyS3(name), tmp_path).open(shard).path.stat().st_size == shard.bytes


@pytest.mark.parametrize("faults", [["down"] * 3, ["cut", "down", "cut"], [None, "cut"]])
def test_faults_that_pass_are_survived(bucket, tmp_path, faults):
    name, manifest = bucket
    shard = first_shard(manifest)
    assert ShardCache(FaultyS3(name, faults), tmp_path).open(shard).path.stat().st_size == shard.bytes


@pytest.mark.parametrize(("fault", "why"), [("down", "cannot be reached"), ("cut", "SHA-256")])
def test_faults_that_stay_end_with_a_sentence_and_leave_nothing_behind(bucket, tmp_path, fault, why):
    name, manifest = bucket
    shard = first_shard(manifest)
    with pytest.raises(UserError, match=rf"cannot fetch s3://{name}/{shard.index_name}: .*{why}"):
        ShardCache(FaultyS3(name, [fault] * 4), tmp_path).open(shard)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}


def test_what_cannot_pass_is_not_tried_again(bucket, tmp_path, s3_server):
    shard = first_shard(bucket[1])
    empty, absent = FaultyS3(s3_server.make_bucket()), FaultyS3("no-such-bucket")
    with pytest.raises(UserError, match="is missing, though the manifest names it"):
        ShardCache(empty, tmp_path).open(shard)
    with pytest.raises(UserError, match="bucket no-such-bucket does not exist"):
        ShardCache(absent, tmp_path).open(shard)
    assert empty.downloads == absent.downloads == 1


def test_a_cache_folder_that_cannot_be_made_is_explained(bucket, tmp_path):
    name, manifest = bucket
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the shard cache .* --data.cache-dir"):
        ShardCache(FaultyS3(name), tmp_path / "file").open(first_shard(manifest))


def _open_all(bucket_name, manifest, directory, downloads):
    storage = FaultyS3(bucket_name)
    shards = ShardCache(storage, directory)
    for shard in manifest.splits["train/source"].shards:
        shards.open(shard)
    downloads.put(storage.downloads)


def test_the_ranks_of_a_machine_fetch_each_file_once(bucket, tmp_path):
    name, manifest = bucket
    context = multiprocessing.get_context("fork")
    downloads = context.SimpleQueue()
    ranks = [context.Process(target=_open_all, args=(name, manifest, tmp_path, downloads)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sum(downloads.get() for _ in ranks) == 2 * len(manifest.splits["train/source"].shards)


def test_prefetched_shards_are_there_without_being_opened(bucket, tmp_path):
    name, manifest = bucket
    wanted = manifest.splits["train/source"].shards
    shards = ShardCache(FaultyS3(name), tmp_path)
    shards.prefetch(wanted)
    deadline = time.monotonic() + 20
    paths = [tmp_path / f"{shard.sha256}.tar" for shard in wanted]
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(path.exists() for path in paths)
    shards.close()


def test_a_failed_prefetch_shows_when_the_shard_is_opened(tmp_path):
    storage = LocalStorage(tmp_path)
    shard = first_shard(write_root(storage))
    (tmp_path / shard.name).write_bytes(b"bad")
    shards = ShardCache(storage)
    shards.prefetch([shard])
    with pytest.raises(UserError, match="is damaged"):
        shards.open(shard)
    shards.close()


def test_only_the_last_used_indexes_stay_in_memory(tmp_path):
    storage = LocalStorage(tmp_path)
    wanted = write_root(storage).splits["train/source"].shards
    shards = ShardCache(storage, keep=2)
    opened = [shards.open(shard) for shard in wanted]
    assert shards.open(wanted[2]) is opened[2] and shards.open(wanted[1]) is opened[1]
    assert shards.open(wanted[0]) is not opened[0]
