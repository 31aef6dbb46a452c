"""launch/evaluate.py as a person types it: the table, the files, MLflow, and the user's mistakes."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import nn

from infra.storage import LocalStorage
from infra.tracking import MlflowRun
from launch.runs import evaluation
from pipelines.dataset import ImageDataset
from pipelines.manifest import DOMAINS
from pipelines.prepare import Encoding, prepare
from pipelines.sources.photos import folders, paired
from tests.launch.evaluating import STEP, evaluate, make_run, report_of, sentence
from trainer.checkpointer import Checkpointer
from trainer.evaluation import Example
from trainer.evaluation.fidelity import Features, fidelity
from trainer.networks import ResnetGenerator
from trainer.translator import load_translator

pytestmark = pytest.mark.slow

TESTS = 10  # images
FID_LINE = "FID, KID: not available: no Inception weights were given (--inception FILE)"


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


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", data / "pairs", task="map2photo")


def expected(run: Path, data: Path, places: Iterable[int], deltas: tuple[int, int] = (30, 50)) -> dict[str, dict]:
    """The metrics from the pictures themselves, in one go."""
    translator = load_translator(run)
    sources, targets = (
        np.stack([ImageDataset(str(data), "test", side).read(i)[0] for i in places]) for side in ("source", "target")
    )
    metrics = {}
    for name, pictures in (("translation", np.stack([translator(s) for s in sources])), ("baseline", sources)):
        difference = pictures.astype(float) - targets
        shares = {str(delta): (np.abs(difference).max(axis=-1) < delta).mean() for delta in deltas}
        metrics[name] = {"Dist": pytest.approx(np.linalg.norm(difference, axis=-1).mean()), "Acc": shares}
    return metrics


def paired_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in ("Dist", "Acc")}


def scale(generator: ResnetGenerator, factor: float) -> None:
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(factor)


def test_other_runs_stand_beside_in_table_and_picture_and_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(
        tmp_path / "other", data / "pairs", task="map2photo", change=lambda generator: scale(generator, 2.0)
    )
    before = sorted(other.rglob("*"))
    assert evaluate(monkeypatch, run, "--beside", other) == 0
    lines = capsys.readouterr().out.splitlines()
    want = expected(other, data / "pairs", range(TESTS))["translation"]
    assert lines[3].split()[:2] == [str(other), f"{want['Dist'].expected:.2f}"] and lines[2].split()[0] == "translation"
    sheet = np.asarray(Image.open(run / "samples" / "evaluation.png"))
    assert sheet.shape == (8 * 16 + 7 * 4, 4 * 24 + 3 * 4, 3)
    picture = ImageDataset(str(data / "pairs"), "test", "source").read(8)[0]
    for column, each in enumerate((run, other), 1):
        shown = sheet[-16:, column * 28 : column * 28 + 24]
        np.testing.assert_array_equal(shown, load_translator(each)(picture))
    assert sorted(other.rglob("*")) == before and report_of(run)["step"] == STEP


def test_table_metrics_and_picture(
    monkeypatch: pytest.MonkeyPatch, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, run) == 0
    report = report_of(run)
    want = expected(run, data / "pairs", range(TESTS))
    assert paired_metrics(report) == want["translation"]
    assert paired_metrics(report["baseline"]) == want["baseline"] != want["translation"]
    assert report["FID"] == report["KID"] == FID_LINE.removeprefix("FID, KID: ")
    assert report["segmenter"] is None and report["step"] == STEP
    assert report["images"] == TESTS and report["data"] == str(data / "pairs")
    assert Path(report["checkpoint"]) == run / "checkpoints" / f"step_{STEP}"

    header, source, translation, fid, *_ = capsys.readouterr().out.splitlines()
    assert fid == FID_LINE
    assert header.split() == ["Dist", "Acc(30)", "Acc(50)"]
    assert source.startswith("untranslated") and f"{report['baseline']['Dist']:.2f}" in source
    assert translation.split() == [
        "translation",
        f"{report['Dist']:.2f}",
        *(f"{a:.1%}" for a in report["Acc"].values()),
    ]

    sheet = np.asarray(Image.open(run / "samples" / "evaluation.png"))
    assert sheet.shape == (8 * 16 + 7 * 4, 3 * 24 + 2 * 4, 3)
    picture, real = (ImageDataset(str(data / "pairs"), "test", side).read(8)[0] for side in ("source", "target"))
    last = sheet[-16:]  # eight of the ten, evenly spread
    np.testing.assert_array_equal(last[:, :24], picture)
    np.testing.assert_array_equal(last[:, 28:52], load_translator(run)(picture))
    np.testing.assert_array_equal(last[:, 56:], real)


def test_limit_and_json_of_another_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "maps", tmp_path / "moved", task="photo2map")
    file = tmp_path / "deep" / "figures.json"
    args = (run / "checkpoints" / f"step_{STEP}", "--data", data / "pairs", "--limit", 3, "--json", file)
    assert evaluate(monkeypatch, *args) == 0
    report = json.loads(file.read_text())
    assert report["images"] == 3
    assert paired_metrics(report) == expected(run, data / "pairs", (0, 3, 6), (3, 5))["translation"]
    assert file.with_suffix(".csv").exists()
    assert file.with_suffix("").joinpath("evaluation.png").exists()
    assert not (run / "evaluation.json").exists() and not (run / "samples").exists()


def test_fid_and_kid_with_inception(
    monkeypatch: pytest.MonkeyPatch, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)).requires_grad_(False)
    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: extractor.to(device))
    assert evaluate(monkeypatch, run, "--inception", "weights.pth") == 0
    report, printed = report_of(run), capsys.readouterr().out
    header, source, translation, *_ = printed.splitlines()
    assert header.split()[-2:] == ["FID", "KID"] and "not available" not in printed
    for line, metrics in ((source, report["baseline"]), (translation, report)):
        assert line.split()[-2:] == [f"{metrics['FID']:.2f}", f"{metrics['KID']:.4f}"]

    translator, samples = load_translator(run), [ImageDataset(str(data / "pairs"), "test", side) for side in DOMAINS]
    translations, real = Features(extractor), Features(extractor)
    for i in range(TESTS):
        translations.update(Example(i, translator(samples[0].read(i)[0])))
        real.update(Example(i, samples[1].read(i)[0]))
    assert {name: report[name] for name in ("FID", "KID")} == fidelity(translations, real)

    assert evaluate(monkeypatch, run, "--inception", "weights.pth", "--data", data / "apart") == 0
    assert "FID is not available: there are 10 images and 0 real ones" in capsys.readouterr().out


def test_a_checkpoint_without_its_run_folder(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / f"step_{STEP}", tmp_path / "sent" / "model")
    assert evaluate(monkeypatch, tmp_path / "sent" / "model") == 0
    assert {path.name for path in (tmp_path / "sent").iterdir()} == {
        "model", "samples", "evaluation.json", "evaluation.csv"
    }  # fmt: skip


def test_without_pairs_there_are_pictures_only(
    monkeypatch: pytest.MonkeyPatch, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, run, "--data", data / "apart") == 0
    nothing, *_ = capsys.readouterr().out.splitlines()
    assert nothing.startswith(
        f"nothing to measure: {data / 'apart'} has no pairs, no --segmenter was given, and FID is not"
    )
    assert "Dist" not in report_of(run)
    assert Image.open(run / "samples" / "evaluation.png").size == (2 * 24 + 4, 8 * 16 + 7 * 4)


@pytest.mark.parametrize("status", ["FINISHED", "KILLED", "RUNNING"])
def test_the_metrics_join_the_run_in_mlflow(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, run: Path, status: str
) -> None:
    tracked = MlflowRun.open(run / "mlflow_run_id", "map2photo", "run")
    assert tracked is not None
    tracked.status(status)
    ended = client.get_run(tracked.id).info.end_time
    assert evaluate(monkeypatch, run) == 0

    report = report_of(run)
    (row,) = client.get_metric_history(tracked.id, "eval/Dist")
    assert (row.step, row.value) == (STEP, report["Dist"])
    metrics = client.get_run(tracked.id).data.metrics
    assert metrics["eval/Acc/30"] == report["Acc"]["30"]
    assert metrics["eval/baseline/Dist"] == report["baseline"]["Dist"]
    assert any("evaluation+step" in Path(item.path).name for item in client.list_artifacts(tracked.id, "images"))
    info = client.get_run(tracked.id).info
    assert (info.status, info.end_time) == (status, ended)  # a killed or running one may still go on
    assert (run / "mlflow_run_id").read_text().strip() == tracked.id


def test_a_store_that_does_not_know_the_run_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    assert evaluate(monkeypatch, run) == 0
    assert "does not know the run" in capsys.readouterr().err
    assert (run / "mlflow_run_id").read_text() == "0123456789abcdef0123456789abcdef\n"  # its training's


def test_mlflow_may_be_away(monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["RUN", "--limit", "0"], "0 test images leave nothing to evaluate"),
        (["RUN", "--limit", "few"], "invalid int value"),
        (["RUN", "--json", "EMPTY"], "is no name of a JSON file: give one that ends in .json"),
        (["RUN", "--json", "figures.csv"], "is no name of a JSON file"),
        (["RUN", "--json", "taken.json"], "taken is a file"),
        (["RUN", "--json", "taken/figures.json"], "taken is a file"),
        (["RUN", "--json", "s3://bucket/figures.json"], "is a place in a store: name a folder or file of this machine"),
        (["RUN", "--segmenter", "NOWHERE"], "have no labels to compare a segmenter's with"),
        (["RUN", "--inception", "NOWHERE"], "cannot read the Inception weights"),
        (["RUN", "--inception", "OTHER"], "is not the published Inception for FID: its SHA-256 begins with"),
        (["SEGMENTER"], "holds no translator (a segmenter's run has none)"),
        ([], "RUN_OR_CHECKPOINT"),
    ],
    ids=str,
)
def test_the_users_mistakes_exit_with_2(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    words: str,
) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other.pth").write_bytes(b"weights of something else")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file where pictures would go")
    segmenter = tmp_path / "segmenter" / "checkpoints"
    Checkpointer(segmenter, keep=1).save(STEP, {"segmenter": nn.Conv2d(3, 19, 1).state_dict()}, {"config": {}})
    places = {
        "RUN": run, "NOWHERE": tmp_path / "none", "EMPTY": tmp_path / "empty", "UNTESTED": data / "untested",
        "OTHER": tmp_path / "other.pth", "SEGMENTER": segmenter.parent,
    }  # fmt: skip
    assert evaluate(monkeypatch, *(places.get(arg, arg) for arg in args)) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml"}


@pytest.mark.parametrize("file", ["generator.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named(
    monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    path = run / "checkpoints" / f"step_{STEP}" / file
    path.write_bytes(path.read_bytes()[:-9])
    assert evaluate(monkeypatch, run) == 2
    message = sentence(capsys.readouterr().err)
    assert f"step_{STEP}" in message and file in message and "damaged" in message
    assert not (run / "evaluation.json").exists()


def test_help_reads_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (
        "RUN_OR_CHECKPOINT", "--data ROOT", "--segmenter", "--inception FILE", "--limit N", "--json FILE", "example:",
        "flip rate",
    ))  # fmt: skip
