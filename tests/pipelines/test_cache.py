import hashlib
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage, StorageUnavailable, WrongContent
from pipelines import cache
from pipelines.cache import FolderOfCopies, ShardCache, UnusableShard
from pipelines.health import DataHealth
from pipelines.manifest import Manifest, Shard
from tests.conftest import S3Server
from tests.pipelines.shardmaker import write_root

pytestmark = pytest.mark.slow


class FaultyS3(S3Storage):
    """A real S3 store whose first downloads fail with the errors given."""

    def __init__(self, bucket: str, faults: Sequence[Exception] = ()) -> None:
        super().__init__(bucket)
        self.faults = list(faults)
        self.downloads = 0

    def download(self, name: str, path: Path, sha256: str | None = None) -> int:
        self.downloads += 1
        if fault := self.faults.pop(0) if self.faults else None:
            raise fault
        return super().download(name, path, sha256)


DOWN, WRONG = StorageUnavailable("the S3 endpoint cannot be reached"), WrongContent("it has not the SHA-256")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WAIT_SECONDS", (0.001, 0.002))
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.2)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> tuple[str, Manifest]:
    """(a bucket with a data set, its manifest)"""
    name = s3_server.make_bucket()
    return name, write_root(S3Storage(name))


def first_shard(manifest: Manifest) -> Shard:
    return manifest.splits["train/source"].shards[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_local_root_is_used_in_place(tmp_path: Path) -> None:
    manifest = write_root(LocalStorage(tmp_path / "data"))
    shard = first_shard(manifest)
    opened = ShardCache(LocalStorage(tmp_path / "data"), tmp_path / "cache").open(shard)
    assert opened.path == tmp_path / "data" / shard.name and not (tmp_path / "cache").exists()
    assert [entry.key for entry in opened.entries] == [f"source_{i:06d}" for i in range(4)]
    assert opened.read(opened.entries[2].image).startswith(b"\xff\xd8\xff")
    label = opened.entries[2].label
    assert label is not None and opened.read(label).startswith(b"\x89PNG")


@pytest.mark.parametrize("damage", ["flip a byte", "truncate", "remove"])
def test_a_damaged_local_file_is_named(tmp_path: Path, damage: str) -> None:
    shard = first_shard(write_root(LocalStorage(tmp_path)))
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip a byte" else data[: len(data) // 2])
    if damage == "remove":
        path.unlink()
    with pytest.raises(UnusableShard, match=f"{path} is {'missing' if damage == 'remove' else 'damaged'}"):
        ShardCache(LocalStorage(tmp_path)).open(shard)


def test_a_remote_shard_is_fetched_once_and_shared_by_later_runs(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    name, manifest = bucket
    shard, storage = first_shard(manifest), FaultyS3(name)
    for _ in range(2):
        shards = ShardCache(storage, tmp_path)
        assert shards.open(shard) is shards.open(shard)
    path = shards.open(shard).path
    assert path == tmp_path / f"{shard.sha256}.tar"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert storage.downloads == 1


def test_a_cached_file_that_went_bad_is_fetched_again(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    name, manifest = bucket
    shard = first_shard(manifest)
    path = ShardCache(FaultyS3(name), tmp_path).open(shard).path
    path.write_bytes(b"bad")
    assert ShardCache(FaultyS3(name), tmp_path).open(shard).path.stat().st_size == shard.bytes


@pytest.mark.parametrize("faults", [[DOWN] * 10, [WRONG, DOWN, WRONG]])
def test_faults_that_pass_are_survived_and_counted(
    bucket: tuple[str, Manifest], tmp_path: Path, faults: list[Exception]
) -> None:
    name, manifest = bucket
    shard, health = first_shard(manifest), DataHealth()
    shards = ShardCache(FaultyS3(name, faults), tmp_path, health=health)
    assert len(shards.open(shard).read((0, shard.bytes))) == shard.bytes
    assert health.retries == len(faults)
    assert health.fetched_bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())


@pytest.mark.parametrize(("fault", "why"), [(DOWN, "cannot be reached"), (WRONG, "damaged .*SHA-256")])
def test_faults_that_stay_end_with_a_sentence_and_leave_nothing_behind(
    bucket: tuple[str, Manifest], tmp_path: Path, fault: Exception, why: str
) -> None:
    name, manifest = bucket
    shard = first_shard(manifest)
    with pytest.raises(UserError, match=rf"s3://{name}/{shard.name}.*{why}") as caught:
        ShardCache(FaultyS3(name, [fault] * 1000), tmp_path).open(shard)
    assert isinstance(caught.value, UnusableShard if fault is WRONG else StorageUnavailable)
    assert {path.name for path in tmp_path.iterdir()} <= {"locks"}


def test_what_cannot_pass_is_not_tried_again(bucket: tuple[str, Manifest], tmp_path: Path, s3_server: S3Server) -> None:
    shard = first_shard(bucket[1])
    empty, absent = FaultyS3(s3_server.make_bucket()), FaultyS3("no-such-bucket")
    with pytest.raises(UnusableShard, match="is missing, though the manifest names it"):
        ShardCache(empty, tmp_path).open(shard)
    with pytest.raises(UserError, match="bucket no-such-bucket does not exist"):
        ShardCache(absent, tmp_path).open(shard)
    assert empty.downloads == absent.downloads == 1


def test_a_cache_folder_that_cannot_be_made_is_explained(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    name, manifest = bucket
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the shard cache .* --data.cache-dir"):
        ShardCache(FaultyS3(name), tmp_path / "file").open(first_shard(manifest))


def test_prefetched_shards_are_there_without_being_opened(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    name, manifest = bucket
    wanted = manifest.splits["train/source"].shards
    shards = ShardCache(FaultyS3(name), tmp_path)
    shards.prefetch(wanted)
    paths = [tmp_path / f"{shard.sha256}.tar" for shard in wanted]
    wait_until(lambda: all(path.exists() for path in paths))
    shards.close()


def test_a_failed_prefetch_shows_when_the_shard_is_opened(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    shard = first_shard(write_root(storage))
    (tmp_path / shard.name).write_bytes(b"bad")
    shards = ShardCache(storage)
    shards.prefetch([shard])
    with pytest.raises(UserError, match="is damaged"):
        shards.open(shard)
    shards.close()


def test_only_the_last_used_shards_stay_open(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    wanted = write_root(storage).splits["train/source"].shards
    shards = ShardCache(storage, keep=2)
    opened = [shards.open(shard) for shard in wanted]
    assert shards.open(wanted[2]) is opened[2] and shards.open(wanted[1]) is opened[1]
    assert shards.open(wanted[0]) is not opened[0]


def cached(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix == ".tar"}


def test_within_the_limit_those_opened_longest_ago_go_first(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    name, manifest = bucket
    a, b, c = manifest.splits["train/source"].shards
    health = DataHealth()
    shards = ShardCache(FaultyS3(name), tmp_path, keep=1, limit_bytes=int(2.5 * a.bytes), health=health)
    for shard in (a, b, a, c):  # only the last one is in use
        shards.open(shard)
        time.sleep(0.02)  # the clock of file times is coarse
    assert cached(tmp_path) == {f"{a.sha256}.tar", f"{c.sha256}.tar"}
    assert health.evictions == 1
    assert shards.open(b).entries[0].key == "source_000004"  # fetched again
    assert cached(tmp_path) == {f"{b.sha256}.tar", f"{c.sha256}.tar"}


def test_what_is_in_use_stays_and_the_excess_is_said_once(
    bucket: tuple[str, Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, manifest = bucket
    wanted = manifest.splits["train/source"].shards
    health = DataHealth()
    shards = ShardCache(FaultyS3(name), tmp_path, limit_bytes=1, health=health)
    opened = [shards.open(shard) for shard in wanted]
    assert all(each.path.exists() for each in opened)
    assert health.evictions == 0
    (said,) = caplog.messages
    assert re.search(r"the shards in use need 0.0\d\d GB, more than .* 0.000 GB: raise --data.cache-gb", said)
    shards.close()
    del opened
    other = ShardCache(FaultyS3(name), tmp_path, limit_bytes=1).open(manifest.splits["train/target"].shards[0])
    assert cached(tmp_path) == {other.path.name}  # a closed cache uses nothing


def test_an_open_shard_is_read_even_if_somebody_empties_the_folder(
    bucket: tuple[str, Manifest], tmp_path: Path
) -> None:
    name, manifest = bucket
    a, b, _ = manifest.splits["train/source"].shards
    storage = FaultyS3(name)
    shards = ShardCache(storage, tmp_path, keep=1)
    opened = shards.open(a)
    tar = opened.read((0, a.bytes))
    shutil.rmtree(tmp_path)
    assert opened.read((0, a.bytes)) == tar
    shards.open(b)
    assert shards.open(a).read((0, a.bytes)) == tar
    assert storage.downloads == 3


def test_a_shard_that_was_let_go_is_prefetched_again(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    name, manifest = bucket
    a, b, _ = manifest.splits["train/source"].shards
    shards = ShardCache(FaultyS3(name), tmp_path, keep=1)
    for shard in (a, b, a):
        shards.prefetch([shard])
        path = tmp_path / f"{shard.sha256}.tar"
        wait_until(path.exists)
        shards.open(shard)
        path.unlink()
    shards.close()


def test_left_overs_of_a_killed_process_are_swept(bucket: tuple[str, Manifest], tmp_path: Path) -> None:
    (tmp_path / ".tmp-left").write_bytes(b"half")
    ShardCache(FaultyS3(bucket[0]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_locks_do_not_pile_up(tmp_path: Path) -> None:
    folder = FolderOfCopies(S3Storage("bucket"), tmp_path, None, DataHealth())
    folder._storage = LocalStorage(tmp_path / "root")
    hashes = {hashlib.sha256(str(number).encode()).hexdigest(): str(number) for number in range(2000)}
    alike = {sha256: name for sha256, name in hashes.items() if sha256.startswith("00")}
    assert len(alike) > 3
    for sha256, name in alike.items():
        folder._storage.write(name, name.encode())
        folder.open(name, sha256).close()
    assert len(list((tmp_path / "locks").iterdir())) == 1
