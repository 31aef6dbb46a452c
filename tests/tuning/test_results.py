"""What a search leaves, of records made up for it."""

import csv
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from ray.tune.experiment import Trial

from infra.config import flatten, read_yaml, to_yaml
from launch.runs.config import make_config
from launch.runs.folder import RunFolder
from tests.tuning.made import BETA, T, records
from tuning import ablations
from tuning.folder import SearchFolder
from tuning.landscape import landscape
from tuning.results import Record, best_record, record_of, table, write_best, write_csv
from tuning.spaces import Params, parse_space


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    folder = SearchFolder(tmp_path / "search-made")
    folder.trials.mkdir(parents=True)
    return folder


class Known:
    """What Ray knows of trial 7, as it was restored: without tuples."""

    config: ClassVar = {BETA: 1e-4, "method.robust.taps": [0, 4]}

    def __init__(self, status: str, last: dict[str, Any], error: Exception | None = None) -> None:
        self.status, self.last_result, self.error = status, last, error

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def get_pickled_error(self) -> Exception | None:
        return self.error

    def get_error(self) -> None: ...

    def __str__(self) -> str:
        return "0007"


@pytest.mark.parametrize(
    ("known", "status", "cause"),
    [
        (Known(Trial.PENDING, {}), "running", ""),
        (Known(Trial.RUNNING, {"mIoU": 0.3, "step": 8}), "running", ""),
        (Known(Trial.PAUSED, {"mIoU": 0.3, "step": 8}), "running", ""),
        (Known(Trial.TERMINATED, {"mIoU": 0.3, "step": 8, "finished": True}), "finished", ""),
        (Known(Trial.TERMINATED, {"mIoU": 0.3, "step": 8}), "stopped", ""),
        (Known(Trial.TERMINATED, {"mIoU": 0.3, "step": 8, "cause": "G is no number"}), "failed", "G is no number"),
        (Known(Trial.ERROR, {}, MemoryError("all used up")), "failed", "died 3 times: MemoryError: all used up"),
        (Known(Trial.ERROR, {"mIoU": 0.3, "step": 8}), "failed", "died 3 times"),
    ],
)
def test_what_became_of_a_trial(known: Known, status: str, cause: str) -> None:
    record = record_of(cast(Trial, known))
    assert (record.number, record.status, record.cause) == (7, status, cause)
    assert record.params == {BETA: 1e-4, "method.robust.taps": (0, 4)}
    assert (record.metrics, record.step) == (({"mIoU": 0.3}, 8) if known.last_result else ({}, 0))


def test_the_best_was_finished_and_is_the_right_way_round() -> None:
    best, least = best_record(records(), "mIoU"), best_record(records(), "Dist")
    assert best and best.number == 1  # trial 2, stopped early, has more
    assert least and least.number == 1
    best = best_record(
        [Record(0, {}, "finished", metrics={"Dist": 3.0}), Record(1, {}, "finished", metrics={"Dist": 2.0})], "Dist"
    )
    assert best and best.number == 1
    assert best_record(records()[2:], "mIoU") is None


def test_the_table_has_the_best_on_top_and_causes() -> None:
    lines = table(records(), "mIoU").splitlines()
    assert lines[0].split() == ["trial", "beta", "T", "mIoU", "Dist", "step", "status"]
    assert [line.split()[0] for line in lines[1:]] == ["0001", "0000", "0002", "0003"]
    assert lines[4].endswith("failed: G is not a finite number at step 7")


def test_the_csv_has_every_trial(folder: SearchFolder) -> None:
    write_csv(folder, records())
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
    trials: list[Params] = [{"row": row, "seed": seed} for seed in (5, 6) for row in srunit.rows]
    for name, table_ in ablations.TABLES.items():
        assert table_.paper.keys() <= table_.rows.keys()
        for row, given in table_.rows.items():
            made = ablations.options(name, {"row": row, "seed": 5}, {})
            assert {**made, "seed": 5, **given} == made
            make_config(made)
    assert ablations.options(None, {BETA: 1e-4}, {}) == {BETA: 1e-4}

    measured = [(trial, {"mIoU": 0.2 + 0.02 * (trial["seed"] - 5)}) for trial in trials if trial["row"] != "E2"]
    lines = ablations.render(srunit, measured).splitlines()
    assert lines[2] == "|  | pxAcc | clsAcc | mIoU | seeds |"  # what was measured or is in the paper
    assert "| CUT | – | – | 21.0 ± 1.4 | 2 |" in lines
    assert "| SRUNIT | – (80.7) | – (33.95) | 21.0 ± 1.4 (27.23) | 2 |" in lines
    assert "| E2 | – (75.31) | – (30.13) | – (23.86) | 0 |" in lines


def test_rows_of_equal_time_have_schedules_of_other_lengths_and_are_else_alike() -> None:
    shared = {"optim.epochs": 0.6, "optim.decay_epochs": 0.4, "evaluation.every": 0.5}
    for row in ("CUT", "SRUNIT", "DistanceGAN"):
        equal_steps, equal_time = (
            make_config(shared, ablations.options(name, {"row": row, "seed": 5}, shared))
            for name in ("baselines", "baselines-time")
        )
        length = ablations.MILLISECONDS["CUT"] / ablations.MILLISECONDS[row]
        assert equal_time.optim.epochs == 0.6 * length and equal_time.optim.decay_epochs == 0.4 * length
        assert equal_time.evaluation.every == 0.5 * length
        assert equal_time.method == equal_steps.method
    assert length > 1


def test_labels_of_equal_trials_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    places, annotate = [], Axes.annotate

    def spy(axes: Axes, label: str, place: tuple[float, float], *, xytext: tuple[int, int], **how: Any) -> Annotation:
        places.append((*place, *xytext))
        return annotate(axes, label, place, xytext=xytext, **how)

    monkeypatch.setattr(Axes, "annotate", spy)
    equal = [Record(number, {BETA: 1e-4, T: 0.1}, "finished", metrics={"mIoU": 0.2}) for number in range(4)]
    landscape(equal, parse_space(["beta-T"], [{}]), "mIoU")
    assert len(set(places)) == 4
