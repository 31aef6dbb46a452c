"""launch/evaluate.py on several ranks: the figures of one process, to the byte."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.end_to_end.jobs import REPOSITORY, finish, kill, start, wait_for_step
from tests.launch.evaluating import make_run, make_scenes, make_segmenter

EVALUATING = (
    "--data", "data", "--evaluation.every", "1", "--evaluation.segmenter", "segmenter/colours.yaml",
    "--evaluation.best", "Dist", "--loop.keep", "1", "--crop", "32",
)  # fmt: skip
EVALUATE = str(REPOSITORY / "launch" / "evaluate.py")
FILES = ("evaluation.json", "evaluation.csv", *(
    f"samples/{name}.png" for name in ("evaluation", "flips", "class_distribution", "worst_images")
))  # fmt: skip


def evaluate(launcher: str, *arguments: str, cwd: Path) -> str:
    """What launch/evaluate.py printed."""
    return finish(start(launcher, *arguments, cwd=cwd, script=EVALUATE, options=()))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, a `segmenter`, a `run`, and in `alone` what one process made of them."""
    folder = tmp_path_factory.mktemp("workplace")
    make_segmenter(folder / "segmenter", make_scenes(folder / "data"))
    make_run(folder / "run", Path("data"))
    evaluate("single", "run", "--segmenter", "segmenter/colours.yaml", cwd=folder)
    for name in FILES:
        (folder / "alone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "run" / name, folder / "alone" / name)
    return folder


@pytest.mark.parametrize("launcher", ["ddp", "deepspeed"])
def test_two_ranks_write_the_bytes_of_one_process(launcher: str, workplace: Path) -> None:
    """Of five images one rank has three and the other two."""
    printed = evaluate(launcher, "run", "--segmenter", "segmenter/colours.yaml", cwd=workplace)
    assert printed.count("real (ceiling)") == 1  # one rank speaks
    for name in FILES:
        assert (workplace / "run" / name).read_bytes() == (workplace / "alone" / name).read_bytes(), name
        (workplace / "run" / name).unlink()


def test_a_run_evaluates_itself_keeps_the_best_and_goes_on_after_a_kill(workplace: Path) -> None:
    """Evaluated after 2, 4, 6 and 8 steps of 2 pairs; two ranks, killed and continued; the last figures are those of
    launch/evaluate.py."""
    options = (*EVALUATING, "--run-dir", "runs/self")
    job = start("ddp", *options, cwd=workplace)
    wait_for_step(job, workplace / "runs/self", 5)
    kill(job)
    finish(start("ddp", *options, cwd=workplace))
    rows = [json.loads(line) for line in (workplace / "runs/self/evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]

    best = min(rows, key=lambda row: row["Dist"])
    link = workplace / "runs/self/checkpoints/best"
    assert link.is_symlink() and link.resolve().name == f"step_{best['step']}"
    for checkpoint, row in (("runs/self", rows[-1]), ("runs/self/checkpoints/best", best)):
        evaluate("ddp", checkpoint, "--segmenter", "segmenter/colours.yaml", "--json", "self.json", cwd=workplace)
        report = json.loads((workplace / "self.json").read_text())
        assert all(report[name] == row[name] for name in row if name not in ("step", "time", "judge"))

    client = MlflowClient(tracking_uri=f"sqlite:///{workplace / 'mlflow.db'}")
    run = client.get_run((workplace / "runs/self/mlflow_run_id").read_text().strip())
    assert run.data.tags["best_step"] == str(best["step"]) and float(run.data.tags["best_Dist"]) == pytest.approx(
        best["Dist"], rel=1e-5
    )
    history = client.get_metric_history(run.info.run_id, "eval/flip_rate")
    assert {(point.step, point.value) for point in history} >= {(row["step"], row["flip_rate"]) for row in rows}


def test_more_ranks_than_images(workplace: Path) -> None:
    options = ("run", "--segmenter", "segmenter/colours.yaml", "--limit", "1", "--json")
    for launcher in ("single", "ddp"):
        evaluate(launcher, *options, f"{launcher}.json", cwd=workplace)
    for kind in ("json", "csv"):
        assert (workplace / f"ddp.{kind}").read_bytes() == (workplace / f"single.{kind}").read_bytes()
