"""A training in a process of its own, which takes steps when it is told to."""

import multiprocessing
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from infra.errors import UserError
from launch.benchmarks.measuring import matmul_tflops, seconds_per_run
from launch.benchmarks.profiling import time_shares
from launch.benchmarks.published import PublishedStep
from launch.benchmarks.work import PROGRESS, flops_of
from launch.runs.config import JobConfig, make_config
from pipelines.loader import Loader
from trainer.draws import Draws
from trainer.engines import make_engine
from trainer.methods import Srunit
from trainer.methods.base import StepContext
from trainer.step import train_step


class OutOfMemory(Exception):
    """It does not fit in the memory of the GPU."""


class Stepper:
    """The process, from outside. It stays alive between its turns, and waits.

    program: "ours" or "published". options: of the configuration tree, flat.
    """

    def __init__(self, name: str, program: str, options: Mapping[str, Any]) -> None:
        self.name = name
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints when it starts and stops
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, program, dict(options)), daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()  # the end of its work
        self._process.join(timeout=60)
        self._process.kill()

    def ask(self, what: str, **request: int) -> dict[str, float]:
        """Have it do `Training.steps` or `Training.profile`. Raises OutOfMemory, and UserError if the process has ended."""
        try:
            self._connection.send((what, request))
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise UserError(
                f"the process of {self.name!r} ended early (its message is above): leave this combination out"
            ) from None
        if answer is None:
            raise OutOfMemory(self.name)
        return dict(answer)


def _serve(connection: Connection, program: str, options: dict[str, Any]) -> None:
    training = Training(program, make_config(options))
    try:
        while True:
            what, request = connection.recv()
            try:
                answer = getattr(training, what)(**request)
            except torch.OutOfMemoryError:
                answer = None
            connection.send(answer)
            if training.device.type == "cuda":
                torch.cuda.empty_cache()  # the other combinations' processes share the GPU
    except EOFError:
        training.loader.close()
        training.engine.close()
        os._exit(0)  # DALI's threads need no farewell


class Training:
    """A loader, networks and optimisers, ready to step."""

    def __init__(self, program: str, config: JobConfig) -> None:
        self.engine = make_engine(config.engine)
        self.device, self.program = self.engine.device, program
        self.contiguous = config.engine.memory_format == "contiguous"
        batch = config.optim.global_batch
        self.loader = Loader(
            str(config.data.root), config.data, config.method.view, seed=0, global_batch=batch, device=self.device
        )
        self.batches = iter(self.loader)
        self.method = config.method.build(seed=0, global_batch=batch)
        if program == "published":
            assert isinstance(self.method, Srunit)
            self.published = PublishedStep(self.method, config.optim, self.device)
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
        context = StepContext(Draws(0, number), PROGRESS)
        if self.program == "published":
            self.published(batches[0], context)
        else:
            train_step(self.method, self.engine, batches, context)
        return waited

    def steps(self, first: int, count: int) -> dict[str, float]:
        """Of all together: seconds; waiting, for data; cpu_seconds, of all cores; peak, bytes; and right after them
        matmul, 10^12 FLOPs a second of a large product in the step's precision."""
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
        """flops: of one step, as torch counts them; and the shares of its time by kind of work."""
        return {"flops": flops_of(lambda: self.step(first)), **time_shares(lambda: self.step(first), self.device)}

    def _peak(self) -> int:
        """Bytes allocated on a GPU since the first of these steps, or this process's largest resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
