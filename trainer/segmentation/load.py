"""A segmenter from a file or a run folder."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from infra.errors import UserError
from trainer.segmentation import outside
from trainer.segmentation.segmenter import Segmenter
from trainer.segmentation.trained import load_trained, weights_hash


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> Segmenter:
    """A segmenter from the folder of a run or checkpoint of `launch/train_segmenter.py`, from a YAML file that describes
    an outside network, or from that network's .onnx or .pth file with such a YAML file of the same stem beside it.

    UserError for anything else, and for what is missing, damaged or does not fit together.
    """
    return load_trained(path, device) if path.is_dir() else outside.load(_description_of(path), device)


def _description_of(path: Path) -> Path:
    """The YAML file of an outside network."""
    if not path.exists():
        raise UserError(f"there is no segmenter {path}: give a segmenter's run folder, a .yaml, .onnx or .pth file")
    if path.suffix in (".yaml", ".yml"):
        return path
    if path.suffix not in (".onnx", ".pth"):
        raise UserError(f"{path} is no segmenter: give a segmenter's run folder, a .yaml, .onnx or .pth file")
    description = path.with_suffix(".yaml")
    if not description.is_file():
        raise UserError(f"{path} has no {description.name} beside it: describe the network there (docs/segmenters.md)")
    return description


def description_sha256(path: Path) -> str | None:
    """SHA-256 of what is said of an outside network, which decides what it sees, beside its weights; None for a run, whose
    weights say it. Errors: `load_segmenter`."""
    if path.is_dir():
        return None
    described = dataclasses.asdict(outside.read_description(_description_of(path)))
    del described["weights"]  # the name of their file
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def weights_sha256(segmenter: Segmenter) -> str:
    """SHA-256 of a segmenter's weights: the same for copies of one network, wherever they lie."""
    if isinstance(segmenter.logits, outside.OnnxNetwork):
        return hashlib.sha256(segmenter.logits.path.read_bytes()).hexdigest()
    assert isinstance(segmenter.logits, nn.Module)
    return weights_hash(segmenter.logits)
