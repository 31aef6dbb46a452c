"""Local folders and a real S3 server behind the same interface, and what each fault is turned into."""

import fcntl
import hashlib
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from botocore.config import Config
from botocore.retries.standard import ExponentialBackoff

from infra.errors import UserError
from infra.storage import LocalStorage, S3Storage, Storage, StorageUnavailable, WrongContent, open_storage, replacing
from tests.conftest import S3Server
from tests.faulty_s3 import Fault, FaultyS3

pytestmark = pytest.mark.slow


@pytest.fixture(params=["local", "s3", "s3 root"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "root"))
    bucket = request.getfixturevalue("s3_server").make_bucket()
    return open_storage(f"s3://{bucket}/some/prefix/" if request.param == "s3" else f"s3://{bucket}")


def test_what_is_written_is_read_and_listed(storage: Storage) -> None:
    assert storage.list() == []
    storage.write("b/2.tar", b"old")
    storage.write("b/2.tar", b"new and longer")
    storage.write("b/10.tar", b"")
    storage.write("a.json", b"{}")
    assert storage.read("b/2.tar") == b"new and longer"
    assert storage.read("b/10.tar") == b""
    assert storage.size("b/2.tar") == 14
    assert storage.list() == ["a.json", "b/10.tar", "b/2.tar"]
    assert storage.list("b/") == ["b/10.tar", "b/2.tar"]
    assert storage.list("b/2") == ["b/2.tar"]
    storage.delete("b/2.tar")
    storage.delete("b/2.tar")
    assert storage.list("b") == ["b/10.tar"]


def test_files_go_up_and_down(storage: Storage, tmp_path: Path) -> None:
    large = bytes(range(256)) * (20 * 2**20 // 256)  # 20 MiB: several parts to S3
    (tmp_path / "up").write_bytes(large)
    storage.upload(tmp_path / "up", "deep/er/object")
    storage.download("deep/er/object", tmp_path / "new folder" / "down")
    assert (tmp_path / "new folder" / "down").read_bytes() == large


def test_a_missing_name_is_a_missing_file(storage: Storage, tmp_path: Path) -> None:
    storage.write("there", b"1")
    for attempt in (storage.read, storage.size, lambda name: storage.download(name, tmp_path / "copy")):
        with pytest.raises(FileNotFoundError):
            attempt("not/there")
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "absent", "there")
    assert storage.read("there") == b"1"
    assert not list(tmp_path.glob("*copy*")) and not list(tmp_path.glob(".tmp*"))


def test_a_store_works_in_other_processes(storage: Storage) -> None:
    storage.write("name", b"bytes")  # so that a client exists before the fork
    assert pickle.loads(pickle.dumps(storage)).read("name") == b"bytes"
    context = multiprocessing.get_context("fork")
    child = context.Process(target=storage.write, args=("from the child", b"more"))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert storage.read("from the child") == b"more"


def test_a_broken_off_write_leaves_the_old_bytes(tmp_path: Path) -> None:
    (tmp_path / "name").write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "name") as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name").read_bytes() == b"old"


def test_a_reader_sees_the_old_bytes_or_the_new(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path)
    store.write("name", b"old bytes")
    with open(tmp_path / "name", "rb") as reader:
        store.write("name", b"new")
        assert reader.read() == b"old bytes"
    assert store.read("name") == b"new"


def test_sweep_removes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path)
    store.write("a/b", b"kept")
    (tmp_path / "a" / ".tmp-left").write_bytes(b"half")
    with replacing(tmp_path / "a" / "c") as file:  # a writer at work
        file.write(b"whole")
        assert store.list() == ["a/b"]
        store.sweep()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "c"]
    assert store.read("a/c") == b"whole"


def test_what_is_swept_before_its_lock_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock_late(file: BinaryIO, operation: int) -> None:
        monkeypatch.undo()
        LocalStorage(tmp_path).sweep()
        fcntl.flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    LocalStorage(tmp_path).write("name", b"bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_folder_deleted_under_a_write_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*folder/name"), replacing(tmp_path / "folder" / "name"):
        shutil.rmtree(tmp_path / "folder")


def test_other_content_than_asked_for_never_gets_its_name(storage: Storage, tmp_path: Path) -> None:
    storage.write("name", b"bytes")
    right = hashlib.sha256(b"bytes").hexdigest()
    assert storage.download("name", tmp_path / "right", right) == 5
    with pytest.raises(WrongContent, match=f"not the SHA-256 {'0' * 64} .*/name"):
        storage.download("name", tmp_path / "wrong", "0" * 64)
    assert (tmp_path / "right").read_bytes() == b"bytes"
    assert not list(tmp_path.glob("wrong")) and not list(tmp_path.glob(".tmp*"))


def test_a_root_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = open_storage(str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"cannot write .*file/store/name"):
        store.write("name", b"")
    with pytest.raises(FileNotFoundError):
        store.read("name")
    assert store.list() == []


@pytest.mark.parametrize(
    ("url", "words"),
    [("", "empty"), ("gs://bucket/x", "neither a folder nor an s3"), ("s3:///prefix", "no bucket")],
)
def test_an_impossible_location_is_explained(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_storage(url)


EVERY_CALL: list[Callable[[Storage], object]] = [
    lambda store: store.read("name"),
    lambda store: store.write("name", b"bytes"),
    lambda store: store.list(),
    lambda store: store.size("name"),
]


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize("call", EVERY_CALL)
def test_a_missing_bucket_is_named(call: Callable[[Storage], object]) -> None:
    with pytest.raises(UserError, match="bucket no-such-bucket does not exist"):
        call(open_storage("s3://no-such-bucket/data"))


@pytest.mark.usefixtures("s3_server")
def test_an_impossible_bucket_name_is_named() -> None:
    with pytest.raises(UserError, match="'A b' cannot be the name"):
        open_storage("s3://A b/data").read("name")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("call", EVERY_CALL)
def test_wrong_keys_are_access_denied(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, call: Callable[[Storage], object]
) -> None:
    bucket = s3_server.make_bucket()
    monkeypatch.setenv(variable, "SOMETHINGELSE")
    with pytest.raises(UserError, match=f"access to s3://{bucket} is denied.*AWS_ACCESS_KEY_ID"):
        call(open_storage(f"s3://{bucket}"))


@pytest.mark.usefixtures("s3_server")
def test_absent_keys_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no S3 credentials.*AWS_ACCESS_KEY_ID"):
        open_storage("s3://bucket").read("name")


@pytest.fixture
def two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than in earnest, since the waiting between them doubles each time."""
    fewer = S3Storage._CONFIG.merge(Config(retries={"mode": "standard", "total_max_attempts": 2}))
    monkeypatch.setattr(S3Storage, "_CONFIG", fewer)


@pytest.mark.usefixtures("s3_server", "two_attempts")
@pytest.mark.parametrize("call", EVERY_CALL)
def test_an_endpoint_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch, call: Callable[[Storage], object]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match=r"127\.0\.0\.1:1 .*cannot be reached: check AWS_ENDPOINT_URL"):
        call(open_storage("s3://bucket"))


@pytest.fixture
def bucket(s3_server: S3Server, faulty_server: FaultyS3) -> str:
    """A bucket with an object "name", behind the proxy."""
    bucket = s3_server.make_bucket()
    open_storage(f"s3://{bucket}").write("name", BODY)
    faulty_server.requests.clear()
    return bucket


BODY = b"0123456789" * 100


def test_denied_access_fails_at_once(bucket: str, faulty_server: FaultyS3) -> None:
    faulty_server.faults = ["denied"] * 10
    with pytest.raises(UserError, match="denied") as caught:
        open_storage(f"s3://{bucket}").list()
    assert not isinstance(caught.value, StorageUnavailable)
    assert len(faulty_server.requests) == 1


@pytest.mark.parametrize("faults", [["busy"], ["cut"], ["empty"], ["reset"], ["busy", "cut", "empty", "busy", "reset"]])
def test_a_passing_fault_is_survived_and_counted(
    bucket: str, faulty_server: FaultyS3, faults: list[Fault | None]
) -> None:
    store, retries = open_storage(f"s3://{bucket}"), []
    store.on_retry = lambda: retries.append(1)
    faulty_server.faults = list(faults)
    assert store.read("name") == BODY
    assert store.read("name") == BODY
    assert len(retries) == len(faults)
    assert len(faulty_server.requests) == len(faults) + 2


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_an_upload_survives_a_passing_fault(bucket: str, faulty_server: FaultyS3, fault: Fault) -> None:
    faulty_server.faults = [fault]
    store = open_storage(f"s3://{bucket}")
    store.write("other", BODY)
    assert store.read("other") == BODY


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_a_stuck_socket_is_given_up(
    bucket: str, faulty_server: FaultyS3, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Storage, "_CONFIG", S3Storage._CONFIG.merge(Config(read_timeout=0.3)))
    faulty_server.faults = [fault]
    assert open_storage(f"s3://{bucket}").read("name") == BODY
    assert len(faulty_server.requests) == 2


@pytest.mark.parametrize(("fault", "status"), [("busy", 503), ("throttled", 429)])
def test_a_store_that_stays_busy_is_unavailable(
    bucket: str, faulty_server: FaultyS3, monkeypatch: pytest.MonkeyPatch, fault: Fault, status: int
) -> None:
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    faulty_server.faults = lambda _: fault
    with pytest.raises(StorageUnavailable, match=f"keeps answering {status}"):
        open_storage(f"s3://{bucket}").read("name")
    assert len(faulty_server.requests) == 8


def test_a_body_that_is_always_cut_off_is_unavailable_and_leaves_no_file(
    bucket: str, faulty_server: FaultyS3, tmp_path: Path
) -> None:
    faulty_server.faults = lambda _: "cut"
    with pytest.raises(StorageUnavailable):
        open_storage(f"s3://{bucket}").download("name", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_an_object_that_changes_between_its_parts_is_not_mixed(
    bucket: str, faulty_server: FaultyS3, tmp_path: Path
) -> None:
    faulty_server.faults = ["changed"]
    with pytest.raises(StorageUnavailable, match="name changed while it was read"):
        open_storage(f"s3://{bucket}").download("name", tmp_path / "copy")
