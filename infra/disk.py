"""What it takes for files to be there after a crash of the machine."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's content, or what a folder's files are called, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
