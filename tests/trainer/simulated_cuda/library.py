"""The stand-in for CUDA (hooks.cpp) as a library, built once for each version of torch. Imports no torch: the library has
to be loaded before it."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")


def torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def build(cache: Path) -> Path:
    """The library in a folder that outlives the tests, made there if it is missing."""
    content = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = cache / f"torch-{importlib.metadata.version('torch')}-{content}.so"
    if not library.is_file():
        include = torch_folder() / "include"
        partial = library.with_suffix(f".{os.getpid()}")  # other processes may be building it too
        subprocess.run(
            ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-w", f"-I{include}",
             f"-I{include / 'torch/csrc/api/include'}", str(SOURCE), "-o", str(partial)],
            check=True,
        )  # fmt: skip
        partial.rename(library)
    return library


def load(library: Path) -> None:
    """Put it into this process, which must not have imported torch yet."""
    for each in (*(torch_folder() / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")), library):
        ctypes.CDLL(str(each), mode=ctypes.RTLD_GLOBAL)
