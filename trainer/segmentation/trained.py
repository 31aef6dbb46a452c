"""Segmenters that were trained here, as things to use: from a run folder or a checkpoint."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from infra.config import build
from infra.errors import UserError
from trainer.checkpoint import Checkpoint, find_checkpoint
from trainer.segmentation.config import SegmenterModelConfig
from trainer.segmentation.segmenter import LABEL_SPACES, Segmenter


def as_segmenter(
    network: nn.Module,
    *,
    name: str,
    input_size: tuple[int, int],
    label_space: str,
    device: torch.device | str,
) -> Segmenter:
    """A network as `Segmentation` trains it: RGB in [-1, 1] to one score per class of the label space.

    input_size: (width, height) of the images it was trained on.
    """
    return Segmenter(
        network, name=name, input_size=input_size, mean=(0.5,) * 3, std=(0.5,) * 3, scale=255.0,
        trainids=range(LABEL_SPACES[label_space]), label_space=label_space, device=device,
    )  # fmt: skip


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers: the same for the same ones, wherever they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_trained(path: Path, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter of a run of `launch/train_segmenter.py` (its newest checkpoint) or of one of its checkpoints; its
    moving average where the run kept one. UserError if it is none."""
    folder = find_checkpoint(path)
    checkpoint = Checkpoint(folder)
    if not checkpoint.has("segmenter"):
        raise UserError(f"{path} holds no segmenter: give a run folder of launch/train_segmenter.py")
    state = checkpoint.state
    if state["label_space"] not in LABEL_SPACES:
        raise UserError(f"the segmenter {path} has the unknown label space {state['label_space']!r}: "
                        f"choose one of {' or '.join(LABEL_SPACES)}")  # fmt: skip
    config = build(SegmenterModelConfig, checkpoint.config(SegmenterModelConfig, "model."))
    network = config.build(LABEL_SPACES[state["label_space"]])
    checkpoint.load_into(network, checkpoint.averaged("segmenter"))
    width, height = state["image_size"]
    return as_segmenter(
        network.to(device).eval(), name=str(path), input_size=(width, height), label_space=state["label_space"],
        device=device,
    )  # fmt: skip
