"""What adapted segmenters found: a JSON list of runs, to which every command adds, the tables and the pictures made from it.

Each run: {"arm", "seed", "setting"}, the scores of `ConfusionMatrix.scores` on the target's test images as fractions, and, of a
translator that its training evaluated, the flip rate. setting: a hash of the data and the options, which all have alike.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from infra.errors import UserError
from infra.tables import markdown, mean_spread, spreads
from launch.runs.folder import write_png
from launch.runs.results import Result, add_results, read_results
from pipelines.labels import colourise
from trainer.evaluation.charts import score_chart
from trainer.samples import stack

SOURCE, TARGET = "source", "target"  # the arms without a translator
TITLES = {SOURCE: "source only", TARGET: "target's labels (ceiling)"}
KEY = ("arm", "seed")
REMEDY = "name another --out"
FLIPS = "flip_rate"
COLUMNS = {FLIPS: "flips of the translator", "mIoU": "mIoU", "gain": "gain", "pxAcc": "pxAcc", "clsAcc": "clsAcc"}


def read(file: Path) -> list[Result]:
    """The runs of a file; none if there is no file. UserError if it holds something else."""
    return read_results(file, KEY, REMEDY)


def add(file: Path, runs: Sequence[Result]) -> None:
    """Put runs into the file, over those of the same arm and seed; all others stay."""
    add_results(file, runs, KEY, lambda run: (run["arm"], run["seed"]), REMEDY)


def tables(runs: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Markdown: mean ± standard deviation of the scores over the seeds of each arm, in percent, the gain being that over source
    only with the same seed; and the IoU of each class.

    titles: of the translators, in the order wanted; one without comes last, by its name. UserError if there are no runs.
    """
    arms = _by_arm(runs, titles)
    names = {**titles, **TITLES}
    source = {run["seed"]: run["mIoU"] for run in runs if run["arm"] == SOURCE}
    shown = [_with_gain(run, source) for run in runs]
    columns = {name: title for name, title in COLUMNS.items() if any(name in run for run in shown)}
    rows = []
    for arm, own in arms.items():
        seeds = ", ".join(str(run["seed"]) for run in own)
        of_arm = [run for run in shown if run["arm"] == arm]
        rows.append([names.get(arm, arm), seeds, *spreads(of_arm, dict.fromkeys(columns, 100))])
    found = _by_class(arms)
    by_class = [
        [name, f"{100 * share:.1f}", *(mean_spread([100 * value] if value is not None else []) for value in row)]
        for name, (share, row) in found.items()
    ]
    header = ["class", "share", *(names.get(arm, arm) for arm in arms)]
    scores = markdown(["trained on", "seeds", *columns.values()], rows)
    return f"{scores}\n\nIoU\n\n{markdown(header, by_class)}\n"


def _with_gain(run: Result, source: Mapping[int, float]) -> Result:
    """source: mIoU of the segmenters of the sources alone, by seed."""
    if run["arm"] == SOURCE or run["seed"] not in source:
        return run
    return run | {"gain": run["mIoU"] - source[run["seed"]]}


def iou_picture(file: Path, runs: Sequence[Result], titles: Mapping[str, str]) -> None:
    """A table in colours: the IoU of each class in each arm."""
    arms = _by_arm(runs, titles)
    found = _by_class(arms)
    values = np.array([[np.nan if value is None else value for value in row] for _, row in found.values()])
    names = {**titles, **TITLES}
    columns = [names.get(arm, arm) for arm in arms]
    write_png(file, score_chart(list(found), columns, values, "IoU of each class on the target's test images, %"))


def examples_picture(
    file: Path, shown: Sequence[tuple[np.ndarray, np.ndarray | None]], seen: Mapping[str, Sequence[np.ndarray]]
) -> None:
    """Rows of test images: photo | true labels | what the segmenter of each arm sees. shown: (image, label). seen: labels by
    arm, of the same images."""
    rows = []
    for place, (image, label) in enumerate(shown):
        labels = [*([] if label is None else [label]), *(of_arm[place] for of_arm in seen.values())]
        rows.append(stack([image, *map(colourise, labels)], axis=1))
    write_png(file, stack(rows, axis=0))


def _by_arm(runs: Sequence[Result], titles: Mapping[str, str]) -> dict[str, list[Result]]:
    """The runs of each arm by seed; the ceiling is the last arm."""
    if not runs:
        raise UserError("there are no finished runs to make a table of: train some with launch/adapt.py")
    present = {run["arm"] for run in runs}
    ordered = [SOURCE, *titles, *sorted(present - {SOURCE, TARGET} - titles.keys()), TARGET]
    return {
        arm: sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        for arm in ordered
        if arm in present
    }


def _by_class(arms: Mapping[str, Sequence[Result]]) -> dict[str, tuple[float, list[float | None]]]:
    """(share, mean IoU in each arm) of each class of the test images, the most frequent first."""
    shares = {name: score["share"] for own in arms.values() for name, score in own[0]["per_class"].items()}

    def row(name: str) -> list[float | None]:
        found = [[run["per_class"][name]["IoU"] for run in own if name in run["per_class"]] for own in arms.values()]
        return [statistics.mean(values) if values else None for values in found]

    return {name: (shares[name], row(name)) for name in sorted(shares, key=lambda name: -shares[name])}
