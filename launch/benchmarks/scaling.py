"""How the rate of a training grows with its ranks, from what ordinary runs have written down."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from infra import tables
from infra.errors import UserError
from infra.json_lines import read_records
from launch.runs.folder import RunFolder

HELP = "pairs a second of finished runs, against the first of them"


def report(runs: Sequence[Path]) -> str:
    """A row for each run folder.

    Efficiency is what is left of the first run's rate for each pair of a step: with the same batch for each rank, that of so
    many ranks (weak scaling).
    """
    found = [rate_of(RunFolder(run)) for run in runs]
    (first, first_batch), header = found[0], ("", "pairs a step", "pairs/s", "speed-up", "efficiency")
    rows = [
        (str(run), str(batch), f"{rate:.4g}", f"{rate / first:.3g}", f"{rate / first * first_batch / batch:.1%}")
        for run, (rate, batch) in zip(runs, found, strict=True)
    ]
    return tables.plain(header, rows)


def rate_of(folder: RunFolder) -> tuple[float, int]:
    """Pairs a second in the median step, and pairs a step. The steps up to the first report, which made the run ready, do
    not count. UserError if there are no others, or no run."""
    options = folder.saved()
    if not options or not folder.metrics_file.exists():
        raise UserError(f"{folder.path} is no run folder with metrics: name folders that launch/train.py has made")
    rows = read_records(folder.metrics_file)[options["loop.report_every"] :]
    if not rows:
        raise UserError(f"{folder.path} has no steps after the first report: train longer, or with a lower "
                        "--loop.report-every")  # fmt: skip
    return statistics.median(row["pairs_per_s"] for row in rows), options["optim.global_batch"]
