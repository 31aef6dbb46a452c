"""The training loop: fetch, step, report, sample, save."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from infra.config import option
from infra.errors import DIVERGED, Stopped, UserError
from infra.signals import GRACE_S, StopRequest, ToldToStop, listening
from trainer.average import MovingAverage
from trainer.checkpoint import Checkpoint
from trainer.draws import Draws
from trainer.engines import Engine
from trainer.methods.base import Method, StepContext
from trainer.optim import OptimConfig
from trainer.reports import Pending, Report, Reports
from trainer.schedule import Schedule
from trainer.state import TrainingState, collect_state, restore_state
from trainer.step import NORM
from trainer.step_graphs import steps_of

log = logging.getLogger(__name__)

SAMPLES = ("source_keys", "target_keys", "keys")  # of a batch that names its samples
_END: Any = object()


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    max_steps: int | None = option(
        None, "stop after this many steps, however long the schedule", flag="--max-steps", resumable=True
    )
    report_every: int = option(
        10,
        "steps between reports of metrics (a line for every step); on a GPU one is written when the next begins",
        resumable=True,
    )
    samples_every: int = option(500, "steps between sample grids", resumable=True)
    samples: int = option(4, "rows of the sample grid", resumable=True)
    checkpoint_every: int = option(1000, "steps between checkpoints", resumable=True)
    keep: int = option(2, "checkpoints kept in the run folder", resumable=True)
    keep_logged: int = option(1, "checkpoints kept as MLflow artifacts", resumable=True)
    on_nonfinite: str = option(
        "stop", "a loss or gradient that is not finite: end the run with its data and state in postmortem/, or skip the step",
        flag="--on-nonfinite", choices=("stop", "skip"), resumable=True,
    )  # fmt: skip
    nonfinite_limit: int = option(10, "on_nonfinite skip: how many such steps in a row are passed over", resumable=True)
    mirror: str | None = option(
        None, "s3://bucket/prefix of this run alone: checkpoints are copied there, and restored from it", resumable=True
    )
    grace: float = option(
        GRACE_S, "seconds from a signal to stop until the process ends in any case, saved or not", resumable=True
    )

    def __post_init__(self) -> None:
        counts = (self.report_every, self.samples_every, self.samples, self.checkpoint_every, self.keep)
        if min(counts) < 1 or min(self.keep_logged, self.nonfinite_limit) < 0:
            raise UserError("loop.*_every, loop.samples and loop.keep must be 1 or more, loop.keep_logged and "
                            "loop.nonfinite_limit 0 or more")  # fmt: skip
        if not 0 < self.grace < math.inf:
            raise UserError(f"loop.grace {self.grace:g} is no time to save in: give seconds above 0, such as 30")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"--max-steps {self.max_steps} trains nothing: give 1 or more")


@dataclass(frozen=True)
class Evaluation:
    """metrics: what an evaluation after `step` steps measured, on rank 0. best: the best so far, and keep: so good, or so
    much asked for, that a checkpoint is to hold what was evaluated; both known to all ranks."""

    step: int
    metrics: Mapping[str, Any]
    best: bool
    keep: bool


@dataclass(frozen=True)
class Broken:
    """The step (counted from 1) whose losses or gradients are not finite and end the run. metrics: all of it, of the mean over
    ranks. names: of those that are not finite. samples: by rank and micro-batch, what the loader calls its samples, by kind."""

    step: int
    metrics: Mapping[str, float]
    names: Sequence[str]
    samples: Sequence[Sequence[Mapping[str, Sequence[str]]]]

    def as_json(self) -> dict[str, Any]:
        """With "nan" and "inf" as words, since JSON has no numbers for them."""
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()}
        return {"step": self.step, "not_finite": self.names, "metrics": metrics, "samples": self.samples}


Save = Callable[[TrainingState, Evaluation | None], None]


class Recorder(Protocol):
    """Writes down what a training measures."""

    def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
        """So many steps are done. rows: the metrics of those that have become known since the last call, in order, each once."""

    def measured(self, done: int, count: int) -> None:
        """Of `count` steps that the method is to see before the first one it has seen so many."""

    def estimate(self, seconds: float) -> None:
        """Once, early: seconds that the rest of the run will take at the pace of its second step."""


class Trainer:
    """Trains a method on an iterable of steps, each a list of this rank's micro-batches."""

    def __init__(
        self,
        method: Method[Any, Any],
        engine: Engine,
        optim: OptimConfig,
        config: LoopConfig,
        *,
        seed: int,
        source_samples: int,
        evaluate_every: float = 0.0,
    ) -> None:
        """evaluate_every: epochs between evaluations, the last of which is at the end; 0: none."""
        self.method, self.engine, self.config, self.seed = method, engine, config, seed
        self.schedule = Schedule(optim, source_samples)
        self.evaluate_every = evaluate_every
        self.averaged = MovingAverage(method.product, optim.ema) if optim.ema else None
        self.engine.halts = config.on_nonfinite == "stop"
        self._take = steps_of(method, engine)
        self.reports = Reports(engine)
        # The step that ends the run, its metrics, and the names of those that are not finite.
        self._broken: tuple[Pending, dict[str, float], list[str]] | None = None
        self._skipped = 0  # steps in a row, until now, that were not finite
        self._waited = 0.0  # seconds for the batches of the step that begins
        self._pause: float | None = None  # seconds of the last save, if no report has had them yet

    @property
    def total_steps(self) -> int:
        return min(self.schedule.steps, self.config.max_steps or self.schedule.steps)

    @property
    def product(self) -> nn.Module:
        """The network that is evaluated: the moving average where one is kept."""
        return self.method.product if self.averaged is None else self.averaged.module

    def restore(self, checkpoint: Checkpoint) -> None:
        restore_state(self.method, self.engine, self.averaged, checkpoint)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The network that is evaluated, in evaluation mode: batch norm uses its running statistics and does not update them."""
        product = self.product
        product.eval()
        try:
            yield product
        finally:
            product.train()

    def fit(
        self,
        steps: Iterable[Sequence[Any]],
        first_step: int,
        *,
        recorder: Recorder,
        sample: Callable[[int], None],
        evaluate: Callable[[int], Evaluation] | None,
        save: Save,
        examine: Callable[[TrainingState, Broken], None] = lambda state, broken: None,
        owed: bool = False,
    ) -> None:
        """Train from `first_step` (the number of steps already done) to the end. owed: the evaluation after it is made first.

        sample, evaluate, save: draw what the network does, evaluate it, and keep a checkpoint (with the evaluation of the
        same step, if there was one) after so many steps. examine: told of the step that ends the run, with the state in which
        it left the training. All are called on all ranks at once. evaluate may raise ToldToStop, then on all ranks. Raises
        Stopped when a rank is told to stop (all end after the same step, which is saved) and when a loss or gradient is no
        longer finite.
        """
        with listening() as stop, stop.deferred():
            if first_step == 0:
                self._measure(steps, recorder, stop)
            if owed and evaluate:
                self._save(first_step, self._evaluation(first_step, first_step, evaluate, save, stop), save)
            self.reports.restart()
            given, saved = iter(steps), first_step
            for step in range(first_step, self.total_steps):
                batches = self._next(given, stop)
                # Ranks agree while no step is under way, so that one that waits for its data can stop with the others.
                if self.engine.any(batches is None):
                    self._flush(step, recorder, examine)
                    self._stop(step, saved, save, stop)
                if batches is None or batches is _END:
                    break
                done = step + 1
                last = done == self.total_steps
                samples = last or done % self.config.samples_every == 0
                saves = last or done % self.config.checkpoint_every == 0
                evaluates = self.evaluate_every > 0 and (last or self.schedule.passes(done, self.evaluate_every))
                # A checkpoint must find the line of every step before it written: a resumed run cuts the file there. And
                # what takes its time here must not count as that of steps.
                with self.engine.step(done):
                    self._step(step, batches)
                    rows = self._rows(done, samples or saves or evaluates or done - first_step <= 2)
                recorder.record(done, rows)
                if self._broken:
                    self._end(*self._broken, examine)
                if done - first_step == 2:
                    pairs = (self.total_steps - done) * self.schedule.optim.global_batch
                    recorder.estimate(pairs / rows[-1]["pairs_per_s"])
                if samples:
                    sample(done)
                evaluation = self._evaluation(done, saved, evaluate, save, stop) if evaluate and evaluates else None
                if saves or (evaluation and evaluation.keep):
                    self._save(done, evaluation, save)
                    saved = done
                if rows:
                    self.reports.restart()

    def _save(self, done: int, evaluation: Evaluation | None, save: Save) -> None:
        began = time.perf_counter()
        save(collect_state(self.method, self.engine, self.averaged, done), evaluation)
        self._pause = time.perf_counter() - began

    def _next(self, given: Iterator[Sequence[Any]], stop: StopRequest) -> Sequence[Any] | None:
        """The next step's batches, _END after the last; None if this rank was told to stop, before or while it waited."""
        began = time.perf_counter()
        try:
            with stop.interruptible():
                return next(given, _END)
        except ToldToStop:
            return None
        finally:
            self._waited = time.perf_counter() - began

    def _evaluation(
        self, done: int, saved: int, evaluate: Callable[[int], Evaluation], save: Save, stop: StopRequest
    ) -> Evaluation:
        """Gives way, on all ranks, if one is told to stop."""
        if not self.engine.any(stop.told):
            with suppress(ToldToStop):
                return evaluate(done)
        self._stop(done, saved, save, stop, owed=True)

    def _flush(self, done: int, recorder: Recorder, examine: Callable[[TrainingState, Broken], None]) -> None:
        """Write the lines of steps that no report has had yet."""
        if reports := self.reports.take(wait=True):
            recorder.record(done, self._rows_of(reports))
        if self._broken:
            self._end(*self._broken, examine)

    def _stop(self, done: int, saved: int, save: Save, stop: StopRequest, *, owed: bool = False) -> NoReturn:
        """Save what is not saved yet, on all ranks, and raise Stopped."""
        stop.agree()
        if done > saved:
            state = collect_state(self.method, self.engine, self.averaged, done)
            save(replace(state, owed=owed), None)
        where = f"after step {done}, which is saved" if done else "before the first step"
        raise Stopped(f"told to stop {where}: the same command goes on from there", stop.exit_code)

    def _context(self, step: int) -> StepContext:
        return StepContext(Draws(self.seed, step), self.schedule.progress(step), self.engine.all_ranks)

    @torch.no_grad()
    def _measure(self, steps: Iterable[Sequence[Any]], recorder: Recorder, stop: StopRequest) -> None:
        """Show the method as many steps as it wants to measure. `steps` can then be iterated anew."""
        given = iter(steps)
        for step in range(count := self.method.measured_steps()):
            batches = self._next(given, stop)
            if self.engine.any(batches is None):
                stop.agree()
                raise Stopped(
                    f"told to stop after {step} of {count} steps that are measured before the first, of which nothing is "
                    "kept: the same command begins anew",
                    stop.exit_code,
                )
            if batches is None or batches is _END:
                break
            self.method.measure(batches, self._context(step))
            recorder.measured(step + 1, count)

    def _step(self, step: int, batches: Sequence[Any]) -> None:
        self.engine.set_learning_rate(self.schedule.learning_rate(step))
        losses = self._take(batches, self._context(step))
        self.reports.pending.append(Pending(step, losses, [_samples(batch) for batch in batches], self._waited))
        if self.averaged is not None:
            self.averaged.update(self.method.product)

    def _rows(self, done: int, due: bool) -> list[dict[str, float]]:
        """The metrics of steps that no earlier call had: of all with `due`, or where one breaks; where a report is due after so
        many steps, those that are known without waiting; else nothing."""
        due = due or self._is_seen_to_break()
        return self._rows_of(self.reports.take(wait=due)) if due or done % self.config.report_every == 0 else []

    def _is_seen_to_break(self) -> bool:
        """Whether the last step ends the run, where it costs nothing to know: on a CPU. All ranks have the same norms."""
        if self.engine.device.type != "cpu" or not self.engine.halts:
            return False
        last = self.reports.pending[-1].losses
        return bool(self._not_finite({name: float(value) for name, value in last.items()}, NORM))

    def _not_finite(self, metrics: Mapping[str, float], start: str = "") -> list[str]:
        """The names, with this start, of those that are not finite and should be: a gradient that overflows in fp16 is the
        loss scaler's business."""
        scaled = self.engine.dtype == torch.float16
        return [
            name for name, value in metrics.items()
            if name.startswith(start) and not math.isfinite(value) and not (scaled and name.startswith(NORM))
        ]  # fmt: skip

    def _end(
        self, broken: Pending, metrics: Mapping[str, float], names: Sequence[str],
        examine: Callable[[TrainingState, Broken], None],
    ) -> None:  # fmt: skip
        step = broken.step + 1
        samples = self.engine.gather(broken.samples) or []
        state = collect_state(self.method, self.engine, self.averaged, broken.step)
        examine(state, Broken(step, metrics, names, samples))
        raise Stopped(f"{', '.join(names)} is not a finite number at step {step}: postmortem/step_{step} has its samples, "
                      "losses and state; train in another --run-dir with a lower optim.lr or beta, or with --precision fp32, or "
                      "leave such steps out with --on-nonfinite skip", DIVERGED)  # fmt: skip

    def _rows_of(self, reports: Sequence[Report]) -> list[dict[str, float]]:
        """The metrics of their steps as plain numbers, averaged over ranks, up to one that ends the run."""
        rows = []
        for report in reports:
            losses, seconds, waited = report.read()
            batch = self.schedule.optim.global_batch
            shared = {"pairs_per_s": len(losses) * batch / seconds, "memory_gib": report.memory_gib}
            of_report = []
            for pending, named in zip(report.steps, losses, strict=True):
                if self._breaks(pending, named):
                    break
                step = pending.step
                position = {
                    "step": step + 1,
                    "epoch": self.schedule.epoch(step),
                    "lr": self.schedule.learning_rate(step),
                }
                of_report.append({**position, **named, **shared})
            if of_report:  # what belongs to no step of the report alone stands in its last row
                of_report[-1]["data/wait"] = waited / seconds
                if self._pause is not None:
                    of_report[-1]["save/pause"], self._pause = self._pause, None
            rows += of_report
            if self._broken:
                break
        return rows

    def _breaks(self, pending: Pending, metrics: dict[str, float]) -> bool:
        """Whether a step ends the run. It counts those that are passed over."""
        if not (wrong := self._not_finite(metrics)):
            self._skipped = 0
            return False
        self._skipped += 1
        if self.engine.halts or self._skipped > self.config.nonfinite_limit:
            self._broken = pending, metrics, wrong
            return True
        log.warning("step %d is left out: %s is not a finite number (%d of at most %d in a row)", pending.step + 1,
                    ", ".join(wrong), self._skipped, self.config.nonfinite_limit)  # fmt: skip
        return False


def _samples(batch: Any) -> dict[str, list[str]]:
    """What a loader calls the samples of a micro-batch, if it does."""
    return {name: list(getattr(batch, name)) for name in SAMPLES if hasattr(batch, name)}
