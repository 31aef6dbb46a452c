"""Sample pictures: what the network does with the same images, while it trains."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from infra.storage import StorageUnavailable
from launch.runs.folder import RunFolder, write_png
from trainer.loop import Trainer

log = logging.getLogger(__name__)

Draw = Callable[[nn.Module, torch.device], np.ndarray]


class Sampler:
    """Writes samples/step_N.png. draw: makes the picture, uint8 (H, W, 3), with a network in evaluation mode on a device;
    None on the ranks that draw nothing."""

    def __init__(self, folder: RunFolder, trainer: Trainer, draw: Draw | None) -> None:
        self.folder, self.trainer, self.draw = folder, trainer, draw

    def __call__(self, step: int) -> None:
        if self.draw:
            engine = self.trainer.engine
            with engine.autocast(), self.trainer.evaluating() as network:
                picture = self.draw(network, engine.device)
            try:
                write_png(self.folder.samples / f"step_{step}.png", picture)
            except StorageUnavailable as error:
                log.warning("%s", error)  # a picture less: training goes on
