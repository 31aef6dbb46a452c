"""Networks described by a YAML file: real ONNX files, small enough to write here."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from infra.errors import UserError
from trainer.segmentation import load_segmenter

COLOURS = np.random.default_rng(0).standard_normal((19, 3)).astype(np.float32)


def write_network(path: Path, classes: int = 19, size: tuple[Any, Any] = ("h", "w"), *, labels: bool = False) -> None:
    """An ONNX file that scores each pixel by its colour, at half the size; labels: it ends with an argmax."""
    kernel = numpy_helper.from_array(np.resize(COLOURS, (classes, 3, 1, 1)), "kernel")
    nodes = [helper.make_node("Conv", ["image", "kernel"], ["scores"], strides=[2, 2])]
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, classes, None, None])
    if labels:
        nodes.append(helper.make_node("ArgMax", ["scores"], ["labels"], axis=1, keepdims=0))
        output = helper.make_tensor_value_info("labels", TensorProto.INT64, [1, None, None])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *size])
    graph = helper.make_graph(nodes, "colours", [image], [output], [kernel])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def describe(folder: Path, **changes: Any) -> Path:
    """colours.yaml for colours.onnx; a change to None leaves the key out."""
    keys = {"network": "onnx", "weights": "colours.onnx", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]} | changes
    path = folder / "colours.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return path


def patches(*colours: tuple[int, int, int]) -> np.ndarray:
    """An image of 8x8 patches side by side."""
    return np.repeat(np.repeat(np.array([colours], np.uint8), 8, axis=0), 8, axis=1)


@pytest.mark.parametrize("given", ["colours.yaml", "colours.onnx"])
def test_an_onnx_file_labels_images(tmp_path: Path, given: str) -> None:
    write_network(tmp_path / "colours.onnx")
    describe(tmp_path)
    colours = [(255, 0, 0), (0, 255, 0), (30, 20, 250)]
    segmenter = load_segmenter(tmp_path / given)
    label = segmenter(patches(*colours))
    expected = ((np.array(colours) / 255 - 0.5) / 0.25 @ COLOURS.T).argmax(axis=1)
    assert len(set(expected)) == 3
    np.testing.assert_array_equal(label[:, 2::8], np.tile(expected, (8, 1)))
    np.testing.assert_array_equal(label, segmenter(patches(*colours)))
    assert (segmenter.name, segmenter.label_space) == ("colours", "cityscapes19")


def test_a_network_of_one_size_needs_that_size(tmp_path: Path) -> None:
    write_network(tmp_path / "colours.onnx", size=(32, 64))
    with pytest.raises(UserError, match=r"colours.onnx refuses .*Got: 128 Expected: 32.*input_size: \[width, height\]"):
        load_segmenter(describe(tmp_path))
    assert load_segmenter(describe(tmp_path, input_size=[64, 32]))(patches((9, 9, 9))).shape == (8, 8)


def test_the_map_of_outputs(tmp_path: Path) -> None:
    write_network(tmp_path / "colours.onnx", classes=21)
    with pytest.raises(UserError, match=r"\(1, 21, .* 19 classes .*correct trainids"):
        load_segmenter(describe(tmp_path))
    label = load_segmenter(describe(tmp_path, trainids=[255] * 20 + [4]))(patches((1, 2, 3)))
    assert (label == 4).all()


def test_labels_instead_of_scores_are_refused(tmp_path: Path) -> None:
    write_network(tmp_path / "colours.onnx", labels=True)
    with pytest.raises(UserError, match="output of shape .* not scores"):
        load_segmenter(describe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"maen": [0, 0, 0]}, "colours.yaml: unknown option 'maen' .did you mean 'mean'"),
        ({"network": "keras"}, "network = 'keras' is unknown: choose one of onnx, espnetv2"),
        ({"network": None}, "network and weights are missing"),
        ({"weights": None}, "network and weights are missing"),
        ({"weights": "other.onnx"}, "other.onnx, which do not exist"),
        ({"std": None}, "mean and std must be three numbers"),
        ({"std": [1, 1, 0]}, "above 0"),
        ({"channels": "RGBA"}, "channels = 'RGBA' is unknown: choose one of RGB, BGR"),
        ({"input_size": [512]}, "no size in pixels"),
        ({"trainids": [*range(18), 20]}, "trainids of the segmenter colours leave the classes"),
        ({"trainids": ["road"]}, "trainids = .* is not a list of numbers"),
        ({"label_space": "camvid11"}, "unknown label space 'camvid11'"),
    ],
)
def test_a_wrong_description(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    write_network(tmp_path / "colours.onnx")
    with pytest.raises(UserError, match=complaint):
        load_segmenter(describe(tmp_path, **changes))


def test_files_that_are_no_segmenters(tmp_path: Path) -> None:
    def refused(name: str, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            load_segmenter(tmp_path / name)

    for name in ("alone.onnx", "alone.pth", "picture.png", "colours.onnx", "colours.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    describe(tmp_path)
    refused("absent.onnx", "there is no segmenter")
    refused("alone.onnx", "no alone.yaml beside it: describe")
    refused("alone.pth", "no alone.yaml beside it: describe")
    refused("picture.png", "is no segmenter: give")
    refused("colours.onnx", "not an ONNX file that onnxruntime can run")
    describe(tmp_path, network="espnetv2", weights="colours.pth")
    refused("colours.pth", "damaged or not of an ESPNetv2")
