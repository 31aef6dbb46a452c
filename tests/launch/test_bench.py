import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import UserError
from launch.bench import BENCHMARKS, parser
from launch.benchmarks.measuring import Figure, Target, interleaved, ratios, table

REPOSITORY = Path(__file__).parents[2]
RATIOS = {"loader_to_bare_dali", "loader_to_pillow_dataloader", "s3_cold_to_cached", "prepare_to_plain_pillow"}
TINY = [
    "--repetitions",
    "1",
    "--scenes",
    "3",
    "--photos",
    "4",
    "--epoch",
    "6",
    "--batch",
    "2",
    "--samples",
    "2000",
    "--threads",
    "1",
]


def test_data_benchmark_writes_every_figure(tmp_path):
    pytest.importorskip("nvidia.dali")
    file = tmp_path / "new" / "speed.json"
    command = [sys.executable, str(REPOSITORY / "launch/bench.py"), "data", *TINY, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["benchmark"] == "data" and report["options"]["epoch"] == 6
    assert report["machine"]["cores"] >= 1 and "torch" in report["versions"]
    figures = report["figures"]
    assert {name for name in figures if "_to_" in name} == RATIOS
    for name, figure in figures.items():
        assert figure["least"] <= figure["median"] <= figure["most"] and len(figure["values"]) == 1
        assert figure["least"] > 0 or name == "peak_growth"
        assert f'"{name}"' not in done.stdout  # the table is for people
    assert {name for name in figures if "target" in figures[name]} == RATIOS | {"peak_growth", "first_batch_large"}
    documented = (REPOSITORY / "launch/benchmarks/data.py").read_text().split('"""')[1]
    assert [name for name in figures if name not in documented] == []
    assert "loader / bare DALI" in done.stdout and "at least 0.9" in done.stdout


def test_impossible_sizes_are_refused_in_one_sentence():
    args = parser().parse_args(["data", "--epoch", "4", "--batch", "8"])
    with pytest.raises(UserError, match="--epoch 4 is less than one batch: give at least 8, or a smaller --batch"):
        BENCHMARKS["data"].run(args)


def test_measures_are_taken_in_turn():
    taken = []

    def measure(name):
        taken.append(name)
        return {name: float(len(taken))}

    found = interleaved([lambda: measure("one"), lambda: measure("two")], 3)
    assert taken == ["one", "two"] * 3
    assert found == {"one": (1.0, 3.0, 5.0), "two": (2.0, 4.0, 6.0)}


def test_ratios_are_of_neighbours():
    assert ratios((10.0, 1.0), (5.0, 2.0)) == (2.0, 0.5)


def test_table_and_json_judge_the_median():
    at_least = Figure("ratio", "ours / theirs", "", (0.5, 0.95, 2.0), Target("at least", 0.9))
    at_most = Figure("growth", "growth", "MB", (150.0, 90.0, 120.0), Target("at most", 100))
    lines = table([at_least, at_most]).splitlines()
    assert lines[1].split() == ["ours", "/", "theirs", "0.95", "0.5", "2", "at", "least", "0.9:", "met"]
    assert lines[2].split() == ["growth", "120", "90", "150", "MB", "at", "most", "100:", "MISSED"]
    assert at_most.to_json() == {
        "unit": "MB", "median": 120.0, "least": 90.0, "most": 150.0, "target": "at most 100", "met": False,
        "values": [150.0, 90.0, 120.0],
    }  # fmt: skip
