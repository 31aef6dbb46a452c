"""What an evaluation leaves behind: a table on the screen, JSON and CSV, pictures, and the same in MLflow."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from infra import tables
from infra.storage import replacing
from launch.runs.evaluation import PICTURES, Outcome
from trainer.evaluation.flips import NAMED_PAIRS, Pair, name_of

WORST_FLIPS = 5
# Not in MLflow, where each would be 19 charts and more: evaluation.json, evaluation.csv and the pictures have them.
DETAILS = ("eval/baseline/per_class", "eval/ceiling/per_class", "eval/class_distribution")
ROWS = ("untranslated", "translation", "real (ceiling)")


def metrics_table(metrics: dict[str, Any], others: Mapping[str, dict[str, Any]] | None = None) -> str:
    """The metrics as aligned lines; empty where there is nothing to measure. others: of other translators on the same images, by
    name, a row for each."""
    untranslated, translation, real = ROWS
    rows = {
        untranslated: metrics.get("baseline", {}),
        translation: metrics,
        **(others or {}),
        real: metrics.get("ceiling", {}),
    }
    columns = [column for column in _columns(metrics) if any(column(row) for row in rows.values())]
    cells = [(name, *texts) for name, row in rows.items() if any(texts := [column(row) for column in columns])]
    lines = [tables.plain(("", *(column.title for column in columns)), cells)]
    lines += [f"flips: {line}" if k == 0 else f"       {line}" for k, line in enumerate(_flips(metrics))]
    if isinstance(metrics["FID"], str):
        lines.append(f"FID, KID: {metrics['FID']}")
    return "\n".join(lines) if columns else ""


def summary(metrics: dict[str, Any]) -> str:
    """The translations' metrics in one line."""
    cells = [(column.title, column(metrics)) for column in _columns(metrics)]
    return ", ".join(f"{title} {cell}" for title, cell in cells if cell) or "nothing to measure"


class _Column:
    """One metric of a row, as text; empty where the row lacks it."""

    def __init__(self, title: str, *path: str, form: str = "{:.1%}") -> None:
        self.title, self.path, self.form = title, path, form

    def __call__(self, row: Any) -> str:
        for name in self.path:
            row = row.get(name, {}) if isinstance(row, dict) else {}
        return self.form.format(row) if isinstance(row, float) else ""


def _columns(metrics: dict[str, Any]) -> Iterator[_Column]:
    for name in ("pxAcc", "clsAcc", "mIoU"):
        yield _Column(name, name)
    yield _Column("flip rate", "flip_rate")
    yield _Column("drift", "drift")
    yield _Column("Dist", "Dist", form="{:.2f}")
    for delta in metrics.get("Acc", ()):
        yield _Column(f"Acc({delta})", "Acc", delta)
    yield _Column("FID", "FID", form="{:.2f}")
    yield _Column("KID", "KID", form="{:.4f}")


def _flips(metrics: dict[str, Any]) -> list[str]:
    worst = [Pair(**pair) for pair in metrics.get("flips", [])[:WORST_FLIPS]]
    lines = [str(pair) for pair in worst]
    for true, seen in NAMED_PAIRS:
        share = metrics.get(name_of(true, seen), 0.0)
        if share > 0 and (true, seen) not in [(pair.true, pair.seen) for pair in worst]:
            lines.append(f"{true} → {seen} {share:.1%} of {true}")
    if skipped := metrics.get("skipped"):
        lines.append(f"not compared, since no real image shows them: {', '.join(skipped)}")
    return lines


def write(outcome: Outcome, about: dict[str, Any], json_file: Path, csv_file: Path, pictures: Path) -> None:
    """Write the metrics, with `about` beside them, as JSON and as CSV (of, class, metric, value), and the pictures as
    PNG files into a folder, where those of an earlier evaluation go."""
    with replacing(json_file) as file:
        file.write((json.dumps({**outcome.metrics, **about}, indent=1) + "\n").encode())
    rows = (
        (name, *row)
        for name, key in (("translation", None), ("baseline", "baseline"), ("ceiling", "ceiling"))
        for row in _tidy(outcome.metrics if key is None else outcome.metrics.get(key, {}))
    )
    with replacing(csv_file) as file:
        file.write(tables.comma_separated(("of", "class", "metric", "value"), rows).encode())
    for name in PICTURES:
        (pictures / f"{name}.png").unlink(missing_ok=True)
    for name, picture in outcome.pictures.items():
        with replacing(pictures / f"{name}.png") as file:
            Image.fromarray(picture).save(file, format="png")


def _tidy(metrics: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(class, metric, value) of every number of one row; class is empty where the metric is of all."""
    for name, value in metrics.items():
        if isinstance(value, float):
            yield "", name, value
    for delta, share in metrics.get("Acc", {}).items():
        yield "", f"Acc({delta})", share
    for of_class, scores in metrics.get("per_class", {}).items():
        for name, value in scores.items():
            yield of_class, name, value
    for part, shares in metrics.get("class_distribution", {}).items():
        for of_class, share in shares.items():
            yield of_class, f"share in {part}", share
    for parts, distance in metrics.get("total_variation", {}).items():
        yield "", f"total variation {parts}", distance


def scalars(metrics: dict[str, Any], prefix: str = "eval/") -> Iterator[tuple[str, float]]:
    """{"Acc": {"30": x}} as ("eval/Acc/30", x); without what is no number, and without DETAILS."""
    for name, value in metrics.items():
        if prefix + name in DETAILS:
            continue
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, float):
            yield prefix + name, value
