"""launch/adapt.py at the smallest size: translations, segmenters as processes, scores, tables and pictures; again and refused."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from infra.errors import UserError
from infra.storage import open_storage
from launch import adapt as cli
from launch.adaptation import STRENGTH, Adaptation, street_root
from launch.adaptation_results import tables
from launch.flipping_arms import read_arms
from launch.flipping_benchmark import Benchmark, Cell
from launch.flipping_data import StreetScenes
from launch.runs import segmenter as segmenters
from launch.runs.embedded import Setup
from pipelines.dataset import ImageDataset
from pipelines.manifest import load_manifest
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import mismatched, street_scenes
from tests.launch.translating import make_run
from trainer.segmentation.trained import load_trained
from trainer.translator import load_translator

SEGMENTER = "{model: {output_stride: 8, width: 0.25}, optim: {epochs: 1, global_batch: 2}, engine: {precision: fp32}}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Six labelled sources, four labelled targets, and a run for seed 3."""
    monkeypatch.chdir(tmp_path)
    Path("segmenter.yaml").write_text(SEGMENTER)
    scenes = street_scenes(6, 4)
    fewer = scenes.splits | {"train/target": scenes.splits["train/target"][:4]}
    prepare(dataclasses.replace(scenes, splits=fewer), open_storage("data"), Encoding((64, 32)), progress=False)
    run = make_run(Path("run-3"))
    rows = ({"step": 3, "flip_rate": 0.5}, {"step": 7, "flip_rate": 0.25}, {"step": 9, "flip_rate": 1.0})
    (run / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))  # step 9 was never saved
    return "data"


def adapt(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["adapt.py", *options.split()])
    cli.main()


def test_from_translators_to_the_tables(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = {"arm": "source", "seed": 9, "mIoU": 0.5, "per_class": {}}
    Path("out").mkdir()
    Path("out/adaptation.json").write_text(json.dumps([earlier]))
    options = "--data data --translators cut=run-{seed} --segmenter-config segmenter.yaml --seed-list 3 --parallel 3 --out out"
    adapt(monkeypatch, options)
    printed = capsys.readouterr().out

    found = {(run["arm"], run["seed"]): run for run in json.loads(Path("out/adaptation.json").read_text())}
    assert found.pop(("source", 9)) == earlier
    assert found.keys() == {("source", 3), ("cut", 3), ("target", 3)}
    for (arm, _), run in found.items():
        folder = Path(f"out/segmenters/{arm}-3")
        assert run.get("flip_rate") == (0.25 if arm == "cut" else None)
        scores = segmenters.score(load_trained(folder), root, "target")  # on real targets, whatever was trained on
        assert {name: run[name] for name in scores} == scores
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3  # one schedule, in steps
        config = yaml.safe_load((folder / "config.yaml").read_text())
        trained_on = (config["data"]["root"], config["domain"])
        assert (
            trained_on
            == {"source": ("data", "source"), "cut": ("out/data/cut-3", "source"), "target": ("data", "target")}[arm]
        )
    gain = 100 * (found["cut", 3]["mIoU"] - found["source", 3]["mIoU"])
    assert f"| cut | 3 | 25.0 | {100 * found['cut', 3]['mIoU']:.1f} | {gain:.1f} |" in printed
    translations, sources = (ImageDataset(place, "train", "source") for place in ("out/data/cut-3", root))
    (image, label), (source, true) = translations.read(0), sources.read(0)
    difference = image.astype(int) - load_translator(Path("run-3"))(source)
    assert abs(difference).mean() < 8 and abs(image.astype(int) - source).mean() > 8  # JPEG
    assert label is not None and true is not None and (label == true).all()
    assert np.asarray(Image.open("out/segmentations.png")).shape == (4 * 32 + 3 * 4, 5 * 64 + 4 * 4, 3)

    # Again: nothing is trained a second time. With another schedule, or another translator: refused, and nothing trained.
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.jsonl")}
    adapt(monkeypatch, options)
    assert capsys.readouterr().out == printed
    Path("segmenter.yaml").write_text(SEGMENTER.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(SystemExit, match="2"):
        adapt(monkeypatch, options)
    assert "source-3 has optim.epochs = 1.0, not 2.0" in capsys.readouterr().err
    make_run(Path("run-3"), seed=1, step=8)
    with pytest.raises(SystemExit, match="2"):
        adapt(monkeypatch, options)
    assert "cut-3 was prepared with weights = " in capsys.readouterr().err
    # Nor are other seeds put beside these with another schedule, in one mean.
    with pytest.raises(SystemExit, match="2"):
        adapt(monkeypatch, options.replace("--seed-list 3", "--seed-list 4").replace("run-{seed}", "run-3"))
    assert "out/adaptation.json has segmenters with other options, or of other data" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.jsonl")} == before


def test_the_embedded_scenes_have_test_images_like_their_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.adaptation.TESTS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # no processes to draw a few scenes
    tier = Setup(Path("launch/flipping-small.yaml").absolute(), (64, 32), (3, 8, 1), {})
    cut = read_arms()["cut"]
    data, folder = StreetScenes(tier, tmp_path / "flipping"), tmp_path / "flipping"
    benchmark = Benchmark(tier, data, folder, [cut], [STRENGTH], [4], None, 1)
    tier.draw(Path(data.root(STRENGTH)), 1.0)
    root = street_root(benchmark, tmp_path / "out")
    splits, theirs = (load_manifest(open_storage(str(place))).splits for place in (root, data.root(STRENGTH)))
    assert splits.keys() == {"train/source", "train/target", "test/target"}
    assert all(splits[name] == theirs[name] for name in ("train/source", "train/target"))
    unseen = street_scenes(1, 2, 1000, mismatched(1.0), mismatched(1.0)).splits["test/target"]
    image, label = ImageDataset(root, "test", "target").read(1)
    assert label is not None and (label == unseen[1].load((64, 32))[1]).all()
    assert unseen[1].origin["look"] == "camera" and image.shape == (32, 64, 3)
    assert benchmark.runs_of(cut, STRENGTH).replace("{seed}", "4") == str(benchmark.run_dir(Cell(cut, STRENGTH, 4)))


def score(arm: str, seed: int, mean: float, **classes: float) -> dict[str, Any]:
    per_class = {name: {"IoU": value, "share": 0.5 if name == "sky" else 0.1} for name, value in classes.items()}
    return {"arm": arm, "seed": seed, "mIoU": mean, "pxAcc": 0.5, "clsAcc": 0.25, "per_class": per_class}


def test_gains_are_over_the_same_seed_and_classes_are_ordered_by_their_share() -> None:
    runs = [
        score("target", 0, 0.6, car=0.5, sky=0.7), score("source", 1, 0.3, car=0.2, sky=0.4),
        score("source", 0, 0.2, car=0.1, sky=0.3), score("gone", 7, 0.1, car=0.1, sky=0.1),
        score("cut", 0, 0.4, car=0.3, sky=0.5), score("cut", 1, 0.44, car=0.5, sky=0.5),
    ]  # fmt: skip
    assert tables(runs, {"best": "never run", "cut": "CUT"}) == (
        "| trained on | seeds | mIoU | gain | pxAcc | clsAcc |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| source only | 0, 1 | 25.0 ± 7.1 | – | 50.0 ± 0.0 | 25.0 ± 0.0 |\n"
        "| CUT | 0, 1 | 42.0 ± 2.8 | 17.0 ± 4.2 | 50.0 ± 0.0 | 25.0 ± 0.0 |\n"
        "| gone | 7 | 10.0 | – | 50.0 | 25.0 |\n"
        "| target's labels (ceiling) | 0 | 60.0 | 40.0 | 50.0 | 25.0 |\n"
        "\nIoU\n\n"
        "| class | share | source only | CUT | gone | target's labels (ceiling) |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| sky | 50.0 | 35.0 | 50.0 | 10.0 | 70.0 |\n"
        "| car | 10.0 | 15.0 | 40.0 | 10.0 | 50.0 |\n"
    )
    with pytest.raises(UserError, match="there are no finished runs"):
        tables([], {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--translators cut=run-3", "--translators are of data of yours: add --data"),
        ("--data data --arms cut", "--arms and --benchmark are of the street scenes"),
        ("--data data --translators run-3", "--translators run-3 is no NAME=RUN"),
        ("--data data --translators a=run-3 a=run-4", "name one twice"),
        ("--data data --translators source=run-3", "cannot be called 'source'"),
        ("--data data --translators a=run-{seed}", "run-0 is neither a run folder nor a checkpoint"),
        ("--data data --seed-list 1 1", "the seeds 1 1 name one twice"),
        ("--data data --parallel 0", "0 trainings at once are impossible"),
        ("--data none --translators a=run-3", "no prepared data"),
        ("--table none.json", "there are no finished runs"),
    ],
)
def test_what_cannot_be(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        adapt(monkeypatch, f"--out out {options}")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("out").exists()


def test_data_without_labels_are_refused_and_targets_may_have_none(root: str) -> None:
    for split, words in (
        ("train/source", "to train on"),
        ("test/target", "to score segmenters on"),
        ("train/target", ""),
    ):
        manifest = json.loads(Path(root, "manifest.json").read_text())
        manifest["splits"][split]["label_space"] = None
        del manifest["sha256"]
        place = Path(split.replace("/", "-"))
        place.mkdir()
        (place / "manifest.json").write_text(json.dumps(manifest))
        make: Any = lambda: Adaptation(str(place), {}, {}, Path("out"), [0], 1)  # noqa: B023, E731
        if words:
            with pytest.raises(UserError, match=words):
                make()
        else:
            assert make().arms == ["source"]
