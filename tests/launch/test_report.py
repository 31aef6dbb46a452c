"""The table and the files, from metrics made up for the purpose. (test_evaluate.py has them made of pictures.)"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.errors import UserError
from launch.runs.evaluation import PICTURES, Outcome
from launch.runs.report import metrics_table, scalars, summary, write

NOT_AVAILABLE = "not available: no Inception weights were given (--inception FILE)"


def row(share: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "pxAcc": share, "clsAcc": share / 2, "mIoU": share / 4, "per_class": {"sky": {"accuracy": share, "IoU": 0.125}},
    } | more  # fmt: skip


def outcome(**metrics: Any) -> Outcome:
    return Outcome(
        3, {"FID": NOT_AVAILABLE, "KID": NOT_AVAILABLE} | metrics, {"evaluation": np.full((4, 6, 3), 9, np.uint8)}
    )


def flip(true: str, seen: str, share: float) -> dict[str, Any]:
    return {"true": true, "seen": seen, "excess": share, "of_all": share / 5}


EVERYTHING = row(
    0.6,
    flip_rate=0.123,
    drift=0.0712,
    sky_to_vegetation=0.18,
    building_to_vegetation=0.0149,
    flips=[flip("sky", "vegetation", 0.18), flip("road", "car", 0.04)],
    skipped=["train", "bus"],
    Dist=101.259,
    Acc={"30": 0.25, "50": 1.0},
    FID=62.345,
    KID=0.01234,
    baseline=row(0.4, flip_rate=0.0, drift=0.5, Dist=9.5, Acc={"30": 0.125, "50": 0.5}, FID=100.0, KID=-0.0001),
    ceiling=row(0.9, drift=0.02),
)


def test_everything_on_one_screen() -> None:
    assert metrics_table(EVERYTHING).splitlines() == [
        "                pxAcc  clsAcc   mIoU  flip rate  drift    Dist  Acc(30)  Acc(50)     FID      KID",
        "untranslated    40.0%   20.0%  10.0%       0.0%  50.0%    9.50    12.5%    50.0%  100.00  -0.0001",
        "translation     60.0%   30.0%  15.0%      12.3%   7.1%  101.26    25.0%   100.0%   62.34   0.0123",
        "real (ceiling)  90.0%   45.0%  22.5%              2.0%",
        "flips: sky → vegetation 18 % of sky, 3.6 % of all pixels",
        "       road → car 4.0 % of road, 0.8 % of all pixels",
        "       building → vegetation 1.5% of building",
        "       not compared, since no real image shows them: train, bus",
    ]


def test_columns_and_rows_without_figures_are_skipped() -> None:
    metrics = {"Dist": 1.0, "Acc": {"3": 0.5}, "FID": NOT_AVAILABLE, "KID": NOT_AVAILABLE}
    assert metrics_table(metrics | {"baseline": metrics}).splitlines() == [
        "              Dist  Acc(3)",
        "untranslated  1.00   50.0%",
        "translation   1.00   50.0%",
        f"FID, KID: {NOT_AVAILABLE}",
    ]


def test_a_row_of_before_drift_was_measured() -> None:
    newer = ("drift", "sky_to_vegetation", "building_to_vegetation")
    older = {name: value for name, value in EVERYTHING.items() if name not in newer} | {
        "baseline": row(),
        "ceiling": row(),
    }
    assert "drift" not in metrics_table(older) and "building" not in metrics_table(older)
    assert "drift" not in summary(older) and "drift 7.1%" in summary(EVERYTHING)


def test_no_more_than_the_worst_five_flips_are_named() -> None:
    metrics = EVERYTHING | {"flips": [flip("sky", f"class {k}", 0.1) for k in range(9)], "skipped": []}
    metrics["sky_to_vegetation"] = 0.0
    shown = [line for line in metrics_table(metrics).splitlines() if "→" in line]
    assert len(shown) == 5 + 1 and "building → vegetation" in shown[5]  # which has a name, and is not 0


def test_nothing_to_show() -> None:
    assert metrics_table(outcome(baseline={"FID": NOT_AVAILABLE, "KID": NOT_AVAILABLE}).metrics) == ""


def test_the_files_agree_to_the_last_digit(tmp_path: Path) -> None:
    metrics = EVERYTHING | {"Dist": float(np.nextafter(1 / 3, 1)), "class_distribution": {"source": {"sky": 1 / 7}}}
    given = outcome(**metrics)
    write(given, {"images": 3, "step": 7}, tmp_path / "a" / "e.json", tmp_path / "a" / "e.csv", tmp_path / "samples")
    assert json.loads((tmp_path / "a" / "e.json").read_text()) == given.metrics | {"images": 3, "step": 7}
    with (tmp_path / "a" / "e.csv").open(newline="") as lines:
        header, *rows = csv.reader(lines)
    assert header == ["of", "class", "metric", "value"]
    values = {(of, name, metric): float(value) for of, name, metric, value in rows}
    assert len(values) == len(rows)
    assert values["translation", "", "Dist"] == metrics["Dist"]
    assert values["translation", "sky", "share in source"] == 1 / 7
    assert values["ceiling", "sky", "accuracy"] == 0.9
    assert values["baseline", "", "Acc(50)"] == 0.5
    assert (np.asarray(Image.open(tmp_path / "samples" / "evaluation.png")) == 9).all()
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "samples", "e.json", "e.csv", "evaluation.png"}


def test_pictures_of_an_earlier_evaluation_go(tmp_path: Path) -> None:
    files = tmp_path / "e.json", tmp_path / "e.csv", tmp_path / "samples"
    earlier = outcome()
    write(Outcome(3, earlier.metrics, {name: np.zeros((4, 6, 3), np.uint8) for name in PICTURES}), {}, *files)
    (tmp_path / "samples" / "step_5.png").write_bytes(b"of the training")
    write(earlier, {}, *files)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"evaluation.png", "step_5.png"}


def test_what_is_not_available_is_no_number_in_the_csv(tmp_path: Path) -> None:
    write(outcome(), {}, tmp_path / "e.json", tmp_path / "e.csv", tmp_path)
    assert (tmp_path / "e.csv").read_text() == "of,class,metric,value\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*e.json"):
        write(outcome(), {}, tmp_path / "file" / "e.json", tmp_path / "file" / "e.csv", tmp_path)


def test_metrics_have_the_figures_paths_as_names_without_the_details() -> None:
    of_translation = {
        "mIoU": 0.5,
        "FID": NOT_AVAILABLE,
        "flips": [1.0],
        "Acc": {"30": 0.1},
        "per_class": {"sky": {"IoU": 0.2}},
    }
    details = {"class_distribution": {"source": {"sky": 0.3}}}
    assert dict(scalars({**of_translation, **details, "ceiling": row(1.0)})) == {
        "eval/mIoU": 0.5, "eval/Acc/30": 0.1, "eval/per_class/sky/IoU": 0.2,
        "eval/ceiling/pxAcc": 1.0, "eval/ceiling/clsAcc": 0.5, "eval/ceiling/mIoU": 0.25,
    }  # fmt: skip
