"""Shards at hand: in place where the data lies on this machine, fetched whole, verified and kept where it does not."""

import fcntl
import hashlib
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.errors import UserError
from infra.storage import LocalStorage, Storage, StorageUnavailable
from pipelines.manifest import SampleEntry, Shard, index_from_json

# Waits between attempts to fetch a file, on top of the storage's own retries: a run outlives a fault of a minute.
BACKOFF_SECONDS = (1.0, 4.0, 15.0, 60.0)
_PREFETCH_THREADS = 4


def default_cache_directory() -> Path:
    """$XDG_CACHE_HOME/srunit/shards, ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srunit" / "shards"


@dataclass(frozen=True)
class OpenShard:
    """A verified tar file on this machine and where its samples lie in it."""

    path: Path
    entries: tuple[SampleEntry, ...]

    def read(self, part: tuple[int, int]) -> bytes:
        """The bytes of one part of a sample, given as (offset, length)."""
        offset, length = part
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


class ShardCache:
    """The shards of one data root. Safe to use from several threads, and from the processes of several ranks.

    A local root is used where it is. Files of a remote root are kept in `directory` under the SHA-256 of their
    content, so data sets and runs share them; a lock per file lets only one process of a machine fetch it. Every file
    is verified once per process, before its first use.

    keep: shards whose index stays in memory, the last used ones.
    """

    def __init__(self, storage: Storage, directory: Path | None = None, keep: int = 64) -> None:
        self._storage = storage
        self._directory = directory or default_cache_directory()
        self._keep = keep
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._verified: dict[str, Path] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()  # of the fields above
        self._wanted: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._asked: set[str] = set()
        self._threads: list[threading.Thread] = []

    def open(self, shard: Shard) -> OpenShard:
        """The shard on this machine; waits until it is fetched and verified.

        UserError naming the file if it is missing, damaged, or still out of reach after several attempts.
        """
        with self._guard:
            if shard.name in self._open:
                self._open.move_to_end(shard.name)
                return self._open[shard.name]
        index = self._local_file(shard.index_name, shard.index_sha256)
        opened = OpenShard(self._local_file(shard.name, shard.sha256), tuple(index_from_json(index.read_text())))
        with self._guard:
            self._open[shard.name] = opened
            if len(self._open) > self._keep:
                self._open.popitem(last=False)
        return opened

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Have shards fetched and verified in the background. A failure shows when the shard is opened."""
        for shard in shards:
            if shard.name not in self._asked:
                self._asked.add(shard.name)
                self._wanted.put(shard)
        while len(self._threads) < _PREFETCH_THREADS:
            # Daemons: a transfer in progress must not hold up the end of the program; its file is not in place yet.
            self._threads.append(threading.Thread(target=self._fetch_wanted, name="prefetch", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Stop prefetching."""
        with suppress(queue.Empty):
            while True:
                self._wanted.get_nowait()
        for _ in self._threads:
            self._wanted.put(None)
        self._threads.clear()

    def _fetch_wanted(self) -> None:
        while shard := self._wanted.get():
            with suppress(UserError, OSError):
                self.open(shard)

    def _local_file(self, name: str, sha256: str) -> Path:
        """The path of a stored file on this machine, verified."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._verified:
                local = isinstance(self._storage, LocalStorage)
                self._verified[name] = self._verify_in_place(name, sha256) if local else self._fetch(name, sha256)
            return self._verified[name]

    def _verify_in_place(self, name: str, sha256: str) -> Path:
        assert isinstance(self._storage, LocalStorage)
        path = self._storage.root / name
        if not path.is_file():
            raise UserError(
                f"{path} is missing, though the manifest names it: prepare the data again, or copy all of it"
            )
        if _sha256(path) != sha256:
            raise UserError(
                f"{path} is damaged (not the SHA-256 of the manifest): prepare the data again, or copy it anew"
            )
        return path

    def _fetch(self, name: str, sha256: str) -> Path:
        path = self._directory / f"{sha256}{''.join(Path(name).suffixes)}"
        with _file_lock(path.with_name(f"{path.name}.lock")):
            if path.is_file() and _sha256(path) == sha256:
                return path
            # One name suffices, since the lock is held; what a killed process left is overwritten.
            partial = path.with_name(f"{path.name}.part")
            for wait in (*BACKOFF_SECONDS, None):
                try:
                    self._storage.download(name, partial)
                    if _sha256(partial) == sha256:
                        partial.replace(path)
                        return path
                    partial.unlink()
                    problem = (
                        "what arrives has not the SHA-256 of the manifest: prepare the data again, or copy it anew"
                    )
                except FileNotFoundError:
                    raise UserError(
                        f"{self._storage.url}/{name} is missing, though the manifest names it: "
                        "prepare the data again, or copy all of it"
                    ) from None
                except StorageUnavailable as error:
                    problem = str(error)
                if wait is not None:
                    time.sleep(wait)
        raise UserError(f"cannot fetch {self._storage.url}/{name}: {problem}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold a lock that other threads and processes of this machine wait for; it ends with the process that holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as error:
        raise UserError(
            f"cannot write to the shard cache {path.parent} ({error.strerror}): "
            "name another folder with --data.cache-dir"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
