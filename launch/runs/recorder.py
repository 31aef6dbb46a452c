"""What a run writes down while it trains: metrics, the progress line, and what happened to its data."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from infra.console import ProgressLine
from infra.json_lines import JsonLines
from launch.runs.folder import RunFolder
from pipelines.health import DataHealth
from trainer.engines import Engine

log = logging.getLogger(__name__)

LONG_SECONDS = 3600.0  # a run on a CPU that takes longer gets a word about it
NOT_LOSSES = ("step", "epoch", "lr", "pairs_per_s", "memory_gib", "time")
NAMED = 10  # names in the sentence about what was skipped


class Saves:
    """How long the thread takes to write a checkpoint, and how old the last one is, on the host's steady clock."""

    def __init__(self) -> None:
        self._taken = time.monotonic()  # of the state that a kill now would go back to; at first, of the start
        self._writing: float | None = None

    def written(self, began: float) -> None:
        """A checkpoint is complete (and in the mirror), whose writing began when `time.monotonic()` was so much."""
        self._taken, self._writing = began, time.monotonic() - began

    def metrics(self) -> dict[str, float]:
        writing, self._writing = self._writing, None
        return {"save/age": time.monotonic() - self._taken} | ({} if writing is None else {"save/write": writing})


class Recorder:
    """Of all ranks, which tell each other what happened to their data; rank 0 writes.

    line: shows the progress. shorter: how to have a run of minutes. progress: told, on rank 0, of each step that is done.
    watch: is shown the rows there.
    """

    def __init__(
        self, folder: RunFolder, engine: Engine, health: DataHealth, first_step: int, line: ProgressLine, shorter: str,
        progress: Callable[[int], None] = lambda step: None,
        watch: Callable[[Sequence[Mapping[str, float]]], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        self.engine, self.health, self.line, self.shorter = engine, health, line, shorter
        self._full = False
        self.progress, self.watch = progress, watch
        self.saves = Saves()
        self._file = JsonLines(folder.metrics_file) if engine.rank == 0 else None
        self._measuring: ProgressLine | None = None
        if self._file:
            self._file.truncate_after(first_step)

    def record(self, done: int, rows: Sequence[Mapping[str, float]]) -> None:
        data = self._data_metrics() if rows else {}
        if self._file is None:
            return
        now = time.time()
        for row in rows:
            last = self.saves.metrics() if row is rows[-1] else {}
            self._append({**row, **data, **last, "time": now})
        self.watch(rows)
        shown = rows[-1].items() if rows else ()
        losses = {name: value for name, value in shown if name not in NOT_LOSSES and "/" not in name}
        if done > self.line.n:  # else rows come late, at a stop between two reports
            self.line.advance(losses or None)
        self.progress(self.line.n)

    def measured(self, done: int, count: int) -> None:
        if self._file:
            self.progress(0)
        if self._measuring:
            self._measuring.advance()
        else:
            self._measuring = ProgressLine(
                count, done, unit="steps", title="measured", leave=False, enabled=self._file is not None
            )
        if done == count:
            self._measuring.close()
            self.line.unpause()  # its rate is that of steps

    def _append(self, row: Mapping[str, float]) -> None:
        assert self._file is not None
        try:
            self._file.append(row)
        except OSError as error:
            if not self._full:
                log.warning(
                    "%s cannot be written (%s): the rows wait until there is room", self._file.path, error.strerror
                )
            self._full = True
        else:
            self._full = False

    def _data_metrics(self) -> dict[str, float]:
        """On rank 0 what happened to the data of all ranks, without zeros. Its own health notes, and logs, every
        shard and sample that another rank skipped; several may have met the same one."""
        health = self.health
        ranks = self.engine.gather((health.metrics(), dict(health.bad_shards), dict(health.bad_samples)))
        if ranks is None:
            return {}
        for _, shards, samples in ranks[1:]:
            for name, reason in shards.items():
                health.bad_shard(name, reason)
            for name, reason in samples.items():
                health.bad_sample(name, reason)
        own = health.metrics()
        counts = {name: sum(rank[name] for rank, _, _ in ranks) for name in own}
        counts |= {name: own[name] for name in ("data/bad_shards", "data/bad_samples")}
        return {name: value for name, value in counts.items() if value}

    def estimate(self, seconds: float) -> None:
        if self.engine.rank == 0 and self.engine.device.type == "cpu" and seconds > LONG_SECONDS:
            log.warning(
                "at this pace the run takes %s on this CPU: for one of minutes %s", _duration(seconds), self.shorter
            )

    def close(self) -> None:
        if self._measuring:
            self._measuring.close()
        self.line.close()
        if self._file:
            self._file.close()
            if words := skipped(self.health):
                log.warning("%s", words)


def skipped(health: DataHealth) -> str:
    """What the training did without, in a sentence; empty if nothing."""
    kinds = {"sample": health.bad_samples, "shard": health.bad_shards}
    counts = [f"{len(names)} {kind}{'s' if len(names) > 1 else ''}" for kind, names in kinds.items() if names]
    named = [name for names in kinds.values() for name in names]
    if not named:
        return ""
    shown = ", ".join(named[:NAMED]) + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")
    return (
        f"{' and '.join(counts)} {'was' if len(named) == 1 else 'were'} skipped, others took their places: {shown}; "
        "the warnings above say why"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds / 60:.0f} minutes"
