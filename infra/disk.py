"""What it takes for files to be there after a crash of the machine, whether a folder takes any, and paths of a command line."""

import argparse
import os
import uuid
from pathlib import Path

from infra.errors import FULL


def is_in_store(place: str) -> bool:
    """Whether a place is in a store (s3://…): as a path it would be made as a folder s3: here."""
    return "://" in place


def local_path(text: str) -> Path:
    """A path of a command line, for argparse's `type`; a place in a store is refused."""
    if is_in_store(text):
        raise argparse.ArgumentTypeError(f"{text} is a place in a store: name a folder or file of this machine")
    return Path(text)


def flush(path: Path) -> None:
    """Wait until a file's content, or what a folder's files are called, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why_unwritable(folder: Path) -> str | None:
    """What keeps files from being made in a folder, or the folder from being made; None if nothing does, or a full disk, which
    may pass. Leaves nothing there."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not nearest.is_dir():
            return f"{nearest} is a file"
        if not os.access(nearest, os.W_OK | os.X_OK):
            return f"no right to write in {nearest}"
        if nearest != folder:  # a right alone does not say that it can be made: in /proc, or by root on a file server
            probe = nearest / f".probe-{uuid.uuid4().hex}"
            probe.mkdir()
            probe.rmdir()
    except OSError as error:  # also for a name that is too long
        return None if error.errno in FULL else error.strerror
    return None
