"""One writer for a run folder: a lock that ends with its process, and a token that shows whether all ranks see the folder."""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from infra.errors import OUTAGE, UserError
from infra.json_lines import read_json
from trainer.engines import Engine

WAIT_S = 5.0  # for a process that is about to end, or that only looks
LEASE_S = 60.0  # without locks: how long a sign of life of the holder counts
SEEN_S = 10.0  # in which a new file shows on the other machines


class Held(UserError):
    """Another process trains the run. That passes, also where the machine that holds the lock has died, which a file server
    may learn a minute later."""

    exit_code = OUTAGE


class RunLock:
    """Held by rank 0 of a run from before it changes anything until it ends, whatever ends it.

    Where the file system has no locks, the holder renews the file's date, and a start finds it held while that is new.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._path = Path()
        self._released = threading.Event()

    def take(self, path: Path) -> None:
        """Held if another process has it. path: of the file, in a folder that is there."""
        if self._descriptor is not None:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
            except OSError:  # no locks here
                held = _is_leased(path)
                if not held:
                    threading.Thread(target=self._renew, args=(path,), daemon=True).start()
            if not held:
                break
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise Held(f"the run in {path.parent} is being trained{_by(path)}: wait for it or stop it, or name another "
                           "--run-dir")  # fmt: skip
            time.sleep(0.1)
        self._descriptor, self._path = descriptor, path

    def sign(self) -> str:
        """Write down who holds it; returns a token that is in the file."""
        assert self._descriptor is not None
        token = secrets.token_hex(8)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": _now(), "token": token}
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        with suppress(OSError):
            os.fsync(self._descriptor)
        return token

    def release(self) -> None:
        self._released.set()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _renew(self, path: Path) -> None:
        while not self._released.wait(LEASE_S / 4):
            with suppress(OSError):
                os.utime(path)


def is_held(path: Path) -> bool:
    """Whether a process trains the run whose lock file this is."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return _is_leased(path)
    finally:
        os.close(descriptor)


def check_shared(path: Path, token: str, engine: Engine) -> None:
    """UserError, on all ranks, if the lock file of rank 0, which has that token in it, is not what the others see."""
    token = engine.broadcast(token)
    deadline = time.monotonic() + SEEN_S
    while not (seen := read_json(path, dict).get("token") == token) and time.monotonic() < deadline:
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(path.parent.parent)  # has a network file system ask its server anew what is there
            os.listdir(path.parent)
    lack = engine.gather(None if seen else f"rank {engine.rank} on {socket.gethostname()}")
    if without := engine.broadcast([one for one in lack or () if one]):
        raise UserError(f"the run folder {path.parent} of rank 0 is not there for {', '.join(without)}: name a --run-dir on "
                        "storage that all machines share, by its whole path")  # fmt: skip


def _is_leased(path: Path) -> bool:
    """Whether the file says of a process that it holds it, and was renewed of late. One of this machine that has ended does
    not."""
    holder = read_json(path, dict)
    if not holder or time.time() - path.stat().st_mtime > LEASE_S:
        return False
    return holder.get("host") != socket.gethostname() or Path(f"/proc/{holder.get('pid')}").exists()


def _by(path: Path) -> str:
    holder = read_json(path, dict)
    return f" by process {holder['pid']} on {holder['host']} since {holder['time']}" if "pid" in holder else ""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
