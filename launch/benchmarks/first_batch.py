"""The memory and start-up of the loader, in a process of its own: its peak must hold nothing but the loader.

    python -m launch.benchmarks.first_batch ROOT BATCH THREADS STEPS

prints {"first_batch_s": seconds from making the loader to its first batch, imports left out,
"peak_MB": the process's largest resident memory after STEPS batches, in 10^6 bytes}.
"""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from pipelines.config import DataConfig
from pipelines.loader import Loader


def main() -> None:
    root = sys.argv[1]
    batch, threads, steps = map(int, sys.argv[2:])
    begin = time.perf_counter()
    loader = Loader(root, DataConfig(threads=threads), seed=0, global_batch=batch, device=torch.device("cpu"))
    batches = iter(loader)
    next(batches)
    first_batch_s = time.perf_counter() - begin
    for _ in islice(batches, steps):
        pass
    loader.close()
    print(json.dumps({"first_batch_s": first_batch_s, "peak_MB": peak_bytes() / 1e6}))


def peak_bytes() -> int:
    """The largest resident memory of this process. Linux only (getrusage's would begin with that of the parent)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
