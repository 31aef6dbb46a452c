"""DeepSpeed's exchange of gradients between the CPU ranks of a node: an extension that it compiles, and a shared buffer."""

import os
import platform
from pathlib import Path

import torch
from filelock import FileLock

from infra.cache_home import cache_home

OP = "deepspeed_shm_comm"


def folder() -> Path:
    """Where the extension is compiled."""
    versions = f"torch{torch.__version__}_python{platform.python_version()}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home() / "extensions" / versions) / OP


def build() -> None:
    """Compile the extension, or load it where it is compiled already (half a minute, once for each version of torch).

    torch guards this by a file that a killed process leaves behind, after which every later start would wait for ever. So
    ranks and jobs take turns by a lock that ends with its process, and whoever holds it removes torch's file. The folder is
    ours, hence no other program can be compiling in it.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not __compatible_ops__.get(builder.NAME, False):
        return  # DeepSpeed goes without it, too
    place = folder()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(place.parent))
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "turn"):
        (place / "lock").unlink(missing_ok=True)
        builder.load()  # DeepSpeed finds it loaded from here on


def unlink_buffer(rank: int) -> None:
    """Take the name off the shared buffer (67 MB), which DeepSpeed never does itself: it would fill /dev/shm run by run.
    Mapped by all ranks, the memory stays until the last of them ends."""
    address = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{rank}").unlink(missing_ok=True)
