"""Evaluation during training: what is written down, and which checkpoint is the best."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from launch.runs.evaluation import Outcome
from launch.runs.folder import RunFolder
from launch.runs.validation import Validation, Validator, best_of
from trainer.loop import Evaluation

PICTURE = np.full((4, 6, 3), 7, np.uint8)


def validated(
    path: Path, *values: float, state: dict[str, Any] | None = None, keep_all: bool = False, judge: str = ""
) -> list[Evaluation]:
    """The next evaluations of a run that goes on from a checkpoint's state; they have these values of Dist."""
    outcomes = iter([Outcome(1, {"Dist": value, "Acc": {"30": 0.5}}, {"evaluation": PICTURE}) for value in values])

    @contextmanager
    def evaluating() -> Iterator[nn.Module]:
        yield nn.Identity()

    engine = SimpleNamespace(rank=0, device=torch.device("cpu"), broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(engine=engine, evaluating=evaluating)
    validation = Validation(1.0, lambda network, device: next(outcomes), "Dist", judge)
    validator = Validator(RunFolder(path), trainer, validation, state or {}, keep_all)
    first = (state or {}).get("step", 0) + 1
    return [validator(step) for step in range(first, first + len(values))]


def test_the_first_of_equals_stays_the_best(tmp_path: Path) -> None:
    evaluations = validated(tmp_path, 5.0, 4.0, 4.0, 4.5)
    assert [(each.best, each.keep) for each in evaluations] == [
        (True, True),
        (True, True),
        (False, False),
        (False, False),
    ]
    assert best_of(RunFolder(tmp_path), "Dist") == {"step": 2, "judge": "", "Dist": 4.0}
    assert evaluations[1].metrics == {"Dist": 4.0, "Acc": {"30": 0.5}}
    assert all(each.keep for each in validated(tmp_path / "all", 5.0, 6.0, keep_all=True))


def test_metrics_and_pictures_are_written_down(tmp_path: Path) -> None:
    validated(tmp_path, 5.0, 4.0)
    rows = RunFolder(tmp_path).evaluations()
    assert [(row["step"], row["Dist"], row["Acc"]) for row in rows] == [(1, 5.0, {"30": 0.5}), (2, 4.0, {"30": 0.5})]
    assert (np.asarray(Image.open(tmp_path / "evaluations" / "step_2" / "evaluation.png")) == PICTURE).all()


def test_evaluations_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    validated(tmp_path, 5.0, 3.0, 4.0)
    (again,) = validated(tmp_path, 4.5, state={"step": 1})
    assert [(row["step"], row["Dist"]) for row in RunFolder(tmp_path).evaluations()] == [(1, 5.0), (2, 4.5)]
    assert again.best  # step 2's earlier 3.0 does not count


def test_a_run_without_its_evaluations_knows_its_best_from_the_checkpoint(tmp_path: Path) -> None:
    state = {"step": 2, "best": {"step": 1, "Dist": 3.0}}
    assert not validated(tmp_path / "worse", 3.5, state=state)[0].best
    assert not validated(tmp_path / "equal", 3.0, state=state)[0].best
    assert best_of(RunFolder(tmp_path / "equal"), "Dist") == {"step": 1, "Dist": 3.0}
    assert [each.best for each in validated(tmp_path / "better", 3.5, 2.0, state=state)] == [False, True]
    assert best_of(RunFolder(tmp_path / "better"), "Dist") == {"step": 4, "judge": "", "Dist": 2.0}


def test_what_another_judge_found_is_no_measure_of_what_this_one_does(tmp_path: Path) -> None:
    validated(tmp_path, 3.0, 2.0, judge="a mild one")
    assert [each.best for each in validated(tmp_path, 5.0, 4.0, 4.5, state={"step": 2}, judge="a strict one")] == [
        True, True, False,
    ]  # fmt: skip
    assert best_of(RunFolder(tmp_path), "Dist") == {"step": 4, "judge": "a strict one", "Dist": 4.0}


def test_nothing_is_best_where_nothing_is_measured(tmp_path: Path) -> None:
    assert best_of(RunFolder(tmp_path), "Dist") is None
    validated(tmp_path, 5.0)
    assert best_of(RunFolder(tmp_path), "mIoU") is None
