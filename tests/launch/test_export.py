"""`launch/export.py`: a run in, a file or folder for other programs out, or a sentence and nothing."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from infra.config import flatten
from infra.errors import UserError
from launch.export import main
from tests.trainer.exported import translation
from tests.trainer.small import method_config
from trainer.checkpoint import find_checkpoint
from trainer.checkpointer import Checkpointer
from trainer.export import check
from trainer.pyfunc import save_pyfunc_model
from trainer.translator import load_translator

pytestmark = pytest.mark.slow


def picture(height: int = 40, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(folder: Path, method: str) -> Path:
    """A run folder with a checkpoint, an evaluation and sample pictures."""
    made = translation(method)
    config = flatten(method_config(method), "method.") | {"method.name": method, "seed": 0, "task": "gta2city"}
    tensors = {name: network.state_dict() for name, network in made.named_children()}
    Checkpointer(folder / "checkpoints", keep=2).save(7, tensors, {"step": 7, "config": config})
    rows = [{"step": step, "mIoU": mean, "FID": "no weights"} for step, mean in ((3, 0.25), (7, 0.375))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples").mkdir()
    for step in (3, 10, 7):
        Image.fromarray(picture(seed=step)).save(folder / "samples" / f"step_{step}.png")
    return folder


@pytest.fixture(scope="module")
def styled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("runs") / "styled", "munit")


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        export(monkeypatch, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_file_says_what_it_is(styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "model.onnx"
    export(monkeypatch, styled, "--to", "onnx", "--out", out, "--direction", "BtoA", "--uint8", "--licence", "cc0-1.0")
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert facts == {
        "method": "munit", "task": "gta2city", "step": "7", "direction": "BtoA", "precision": "fp32", "licence": "cc0-1.0",
        "images": "uint8 (batch, height, width, 3), RGB in 0..255", "normalisation": "in the file", "multiple": "1",
        "smallest": facts["smallest"], "made_by": "srunit 0.1.0",
        "style": "float32 (batch, 8), drawn from N(0, 1) for each image; its mean is 0",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]


def test_nothing_is_written_of_what_differs(
    styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "TOLERANCES", {"fp32": (0.0, 0.0)})
    sentence = refused(monkeypatch, capsys, styled, "--to", "torch", "--out", tmp_path / "model.pt2")
    assert "the exported program differs from the network by" in sentence and not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_at_once(
    styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.onnx"
    there.write_text("mine")
    for arguments, words in (
        (("--to", "onnx", "--out", there), "there.onnx exists: name another --out"),
        (("--to", "onnx", "--out", tmp_path / "x", "--sample", "a.png"), "--sample is for the card of --to hub"),
        (("--to", "hub", "--out", tmp_path / "x", "--uint8"), "--to hub writes the weights as they are: leave out"),
        (("--to", "hub", "--out", tmp_path / "x", "--sample", tmp_path / "no.png"), "no.png"),
        (("--to", "onnx", "--out", tmp_path / "x", "--size", "big"), "'big' is not an image size"),
        (("--to", "onnx", "--out", there / "x.onnx", "--checkpoint", "step_8"), "has no checkpoint step_8"),
    ):
        assert words in refused(monkeypatch, capsys, styled, *arguments)
    assert there.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


# ---- the layout of the Hugging Face Hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = tmp_path / "hub"
    export(monkeypatch, styled, "--to", "hub", "--out", out, "--licence", "cc-by-nc-4.0")
    return out


def test_a_hub_folder_translates_as_the_run_does(hub: Path, styled: Path) -> None:
    assert {path.name for path in hub.iterdir()} == {"README.md", "config.json", "model.safetensors", "sample.png"}
    image = picture()
    for direction in ("AtoB", "BtoA"):
        run, there = (load_translator(path, direction=direction) for path in (styled, hub))
        assert np.array_equal(there(image, key="a"), run(image, key="a"))


def test_its_card_has_what_the_hub_reads_and_the_figures_of_its_checkpoint(hub: Path) -> None:
    text = (hub / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "cc-by-nc-4.0", "library_name": "srunit", "pipeline_tag": "image-to-image",
        "tags": ["unpaired-image-translation", "munit"],
    }  # fmt: skip
    assert "37.5%" in body and "25.0%" not in body and "(sample.png)" in body and "GTA5 frames to Cityscapes" in body
    assert np.array_equal(np.asarray(Image.open(hub / "sample.png")), picture(seed=10))


def test_a_checkpoint_alone_takes_its_sample_from_an_image(
    styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, image, out = tmp_path / "far" / "away" / "step_7", tmp_path / "a.png", tmp_path / "hub"
    shutil.copytree(find_checkpoint(styled), moved)
    Image.fromarray(picture()).save(image)
    assert "give --sample IMAGE" in refused(monkeypatch, capsys, moved, "--to", "hub", "--out", out)
    assert not out.exists()
    export(monkeypatch, moved, "--to", "hub", "--out", out, "--sample", image)
    shown = np.asarray(Image.open(out / "sample.png"))
    assert np.array_equal(shown[:, :48], picture())
    assert np.array_equal(shown[:, -48:], load_translator(moved)(picture(), key="a.png"))
    text = (out / "README.md").read_text()
    assert "license: other\nlicense_name: " in text and "Not evaluated." in text


def test_a_damaged_hub_folder_is_named(hub: Path) -> None:
    weights = load_file(hub / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: torch.zeros(1)}, hub / "model.safetensors")
    with pytest.raises(UserError, match=f"{hub} holds another architecture: .* is .1,. there and"):
        load_translator(hub)
    (hub / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=f"{hub} is damaged .*: fetch it again"):
        load_translator(hub)
    (hub / "config.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=f"{hub} is damaged .*is missing.: fetch it again"):
        load_translator(hub)


def test_an_mlflow_model_is_a_model_too(styled: Path, tmp_path: Path) -> None:
    networks = [name for name, _ in translation("munit").named_children()]
    save_pyfunc_model(tmp_path / "model", find_checkpoint(styled), networks, load_translator)
    assert np.array_equal(load_translator(tmp_path / "model")(picture()), load_translator(styled)(picture()))
