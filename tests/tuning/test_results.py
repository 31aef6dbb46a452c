"""What a search leaves, of records made up for it."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation

from infra.config import flatten, read_yaml, to_yaml
from launch.runs.config import make_config
from launch.runs.folder import RunFolder
from tests.tuning.made import BETA, T, records
from tuning import ablations
from tuning.folder import Record, SearchFolder
from tuning.landscape import landscape
from tuning.results import best_record, table, write_best, write_csv
from tuning.spaces import parse_space


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    for record in records():
        folder.write(record)
    return folder


def test_records_survive_their_files(folder: SearchFolder) -> None:
    assert folder.records() == records()
    taps = Record(4, {"method.robust.taps": (0, 4)})
    folder.write(taps)
    assert folder.records()[4] == taps


def test_the_best_was_finished_and_is_the_right_way_round() -> None:
    best, least = best_record(records(), "mIoU"), best_record(records(), "Dist")
    assert best and best.number == 1  # trial 2, stopped early, has more
    assert least and least.number == 1
    best = best_record(
        [Record(0, {}, "finished", figures={"Dist": 3.0}), Record(1, {}, "finished", figures={"Dist": 2.0})], "Dist"
    )
    assert best and best.number == 1
    assert best_record(records()[2:], "mIoU") is None


def test_the_table_has_the_best_on_top_and_causes() -> None:
    lines = table(records(), "mIoU").splitlines()
    assert lines[0].split() == ["trial", "beta", "T", "mIoU", "Dist", "step", "status"]
    assert [line.split()[0] for line in lines[1:]] == ["0001", "0000", "0002", "0003"]
    assert lines[4].endswith("failed: G is not a finite number at step 7")


def test_the_csv_has_every_trial(folder: SearchFolder) -> None:
    write_csv(folder, folder.records())
    with folder.csv_file.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    assert float(rows[1][BETA]) == 2e-4 and float(rows[1]["mIoU"]) == 0.40
    assert rows[3]["mIoU"] == "" and "finite" in rows[3]["cause"]


def test_the_best_options_are_a_configuration(folder: SearchFolder) -> None:
    run = RunFolder(folder.run_dir(1))
    config = make_config({"method.buffer": 3, BETA: 2e-4, T: 0.12, "run_dir": str(run.path), "data.root": "data/x"})
    run.path.mkdir()
    run.config_file.write_text(to_yaml(flatten(config)))
    write_best(folder, records()[1])
    again = make_config(read_yaml(folder.best_file))
    assert flatten(again) == flatten(config) | {"run_dir": None}


@pytest.mark.parametrize("space", [["beta-T"], ["method.robust.beta=loguniform(1e-5,1e-3)"]])
def test_the_landscape_shows_each_trial_and_a_ring(space: list[str]) -> None:
    dimensions = parse_space(space, [{}])
    picture = landscape(records(), dimensions, "mIoU")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    red = (picture == (255, 0, 0)).all(axis=2)
    assert red.any()
    without = landscape(records()[2:], dimensions, "mIoU")
    assert not (without == (255, 0, 0)).all(axis=2).any()
    landscape([], dimensions, "mIoU")  # nothing measured is no fault


def test_ablations_are_rows_by_seeds_and_a_table() -> None:
    srunit = ablations.TABLES["srunit"]
    trials = ablations.trials(srunit, seeds=2, first_seed=5)
    assert [(trial["row"], trial["seed"]) for trial in trials[:2]] == [("CUT", 5), ("E1", 5)]
    assert len(trials) == 16 and trials[8]["seed"] == 6
    for table_ in ablations.TABLES.values():
        assert table_.paper.keys() <= table_.rows.keys()
        for trial in ablations.trials(table_, 1, 0):
            make_config(ablations.options(trial))

    measured = [(trial, {"mIoU": 0.2 + 0.02 * (trial["seed"] - 5)}) for trial in trials if trial["row"] != "E2"]
    lines = ablations.render(srunit, measured).splitlines()
    assert lines[2] == "| | pxAcc | clsAcc | mIoU | seeds |"  # what was measured or is in the paper
    assert "| CUT | – | – | 21.0 ± 1.4 | 2 |" in lines
    assert "| SRUNIT | – (80.7) | – (33.95) | 21.0 ± 1.4 (27.23) | 2 |" in lines
    assert "| E2 | – (75.31) | – (30.13) | – (23.86) | 0 |" in lines


def test_labels_of_equal_trials_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    places, annotate = [], Axes.annotate

    def spy(axes: Axes, label: str, place: tuple[float, float], *, xytext: tuple[int, int], **how: Any) -> Annotation:
        places.append((*place, *xytext))
        return annotate(axes, label, place, xytext=xytext, **how)

    monkeypatch.setattr(Axes, "annotate", spy)
    equal = [Record(number, {BETA: 1e-4, T: 0.1}, "finished", figures={"mIoU": 0.2}) for number in range(4)]
    landscape(equal, parse_space(["beta-T"], [{}]), "mIoU")
    assert len(set(places)) == 4
