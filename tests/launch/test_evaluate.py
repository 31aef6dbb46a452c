"""launch/evaluate.py as a person types it: the table, the files, MLflow, and the user's mistakes."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from infra.config import flatten, to_yaml
from infra.storage import LocalStorage
from infra.tracking import Tracker, store_uri
from launch import evaluate as cli
from launch.config import make_config
from pipelines.dataset import Samples
from pipelines.prepare import Encoding, prepare
from pipelines.sources.photos import folders, paired
from trainer.checkpoint import Checkpointer
from trainer.translator import load_translator

STEP, TESTS = 7, 10  # the checkpoint's step; test images


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise: pairs side by side (train, test) and domains apart (trainA, trainB, testA)."""
    root, noise = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    counts = {"pairs/train": 1, "pairs/test": TESTS, "apart/trainA": 1, "apart/trainB": 1, "apart/testA": TESTS}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 256, (16, 48 if "pairs" in folder else 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    shutil.copytree(root / "apart", root / "untested", ignore=shutil.ignore_patterns("testA"))
    return root


@pytest.fixture(scope="module")
def data(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data roots: pairs, apart (test sources only) and untested (no test images)."""
    root = tmp_path_factory.mktemp("data")
    sources = {
        "pairs": paired(raw / "pairs"), "apart": folders(raw / "apart"), "untested": folders(raw / "untested")
    }  # fmt: skip
    for name, source in sources.items():
        prepare(source, LocalStorage(root / name), Encoding((24, 16), "png"), workers=1)
    return root


def make_run(path: Path, data_root: Path, task: str = "map2photo") -> Path:
    """A run folder with one checkpoint of a small generator."""
    options = {"task": task, "data.root": str(data_root), "model.ngf": 2, "model.blocks": 6}
    config = make_config(options)
    torch.manual_seed(0)
    state = {"step": STEP, "config": flatten(config)}
    Checkpointer(path / "checkpoints", keep=1).save(STEP, {"generator": config.model.generator().state_dict()}, state)
    (path / "config.yaml").write_text(to_yaml(flatten(config)))
    return path


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", data / "pairs")


def evaluate(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def expected(run: Path, data: Path, count: int, deltas: tuple[int, int] = (30, 50)) -> dict[str, dict]:
    """The figures from the pictures themselves, in one go."""
    translator = load_translator(run)
    sources, targets = (
        np.stack([Samples(str(data), "test", side).read(i)[0] for i in range(count)]) for side in ("source", "target")
    )
    figures = {}
    for name, pictures in (("translation", np.stack([translator(s) for s in sources])), ("baseline", sources)):
        difference = pictures.astype(float) - targets
        shares = {str(delta): (np.abs(difference).max(axis=-1) < delta).mean() for delta in deltas}
        figures[name] = {"Dist": pytest.approx(np.linalg.norm(difference, axis=-1).mean()), "Acc": shares}
    return figures


def test_table_figures_and_picture(monkeypatch, run: Path, data: Path, capsys) -> None:
    assert evaluate(monkeypatch, run) == 0
    report = json.loads((run / "evaluation.json").read_text())
    want = expected(run, data / "pairs", TESTS)
    assert {"Dist": report["Dist"], "Acc": report["Acc"]} == want["translation"]
    assert report["baseline"] == want["baseline"] != want["translation"]
    assert report["images"] == TESTS and report["data"] == str(data / "pairs")
    assert Path(report["checkpoint"]) == run / "checkpoints" / f"step_{STEP}"

    header, source, translation = capsys.readouterr().out.splitlines()[:3]
    assert header.split() == ["Dist", "Acc(30)", "Acc(50)"]
    assert source.startswith("source, untranslated") and f"{report['baseline']['Dist']:.2f}" in source
    assert translation.split() == [
        "translation",
        f"{report['Dist']:.2f}",
        *(f"{a:.1%}" for a in report["Acc"].values()),
    ]

    sheet = np.asarray(Image.open(run / "samples" / "evaluation.png"))
    assert sheet.shape == (8 * 16 + 7 * 4, 3 * 24 + 2 * 4, 3)
    source, target = (Samples(str(data / "pairs"), "test", side).read(7)[0] for side in ("source", "target"))
    last = sheet[-16:]
    np.testing.assert_array_equal(last[:, :24], source)
    np.testing.assert_array_equal(last[:, 28:52], load_translator(run)(source))
    np.testing.assert_array_equal(last[:, 56:], target)


def test_twice_gives_the_same_file(monkeypatch, run: Path) -> None:
    reports = [evaluate(monkeypatch, run) or (run / "evaluation.json").read_bytes() for _ in range(2)]
    assert reports[0] == reports[1]


def test_limit_and_json_of_another_task(monkeypatch, tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "maps", tmp_path / "moved", task="photo2map")
    file = tmp_path / "deep" / "figures.json"
    args = (run / "checkpoints" / f"step_{STEP}", "--data", data / "pairs", "--limit", 3, "--json", file)
    assert evaluate(monkeypatch, *args) == 0
    report = json.loads(file.read_text())
    assert report["images"] == 3
    assert {"Dist": report["Dist"], "Acc": report["Acc"]} == expected(run, data / "pairs", 3, (3, 5))["translation"]
    assert (run / "samples" / "evaluation.png").exists() and not (run / "evaluation.json").exists()


def test_a_checkpoint_without_its_run_folder(monkeypatch, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / f"step_{STEP}", tmp_path / "sent" / "model")
    assert evaluate(monkeypatch, tmp_path / "sent" / "model") == 0
    assert {path.name for path in (tmp_path / "sent").iterdir()} == {"model", "samples", "evaluation.json"}


def test_without_pairs_there_are_pictures_only(monkeypatch, run: Path, data: Path, capsys) -> None:
    assert evaluate(monkeypatch, run, "--data", data / "apart") == 0
    assert "has no pairs, so there is nothing to compare pixel by pixel" in capsys.readouterr().out
    assert "Dist" not in json.loads((run / "evaluation.json").read_text())
    assert Image.open(run / "samples" / "evaluation.png").size == (2 * 24 + 4, 8 * 16 + 7 * 4)


def test_the_figures_join_the_run_in_mlflow(monkeypatch, run: Path, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.start("map2photo", "run", {"seed": 0}, run_id_file=run / "mlflow_run_id")
    tracker.finish("KILLED")
    assert evaluate(monkeypatch, run) == 0
    report = json.loads((run / "evaluation.json").read_text())
    client = MlflowClient(tracking_uri=store_uri())
    (row,) = client.get_metric_history(tracker.run_id, "eval/Dist")
    assert (row.step, row.value) == (STEP, report["Dist"])
    metrics = client.get_run(tracker.run_id).data.metrics
    assert metrics["eval/Acc/30"] == report["Acc"]["30"]
    assert metrics["eval/baseline/Dist"] == report["baseline"]["Dist"]
    assert any("evaluation+step" in Path(item.path).name for item in client.list_artifacts(tracker.run_id, "images"))
    assert client.get_run(tracker.run_id).info.status == "KILLED"  # it may still be continued

    # In another store the run is not known: it gets its own, and the folder keeps the id of its training.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate(monkeypatch, run) == 0
    assert (run / "mlflow_run_id").read_text().strip() == tracker.run_id


def test_mlflow_may_be_away(monkeypatch, run: Path, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (run / "mlflow_run_id").write_text("0123456789abcdef\n")
    assert evaluate(monkeypatch, run) == 0
    printed = capsys.readouterr()
    assert "does not answer" in printed.err and "translation" in printed.out
    assert (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["NOWHERE"], "neither a run folder nor a checkpoint"),
        (["EMPTY"], "has no complete checkpoint yet"),
        (["RUN", "--data", "NOWHERE"], "no prepared data at"),
        (["RUN", "--data", "UNTESTED"], "no test images of the source domain"),
        (["RUN", "--limit", "0"], "--limit 0 leaves no image"),
        (["RUN", "--limit", "few"], "invalid int value"),
        (["RUN", "--json", "EMPTY"], "cannot write"),
        ([], "RUN_OR_CHECKPOINT"),
    ],
    ids=str,
)
def test_the_users_mistakes_exit_with_2(
    monkeypatch, run: Path, data: Path, tmp_path: Path, capsys, args: list[str], words: str
) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    places = {"RUN": run, "NOWHERE": tmp_path / "none", "EMPTY": tmp_path / "empty", "UNTESTED": data / "untested"}
    assert evaluate(monkeypatch, *(places.get(arg, arg) for arg in args)) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize("file", ["generator.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named(monkeypatch, run: Path, capsys, file: str) -> None:
    path = run / "checkpoints" / f"step_{STEP}" / file
    path.write_bytes(path.read_bytes()[:-9])
    assert evaluate(monkeypatch, run) == 2
    message = capsys.readouterr().err
    assert f"step_{STEP}" in message and file in message and "damaged" in message
    assert not (run / "evaluation.json").exists()


def test_help_reads_well(monkeypatch, capsys) -> None:
    assert evaluate(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("RUN_OR_CHECKPOINT", "--data ROOT", "--limit N", "--json FILE", "example:"))
