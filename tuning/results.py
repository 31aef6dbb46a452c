"""What a search leaves for people: a table of its trials and the best configuration."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from infra.config import read_yaml, to_yaml
from infra.storage import replacing
from launch.runs.folder import RunFolder
from trainer.evaluation.config import BETTER
from tuning.folder import Record, SearchFolder


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
    """The best of the finished trials; None where none was finished with that figure."""
    finished = [record for record in records if record.status == "finished" and metric in record.figures]
    return min(finished, key=lambda record: _badness(record, metric), default=None)


def _badness(record: Record, metric: str) -> float:
    value = record.figures.get(metric, 0.0)
    return value if BETTER[metric] == "less" else -value


def _columns(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """The parameters and the figures that occur."""
    params = list(dict.fromkeys(name for record in records for name in record.params))
    return params, [name for name in BETTER if any(name in record.figures for record in records)]


def table(records: Sequence[Record], metric: str) -> str:
    """Aligned lines: finished trials first, the best of them on top."""
    order = ("finished", "stopped", "running", "failed")
    ranked = sorted(records, key=lambda record: (order.index(record.status), _badness(record, metric)))
    params, measured = _columns(records)
    columns = [metric, *(name for name in measured if name != metric)]
    rows = [["trial", *map(_short, params), *columns, "step", "status"]]
    for record in ranked:
        values = [record.params.get(name, "") for name in params]
        figures = [f"{record.figures[name]:.4g}" if name in record.figures else "" for name in columns]
        status = record.status + (f": {record.cause}" if record.cause else "")
        rows.append([f"{record.number:04}", *map(text, values), *figures, str(record.step), status])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    *right, _ = widths
    return "\n".join(
        "  ".join([*(f"{cell:>{w}}" for cell, w in zip(row, right, strict=False)), row[-1]]) for row in rows
    )


def write_csv(folder: SearchFolder, records: Sequence[Record]) -> None:
    """One line per trial: number, status, cause, step, node, run folder, its parameters, its figures."""
    params, measured = _columns(records)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(("trial", "status", *params, *measured, "step", "node", "run_dir", "cause"))
    for record in records:
        values = [record.params.get(name, "") for name in params]
        writer.writerow((
            record.number, record.status,
            *(",".join(map(str, value)) if isinstance(value, tuple) else value for value in values),
            *(record.figures.get(name, "") for name in measured),
            record.step, record.node, folder.run_dir(record.number), record.cause,
        ))  # fmt: skip
    with replacing(folder.csv_file) as file:
        file.write(lines.getvalue().encode())


def write_best(folder: SearchFolder, best: Record) -> None:
    """All options of the best trial but its run folder."""
    options = read_yaml(RunFolder(folder.run_dir(best.number)).config_file)
    del options["run_dir"]
    with replacing(folder.best_file) as file:
        file.write(to_yaml(options).encode())
