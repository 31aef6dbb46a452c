"""The papers' ablations as trials, each row with several seeds, and the table of what they measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.tables import mean_spread
from trainer.methods import ABLATIONS

Params = dict[str, Any]
ROW = "row"  # the name under which a trial's parameters have its row
PERCENT = {"pxAcc": 100.0, "clsAcc": 100.0, "mIoU": 100.0}


@dataclass(frozen=True)
class Table:
    """rows: their options. columns: figures, and what a measured one is multiplied by to have the paper's unit. paper:
    what it reports, by row and figure."""

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, float]
    paper: Mapping[str, Mapping[str, float]]


TABLES = {
    "srunit": Table(
        "Ablations of SRUNIT (its Table 2: labels to Cityscapes)",
        ABLATIONS["srunit"],
        {**PERCENT, "flip_rate": 100.0, "Dist": 1.0},
        {
            row: dict(zip(PERCENT, values, strict=True))
            for row, values in {
                "E1": (74.46, 29.84, 23.52), "E2": (75.31, 30.13, 23.86), "E3": (75.42, 30.43, 23.89),
                "E4": (76.38, 31.13, 24.71), "E5": (74.86, 29.79, 23.22), "E6": (76.25, 30.92, 23.51),
                "SRUNIT": (80.70, 33.95, 27.23),
            }.items()
        },
    ),
    "cut": Table(
        "Ablations of CUT (its Appendix C.5: horses to zebras)",
        ABLATIONS["cut"],
        {"FID": 1.0, **PERCENT, "flip_rate": 100.0, "Dist": 1.0},
        {"CUT": {"FID": 46.6}, "separate encoder": {"FID": 50.5}, "no NCE to decoder": {"FID": 444.2}},
    ),
}  # fmt: skip


def trials(table: Table, seeds: int, first_seed: int) -> list[Params]:
    """The parameters of every run: all rows with one seed, then with the next."""
    return [{ROW: row, "seed": first_seed + k, **given} for k in range(seeds) for row, given in table.rows.items()]


def options(params: Params) -> Params:
    """Of a trial's parameters those that are options of the job."""
    return {name: value for name, value in params.items() if name != ROW}


def render(table: Table, measured: Sequence[tuple[Params, Mapping[str, Any]]]) -> str:
    """Markdown: mean ± standard deviation over the seeds, and the paper's value in brackets where it has one.

    measured: (parameters, figures) of the runs that were finished. A figure that neither they nor the paper have gets no column.
    """
    runs = {row: [figures for params, figures in measured if params[ROW] == row] for row in table.rows}
    known = [*(run for group in runs.values() for run in group), *table.paper.values()]
    columns = [name for name in table.columns if any(name in figures for figures in known)]
    lines = [f"| | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for row, group in runs.items():
        cells = [
            _cell([run[name] * table.columns[name] for run in group if name in run], table.paper.get(row, {}).get(name))
            for name in columns
        ]
        lines.append(f"| {row} | {' | '.join(cells)} | {len(group)} |")
    return "\n".join([f"{table.title}. In brackets what the paper has, of its own data.", "", *lines]) + "\n"


def _cell(values: Sequence[float], paper: float | None) -> str:
    measured = mean_spread(values)
    return measured if paper is None else f"{measured} ({paper:g})"
