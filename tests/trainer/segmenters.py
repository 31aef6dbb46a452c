"""Runs of segmenters that were never trained, for those who read one."""

from pathlib import Path
from typing import Any

import torch

from infra.config import flatten
from trainer.checkpointer import Checkpointer
from trainer.draws import generator
from trainer.segmentation.config import SegmenterModelConfig, init_weights

MODEL = SegmenterModelConfig(width=0.1, output_stride=4)
CLASSES = 19


def network(seed: int) -> torch.nn.Module:
    """A small segmenter in evaluation mode, its batch norm's statistics drawn as well."""
    result = MODEL.build(CLASSES)
    init_weights(result, generator("cpu", seed))
    for module in result.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(generator=torch.Generator().manual_seed(seed))
    return result.eval()


def save(
    run: Path, step: int, size: tuple[int, int] = (32, 24), space: str = "cityscapes19", **networks: torch.nn.Module
) -> Path:
    """A checkpoint of a run, whose folder is `run`."""
    tensors = {stem: net.state_dict() for stem, net in networks.items()}
    config = {f"model.{name}": value for name, value in flatten(MODEL).items()}
    facts: dict[str, Any] = {"step": step, "image_size": size, "label_space": space, "config": config}
    return Checkpointer(run / "checkpoints", keep=9).save(step, tensors, facts)
