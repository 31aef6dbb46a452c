"""A trained translation as a thing to use: images in, images out; from a run folder or a checkpoint."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from infra.config import build, completed
from infra.errors import UserError
from trainer.checkpoint import Checkpoint, find_checkpoint
from trainer.draws import generator
from trainer.methods import METHODS
from trainer.methods.former import todays_names
from trainer.translation import Translation


class Translator:
    """Translates pictures of any size that is not too small.

    seed: of the styles or noise, where the translation has them. direction: AtoB, from the source to the target domain,
    or BtoA. UserError for a direction that the translation does not know.
    """

    def __init__(
        self, translation: Translation, device: torch.device | str = "cpu", *, seed: int = 0, direction: str = "AtoB"
    ) -> None:
        if direction not in translation.directions:
            raise UserError(f"this method translates {' and '.join(translation.directions)}, not {direction}: "
                            "choose one of these, or a method with both directions such as cyclegan")  # fmt: skip
        self.translation, self.device, self.seed, self.direction = translation, device, seed, direction

    @torch.no_grad()
    def __call__(self, image: np.ndarray, key: str = "", *, example: np.ndarray | None = None) -> np.ndarray:
        """(H, W, 3) uint8 RGB, or (N, H, W, 3), to the same shape. Sizes that the networks do not take are padded by
        reflection and cut back.

        key: names the image, whose style or noise is N(0, 1) drawn by the seed and this name, so that an image has the same one
        wherever and whenever it is translated; several images together have one for each. example: an image of the domain
        that is translated to, (h, w, 3) uint8 RGB, whose style all images take instead. UserError where there are no styles.
        """
        batch = image if image.ndim == 4 else image[None]
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise UserError(f"an image of type {image.dtype} and shape {image.shape} cannot be translated: "
                            "give uint8 RGB of shape (H, W, 3) or (N, H, W, 3)")  # fmt: skip
        height, width = batch.shape[1:3]
        padded = self._padded(batch)
        codes = self._codes(padded, key) if example is None else self._codes_of(example, len(batch))
        result = to_images(self.translation(padded, codes, self.direction)[:, :, :height, :width])
        return result if image.ndim == 4 else result[0]

    def _padded(self, images_NHWC: np.ndarray) -> Tensor:
        height, width = images_NHWC.shape[1:3]
        multiple, smallest = self.translation.sizes.multiple, self.translation.sizes.smallest
        if min(height, width) < smallest:
            raise UserError(f"an image of {width}x{height} is too small: give {smallest} pixels or more each way")
        x_NCHW = to_tensor(images_NHWC).to(self.device)
        return nn.functional.pad(x_NCHW, (0, -width % multiple, 0, -height % multiple), mode="reflect")

    def _codes_of(self, example: np.ndarray, count: int) -> Tensor:
        code = self.translation.code_of(self._padded(example[None]), self.direction)
        if code is None:
            raise UserError("this method has no styles to take from an example: choose one that has, such as munit")
        return code.expand(count, -1)

    def _codes(self, images: Tensor, key: str) -> Tensor | None:
        shape = self.translation.code_shape(*images.shape[2:])
        if shape is None:
            return None
        drawn = torch.randn(len(images), *shape, generator=generator("cpu", self.seed, "code", key))
        return drawn.to(self.device)


def to_tensor(images_NHWC: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1], channels-last in memory."""
    return torch.from_numpy(images_NHWC.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def to_images(x_NCHW: Tensor) -> np.ndarray:
    """float (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3), rounded to nearest."""
    scaled = (x_NCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def load_translator(
    path: Path, device: torch.device | str = "cpu", *, averaged: bool = True, direction: str = "AtoB"
) -> Translator:
    """The translation of a run or checkpoint; its moving average where the run kept one and `averaged` is true.

    UserError if there is none, or if it is damaged.
    """
    checkpoint = Checkpoint(find_checkpoint(path))
    if "method.name" not in checkpoint.state["config"]:
        raise UserError(
            f"{path} holds no translator (a segmenter's run has none): give a run folder of launch/train.py"
        )
    config = todays_names(checkpoint.state["config"])
    section = {name.removeprefix("method."): value for name, value in config.items() if name.startswith("method.")}
    cls = METHODS[section["name"]].config
    translation = build(cls, completed(cls, section)).translation()
    for name, network in translation.named_children():
        checkpoint.load_into(network, checkpoint.averaged(name) if averaged else name)
    return Translator(translation.to(device).eval(), device, seed=config.get("seed", 0), direction=direction)
