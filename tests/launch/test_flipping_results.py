"""The list of runs of the flipping benchmark, and the tables made from it."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from infra.errors import UserError
from launch import flipping
from launch.flipping_results import Run, add_runs, differences, read_runs, tables


def made(arm: str, mismatch: str, seed: int, steps: int, flip_rate: float, half: float | None = None) -> Run:
    evaluations = [] if half is None else [{"steps": steps // 2, "flip_rate": half}]
    key = {"arm": arm, "mismatch": mismatch, "seed": seed, "steps": steps}
    return {**key, "flip_rate": flip_rate, "mIoU": 0.2, "Dist": 40.0, "evaluations": evaluations}


def test_runs_are_merged_by_arm_mismatch_seed_and_steps(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    first = [made("cut", "strong", 0, 1200, 0.3), made("cut", "none", 0, 1200, 0.2)]
    add_runs(file, first)
    again = made("cut", "strong", 0, 1200, 0.35)
    add_runs(file, [made("cut", "strong", 0, 4000, 0.25), again, made("cut", "strong", 1, 1200, 0.31)])
    found = [(run["mismatch"], run["seed"], run["steps"], run["flip_rate"]) for run in read_runs(file)]
    assert found == [
        ("none", 0, 1200, 0.2),
        ("strong", 0, 1200, 0.35),
        ("strong", 1, 1200, 0.31),
        ("strong", 0, 4000, 0.25),
    ]


def test_runs_of_several_judges_lie_side_by_side_and_in_tables_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    add_runs(file, [made("cut", "none", 0, 4, 0.1)])
    for judge, rate in (("b0b", 0.2), ("abe", 0.3), ("b0b", 0.4)):
        add_runs(file, [made("cut", "none", 0, 4, rate) | {"judge": judge}])
    assert [(run.get("judge"), run["flip_rate"]) for run in read_runs(file)] == [
        (None, 0.1),
        ("abe", 0.3),
        ("b0b", 0.4),
    ]
    titles = [line for line in tables(read_runs(file), {}).splitlines() if line.startswith("Mismatch")]
    assert titles == [f"Mismatch none, 4 steps{judge}" for judge in ("", ", judge abe", ", judge b0b")]
    worse = [run | {"arm": "worse", "flip_rate": 0.9} for run in read_runs(file)]
    found = differences([*read_runs(file), *worse], {}, "cut")
    assert [line.split(" | ")[2] for line in found.splitlines() if line.startswith("| worse")] == [
        "+80.0",
        "+60.0",
        "+50.0",
    ]


def add_many(file: Path, seed: int) -> None:
    for steps in range(10):
        add_runs(file, [made("cut", "none", seed, steps, 0.1)])


def test_commands_that_add_runs_at_once_lose_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=add_many, args=(tmp_path / "runs.json", seed)) for seed in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert len(read_runs(tmp_path / "runs.json")) == 30


SOME = {"arm": "cut", "mismatch": "strong", "seed": 0, "steps": 4}


@pytest.mark.parametrize(
    "content",
    [
        "{", '{"arm": 1}', '[{"arm": "cut"}]', "[1]", json.dumps([SOME | {"seed": "0"}]), json.dumps([SOME | {"arm": ["cut"]}]),
        json.dumps([SOME | {"flip_rate": "high"}]), json.dumps([SOME | {"mIoU": None}]), json.dumps([SOME | {"evaluations": 4}]),
        json.dumps([SOME | {"evaluations": [{"flip_rate": 0.1}]}]), json.dumps([SOME | {"evaluations": [4]}]),
        json.dumps([SOME | {"judge": 4}]), json.dumps([SOME | {"baseline": {"mIoU": "low"}}]),
        json.dumps([SOME | {"ceiling": 1}]),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "runs.json"
    file.write_text(content)
    for use in (lambda: add_runs(file, [made("cut", "none", 0, 4, 0.1)]), lambda: read_runs(file)):
        with pytest.raises(UserError, match="name another --json") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert file.read_text() == content


def test_a_run_of_another_program_has_what_it_must_have_alone(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(json.dumps([SOME | {"flip_rate": 0.25, "mIoU": 0.2, "Dist": 40}]))
    assert "| CUT | 0 | 20.0 | 25.0 | 40.0 |" in tables(read_runs(tmp_path / "runs.json"), {"cut": "CUT"})


def test_the_tables() -> None:
    runs = [
        made("srunit", "strong", 0, 1200, 0.30, 0.35),
        made("cut", "strong", 1, 1200, 0.30, 0.34),
        made("cut", "strong", 0, 1200, 0.20, 0.32),
        made("gone", "strong", 0, 1200, 0.5),
        made("cut", "none", 0, 1200, 0.10) | {"baseline": {"mIoU": 0.14, "flip_rate": 0.44}, "ceiling": {"mIoU": 0.5}},
        made("cut", "none", 0, 4000, 0.09),
    ]
    assert (
        tables(runs, {"cut": "CUT", "srunit": "SRUNIT", "other": "never run"})
        == """\
Mismatch none, 1,200 steps

| arm | seeds | mIoU | flip rate | Dist |
| --- | --- | --- | --- | --- |
| untranslated |  | 14.0 | 44.0 |  |
| real images (ceiling) |  | 50.0 |  |  |
| CUT | 0 | 20.0 | 10.0 | 40.0 |

Mismatch strong, 1,200 steps

| arm | seeds | mIoU | flip rate | Dist | flip rate at 600 |
| --- | --- | --- | --- | --- | --- |
| CUT | 0, 1 | 20.0 ± 0.0 | 25.0 ± 7.1 | 40.0 ± 0.0 | 33.0 ± 1.4 |
| SRUNIT | 0 | 20.0 | 30.0 | 40.0 | 35.0 |
| gone | 0 | 20.0 | 50.0 | 40.0 | – |

Mismatch none, 4,000 steps

| arm | seeds | mIoU | flip rate | Dist |
| --- | --- | --- | --- | --- |
| CUT | 0 | 20.0 | 9.0 | 40.0 |
"""
    )
    with pytest.raises(UserError, match="there are no finished runs"):
        tables([], {})


def test_how_much_more_an_arm_flips_than_another_with_the_same_seed() -> None:
    runs = [
        made("cut", "none", 0, 1200, 0.20, 0.30), made("cut", "none", 1, 1200, 0.30, 0.34),
        made("srunit", "none", 0, 1200, 0.30, 0.35), made("srunit", "none", 1, 1200, 0.24, 0.37),
        made("srunit", "none", 2, 1200, 0.99, 0.99), made("cut", "strong", 5, 1200, 0.20), made("gone", "strong", 4, 1200, 0.1),
    ]  # fmt: skip
    assert (
        differences(runs[:5], {"cut": "CUT", "srunit": "SRUNIT"}, "cut")
        == """\
Mismatch none, 1,200 steps, flip rate against that of CUT, in points

| arm | seeds | at 600 | at 1,200 | less than CUT |
| --- | --- | --- | --- | --- |
| SRUNIT | 0, 1 | +4.0 | +2.0 | 1 of 4 |
"""
    )
    assert "gone" not in differences(runs, {}, "cut")  # which has no seed that the other has
    with pytest.raises(UserError, match="no finished runs of the arm best to compare with"):
        differences(runs, {}, "best")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--arms cut nope", "no run of runs.json has arm nope: it has cut, best"),
        ("--mismatch weak", "has mismatch weak: it has none, strong"),
        ("--arms cut --seed-list 0 7", "has seed 7: it has 0, 1"),
        ("--arms cut --mismatch none --seed-list 1", "has seed 1: it has 0"),
        ("--steps 0", "has steps 0: it has 4"),
        ("--judge abe", "has judge abe: it has b0b"),
        ("--against nope", "no finished runs of the arm nope to compare with"),
        ("--data x", "--table trains nothing: leave out --data"),
        ("--compile", "--table trains nothing: leave out --compile"),
    ],
)
def test_a_table_of_what_is_not_there(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    add_runs(Path("runs.json"), SEVERAL)
    with pytest.raises(SystemExit) as stop:
        table(monkeypatch, options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


SEVERAL = [
    made("cut", "strong", 0, 4, 0.3) | {"judge": "b0b"}, made("cut", "strong", 1, 4, 0.4), made("best", "strong", 0, 4, 0.2),
    made("cut", "none", 0, 4, 0.1),
]  # fmt: skip


def table(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["flipping.py", "--table", "runs.json", *options.split()])
    flipping.main()


@pytest.mark.parametrize(
    ("options", "seen", "unseen"),
    [
        ("--judge b0b", "strong, 4 steps, judge b0b", "none"),
        ("--arms cut --mismatch strong --seed-list 1", "| cut | 1 | 20.0 | 40.0", "| 0 |"),
    ],
)
def test_the_table_of_some_runs(
    options: str, seen: str, unseen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    add_runs(Path("runs.json"), SEVERAL)
    table(monkeypatch, options)
    printed = capsys.readouterr().out.replace("CUT", "cut")
    assert seen in printed and unseen not in printed


def test_an_arm_that_others_are_held_against_need_not_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    add_runs(Path("runs.json"), [*SEVERAL[1:], made("cut", "strong", 0, 4, 0.5)])
    table(monkeypatch, "--against cut --arms best")
    assert "| best | 0 | -30.0 | 1 of 1 |" in capsys.readouterr().out
