"""launch/rounds.py at the smallest size: all stages, stopped between them, and going on."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from infra.config import flatten, to_yaml
from infra.errors import UserError
from infra.storage import open_storage
from launch import rounds as cli
from launch.runs import rounds
from pipelines.dataset import ImageDataset
from pipelines.manifest import MANIFEST
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from tests.trainer import segmenters

SEGMENTER = "{model: {output_stride: 8, width: 0.25}, optim: {epochs: 0.5}, jitter: 0.5, engine: {precision: fp32}}"
OPTIONS = (
    "--method cut --crop 32 --ngf 2 --ndf 2 --method.generator.blocks 6 --method.head-dim 4 --method.patches 8 --precision fp32 "
    "--optim.epochs 0.5 --optim.decay-epochs 0.5 --loop.keep-logged 0"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "segmenter.yaml").write_text(SEGMENTER)
    prepare(street_scenes(4, 2), open_storage("data"), Encoding((64, 32), shard_size=3), progress=False)
    return "data"


def start(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    given = f"rounds.py --data data --out out --segmenter-config segmenter.yaml {options}"
    monkeypatch.setattr(sys, "argv", given.split())
    cli.main()


def written() -> dict[Path, int]:
    names = ("metrics.jsonl", "manifest.json", "*.npy")
    return {path: path.stat().st_mtime_ns for name in names for path in Path().rglob(name)}


def test_rounds_stopped_at_every_stage_and_continued(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--rounds 2 --sure 0 {OPTIONS}"
    for stage in ("matched", "train", "derive"):
        with monkeypatch.context() as stopping:

            def stop(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            stopping.setattr(rounds, stage, stop)
            before = written()
            with pytest.raises(SystemExit, match="130"):
                start(stopping, options)
            assert before.items() <= written().items(), stage
    start(monkeypatch, options)
    assert before.items() <= written().items()
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("the last translator: out/round-1/translator")

    for number, segmenter in enumerate(("out/segmenter-0", "out/segmenter-1")):
        config = yaml.safe_load(Path(f"out/round-{number}/translator/config.yaml").read_text())
        assert config["method"]["semantic"]["segmenter"] == segmenter and config["method"]["semantic"]["weight"] == 1
        trained = yaml.safe_load(Path(segmenter, "config.yaml").read_text())
        assert (trained["data"]["root"], trained["domain"]) == (
            ("data", "source"), ("out/round-0/data", "target"),
        )[number]  # fmt: skip
        assert trained["jitter"] == 0.5
        score = json.loads(Path(f"out/round-{number}/segmenter.json").read_text())["mIoU"]
        assert f"{number}" in printed and f"{score:.1%}" in printed and "flip rate" not in printed  # no judge

    # The data between: translations with the sources' labels, and targets, of which all is labelled at --sure 0.
    between = ImageDataset("out/round-0/data", "train", "target")
    sources, targets = (ImageDataset(root, "train", domain) for domain in ("source", "target"))
    assert between.keys == [*sources.keys, *(f"target-{key}" for key in targets.keys)]
    translation, label = between.read(1)
    source, true = sources.read(1)
    assert label is not None and true is not None and (label == true).all() and (translation != source).any()
    _, seen = between.read(6)
    assert seen is not None and seen.max() < 19


def test_what_a_round_found_is_that_of_its_runs_as_they_are_now(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("judge", 1), ("S", 2)):
        segmenters.save(Path(name), 3, (64, 32), segmenter=segmenters.network(seed))
    config = cli.translators(["--method", "cut", "--crop", "32"], root, "judge")
    found = rounds.Rounds(Path("out"), config, {}, first=Path("S"))
    translator = found._translators[0] = Path("out/round-0/translator")
    translator.mkdir(parents=True)
    (translator / "config.yaml").write_text(to_yaml(flatten(config)))
    rows = translator / "evaluations.jsonl"
    rows.write_text('{"step": 2, "Dist": 30.0}\n')  # before there was a judge
    with pytest.raises(UserError, match="out/round-0/translator was trained without a judge: leave out --judge"):
        found.metrics(0)
    rows.write_text('{"step": 2, "mIoU": 0.25}\n')
    first = found.metrics(0)
    rows.write_text(rows.read_text() + '{"step": 4, "mIoU": 0.5}\n')
    assert found.metrics(0) == first | {"mIoU": 0.5}

    monkeypatch.setattr("launch.runs.segmenter.score", lambda *_: {"mIoU": 0.75})
    assert found.metrics(0)["segmenter"] == first["segmenter"] != 0.75  # S is as it was
    segmenters.save(Path("S"), 4, (64, 32), segmenter=segmenters.network(3))
    assert found.metrics(0)["segmenter"] == 0.75


def test_the_options_of_every_translator(root: str) -> None:
    config = flatten(
        cli.translators(["--method", "cut", "--optim.epochs", "3", "--optim.decay-epochs", "1"], root, "judge")
    )
    asked = {
        "data.root": root, "method.semantic.weight": 1.0, "optim.epochs": 3.0,
        "evaluation.segmenter": "judge", "evaluation.every": 4.0,
    }  # fmt: skip
    assert config.items() >= asked.items()
    config = flatten(cli.translators(["--method.semantic.weight", "2", "--evaluation.every", "1"], root, "judge"))
    assert (config["method.semantic.weight"], config["evaluation.every"]) == (2, 1)
    Path("mask.yaml").write_text("method: {semantic: {weight: 0, mask: true}}")
    for given in (["--method.semantic.weight", "0", "--method.semantic.mask", "true"], ["--config", "mask.yaml"]):
        config = flatten(cli.translators(given, root, None))
        assert (config["method.semantic.weight"], config["method.semantic.mask"]) == (0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 0", "0 rounds train nothing: give 1 or more"),
        ("--sure 1.5", "--sure 1.5 is a probability"),
        ("--method munit", "munit has no L_sem"),
        ("--method cut --run-dir runs/x", "leave out --run-dir"),
        ("--method cut --data.match labels", "leave out --run-dir and --data.match"),
        ("--method cut --method.semantic.segmenter S2", "leave out --method.semantic.segmenter"),
        (
            "--method cut --crop 48",
            "crops of 48x48 pixels cannot be cut from the source images of 64x32: pass --crop 32",
        ),
        ("--method cut --crop 32 --judge nowhere", "there is no segmenter nowhere"),
        ("--method cut --optim.lr fast", "optim.lr = 'fast' is not a number"),
    ],
)
def test_what_cannot_be(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch, options)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("out").exists()


def test_a_segmenter_of_the_rounds_judges_none_of_them(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    segmenters.save(Path("out/segmenter-1"), 3, (64, 32), segmenter=segmenters.network(1))
    for judge in ("out/segmenter-1", "out/segmenter-1/checkpoints/step_3"):
        with pytest.raises(SystemExit, match="2"):
            start(monkeypatch, f"--method cut --crop 32 --judge {judge}")
        assert f"the judge {judge} is one of the segmenters that these rounds train with" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["segmenter-1"]


def test_a_round_that_another_judge_evaluated_is_not_taken_for_one_of_this(root: str) -> None:
    for name, seed in (("judge", 1), ("other", 2)):
        segmenters.save(Path(name), 3, (64, 32), segmenter=segmenters.network(seed))
    config = cli.translators(["--method", "cut", "--crop", "32"], root, "judge")
    found = rounds.Rounds(Path("out"), config, {})
    found._translators[0] = Path("out/round-0/translator")
    found._translators[0].mkdir(parents=True)
    (found._translators[0] / "config.yaml").write_text(to_yaml({"evaluation.segmenter": "other"}))
    with pytest.raises(UserError, match="out/round-0/translator was judged by other, not judge"):
        found.metrics(0)


def test_a_judge_of_test_sources_without_labels(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    segmenters.save(Path("judge"), 3, (64, 32), segmenter=segmenters.network(1))
    manifest = json.loads(Path(root, MANIFEST).read_text())
    manifest["splits"]["test/source"]["label_space"] = None
    del manifest["sha256"]
    Path(root, MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch, "--method cut --crop 32 --judge judge")
    assert "the test sources of data have no labels to compare a segmenter's with" in capsys.readouterr().err
    assert not Path("out").exists()


def test_sources_without_labels(root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads(Path(root, MANIFEST).read_text())
    manifest["splits"]["train/source"]["label_space"] = None
    del manifest["sha256"]
    Path(root, MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch, "--method cut")
    assert "the sources of data have no labels to train a segmenter on" in capsys.readouterr().err
