"""DeepSpeed's exchange of gradients between the CPU ranks of a node: an extension that it compiles, and a shared buffer."""

import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from infra.cache_home import cache_home
from infra.errors import UserError

OP = "deepspeed_shm_comm"
SHARED_MEMORY = Path("/dev/shm")
BUFFER_BYTES = 67 * 2**20  # of each rank, in DeepSpeed 0.19: two times 32 + 1 MiB, and its state


def folder() -> Path:
    """Where the extension is compiled: anew for each installation, of whose headers it is made; two that shared a folder would
    compile it at every other start."""
    place = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    versions = f"torch{torch.__version__}_python{platform.python_version()}_{place}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home() / "extensions" / versions) / OP


def _builder() -> Any:
    """None where it cannot be compiled."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    return builder if builder is not None and __compatible_ops__.get(builder.NAME, False) else None


def check_room(ranks: int) -> None:
    """UserError if /dev/shm has no room for the buffers of this machine's ranks: writing to them would be a SIGBUS or SIGSEGV
    in the first step. To be called before any of them can have made one, which is before they have met."""
    needed = ranks * BUFFER_BYTES
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if ranks > 1 and free < needed and _builder() is not None:
        raise UserError(f"{ranks} CPU ranks under DeepSpeed need {needed >> 20} MiB of {SHARED_MEMORY}, which has {free >> 20}: "
                        "give the container more (docker run --shm-size 1g; in Kubernetes an emptyDir of medium Memory), or "
                        "start with torchrun and --engine ddp, which needs none")  # fmt: skip


def build() -> None:
    """Compile the extension, or load it where it is compiled already (half a minute, once for each version of torch).

    torch guards this by a file that a killed process leaves behind, after which every later start would wait for ever. So
    ranks and jobs take turns by a lock that ends with its process, and whoever holds it removes torch's file. The folder is
    ours, hence no other program can be compiling in it.
    """
    builder = _builder()
    if builder is None:
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
    Path(SHARED_MEMORY, f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{rank}").unlink(missing_ok=True)
