"""What tests of launch/evaluate.py have in common: a small run, an outside segmenter, labelled data, the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper

from infra.config import flatten, to_yaml
from infra.storage import LocalStorage
from launch import evaluate as cli
from launch.runs.config import make_config
from pipelines.dataset import ImageDataset
from pipelines.prepare import Encoding, prepare
from pipelines.sources.drawn import street_scenes
from trainer.checkpointer import Checkpointer
from trainer.networks.generator import ResnetGenerator

STEP = 7  # of the checkpoint
SCENES = 5  # labelled test scenes


def make_run(
    path: Path, data_root: Path, task: str = "gta2city", change: Callable[[ResnetGenerator], object] = lambda _: None
) -> Path:
    """A run folder with one checkpoint of a small generator, to which `change` was done."""
    config = make_config(
        {"task": task, "data.root": str(data_root), "method.generator.ngf": 2, "method.generator.blocks": 6}
    )
    torch.manual_seed(0)
    generator = config.method.translation().get_submodule("generator")
    assert isinstance(generator, ResnetGenerator)
    change(generator)
    state = {"step": STEP, "config": flatten(config)}
    Checkpointer(path / "checkpoints", keep=1).save(STEP, {"generator": generator.state_dict()}, state)
    (path / "config.yaml").write_text(to_yaml(flatten(config)))
    return path


def make_scenes(root: Path) -> Path:
    """Prepared street scenes, labelled and in pairs."""
    prepare(street_scenes(count=4, test_count=SCENES), LocalStorage(root), Encoding((64, 32), "png"), progress=False)
    return root


def make_segmenter(folder: Path, scenes: Path, classes: int = 19, **changes: Any) -> Path:
    """colours.yaml and colours.onnx: each pixel is of the class whose mean colour in the target's training scenes is
    nearest to its own. (|x - m|² is least where 2 m·x - |m|² is largest: a 1x1 convolution.)"""
    samples = ImageDataset(str(scenes), "train", "target")
    images, labels = (np.stack(part) for part in zip(*map(samples.read, range(len(samples))), strict=True))
    kernel = np.zeros((classes, 3, 1, 1), np.float32)
    bias = np.full(classes, -9.0, np.float32)  # never the highest
    for c in np.unique(labels[labels < 19]):
        mean = images[labels == c].mean(axis=0) / 255
        kernel[c, :, 0, 0], bias[c] = 2 * mean, -(mean**2).sum()
    constants = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(bias, "bias")]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, classes, "h", "w"])
    node = helper.make_node("Conv", ["image", "kernel", "bias"], ["scores"])
    graph = helper.make_graph([node], "colours", [image], [scores], constants)
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "colours.onnx")
    keys = {"network": "onnx", "weights": "colours.onnx", "mean": [0.0] * 3, "std": [1.0] * 3}
    (folder / "colours.yaml").write_text(yaml.safe_dump(keys | changes))
    return folder / "colours.yaml"


def evaluate(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def report_of(run: Path) -> dict[str, Any]:
    """What a run folder's evaluation.json says."""
    return json.loads((run / "evaluation.json").read_text())


def sentence(captured: str) -> str:
    """The one line that a mistake is answered with."""
    (line,) = [line for line in captured.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured
    return line
