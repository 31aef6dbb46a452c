"""launch/flipping.py at the smallest size: real preparation, segmenter, trainings and tables; and going on."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.errors import UserError
from launch import flipping as cli
from launch import flipping_benchmark
from launch.flipping_benchmark import METRICS, Benchmark
from launch.runs.embedded import Setup

TRAINING = """
data: {crop: 32, threads: 1}
method: {patches: 8, generator: {ngf: 2, blocks: 6}, discriminator: {ndf: 2}, head_dim: 4}
methods: {srunit: {robust: {per_step: one}}}
optim: {epochs: 0.5, decay_epochs: 0.5}
loop: {keep: 1, keep_logged: 0}
evaluation: {every: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    (tmp_path / "tiny.yaml").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flipping_benchmark, "STRENGTHS", {"strong": 1.0})
    monkeypatch.setattr(flipping_benchmark, "PICTURE_ROWS", 2)
    segmenter = {"model.output_stride": 8, "model.width": 0.25, "optim.epochs": 1.0}
    return Setup(tmp_path / "tiny.yaml", (64, 32), (4, 8, 4), segmenter)


def test_the_benchmark_from_nothing_to_the_table(
    tiny: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "TIERS", {"small": tiny})
    monkeypatch.setattr(
        sys, "argv", ["flipping.py", "--out", "out", "--beta", "1e-3", "--seeds", "1", "--parallel", "2"]
    )
    cli.main()
    printed = capsys.readouterr().out

    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert [(row["mismatch"], row["method"], row["seed"]) for row in rows] == [
        ("strong", "CUT", "0"),
        ("strong", "SRUNIT, beta 0.001", "0"),
    ]
    for row, name in zip(rows, ("strong-cut-0", "strong-srunit-beta0.001-0"), strict=True):
        last = json.loads(Path(f"out/runs/{name}/evaluations.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 4 and [float(row[f]) for f in METRICS] == [last[f] for f in METRICS]
        assert f"| strong | {row['method']} | {last['mIoU'] * 100:.1f} |" in printed
    assert "|  | untranslated |" in printed and "|  | real images (ceiling) |" in printed
    assert Path("out/results.md").read_text() in printed
    assert np.asarray(Image.open("out/pictures.png")).shape == (2 * 32 + 4, 4 * 64 + 3 * 4, 3)

    # Again: nothing is trained a second time.
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.jsonl")}
    cli.main()
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.jsonl")} == before


def test_a_training_that_fails_is_named_with_its_log(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setup, "draw", lambda *_: None)
    monkeypatch.setattr(Setup, "train_segmenter", lambda *_: None)
    with pytest.raises(
        UserError, match=r"^strong-cut-0 failed \(error: no prepared data at .*\): see .*strong-cut-0\.log, and"
    ):
        Benchmark(tiny, Path("out"), [], seeds=1, parallel=1).run()


@pytest.mark.parametrize("options", [{"seeds": 0, "parallel": 1}, {"seeds": 1, "parallel": 0}])
def test_impossible_numbers(tiny: Setup, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="are impossible: give 1 or more"):
        Benchmark(tiny, Path("out"), [1e-4], **options)


def test_an_impossible_beta(tiny: Setup) -> None:
    with pytest.raises(UserError, match="beta is -1: give 0 or more"):
        Benchmark(tiny, Path("out"), [0.0, -1.0], seeds=1, parallel=1)


def test_the_worst_flip_is_that_of_most_pixels_over_all_runs() -> None:
    runs = [
        {"flips": [{"true": "sky", "seen": "vegetation", "excess": 0.5, "of_all": 0.1}]},
        {"flips": [{"true": "road", "seen": "car", "excess": 0.3, "of_all": 0.12}]},
        {"flips": [{"true": "sky", "seen": "vegetation", "excess": 0.4, "of_all": 0.08}]},
    ]
    assert flipping_benchmark._worst(runs) == "sky → vegetation 30% of sky"
