"""A segmenter in a translator's training, as a person names it: what it trains, who may judge, what may change."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.config import to_yaml
from infra.errors import UserError
from infra.json_lines import JsonLines
from launch.matching import match
from launch.runs import training, translator
from launch.runs.config import parse_arguments
from launch.runs.evaluation import check_judged_by
from launch.runs.folder import RunFolder
from tests.launch.evaluating import evaluate, make_scenes, sentence
from tests.trainer import segmenters
from trainer.methods.parts import semantic

pytestmark = pytest.mark.slow

SMALL = [
    "--data", "data", "--crop", "32", "--ngf", "4", "--ndf", "4", "--method.generator.blocks", "6", "--method.head-dim", "8",
    "--method.patches", "8", "--engine.device", "cpu", "--precision", "fp32", "--data.decoder", "pillow", "--data.threads", "1",
    "--loop.samples", "1", "--method", "cut", "--method.semantic.weight", "1", "--optim.epochs", "1", "--optim.decay-epochs", "0",
    "--evaluation.every", "1",
]  # fmt: skip
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in data, and segmenters: source and other, of one run each; moved, which has the weights of source."""
    folder = tmp_path_factory.mktemp("workplace")
    make_scenes(folder / "data")
    for name, seed, step in (("source", 1, 5), ("other", 2, 5), ("moved", 1, 9)):
        segmenters.save(folder / name, step, (64, 32), segmenter=segmenters.network(seed))
    segmenters.save(folder / "source", 3, (64, 32), segmenter=segmenters.network(3))  # before it was done
    return folder


@pytest.fixture
def train(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(training, "Follower", lambda folder: SimpleNamespace(finish=lambda: None))
    monkeypatch.setattr(translator, "save_pyfunc_model", lambda folder, *_: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(semantic, "MEASURED", 8)
    return lambda *line: translator.train(parse_arguments([*SMALL, *line]))


def test_a_run_is_trained_with_it_judged_by_another_and_goes_on_with_the_same_alone(
    train: Train, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = ("--evaluation.segmenter", "other", "--run-dir", "run", "--method.semantic.balance", "4")
    for segmenter, steps in (("source", "1"), ("moved", "2")):
        folder = train(*judged, "--method.semantic.segmenter", segmenter, "--max-steps", steps)
    rows = list(JsonLines(folder / "metrics.jsonl").read())
    assert [row["step"] for row in rows] == [1, 2] and all(row["semantic"] > 0 for row in rows)
    with pytest.raises(UserError, match="the run in run began with another network as --method.semantic.segmenter"):
        train("--run-dir", "run", "--method.semantic.segmenter", "other", "--method.semantic.balance", "4")
    capsys.readouterr()
    assert evaluate(monkeypatch, "run", "--segmenter", "source") == 2
    assert "was trained with the segmenter source" in sentence(capsys.readouterr().err)
    assert not (folder / "evaluation.json").exists()
    shutil.move(workplace / "run", workplace / "elsewhere")
    assert evaluate(monkeypatch, "elsewhere", "--segmenter", "other") == 0


@pytest.mark.parametrize("judge", ["source", "source/checkpoints/step_3", "moved"])
def test_its_own_teacher_does_not_judge_it(train: Train, workplace: Path, judge: str) -> None:
    with pytest.raises(
        UserError, match=f"with the segmenter {judge} .--method.semantic.segmenter., which cannot judge it"
    ):
        train("--method.semantic.segmenter", "source", "--evaluation.segmenter", judge, "--run-dir", "refused")
    assert not (workplace / "refused").exists()


def test_nor_does_what_its_targets_were_matched_by(
    train: Train, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    match("data", ["segmenter", "other"], crop=32, k=2, name="by-other")
    matched = ("--data.match", "by-other", "--method.semantic.weight", "0", "--max-steps", "1", "--run-dir")
    with pytest.raises(UserError, match="with the segmenter other .--data.match by-other., which cannot judge it"):
        train(*matched, "refused", "--evaluation.segmenter", "other")
    assert not (workplace / "refused").exists()
    train(*matched, "matched", "--evaluation.segmenter", "source")
    assert evaluate(monkeypatch, "matched", "--segmenter", "other") == 2
    assert "(--data.match by-other)" in sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("segmenter", "words"),
    [("data", "data is neither a run folder nor a checkpoint"), ("nowhere", "nowhere is neither")],
)
def test_what_is_no_segmenter(train: Train, workplace: Path, segmenter: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train("--method.semantic.segmenter", segmenter, "--run-dir", "refused")
    assert not (workplace / "refused").exists()


def test_a_run_was_judged_by_that_segmenter_or_by_none_that_is_still_there(workplace: Path, tmp_path: Path) -> None:
    """source and moved have the same weights."""

    def judged_by(path: Path) -> RunFolder:
        (tmp_path / "config.yaml").write_text(to_yaml({"evaluation.segmenter": str(path)}))
        return RunFolder(tmp_path)

    for before in ("source", "moved", "gone"):
        check_judged_by(judged_by(workplace / before), workplace / "source")
    with pytest.raises(UserError, match="was judged by .*other, not .*source: name another --out"):
        check_judged_by(judged_by(workplace / "other"), workplace / "source")
