"""Shards at hand: in place where the data lies on this machine, fetched whole, verified and kept where it does not."""

import fcntl
import hashlib
import logging
import os
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from infra.cache_home import cache_home
from infra.errors import UserError
from infra.storage import TEMPORARY, LocalStorage, Storage, StorageUnavailable, WrongContent
from pipelines.health import DataHealth
from pipelines.manifest import SampleEntry, Shard
from pipelines.shards import DamagedShard, index_tar

log = logging.getLogger(__name__)

# For how long a store may be away, on top of its own retries: a run outlives a fault of a minute.
PATIENCE_SECONDS = 90.0
WAIT_SECONDS = (1.0, 20.0)  # before a fetch is tried again: the first wait, which then doubles, and the longest
WRONG_ATTEMPTS = 3  # fetches until wrong content is the store's fault and not the network's
_PREFETCH_THREADS = 4


class UnusableShard(UserError):
    """A shard that stays missing, or whose content stays wrong. The run may go on without it."""


@dataclass(frozen=True)
class OpenShard:
    """A verified tar file on this machine and where its samples lie in it.

    Holds the file open, so that it can be read whatever becomes of its name, and no cache makes room by removing it.
    """

    file: BinaryIO
    entries: tuple[SampleEntry, ...]

    @property
    def path(self) -> Path:
        return Path(self.file.name)

    def read(self, part: tuple[int, int]) -> bytes:
        """The bytes of one part of a sample, given as (offset, length)."""
        offset, length = part
        return os.pread(self.file.fileno(), length, offset)

    def __del__(self) -> None:
        self.file.close()


class ShardCache:
    """The shards of one data root. Safe to use from several threads, and from the processes of several ranks.

    A local root is used where it is; files of a remote root are kept in `directory`, see `FolderOfCopies`. Every file
    is verified once per process, before its first use.

    keep: shards that stay open, the last used ones. limit_bytes: of all files in `directory`, None for no limit.
    health: where retries, evictions and fetched bytes are counted.
    """

    def __init__(
        self,
        storage: Storage,
        directory: Path | None = None,
        keep: int = 64,
        *,
        limit_bytes: int | None = None,
        health: DataHealth | None = None,
    ) -> None:
        self._files = (
            FilesInPlace(storage)
            if isinstance(storage, LocalStorage)
            else FolderOfCopies(storage, directory or cache_home() / "shards", limit_bytes, health or DataHealth())
        )
        self._url = storage.url
        self._keep = keep
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._asked: set[str] = set()
        self._guard = threading.Lock()  # of the fields above
        self._wanted: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def open(self, shard: Shard) -> OpenShard:
        """The shard on this machine; waits until it is fetched and verified.

        UnusableShard, which names the file, if it is missing or damaged after all attempts; any other UserError for
        what concerns not this shard alone: a store that stays out of reach or denies access, a full disk.
        """
        with self._guard:
            lock = self._locks.setdefault(shard.name, threading.Lock())
        with lock:
            with self._guard:
                if shard.name in self._open:
                    self._open.move_to_end(shard.name)
                    return self._open[shard.name]
                while len(self._open) >= self._keep:  # before the next one is fetched, which may need the room
                    self._asked.discard(self._open.popitem(last=False)[0])
            file = self._files.open(shard.name, shard.sha256)
            opened = OpenShard(file, self._entries(shard, file))
            with self._guard:
                self._open[shard.name] = opened
            return opened

    def _entries(self, shard: Shard, file: BinaryIO) -> tuple[SampleEntry, ...]:
        """From the tar itself, which is here as a whole: its index file would be another request."""
        try:
            entries = tuple(index_tar(shard.name, file))
            if len(entries) == shard.samples:
                return entries
            reason = f"it holds {len(entries)} images, and the manifest says {shard.samples}"
        except DamagedShard:
            reason = "it is cut off, or not a tar of images"
        file.close()
        raise UnusableShard(f"{self._url}/{shard.name} is no shard ({reason}): prepare the data again")

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Have shards fetched and verified in the background. A failure shows when the shard is opened."""
        for shard in shards:
            with self._guard:
                if shard.name in self._asked:
                    continue
                self._asked.add(shard.name)
            self._wanted.put(shard)
        while len(self._threads) < _PREFETCH_THREADS:
            # Daemons: a transfer in progress must not hold up the end of the program; its file is not in place yet.
            self._threads.append(threading.Thread(target=self._fetch_wanted, name="prefetch", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Stop prefetching, and let go of all shards."""
        with suppress(queue.Empty):
            while True:
                self._wanted.get_nowait()
        for _ in self._threads:
            self._wanted.put(None)
        self._threads.clear()
        with self._guard:
            self._open.clear()
            self._asked.clear()

    def _fetch_wanted(self) -> None:
        while shard := self._wanted.get():
            with suppress(UserError):
                self.open(shard)


class FilesInPlace:
    """The files of a local root."""

    def __init__(self, storage: LocalStorage) -> None:
        self._root = storage.root
        self._verified: set[str] = set()

    def open(self, name: str, sha256: str) -> BinaryIO:
        """A file of the root, verified. UnusableShard if it is missing or damaged."""
        path = self._root / name
        file = _open_verified(path, sha256, self._verified)
        if file is None:
            problem, remedy = (
                ("damaged (not the SHA-256 of the manifest)", "copy it anew")
                if path.is_file()
                else ("missing, though the manifest names it", "copy all of it")
            )
            raise UnusableShard(f"{path} is {problem}: prepare the data again, or {remedy}")
        return file


class FolderOfCopies:
    """Verified copies of a store's files, shared by all ranks and runs of a machine.

    A copy is called after the SHA-256 of its content and gets that name once it is complete and right. One lock per
    name (of 256, so that they do not pile up) lets one process fetch it while the others wait.

    limit_bytes: when all copies together are larger, those opened longest ago are removed, except what is in use: an
    open copy holds a shared lock. Where that alone is too large, the limit is exceeded and a warning says so.
    """

    def __init__(self, storage: Storage, directory: Path, limit_bytes: int | None, health: DataHealth) -> None:
        self._storage = storage
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._health = health
        self._verified: set[str] = set()
        self._limit_exceeded = False
        storage.on_retry = health.count_retry
        LocalStorage(directory).sweep()

    def open(self, name: str, sha256: str) -> BinaryIO:
        """The copy of a stored file, in use until it is closed; fetched if it is not here. Errors: `ShardCache.open`."""
        path = self._directory / f"{sha256}{''.join(Path(name).suffixes)}"
        file = self._open_copy(path, sha256)
        if file is None:
            with _locked(self._directory / "locks" / sha256[:2]):
                while (file := self._open_copy(path, sha256)) is None:
                    self._fetch(name, path, sha256)
            if self._limit_bytes is not None:
                self._make_room(self._limit_bytes)
        return file

    def _open_copy(self, path: Path, sha256: str) -> BinaryIO | None:
        file = _open_verified(path, sha256, self._verified)
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_SH)
            with suppress(PermissionError):  # another user's copy, whose age is then that of its last use by its owner
                os.utime(file.fileno())
        return file

    def _fetch(self, name: str, path: Path, sha256: str) -> None:
        """Bring a file here, however often it takes."""
        url = f"{self._storage.url}/{name}"
        give_up, (wait, longest), wrong = time.monotonic() + PATIENCE_SECONDS, WAIT_SECONDS, 0
        while True:
            try:
                self._health.count_fetched(self._storage.download(name, path, sha256))
                self._verified.add(sha256)
                return
            except FileNotFoundError:
                raise UnusableShard(
                    f"{url} is missing, though the manifest names it: prepare the data again, or copy all of it"
                ) from None
            except WrongContent:
                wrong += 1
                if wrong == WRONG_ATTEMPTS:
                    raise UnusableShard(
                        f"{url} is damaged (what arrives has not the SHA-256 of the manifest): "
                        "prepare the data again, or copy it anew"
                    ) from None
            except StorageUnavailable as error:
                if time.monotonic() > give_up:
                    raise StorageUnavailable(f"cannot fetch {url}: {error}") from None
            self._health.count_retry()
            time.sleep(wait * _jitter.uniform(0.5, 1.0))
            wait = min(2 * wait, longest)

    def _make_room(self, limit_bytes: int) -> None:
        """Remove the copies opened longest ago until the rest is within the limit, but none that is in use."""
        with _locked(self._directory / "locks" / "room"):
            copies = sorted(_copies(self._directory), key=lambda copy: copy[1].st_mtime_ns)
            total = sum(status.st_size for _, status in copies)
            for path, status in copies:
                if total <= limit_bytes:
                    return
                if _remove_unused(path):
                    total -= status.st_size
                    if path.suffix == ".tar":
                        self._health.count_eviction()
        if total > limit_bytes and not self._limit_exceeded:
            self._limit_exceeded = True
            log.warning(
                "the shards in use need %.3f GB, more than the limit of the shard cache of %.3f GB: "
                "raise --data.cache-gb, or give a smaller --data.window",
                total / 1e9,
                limit_bytes / 1e9,
            )


_jitter = random.Random()  # of its own, since the run's draws hang on the seed alone


def _open_verified(path: Path, sha256: str, verified: set[str]) -> BinaryIO | None:
    """An open file whose content has that SHA-256, None if it is missing or another. verified: those known to be right."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): check its permissions, and ulimit -n against --data.window"
        ) from None
    if sha256 not in verified and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
        file.close()
        return None
    verified.add(sha256)
    file.seek(0)
    return file


def _copies(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The complete files of a folder, and their sizes and times."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # somebody may be emptying the folder
                if entry.is_file() and not entry.name.startswith(TEMPORARY):
                    yield Path(entry.path), entry.stat()


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody holds a lock on it; whether it was removed."""
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other threads and processes of this machine wait for; it ends with the process that holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"cannot write to the shard cache {path.parent.parent} ({error.strerror}): "
            "name another folder with --data.cache-dir"
        ) from None
    with file:
        yield
