"""launch/train_segmenter.py: its options and recipes, and what bad input gets: one sentence, and nothing written."""

from pathlib import Path
from typing import Any

import pytest

from infra.config import flatten, leaves, to_yaml
from infra.errors import UserError
from infra.storage import LocalStorage
from launch.runs.config import make_config as translator_config
from launch.runs.segmenter import SegmenterConfig, make_config, parse_arguments, train
from pipelines.manifest import MANIFEST, Manifest
from tests.pipelines.shardmaker import write_root, write_split
from trainer.segmentation.method import RECIPES

pytestmark = [pytest.mark.usefixtures("place"), pytest.mark.slow]

SMALL = [
    "--model.width", "0.1", "--engine.device", "cpu", "--precision", "fp32", "--max-steps", "2", "--data.decoder", "pillow",
    "--data.threads", "1", "--global-batch", "2", "--loop.samples", "1",
]  # fmt: skip


# ---- options ----------------------------------------------------------------------------------------------------------


def test_drn_is_trained_as_cut_trained_it() -> None:
    config = parse_arguments(["--network", "drn-d-22"])
    optim = config.optim
    assert (optim.kind, optim.global_batch, optim.lr, optim.total_epochs) == ("sgd", 32, 0.01, 250)
    assert (optim.momentum, optim.weight_decay, optim.schedule, optim.step_epochs) == (0.9, 1e-4, "step", 100)
    assert config.data.crop is None and config.domain == "target"


def test_every_network_has_a_recipe_that_works() -> None:
    (choices,) = (f.metadata["choices"] for name, f, _ in leaves(SegmenterConfig) if name == "model.network")
    assert set(RECIPES) == set(choices)
    assert all(make_config({"model.network": name}).model.network == name for name in choices)


def test_a_file_lies_over_the_recipe_and_under_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: {network: drn-d-22}\noptim: {lr: 0.5, epochs: 7}\n")
    optim = parse_arguments(["--config", str(file), "--optim.epochs", "3", "--local_rank=1"]).optim
    assert (optim.kind, optim.lr, optim.epochs) == ("sgd", 0.5, 3)


def test_a_resolved_configuration_read_back_is_the_same(tmp_path: Path) -> None:
    config = parse_arguments(["--domain", "source", "--crop", "64", "--data", "x"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(flatten(config)))
    assert parse_arguments(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--network", "unet"], "model.network = 'unet' is unknown: choose one of deeplab, drn-d-22"),
        (["--domain", "both"], "domain = 'both' is unknown: choose one of source, target"),
        (["--network", "drn-d-22", "--model.width", "0.2"], "0.2 leaves drn-d-22 too few channels: give 0.25 or more"),
        (["--seed", "-1"], "seed -1 is negative"),
        (["--task", "gta2city"], "unknown option '--task'"),
    ],
)
def test_an_impossible_command_line_is_explained(line: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_arguments(line)


# ---- data and run folders ---------------------------------------------------------------------------------------------


def files() -> list[Path]:
    """Without the lock of a run, which a start holds while it looks at the folder."""
    return sorted(path for path in Path().rglob("*") if path.name != "run.lock")


def refused(words: str, *line: str) -> None:
    before = files()
    with pytest.raises(UserError, match=words) as caught:
        train(parse_arguments([*SMALL, *line]))
    assert "\n" not in str(caught.value) and files() == before


def write(root: Path, **target: Any) -> str:
    """A data set with one domain, "target", of two images of 48x32."""
    storage = LocalStorage(root)
    split = write_split(storage, "train/target", [2], **target)
    storage.write(MANIFEST, Manifest({"train/target": split}).to_json().encode())
    return str(root)


def test_data_that_cannot_train_a_segmenter(tmp_path: Path) -> None:
    refused("no prepared data at nowhere", "--data", "nowhere")
    bare = write(tmp_path / "bare", labelled=False)
    refused("the target images of .*bare have no labels: choose the other --domain", "--data", bare)
    labelled = write(tmp_path / "labelled")
    refused("the data has no train images of the source domain", "--data", labelled, "--domain", "source")
    refused("crop of 33 pixels is larger than the target images of 48x32", "--data", labelled, "--crop", "33")
    refused("global batch of 3 does not divide", "--data", labelled, "--global-batch", "3", "--optim.accumulation", "2")


def test_one_image_of_a_single_deepest_feature_which_batch_norm_cannot_take(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    line = ["--data", data, "--optim.accumulation", "2", "--crop"]
    refused(
        "images of 16x16 pixels do not suit the networks .either side must be 17 or more.: pass --crop 17", *line, "16"
    )
    refused("must be 9 or more.: pass --crop 9", *line, "8", "--network", "drn-d-22", "--model.width", "0.25")


def test_the_run_of_a_translator(tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path / "data"))
    Path("run").mkdir()
    Path("run/config.yaml").write_text(to_yaml(flatten(translator_config())))
    refused("the run in run has the option .*, which is unknown here, so another program or version began it",
            "--data", str(tmp_path / "data"), "--run-dir", "run")  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_data_without_test_images_trains_and_says_that_nothing_was_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    data = write(tmp_path / "data")
    folder = train(parse_arguments([*SMALL, "--data", data, "--run-dir", "run", "--seed", "3", "--crop", "32"]))
    assert "not scored" in (folder / "train.log").read_text() and not (folder / "evaluation.json").exists()
    assert (folder / "model" / "MLmodel").exists()
    assert train(parse_arguments([*SMALL, "--data", data, "--run-dir", "run", "--seed", "3", "--crop", "32"])) == folder
    assert "is complete" in capsys.readouterr().err
