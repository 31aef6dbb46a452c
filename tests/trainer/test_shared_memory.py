"""/dev/shm of 64 MB, Docker's default: said in a sentence before anything is trained."""

import os
import sys
from pathlib import Path

import pytest

from infra.errors import UserError
from trainer.engines import shared_memory
from trainer.engines.base import local_ranks


@pytest.mark.parametrize(("mib", "ranks", "fits"), [(64, 2, False), (133, 2, False), (134, 2, True), (64, 1, True)])
def test_room_for_the_buffers_of_all_ranks(mib: int, ranks: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_builder", lambda: object())
    free = os.statvfs_result((4096, 4096, mib << 8, mib << 8, mib << 8, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    if fits:
        shared_memory.check_room(ranks)
        return
    with pytest.raises(UserError, match=rf"2 CPU ranks .* need 134 MiB of /dev/shm, which has {mib}: .*--shm-size"):
        shared_memory.check_room(ranks)


def test_deepspeed_asks_for_what_it_uses() -> None:
    """The sizes in its source, of which the buffer is made."""
    import deepspeed

    source = (Path(deepspeed.__file__).parent / "ops/csrc/cpu/comm/shm.cpp").read_text()
    assert "#define MAX_BUF_SIZE 1048576 * 32\n#define NAIVE_ALLREDUCE_THRESHOLD 1048576\n" in source
    assert "char buffer[2 * NAIVE_ALLREDUCE_THRESHOLD + 2 * MAX_BUF_SIZE]" in source
    assert 66 * 2**20 < shared_memory.BUFFER_BYTES <= 67 * 2**20


def test_each_installation_compiles_its_own_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    before = shared_memory.folder()
    assert shared_memory.folder() == before
    monkeypatch.setattr(sys, "prefix", "/elsewhere/.venv")
    assert shared_memory.folder() != before


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_both_launchers_say_how_many_ranks_are_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "3")
    assert local_ranks() == 3
