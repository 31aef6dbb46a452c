"""Segmenters that were trained here, as things to use: from a run folder or a checkpoint."""

from pathlib import Path

import torch
from torch import nn

from infra.config import build
from infra.errors import UserError
from trainer.checkpoint import Checkpoint
from trainer.segmentation.config import SegmenterModelConfig
from trainer.segmentation.segmenter import LABEL_SPACES, Segmenter
from trainer.translator import find_checkpoint


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


def load_trained(path: Path, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter of a run of `launch/train_segmenter.py` (its newest checkpoint) or of one of its checkpoints; its
    moving average where the run kept one. UserError if it is none."""
    folder = find_checkpoint(path)
    checkpoint = Checkpoint(folder)
    if not checkpoint.has("segmenter"):
        raise UserError(f"{path} holds no segmenter: give a run folder of launch/train_segmenter.py")
    state = checkpoint.state
    config = build(SegmenterModelConfig, checkpoint.config(SegmenterModelConfig, "model."))
    network = config.build(LABEL_SPACES[state["label_space"]])
    checkpoint.load_into(network, checkpoint.averaged("segmenter"))
    width, height = state["image_size"]
    return as_segmenter(
        network.to(device).eval(), name=str(path), input_size=(width, height), label_space=state["label_space"],
        device=device,
    )  # fmt: skip
