"""What a search leaves for people: a table of its trials and the best configuration."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from infra.config import read_yaml, to_yaml
from infra.errors import Stopped, UserError
from infra.json_lines import read_records
from infra.redaction import redacted
from infra.storage import replacing
from infra.tables import comma_separated, plain
from launch.runs.folder import RunFolder
from trainer.evaluation.config import BETTER, value_of
from tuning.folder import SearchFolder
from tuning.spaces import tupled

if TYPE_CHECKING:  # importing it takes seconds
    from ray.tune.experiment import Trial

FINISHED = "finished"  # what a trial reports at its end
STEP = "ms/step"
RETRIES = 2  # of a trial whose process died; what it raises itself is not tried again
Status = Literal["running", "finished", "stopped", "failed"]  # stopped: by the scheduler, which preferred others


@dataclass(frozen=True)
class Record:
    """A trial. params: by dotted name. metrics: of the last evaluation. cause: of a failure. node: where it ran last."""

    number: int
    params: dict[str, Any]
    status: Status = "running"
    cause: str = ""
    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    node: str = ""


def record_of(trial: "Trial", *, over: bool | None = None) -> Record:
    """What Ray Tune knows of a trial. One that took over from another one has other parameters than at its beginning.

    over: whether it is, where Ray is about to say so.
    """
    last = trial.last_result
    status: Status = "finished" if last.get(FINISHED) else "stopped"
    cause = last.get("cause", "")
    if trial.status == "ERROR":
        error = trial.get_pickled_error() or trial.get_error()
        cause = f"died {RETRIES + 1} times" + (f": {cause_of(error)}" if error else "")
    if not (trial.is_finished() if over is None else over):
        status = "running"
    elif cause:
        status = "failed"
    metrics = {name: float(last[name]) for name in BETTER if name in last}
    step, node = last.get("step", 0), last.get("node", "")
    return Record(int(str(trial)), tupled(trial.config), status, cause, step, metrics, node)


def cause_of(error: BaseException) -> str:
    """One line that says what went wrong, of an error as the job or as Ray raised it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    if failures:
        ours = [failure for failure in failures if isinstance(failure, UserError | Stopped)]
        return cause_of((ours or failures)[0])
    inner = getattr(error, "cause", None)  # of a task of Ray
    if isinstance(inner, BaseException):
        return cause_of(inner)
    line = (str(error).strip().splitlines() or [""])[0]
    return redacted(line if isinstance(error, UserError | Stopped) else f"{type(error).__name__}: {line}")


def of_run(run: RunFolder) -> dict[str, float]:
    """What a finished run's own files say beside the metrics that trials are compared by: milliseconds of a step (the median
    of its reports), and Acc(30) where its test images are pairs."""
    batch = read_yaml(run.config_file)["optim.global_batch"]
    result = {STEP: statistics.median(1000 * batch / row["pairs_per_s"] for row in read_records(run.metrics_file))}
    last = run.evaluations()[-1]
    return result | {f"Acc({delta})": share for delta, share in last.get("Acc", {}).items()}


def shown(params: Mapping[str, Any]) -> str:
    """Parameters for people: "beta 0.00031, T 0.05"."""
    return ", ".join(f"{_short(name)} {text(value)}" for name, value in params.items())


def _short(field: str) -> str:
    return field.rpartition(".")[2]


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def best_record(records: Sequence[Record], metric: str) -> Record | None:
    """The best of the finished trials; None where none was finished with that metric."""
    finished = [record for record in records if record.status == "finished" and metric in record.metrics]
    return min(finished, key=lambda record: value_of(record.metrics, metric) or 0.0, default=None)


def _columns(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """The parameters and the metrics that occur."""
    params = list(dict.fromkeys(name for record in records for name in record.params))
    return params, [name for name in BETTER if any(name in record.metrics for record in records)]


def table(records: Sequence[Record], metric: str) -> str:
    """Aligned lines: finished trials first, the best of them on top."""
    order = ("finished", "stopped", "running", "failed")
    ranked = sorted(records, key=lambda one: (order.index(one.status), value_of(one.metrics, metric) or 0.0))
    params, measured = _columns(records)
    columns = [metric, *(name for name in measured if name != metric)]
    rows = [
        [
            f"{record.number:04}", *(text(record.params.get(name, "")) for name in params),
            *(f"{record.metrics[name]:.4g}" if name in record.metrics else "" for name in columns),
            str(record.step), record.status,
        ]
        for record in ranked
    ]  # fmt: skip
    header, *lines = plain(["trial", *map(_short, params), *columns, "step", "status"], rows).splitlines()
    causes = [f": {record.cause}" if record.cause else "" for record in ranked]
    return "\n".join([header, *map("".join, zip(lines, causes, strict=True))])


def write_csv(folder: SearchFolder, records: Sequence[Record]) -> None:
    """One line per trial: number, status, cause, step, node, run folder, its parameters, its metrics."""
    params, measured = _columns(records)
    header = ("trial", "status", *params, *measured, "step", "node", "run_dir", "cause")
    rows = [
        (
            record.number, record.status, *(_cell(record.params.get(name, "")) for name in params),
            *(record.metrics.get(name, "") for name in measured),
            record.step, record.node, folder.run_dir(record.number), record.cause,
        )
        for record in records
    ]  # fmt: skip
    with replacing(folder.csv_file) as file:
        file.write(comma_separated(header, rows).encode())


def _cell(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def write_best(folder: SearchFolder, best: Record) -> None:
    """All options of the best trial but its run folder."""
    options = read_yaml(RunFolder(folder.run_dir(best.number)).config_file)
    del options["run_dir"]
    with replacing(folder.best_file) as file:
        file.write(to_yaml(options).encode())
