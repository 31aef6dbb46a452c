"""The training step of one combination of options in a process of its own, which takes steps when it is told to.

    python -m launch.benchmarks.one_step

reads JSON lines and answers each with one. The first line is the set-up, {"program": "ours" or "published", "options":
{dotted name: value}, "core": the only core to use, or null}. Then

    {"do": "steps", "first": N, "count": N}    gives, for all of them together, "seconds"; "waiting", for data; "cpu_seconds",
                                               of all cores this process used; "peak", bytes; and right after them "matmul",
                                               10^12 FLOPs a second of a large product in the step's precision
    {"do": "profile", "first": N}              gives the shares of `time_shares`

What does not fit in the memory of a GPU is answered with {"failed": reason}.
"""

import json
import os
import resource
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from launch.benchmarks.machine import matmul_tflops, seconds_per_run
from launch.benchmarks.profiling import time_shares
from launch.benchmarks.published import PublishedStep
from launch.config import JobConfig, make_config
from pipelines.loader import UnpairedLoader
from trainer.draws import Draws
from trainer.engines import make_engine
from trainer.methods import Cut
from trainer.methods.base import StepContext
from trainer.step import train_step

PROGRESS = 0.5  # of the schedule: L_robust has begun


class Stepping:
    """A loader, networks and optimisers, ready to step."""

    def __init__(self, program: str, config: JobConfig) -> None:
        self.engine = make_engine(config.engine)
        self.device, self.program = self.engine.device, program
        self.contiguous = config.engine.memory_format == "contiguous"
        batch = config.optim.global_batch
        self.loader = UnpairedLoader(
            str(config.data.root), config.data, seed=0, global_batch=batch, accumulation=1, rank=self.engine.rank,
            world_size=self.engine.world_size, device=self.device,
        )  # fmt: skip
        self.batches = iter(self.loader)
        self.method = Cut(config.method, config.model, seed=0, global_batch=batch)
        if program == "published":
            self.published = PublishedStep(self.method, config.model, config.optim, self.device)
        else:
            self.engine.prepare(self.method, config.optim)

    def step(self, number: int) -> float:
        """Take step `number`; returns the seconds it waited for data."""
        begin = time.perf_counter()
        batches = next(self.batches)
        waited = time.perf_counter() - begin
        if self.contiguous:  # features have the layout of the images, and the loader's are channels-last
            batches = [
                replace(each, source=each.source.contiguous(), target=each.target.contiguous()) for each in batches
            ]
        context = StepContext(Draws(0, number), PROGRESS, self.engine.all_ranks)
        if self.program == "published":
            self.published(batches[0], context)
        else:
            train_step(self.method, self.engine, batches, context)
        return waited

    def steps(self, first: int, count: int) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        waiting = 0.0

        def run() -> None:
            nonlocal waiting
            waiting = sum(self.step(number) for number in range(first, first + count))

        begin = time.process_time()
        seconds = seconds_per_run(run, self.device)
        cpu_seconds, peak = time.process_time() - begin, self._peak()
        matmul = matmul_tflops(self.device, self.engine.dtype or torch.float32)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "waiting": waiting, "peak": peak, "matmul": matmul}

    def profile(self, first: int) -> dict[str, float]:
        return time_shares(lambda: self.step(first), self.device)

    def _peak(self) -> int:
        """Bytes allocated on a GPU since the first of these steps, or this process's largest resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def answer(stepping: Stepping, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return stepping.steps(**request) if request.pop("do") == "steps" else stepping.profile(**request)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        if stepping.device.type == "cuda":
            torch.cuda.empty_cache()  # the other combinations' processes share the GPU


def main() -> None:
    # Libraries print what they like to the standard output; the answers keep it to themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup = json.loads(sys.stdin.readline())
    if setup["core"] is not None:
        os.sched_setaffinity(0, {setup["core"]})
    stepping = Stepping(setup["program"], make_config(setup["options"]))
    for line in sys.stdin:
        print(json.dumps(answer(stepping, json.loads(line))), file=answers, flush=True)
    stepping.loader.close()
    stepping.engine.close()


if __name__ == "__main__":
    main()
