"""What a run writes down of its data, whose ranks tell each other what happened to it."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.console import ProgressLine
from launch.runs.folder import RunFolder
from launch.runs.recorder import Recorder, skipped
from pipelines.health import DataHealth


def recorder(health: DataHealth, *others: DataHealth, rank: int = 0) -> Any:
    """One of several ranks; the others have told theirs."""
    told = [(other.metrics(), other.bad_shards, other.bad_samples) for other in others]
    engine: Any = SimpleNamespace(rank=1, gather=lambda own: [own, *told] if rank == 0 else None)
    return Recorder(RunFolder(Path()), engine, health, 0, ProgressLine(1, enabled=False), "")


def test_counts_add_up_over_ranks_and_what_two_of_them_met_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    first, second = DataHealth(), DataHealth()
    for health in (first, second):
        health.count_retry()
        health.count_fetched(2**19)
        health.bad_shard("train/source/000001.tar", "it is missing")
    first.bad_sample("a in train/source/000000.tar", "torn")
    second.bad_sample("b in train/source/000000.tar", "not an image")
    own = recorder(first, second)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # each report says what has happened so far
            assert own._data_metrics() == {
                "data/retries": 2, "data/fetched_MiB": 1.0, "data/bad_shards": 1, "data/bad_samples": 2
            }  # fmt: skip
    (line,) = [record.getMessage() for record in caplog.records]  # rank 0's log has what another rank met
    assert "b in train/source/000000.tar" in line and "not an image" in line


def test_nothing_is_reported_of_healthy_data_or_on_other_ranks() -> None:
    assert recorder(DataHealth(), DataHealth())._data_metrics() == {}
    ill = DataHealth()
    ill.count_retry()
    assert recorder(ill, rank=1)._data_metrics() == {}


def test_what_is_measured_before_the_first_step_has_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    engine: Any = SimpleNamespace(rank=0, gather=lambda own: [own])
    own = Recorder(RunFolder(tmp_path), engine, DataHealth(), 0, ProgressLine(10, batch=2), "")
    with caplog.at_level(logging.INFO):
        for done in range(1, 5):
            now += 20
            own.measured(done, 4)
        now += 10
        own.record(1, [{"step": 1, "G": 2.0}])
        own.close()
    assert [record.getMessage() for record in caplog.records] == [
        " 50.0%  measured 2/4  0.05 steps/s  00:40 left",
        " 75.0%  measured 3/4  0.05 steps/s  00:20 left",
        "100.0%  measured 4/4  0.05 steps/s  00:00 left",
        " 10.0%  step 1/10  G 2.000  0.2 pairs/s  01:30 left",  # the time before is none of the step's
    ]


def test_the_last_row_of_a_report_says_how_old_the_last_checkpoint_is_and_once_how_long_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr("launch.runs.recorder.time", SimpleNamespace(monotonic=lambda: now, time=lambda: 1e9 + now))
    engine: Any = SimpleNamespace(rank=0, gather=lambda own: [own])
    own = Recorder(RunFolder(tmp_path), engine, DataHealth(), 0, ProgressLine(10, enabled=False), "")
    now = 60.0
    own.record(2, [{"step": 1, "G": 2.0}, {"step": 2, "G": 2.0}])
    now = 65.0
    own.saves.written(62.0)
    for step in (3, 4):
        own.record(step, [{"step": step, "G": 2.0}])
    own.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    saves = [{name: row[name] for name in row if name.startswith("save/")} for row in rows]
    assert saves == [{}, {"save/age": 10.0}, {"save/age": 3.0, "save/write": 3.0}, {"save/age": 3.0}]


def test_the_progress_goes_on_while_rows_come_a_report_late(tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(rank=0, gather=lambda own: [own])
    seen: list[int] = []
    own = Recorder(RunFolder(tmp_path), engine, DataHealth(), 0, ProgressLine(6), "", seen.append)
    rows = [[], [], [{"step": 1, "G": 1.0}, {"step": 2, "G": 2.0}], [], [{"step": 3, "G": 3.0}]]
    for done, known in enumerate(rows, 1):
        own.record(done, known)
    own.record(5, [{"step": 4, "G": 4.0}, {"step": 5, "G": 5.0}])  # at a stop, when no step is done
    own.close()
    assert seen == [1, 2, 3, 4, 5, 5]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_the_end_names_what_was_skipped() -> None:
    health = DataHealth()
    assert skipped(health) == ""
    health.bad_shard("train/source/000001.tar", "it is missing")
    assert skipped(health).startswith("1 shard was skipped, others took their places: train/source/000001.tar; ")
    for n in range(12):
        health.bad_sample(f"s{n}", "torn")
    words = skipped(health)
    assert words.startswith("12 samples and 1 shard were skipped, others took their places: s0, s1, ")
    assert "s9 and 3 more; " in words and "s10" not in words
