"""The papers' ablations and comparisons as trials, each row with several seeds, and the table of what they measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infra.config import flatten
from infra.tables import markdown, mean_spread
from launch.runs.config import make_config
from trainer.methods import ABLATIONS
from tuning.results import STEP

Params = dict[str, Any]
ROW = "row"  # the name under which a trial's parameters have its row
PERCENT = {"pxAcc": 100.0, "clsAcc": 100.0, "mIoU": 100.0}
SCHEDULE = ("optim.epochs", "optim.decay_epochs", "evaluation.every")  # in epochs


@dataclass(frozen=True)
class Table:
    """rows: their options. columns: metrics, and what a measured one is multiplied by to have the paper's unit. paper:
    what it reports, by row and metric. lengths: of a row's schedule, as multiples of the search's; empty: each has its own."""

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, float]
    paper: Mapping[str, Mapping[str, float]]
    lengths: Mapping[str, float] = field(default_factory=dict)


# Two pairs a step for all, since DRIT and DistanceGAN take no less.
BASELINES: dict[str, dict[str, Any]] = {
    row: {"method.name": row.lower(), "optim.global_batch": 2}
    for row in ("CycleGAN", "GcGAN", "DRIT", "CUT", "SRUNIT", "MUNIT", "DistanceGAN", "SRC", "SemST")
}

# Milliseconds of a step, of which a row of "baselines-time" has the fewer the longer they take. On two otherwise idle CPU
# cores: python launch/bench.py step --config tuning/small.yaml --method NAME --optim.global-batch 2 --steps 10 --repetitions 3
MILLISECONDS = {
    "CycleGAN": 131, "GcGAN": 112, "DRIT": 119, "CUT": 119, "SRUNIT": 159, "MUNIT": 312, "DistanceGAN": 41, "SRC": 122,
    "SemST": 161,
}  # fmt: skip

EQUAL_STEPS = Table(
    "Methods at equal steps (SRUNIT, Table 1: GTA5 to Cityscapes)",
    BASELINES,
    {**PERCENT, "flip_rate": 100.0, "drift": 100.0, "Dist": 1.0, "Acc(30)": 100.0, STEP: 1.0},
    {
        row: dict(zip(PERCENT, values, strict=True))
        for row, values in {
            "CycleGAN": (66.33, 32.53, 23.84), "GcGAN": (65.62, 32.38, 22.64), "DRIT": (64.28, 32.17, 20.99),
            "CUT": (64.59, 32.19, 20.35), "SRUNIT": (67.21, 32.97, 22.69),
        }.items()
    },
    lengths=dict.fromkeys(BASELINES, 1.0),
)  # fmt: skip

EQUAL_TIME = replace(
    EQUAL_STEPS,
    title="Methods in the time that CUT's schedule takes with the small networks on a CPU (SRUNIT, Table 1: GTA5 to Cityscapes)",
    lengths={row: MILLISECONDS["CUT"] / MILLISECONDS[row] for row in BASELINES},
)

TABLES = {
    "baselines": EQUAL_STEPS,
    "baselines-time": EQUAL_TIME,
    "srunit": Table(
        "Ablations of SRUNIT (its Table 2: labels to Cityscapes)",
        ABLATIONS["srunit"],
        {**PERCENT, "flip_rate": 100.0, "drift": 100.0, "Dist": 1.0},
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
        {"FID": 1.0, **PERCENT, "flip_rate": 100.0, "drift": 100.0, "Dist": 1.0},
        {"CUT": {"FID": 46.6}, "separate encoder": {"FID": 50.5}, "no NCE to decoder": {"FID": 444.2}},
    ),
}  # fmt: skip


def options(table: str | None, params: Params, shared: Mapping[str, Any]) -> Params:
    """The options of a job with a trial's parameters, on top of those that all trials share. table: the name of that which
    the trial is a row of, if any."""
    if table is None:
        return params
    rows, row = TABLES[table], params[ROW]
    result = {name: value for name, value in params.items() if name != ROW} | dict(rows.rows[row])
    if row in rows.lengths:  # of methods whose papers have different ones
        usual = flatten(make_config(shared))
        result |= {name: usual[name] * rows.lengths[row] for name in SCHEDULE}
    return result


def render(table: Table, measured: Sequence[tuple[Params, Mapping[str, Any]]]) -> str:
    """Markdown: mean ± standard deviation over the seeds, and the paper's value in brackets where it has one.

    measured: (parameters, metrics) of the runs that were finished. A metric that neither they nor the paper have gets no column.
    """
    runs = {row: [metrics for params, metrics in measured if params[ROW] == row] for row in table.rows}
    known = [*(run for group in runs.values() for run in group), *table.paper.values()]
    columns = [name for name in table.columns if any(name in metrics for metrics in known)]
    rows = [
        [row, *(_cell(table, row, name, group) for name in columns), str(len(group))] for row, group in runs.items()
    ]
    return f"{table.title}. In brackets what the paper has, of its own data.\n\n{markdown(['', *columns, 'seeds'], rows)}\n"


def _cell(table: Table, row: str, name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    measured = mean_spread([run[name] * table.columns[name] for run in runs if name in run])
    paper = table.paper.get(row, {}).get(name)
    return measured if paper is None else f"{measured} ({paper:g})"
