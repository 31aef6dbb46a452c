"""launch/evaluate.py with labels and a segmenter: metrics, table, CSV, pictures, MLflow, and mistakes about them."""

import contextlib
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from infra.storage import LocalStorage
from infra.tracking import MlflowRun
from pipelines.dataset import ImageDataset
from pipelines.labels import CLASSES
from pipelines.prepare import Encoding, prepare
from pipelines.sources.base import Source
from pipelines.sources.drawn import StreetScene, street_scenes
from tests.launch.evaluating import SCENES, STEP, evaluate, make_run, make_scenes, make_segmenter, report_of, sentence
from trainer.segmentation import load_segmenter
from trainer.translator import load_translator

pytestmark = pytest.mark.slow

PICTURES = {"evaluation.png", "flips.png", "class_distribution.png", "worst_images.png"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def segmenter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_segmenter(tmp_path_factory.mktemp("segmenter"), scenes)


@pytest.fixture
def run(scenes: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", scenes)


@pytest.fixture(scope="module")
def evaluated(scenes: Path, segmenter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run folder after its evaluation, and what was printed."""
    run = make_run(tmp_path_factory.mktemp("evaluated") / "run", scenes)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        assert evaluate(patch, run, "--segmenter", segmenter) == 0
    return run, printed.getvalue()


def counted(pictures: list[np.ndarray], labels: list[np.ndarray], segmenter: Path) -> np.ndarray:
    """Confusion counts (19, 19), pixel by pixel."""
    counts = np.zeros((19, 19))
    see = load_segmenter(segmenter)
    for picture, label in zip(pictures, labels, strict=True):
        np.add.at(counts, (label[label < 19], see(picture)[label < 19]), 1)
    return counts


def test_the_metrics_are_those_of_the_pictures(evaluated: tuple[Path, str], scenes: Path, segmenter: Path) -> None:
    run, _ = evaluated
    report = report_of(run)
    assert report.keys() >= {
        "pxAcc", "clsAcc", "mIoU", "flip_rate", "drift", "ceiling", "per_class", "Dist", "Acc", "FID", "KID", "baseline", "flips",
        "class_distribution", "total_variation",
    }  # fmt: skip
    assert (report["segmenter"], report["step"], report["images"]) == ("colours", STEP, SCENES)

    read = [[ImageDataset(str(scenes), "test", side).read(i) for i in range(SCENES)] for side in ("source", "target")]
    (sources, labels), (targets, target_labels) = (zip(*side, strict=True) for side in read)
    translator = load_translator(run)
    real = counted(targets, target_labels, segmenter)
    for metrics, pictures in ((report, list(map(translator, sources))), (report["baseline"], sources)):
        counts = counted(pictures, labels, segmenter)
        occurs = counts.any(axis=1)
        right, true = counts.diagonal()[occurs], counts.sum(axis=1)[occurs]
        assert metrics["pxAcc"] == pytest.approx(right.sum() / counts.sum())
        assert metrics["clsAcc"] == pytest.approx((right / true).mean())
        assert metrics["mIoU"] == pytest.approx((right / (true + counts.sum(axis=0)[occurs] - right)).mean())
        shares = [each / counts.sum() for each in (counts.sum(axis=0), counts.sum(axis=1))]
        assert metrics["drift"] == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)
        excess = counts[occurs] / true[:, None] - real[occurs] / real[occurs].sum(axis=1, keepdims=True)
        off_diagonal = np.where(np.eye(19, dtype=bool)[occurs], 0, excess.clip(min=0))
        assert metrics["flip_rate"] == pytest.approx((true / true.sum()) @ off_diagonal.sum(axis=1))
        worst = metrics["flips"][0]
        t, p = CLASSES.index(worst["true"]), CLASSES.index(worst["seen"])
        assert worst["of_all"] == pytest.approx((true[:, None] / true.sum() * off_diagonal).max())
        assert worst["excess"] == pytest.approx(counts[t, p] / counts[t].sum() - real[t, p] / real[t].sum())
    assert report["ceiling"]["pxAcc"] == pytest.approx(real.diagonal().sum() / real.sum())
    assert 0 < report["flip_rate"] != report["baseline"]["flip_rate"]


def test_the_distribution_of_the_target_is_that_of_its_training_images(
    evaluated: tuple[Path, str], scenes: Path
) -> None:
    train, shares = ImageDataset(str(scenes), "train", "target").split, report_of(evaluated[0])["class_distribution"]
    assert train.class_histogram is not None
    assert shares["target"]["road"] == train.class_histogram[0] / sum(train.class_histogram)
    assert shares["target"] != shares["target_seen"]


def test_the_table(evaluated: tuple[Path, str]) -> None:
    run, printed = evaluated
    report = report_of(run)
    header, source, translation, real, *rest = printed.splitlines()
    assert " ".join(header.split()) == "pxAcc clsAcc mIoU flip rate drift Dist Acc(30) Acc(50)"
    for name, line, metrics in (
        ("untranslated", source, report["baseline"]),
        ("translation", translation, report),
        ("real (ceiling)", real, report["ceiling"]),
    ):
        shown = [
            f"{metrics[each]:.1%}" for each in ("pxAcc", "clsAcc", "mIoU", "flip_rate", "drift") if each in metrics
        ]
        assert line.startswith(name) and line.removeprefix(name).split()[:5] == shown
        assert len(line) <= len(header) <= 80
    worst = report["flips"][0]
    assert rest[0].startswith(
        f"flips: {worst['true']} → {worst['seen']} {100 * worst['excess']:.0f} % of {worst['true']}"
    )
    worst_five = [(flip["true"], flip["seen"]) for flip in report["flips"][:5]]
    named = [(true, "vegetation") for true in ("sky", "building") if report[f"{true}_to_vegetation"] > 0]
    after = len(worst_five) + len(set(named) - set(worst_five))
    assert all("→" in line and line.startswith("       ") for line in rest[1:after])
    assert rest[after].startswith("FID, KID: not available")
    assert f"{SCENES} test images of" in printed and "segmenter: colours" in printed


def test_the_csv_says_what_the_json_says(evaluated: tuple[Path, str]) -> None:
    run, _ = evaluated
    report = report_of(run)
    with (run / "evaluation.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["of", "class", "metric", "value"]
    values = {(row["of"], row["class"], row["metric"]): float(row["value"]) for row in rows}
    assert len(values) == len(rows)
    for of, metrics in (("translation", report), ("baseline", report["baseline"]), ("ceiling", report["ceiling"])):
        numbers = {name: metric for name, metric in metrics.items() if isinstance(metric, float)}
        assert {name: values.pop((of, "", name)) for name in numbers} == numbers
        for delta, share in metrics.get("Acc", {}).items():
            assert values.pop((of, "", f"Acc({delta})")) == share
        for name, scores in metrics["per_class"].items():
            assert {metric: values.pop((of, name, metric)) for metric in scores} == scores
    for part, shares in report["class_distribution"].items():
        assert {name: values.pop(("translation", name, f"share in {part}")) for name in shares} == shares
    for parts, distance in report["total_variation"].items():
        assert values.pop(("translation", "", f"total variation {parts}")) == distance
    assert not values


def test_the_pictures(evaluated: tuple[Path, str]) -> None:
    folder = evaluated[0] / "samples"
    assert {path.name for path in folder.iterdir()} == PICTURES
    assert Image.open(folder / "evaluation.png").size == (3 * 64 + 2 * 4, SCENES * 32 + (SCENES - 1) * 4)
    width, height = Image.open(folder / "worst_images.png").size
    assert width == 5 * 256 + 4 * 4 and height > SCENES * 128  # enlarged four times, with captions
    assert all(Image.open(folder / name).size[0] == 900 for name in ("flips.png", "class_distribution.png"))


def test_evaluating_twice_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, evaluated: tuple[Path, str], segmenter: Path
) -> None:
    run, _ = evaluated
    files = [run / "evaluation.json", run / "evaluation.csv", *sorted((run / "samples").iterdir())]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert evaluate(monkeypatch, run, "--segmenter", segmenter) == 0
    assert [file.read_bytes() for file in files] == before


def test_metrics_and_pictures_in_mlflow(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, run: Path, segmenter: Path
) -> None:
    tracked = MlflowRun.open(run / "mlflow_run_id", "gta2city", "run")
    assert tracked is not None
    assert evaluate(monkeypatch, run, "--segmenter", segmenter) == 0
    report = report_of(run)
    metrics = client.get_run(tracked.id).data.metrics
    for name in ("pxAcc", "clsAcc", "mIoU", "flip_rate", "drift", "sky_to_vegetation", "Dist"):
        assert metrics[f"eval/{name}"] == report[name]
        assert metrics[f"eval/baseline/{name}"] == report["baseline"][name]
    assert metrics["eval/ceiling/mIoU"] == report["ceiling"]["mIoU"]
    assert metrics["eval/per_class/traffic light/IoU"] == report["per_class"]["traffic light"]["IoU"]
    assert not any("class_distribution" in name for name in metrics)  # the picture and the files have it
    logged = {Path(item.path).name.partition("+")[0] for item in client.list_artifacts(tracked.id, "images")}
    assert logged == {Path(name).stem for name in PICTURES}


@dataclasses.dataclass(frozen=True)
class Mislabelled(StreetScene):
    """A scene whose labels are of a class that does not exist, or not of its size."""

    fault: str = "class"

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        image, label = super().load(size)
        assert label is not None
        return image, label[:, :-4].copy() if self.fault == "size" else np.where(label == 0, np.uint8(19), label)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("class", "a true label is 19, which is neither a trainId of the 19 classes (0 to 18) nor 255 (no class)"),
        ("size", "true labels of 60x32 pixels and predicted labels of 64x32 cannot be compared"),
    ],
)
def test_labels_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    segmenter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    complaint: str,
) -> None:
    good = street_scenes(count=1, test_count=2)
    splits = {
        name: [Mislabelled(**vars(item), fault=fault) for item in items] if name == "test/source" else items
        for name, items in good.splits.items()
    }
    source = Source(good.parameters, splits, paired=True)
    prepare(source, LocalStorage(tmp_path / "bad"), Encoding((64, 32)), progress=False)
    refused(monkeypatch, run, capsys, complaint, "--segmenter", segmenter, "--data", tmp_path / "bad")


@pytest.mark.parametrize(
    ("classes", "changes", "complaint"),
    [
        (21, {}, "not scores of the 19 classes in its trainids"),
        (19, {"trainids": [*range(18), 19]}, "the trainids of the segmenter colours leave the classes 0..18"),
        (19, {"label_space": "camvid11"}, "unknown label space 'camvid11'"),
    ],
    ids=["classes", "trainids", "label space"],
)
def test_a_segmenter_of_other_classes(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    classes: int,
    changes: dict[str, Any],
    complaint: str,
) -> None:
    segmenter = make_segmenter(tmp_path / "other", scenes, classes, **changes)
    refused(monkeypatch, run, capsys, complaint, "--segmenter", segmenter)


def test_data_of_another_label_space(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    scenes: Path,
    segmenter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    manifest = json.loads((make_scenes(other) / "manifest.json").read_text())
    manifest["splits"]["test/source"]["label_space"] = "camvid11"
    del manifest["sha256"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    complaint = "the segmenter colours labels in cityscapes19 but the data in camvid11"
    refused(monkeypatch, run, capsys, complaint, "--segmenter", segmenter, "--data", other)


def test_a_segmenter_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(monkeypatch, run, capsys, "there is no segmenter", "--segmenter", tmp_path / "none")
    refused(monkeypatch, run, capsys, f"{run} holds no segmenter", "--segmenter", run)  # a translator's


def test_data_that_are_only_tested_on(
    monkeypatch: pytest.MonkeyPatch, run: Path, segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labelled sources without any target: scores, and no ceiling to compare them with."""
    drawn = street_scenes(count=1, test_count=2)
    source = Source(drawn.parameters, {name: drawn.splits[name] for name in ("train/source", "test/source")})
    prepare(source, LocalStorage(tmp_path / "sources"), Encoding((64, 32)), progress=False)
    assert evaluate(monkeypatch, run, "--segmenter", segmenter, "--data", tmp_path / "sources") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["pxAcc", "clsAcc", "mIoU", "drift"]
    assert [row.split()[0] for row in rows[:3]] == ["untranslated", "translation", "FID,"]
    assert report_of(run).keys() & {"ceiling", "flip_rate", "Dist", "class_distribution"} == set()


def refused(
    monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str], complaint: str, *args: object
) -> None:
    """Exit 2, one sentence, and nothing written."""
    assert evaluate(monkeypatch, run, *args) == 2
    assert complaint in sentence(capsys.readouterr().err)
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml"}
