"""The training step of a job, as launch/train.py takes it: time, arithmetic, memory, and where the time goes.

The job is trained on its own data for a while and nothing is written. Steps before the first repetition do not count. With
several ranks (torchrun or deepspeed in place of python) the metrics are those of the first.

Measurements, by their keys in the JSON:

seconds            s a step
pairs_per_s        pairs of images a second, of all ranks
cpu_seconds        s of all cores a step: with one thread, other programs on the machine change it little
waiting            share of the time spent waiting for data
tflop              10^12 FLOPs of a step, the mean of as many as a repetition has (steps of some methods differ in turn), counted
                   by torch: two for a multiplication with its addition, backward included
tflops             10^12 of these a second
matmul             the same of a large matrix product in this precision, right after the steps (what the device can do)
matmul_share       tflops / matmul
peak               GiB: largest memory allocated on a GPU, largest resident memory of the process on a CPU
parameters/NETWORK in millions
share/KIND         of the time of as many profiled steps, KINDS of `launch.benchmarks.profiling`
"""

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.benchmarks.measuring import Measurement, interleaved, matmul_tflops, ratios, seconds_per_run
from launch.benchmarks.profiling import time_shares
from launch.runs.config import JobConfig
from launch.runs.data import find_data
from pipelines.loader import Loader
from trainer.draws import Draws
from trainer.engines import make_engine
from trainer.methods.base import StepContext
from trainer.step import train_step
from trainer.step_graphs import steps_of

HELP = "the training step of a job: time, FLOPs and their share of the device's best, memory, time by kind of work"
PROGRESS = 0.5  # of the schedule: every loss has begun
WARM_UP = 25  # where code is chosen or compiled: one random tap a step has then met all five twice


class Training:
    """A loader, networks and optimisers, ready to step."""

    def __init__(self, config: JobConfig) -> None:
        root = find_data(config.task, config.data.root)
        self.config = config
        self.engine, optim = make_engine(config.engine), config.optim
        self.device, self.taken = self.engine.device, 0
        self.loader = Loader(
            root, config.data, config.method.view, seed=config.seed, global_batch=optim.global_batch,
            accumulation=optim.accumulation, rank=self.engine.rank, world_size=self.engine.world_size, device=self.device,
        )  # fmt: skip
        self.batches = iter(self.loader)
        self.method = config.method.build(seed=config.seed, global_batch=optim.global_batch)
        self.engine.prepare(self.method, optim)
        self.take = steps_of(self.method, self.engine)

    def close(self) -> None:
        self.loader.close()
        self.engine.close()

    def update(self, batches: Sequence[Any], context: StepContext) -> None:
        self.take(batches, context)

    def step(self) -> float:
        """Take the next step; returns the seconds it waited for data."""
        begin = time.perf_counter()
        batches = next(self.batches)
        waited = time.perf_counter() - begin
        self.update(batches, StepContext(Draws(self.config.seed, self.taken), PROGRESS, self.engine.all_ranks))
        self.taken += 1
        return waited

    def steps(self, count: int) -> dict[str, float]:
        """The metrics that each repetition measures."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        waited: list[float] = []
        begin = time.process_time()
        seconds = seconds_per_run(lambda: waited.append(self.step()), self.device, count)
        cpu_seconds, peak = (time.process_time() - begin) / count, self._peak()
        matmul = matmul_tflops(self.device, self.engine.dtype or torch.float32)
        return {
            "seconds": seconds, "pairs_per_s": self.config.optim.global_batch / seconds, "cpu_seconds": cpu_seconds,
            "waiting": sum(waited) / count / seconds, "peak": peak / 2**30, "matmul": matmul,
        }  # fmt: skip

    def _peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def parameters(self) -> dict[str, int]:
        """How many each network has, by its name in a checkpoint."""
        networks = {
            name: network
            for spec in self.method.optimisers
            for name, network in self.method.networks(spec.name).items()
        }
        return {name: sum(each.numel() for each in network.parameters()) for name, network in networks.items()}


def flops_of(run: Callable[[], Any]) -> float:
    """FLOPs of what this runs, nothing of it compiled: no operator would be seen."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def run(config: JobConfig, repetitions: int, steps: int | None) -> list[Measurement]:
    """Measure `steps` steps in each repetition, 1 on a CPU and 20 on a GPU unless told; nothing on ranks but the first."""
    with closing(Training(config)) as training:
        on_gpu = training.device.type == "cuda"
        count = steps or (20 if on_gpu else 1)
        for _ in range(WARM_UP if on_gpu or config.engine.compile == "true" else 1):
            training.step()
        found = interleaved([lambda: training.steps(count)], repetitions)
        training.take = partial(train_step, training.method, training.engine)  # graphs show no operator of theirs

        def repetition() -> None:
            for _ in range(count):
                training.step()

        tflop = flops_of(repetition) / count / 1e12
        shares = time_shares(repetition, training.device)
        if training.engine.rank:
            return []
        tflops = [tflop / seconds for seconds in found["seconds"]]
        return [
            Measurement("seconds", "s", found["seconds"]),
            Measurement("pairs_per_s", "pairs/s", found["pairs_per_s"]),
            Measurement("cpu_seconds", "s", found["cpu_seconds"]),
            Measurement("waiting", "", found["waiting"]),
            Measurement("tflop", "TFLOP", [tflop]),
            Measurement("tflops", "TFLOP/s", tflops),
            Measurement("matmul", "TFLOP/s", found["matmul"]),
            Measurement("matmul_share", "", ratios(tflops, found["matmul"])),
            Measurement("peak", "GiB", found["peak"]),
            *(Measurement(f"parameters/{name}", "million", [n / 1e6]) for name, n in training.parameters().items()),
            *(Measurement(f"share/{kind}", "", [share]) for kind, share in shares.items()),
        ]
