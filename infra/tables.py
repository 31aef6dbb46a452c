"""Tables of text: for a terminal, in Markdown, and as CSV."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal, the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def comma_separated(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((header, *rows))
    return text.getvalue()


def mean_spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; "–" for no values, no deviation for one."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def spreads(runs: Sequence[Mapping[str, float]], columns: Mapping[str, float]) -> list[str]:
    """A cell for each column: mean ± standard deviation over the runs that have this metric. columns: metric -> factor."""
    return [mean_spread([run[name] * factor for run in runs if name in run]) for name, factor in columns.items()]
