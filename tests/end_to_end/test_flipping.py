"""launch/flipping.py at the smallest size: real preparation, segmenter, trainings, JSON and tables; stopped, and going on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from infra.config import flatten
from infra.errors import UserError
from launch import flipping as cli
from launch import flipping_benchmark
from launch.flipping_arms import Arm, read_arms
from launch.flipping_benchmark import Benchmark
from launch.flipping_data import StreetScenes
from launch.runs.config import parse_arguments
from launch.runs.embedded import Setup
from launch.runs.evaluation import weights_of
from launch.runs.folder import check_same
from tests.end_to_end.jobs import REPOSITORY, kill, wait_for_step

TRAINING = """
data: {crop: 32, threads: 1}
method: {patches: 8, generator: {ngf: 2, blocks: 6}, discriminator: {ndf: 2}, head_dim: 4}
methods: {srunit: {robust: {per_step: one}}}
loop: {keep: 1, keep_logged: 0, report_every: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    (tmp_path / "tiny.yaml").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # no processes to draw and match a few scenes
    monkeypatch.setattr(flipping_benchmark, "PICTURE_ROWS", 2)
    segmenter = {"model.output_stride": 8, "model.width": 0.25, "optim.epochs": 1.0}
    return Setup(tmp_path / "tiny.yaml", (64, 32), (4, 8, 4), segmenter)


def flipping(monkeypatch: pytest.MonkeyPatch, *arguments: str, own: bool = False) -> None:
    drawn = [] if own or "--table" in arguments else ["--out", "out", "--mismatch", "strong"]
    monkeypatch.setattr(sys, "argv", ["flipping.py", *drawn, *arguments])
    cli.main()


def test_the_benchmark_from_nothing_to_the_table(
    tiny: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "TIERS", {"small": tiny})
    earlier = {"arm": "cut", "mismatch": "strong", "seed": 9, "steps": 4, "flip_rate": 0.5, "evaluations": []}
    Path("found.json").write_text(json.dumps([earlier]))
    options = "--arms cut best-rounds --seed-list 3 --steps 4 --json found.json --parallel 2"
    arguments = options.split()
    flipping(monkeypatch, *arguments)
    printed = capsys.readouterr().out

    runs = json.loads(Path("found.json").read_text())
    assert [(run["arm"], run["mismatch"], run["seed"], run["steps"]) for run in runs] == [
        ("cut", "strong", 9, 4),
        ("best-rounds", "strong", 3, 4),
        ("cut", "strong", 3, 4),
    ]
    assert runs[0] == earlier
    judge = weights_of(Path("out/segmenter"))
    for run in runs[1:]:
        assert run["judge"] == judge[:8]
        rows = Path(f"out/runs/strong-{run['arm']}-3-4/evaluations.jsonl").read_text().splitlines()
        half, end = map(json.loads, rows)
        assert (half["step"], end["step"]) == (2, 4)
        for figure in ("flip_rate", "mIoU", "Dist"):
            assert run[figure] == end[figure]
            assert run["evaluations"][0][figure] == half[figure]
        assert run["drift"] == end["drift"] and "sky_to_vegetation" in run
    assert "| CUT | 9 | 50.0 |" in printed  # a table of its own, as nobody knows its judge
    own = printed[printed.index(f"Mismatch strong, 4 steps, judge {judge[:8]}") :]
    assert "| CUT | 3 |" in own and f"| {100 * runs[2]['flip_rate']:.1f} |" in own
    assert "| untranslated |" in printed and "| real images (ceiling) |" in printed
    assert np.asarray(Image.open("out/pictures.png")).shape == (2 * 32 + 4, 4 * 64 + 3 * 4, 3)

    # It is helped by a second segmenter, which saw translations of the first round, and by a match of its own.
    second = yaml.safe_load(Path("out/runs/strong-best-rounds-3-4/config.yaml").read_text())
    assert second["method"]["semantic"]["segmenter"] == "out/rounds/strong-best-rounds/segmenter-1"
    first = yaml.safe_load(Path("out/rounds/strong-best-rounds/round-0/translator/config.yaml").read_text())
    assert first["method"]["semantic"]["segmenter"] == "out/source-segmenter"
    matches = {second["data"]["match"], first["data"]["match"]}
    assert {path.stem for path in Path("out/data/strong/matches").glob("*.npy")} == matches and len(matches) == 2
    assert yaml.safe_load(Path("out/source-segmenter/config.yaml").read_text())["domain"] == "source"

    # Again: nothing is trained a second time, and what the file had lost is there again.
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.jsonl")}
    Path("found.json").write_text(json.dumps([earlier]))
    flipping(monkeypatch, *arguments)
    found = "Mismatch strong, 4 steps"
    assert capsys.readouterr().out.partition(found)[2] == printed.partition(found)[2]
    assert json.loads(Path("found.json").read_text()) == runs
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.jsonl")} == before

    # The table of some of them.
    flipping(monkeypatch, *["--arms", "cut", "--table", "found.json"])
    assert "| CUT | 3 |" in (some := capsys.readouterr().out) and "second round" not in some
    with pytest.raises(SystemExit, match="2"):
        flipping(monkeypatch, *["--steps", "0", "--table", "found.json"])
    assert "no run of found.json has steps 0" in capsys.readouterr().err

    # The same on data of one's own, with a judge of one's own.
    monkeypatch.chdir("out")
    options_of_own = "--arms best --seed-list 3 --steps 4 --data data/strong --judge segmenter --out own"
    flipping(monkeypatch, *options_of_own.split(), own=True)
    assert f"Mismatch strong, 4 steps, judge {judge[:8]}" in capsys.readouterr().out
    (run,) = json.loads(Path("own/runs.json").read_text())
    assert run["arm"] == "best" and run["mismatch"] == "strong"
    assert run["ceiling"] == runs[1]["ceiling"]
    config = yaml.safe_load(Path("own/runs/strong-best-3-4/config.yaml").read_text())
    assert config["evaluation"]["segmenter"] == "segmenter" and config["data"]["root"] == "data/strong"
    assert yaml.safe_load(Path("own/source-segmenter/config.yaml").read_text())["data"]["root"] == "data/strong"
    assert {path.name for path in Path("own").iterdir()} >= {"pictures.png", "logs"} and not Path(
        "own/segmenter"
    ).exists()
    for other, message in (
        ("rounds/strong-best-rounds/segmenter-1", "own/runs/strong-best-3-4 was judged by segmenter, not rounds/"),
        ("source-segmenter", "the judge source-segmenter is the segmenter that the arm best trains with"),
    ):
        with pytest.raises(SystemExit, match="2"):
            flipping(monkeypatch, *options_of_own.replace("segmenter", other).split(), own=True)
        assert message in capsys.readouterr().err
    monkeypatch.chdir("..")

    # The options of an arm have changed: its old run is not taken for one of the new.
    monkeypatch.setattr(cli, "read_arms", lambda: {"cut": Arm("cut", "CUT", {"method.name": "cut", "optim.lr": 0.5})})
    with pytest.raises(SystemExit, match="2"):
        flipping(monkeypatch, *options.replace("best-rounds ", "").split())
    assert "strong-cut-3-4 has optim.lr = 0.0002, not 0.5" in capsys.readouterr().err


FROM_OUTSIDE = """
import os
import sys
from pathlib import Path
from launch.flipping_arms import read_arms
from launch.flipping_benchmark import Benchmark
from launch.flipping_data import StreetScenes
from launch.runs.embedded import Setup
from launch.runs.evaluation import weights_of
from infra.errors import exits_cleanly

os.cpu_count = lambda: 1
Setup.train_segmenter = lambda *_: None
Benchmark._options = (lambda options: lambda *a: options(*a) | {"evaluation.segmenter": None, "evaluation.every": 500.0,
    "loop.checkpoint_every": 100000})(Benchmark._options)

@exits_cleanly
def main():
    setup = Setup(Path("tiny.yaml"), (64, 32), (4, 8, 4), {})
    data = StreetScenes(setup, Path("out"))
    Benchmark(setup, data, Path("out"), [read_arms()["cut"]], ["strong"], [0], int(sys.argv[1]), 1).run(Path("out/runs.json"))

main()
"""


def test_a_stopped_command_stops_its_trainings_with_a_checkpoint(tiny: Setup) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = subprocess.Popen(
        [sys.executable, "-c", FROM_OUTSIDE, "100000"], env=environment, text=True, stderr=subprocess.PIPE
    )
    run = Path("out/runs/strong-cut-0-100000")
    try:
        wait_for_step(command, run, 2)
        children = psutil.Process(command.pid).children(recursive=True)
        (training,) = [child for child in children if any("train.py" in part for part in child.cmdline())]
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=60)
    finally:
        if command.poll() is None:
            kill(command)
    assert command.returncode == 128 + signal.SIGTERM
    assert "stopped: the same command continues from here" in errors
    assert not training.is_running()
    facts = json.loads((run / "status.json").read_text())
    assert (facts["state"], facts["exit_code"], facts["pid"]) == ("KILLED", 143, training.pid)
    done = int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{done}"]
    assert not json.loads(Path("out/runs.json").read_text())  # finished runs alone


def test_a_training_that_fails_is_named_with_its_log_and_others_go_on(
    tiny: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "draw", lambda *_: None)
    monkeypatch.setattr(Setup, "train_segmenter", lambda *_: None)
    arms = [read_arms()["cut"], read_arms()["srunit"]]
    data = StreetScenes(tiny, Path("out"))
    with pytest.raises(
        UserError,
        match=r"^strong-cut-0-4 failed, and 1 more: no prepared data at .* \(see .*strong-cut-0-4\.log\): run the same command",
    ):
        Benchmark(tiny, data, Path("out"), arms, ["strong"], [0], 4, parallel=2).run(Path("out/runs.json"))
    assert "no prepared data" in Path("out/logs/strong-srunit-0-4.log").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 0]}, "the seeds 0 0 name one twice"),
        ({"seeds": [-1]}, "seed -1 is negative"),
        ({"parallel": 0}, "0 trainings at once are impossible: give 1 or more"),
        ({"steps": 1}, "1 steps have no two halves"),
        ({"arms": [Arm("odd", "", {"method.robust.betta": 1})]}, "the arm odd: unknown option 'method.robust.betta'"),
        ({"arms": [Arm("odd", "", {"method.name": "cit"})]}, "the arm odd: unknown method 'cit'"),
    ],
)
def test_what_cannot_be(tiny: Setup, change: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {
        "arms": [read_arms()["cut"]],
        "mismatches": ["none"],
        "seeds": [0],
        "steps": 4,
        "parallel": 1,
    }
    with pytest.raises(UserError, match=message):
        Benchmark(tiny, StreetScenes(tiny, Path("out")), Path("out"), **usual | change)


def test_a_run_whose_evaluations_are_gone(tiny: Setup) -> None:
    arm = read_arms()["cut"]
    benchmark = Benchmark(tiny, StreetScenes(tiny, Path("out")), Path("out"), [arm], ["none"], [0], 4, 1)
    with pytest.raises(
        UserError, match="evaluations.jsonl holds no evaluation: delete out/runs/none-cut-0-4 to train it"
    ):
        benchmark._found(benchmark.cells[0])


def test_compiled_trainings_are_the_same_runs(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Benchmark] = []
    monkeypatch.setattr(cli, "TIERS", {"small": tiny})
    monkeypatch.setattr(Benchmark, "run", lambda self, _: given.append(self))
    monkeypatch.setattr(Benchmark, "write_pictures", lambda _: None)
    monkeypatch.setattr(cli, "tables", lambda *_: "")
    arguments = ["--arms", "cut", "--seed-list", "0", "--steps", "4"]
    for extra in ([], ["--compile"]):
        flipping(monkeypatch, *arguments, *extra)
    plain, compiled = (benchmark._command(benchmark.cells[0])[1:] for benchmark in given)
    assert compiled == [*plain, "--engine.compile=true"]

    begun, goes_on = (parse_arguments(list(map(str, options))) for options in (plain, compiled))
    assert (begun.engine.compile, goes_on.engine.compile) == ("auto", "true")
    check_same("run", flatten(begun), goes_on)  # what one began the other goes on with


def test_a_damaged_list_of_runs_is_found_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs.json").write_text('[{"arm": "cut", "mismatch": "str')
    monkeypatch.setattr(Setup, "draw", lambda *_: pytest.fail("scenes are drawn"))
    with pytest.raises(SystemExit, match="2"):
        flipping(monkeypatch, "--arms", "cut", "--json", "runs.json")
    assert "cannot read the runs in runs.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        flipping(monkeypatch, "--table", "rnus.json")
    assert "there is no file rnus.json: name one" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["runs.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--judge J", "--task and --judge belong to data of yours: give --data ROOT"),
        ("--data ROOT", "--data needs a --judge: train one with"),
        ("--data ROOT --judge J --mismatch none", "--mismatch is a strength of drawn scenes"),
        ("--mismatch weak", "--mismatch weak is no strength: choose among none, middle, strong"),
        ("--data ROOT --judge J", "no prepared data at ROOT"),
        ("--against cut", "--against compares the runs of a --table: name that, too"),
        ("--out /proc/none", "cannot write to /proc/none (No such file or directory): name another --out"),
        ("--json /proc/none/runs.json", "cannot write to /proc/none (No such file or directory): name another --json"),
    ],
)
def test_what_does_not_go_together(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        flipping(monkeypatch, *options.split(), own=True)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
