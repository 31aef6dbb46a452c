"""Which device of this machine work is done on, where no option says so, and what a CPU does well."""

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def usual_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_fast_bf16() -> bool:
    """Whether this machine's CPU multiplies in bf16 faster than in fp32: by AMX, or by AVX512-BF16, unless it is Intel's. That
    of two cores of a Xeon without AMX made 169 GFLOP/s in bf16 and 303 in fp32, one core of an AMD EPYC 209 and 94."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _is_intels()


def _is_intels() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # of another system than Linux
        return False


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks of memory, as a GPU's allocator does. It gives them back to the system by default, which then
    clears every page of the next one: an eighth of a training step's time at 256x256, a third of a translation's at 1024x512."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
