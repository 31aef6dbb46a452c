"""A trained translation as a thing to use: images in, images out; from a run folder or a checkpoint."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from infra.config import build, completed
from infra.errors import UserError
from trainer.checkpoint import LATEST, NETWORK, Checkpoint, find_checkpoint
from trainer.draws import generator
from trainer.hub import Hub, is_hub
from trainer.methods import METHODS
from trainer.methods.former import todays_names
from trainer.segmentation.trained import weights_hash
from trainer.tiling import Span, Tiles, in_tiles
from trainer.translation import Translation

ANY_SIZE = (64, 64)  # of an image, for what does not depend on it
DEPTHS = (np.uint8, np.uint16)  # of the pixels of images


class Translator:
    """Translates pictures of any size that is not too small.

    seed: of the styles or noise, where the translation has them. direction: AtoB, from the source to the target domain,
    or BtoA. example: an image of the domain that is translated to, (h, w, 3) RGB, whose style all images take. tiles: images
    larger than one are translated in tiles. dtype: bfloat16 or float16 to compute in, but for images of 16 bits. UserError for
    a direction that the translation does not know, and for an example where there are no styles.
    """

    def __init__(
        self, translation: Translation, device: torch.device | str = "cpu", *, seed: int = 0, direction: str = "AtoB",
        example: np.ndarray | None = None, tiles: Tiles | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        translation.check_direction(direction)
        self.translation, self.device, self.seed, self.direction = translation, device, seed, direction
        self.tiles, self.dtype = tiles, dtype
        self.style = None if example is None else self._style_of(example)

    def move_to(self, device: torch.device | str) -> None:
        """Translate there from now on."""
        self.translation.to(device)
        self.device, self.style = device, None if self.style is None else self.style.to(device)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, key: str = "", *, example: np.ndarray | None = None) -> np.ndarray:
        """(H, W, 3) RGB, uint8 or uint16, or (N, H, W, 3), to the same shape and type. Sizes that the networks do not take are
        padded by reflection and cut back.

        key: names the image, whose style or noise is N(0, 1) drawn by the seed and this name, so that an image has the same one
        wherever and whenever it is translated; several images together have one for each. example: as the constructor's, for
        this call. UserError for what is no such image, or too small (`check_size`).
        """
        batch = image if image.ndim == 4 else image[None]
        if batch.dtype not in DEPTHS or batch.ndim != 4 or batch.shape[3] != 3:
            raise UserError(f"an image of type {image.dtype} and shape {image.shape} cannot be translated: "
                            "give uint8 RGB of shape (H, W, 3) or (N, H, W, 3)")  # fmt: skip
        height, width = batch.shape[1:3]
        self.check_size(width, height)
        style = self.style if example is None else self._style_of(example)
        codes = self._codes(len(batch), height, width, key) if style is None else style.expand(len(batch), -1)
        with torch.autocast(
            torch.device(self.device).type, self.dtype, enabled=self.dtype is not None and batch.dtype == np.uint8
        ):
            if self.tiles and self.tiles.needed(height, width):
                of_each = [None] * len(batch) if codes is None else codes
                result = np.stack([self._in_tiles(self.tiles, *each) for each in zip(batch, of_each, strict=True)])
            else:
                translated = self.translation(self._padded(batch), codes, self.direction)
                result = to_images(translated[:, :, :height, :width], batch.dtype)
        return result if image.ndim == 4 else result[0]

    def _in_tiles(self, tiles: Tiles, image: np.ndarray, code: Tensor | None) -> np.ndarray:
        result = np.empty_like(image)

        def read(rows: Span, columns: Span) -> Tensor:
            return to_tensor(image[None, slice(*rows), slice(*columns)]).to(self.device)

        def write(rows: Span, columns: Span, part: Tensor) -> None:
            result[slice(*rows), slice(*columns)] = to_images(part, image.dtype)[0]

        in_tiles(
            self.translation, tiles, read, image.shape[:2], None if code is None else code[None], self.direction, write
        )
        return result

    def each(self, images: Sequence[np.ndarray], keys: Sequence[str]) -> list[np.ndarray]:
        """Images of one size and type, (H, W, 3): together, but where each has a style or noise of its own, drawn by its key."""
        if self.style is not None or not self.draws:
            return list(self(np.stack(images)))
        return [self(image, key) for image, key in zip(images, keys, strict=True)]

    @property
    def identity(self) -> dict[str, str | int]:
        """What a translation depends on beside the image."""
        given: dict[str, str | int] = {"weights": weights_hash(self.translation), "direction": self.direction}
        if self.dtype is not None:
            given["precision"] = str(self.dtype).removeprefix("torch.")
        if self.style is not None:
            return given | {"style": hashlib.sha256(self.style.cpu().numpy().tobytes()).hexdigest()}
        return given | ({"seed": self.seed} if self.draws else {})

    @property
    def draws(self) -> bool:
        """Whether there are styles or noise, drawn by the seed where no example gives the style."""
        return self.translation.code_shape(*ANY_SIZE) is not None

    def check_size(self, width: int, height: int) -> None:
        """UserError for images, in pixels, that are too small to be translated."""
        smallest = self.translation.sizes.smallest
        if min(height, width) < smallest:
            raise UserError(f"an image of {width}x{height} is too small: give {smallest} pixels or more each way")

    def _padded(self, images_NHWC: np.ndarray) -> Tensor:
        height, width = images_NHWC.shape[1:3]
        multiple = self.translation.sizes.multiple
        x_NCHW = to_tensor(images_NHWC).to(self.device)
        return nn.functional.pad(x_NCHW, (0, -width % multiple, 0, -height % multiple), mode="reflect")

    @torch.no_grad()
    def _style_of(self, example: np.ndarray) -> Tensor:
        """(1, code)."""
        self.check_size(example.shape[1], example.shape[0])
        code = self.translation.code_of(self._padded(example[None]), self.direction)
        if code is None:
            raise UserError("this method has no styles to take from an example: choose one that has, such as munit")
        return code

    def _codes(self, count: int, height: int, width: int, key: str) -> Tensor | None:
        """For so many images of this size."""
        multiple = self.translation.sizes.multiple
        shape = self.translation.code_shape(height + -height % multiple, width + -width % multiple)
        if shape is None:
            return None
        drawn = torch.randn(count, *shape, generator=generator("cpu", self.seed, "code", key))
        return drawn.to(self.device)


def to_tensor(images_NHWC: np.ndarray) -> Tensor:
    """uint8 or uint16 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1], channels-last in memory."""
    return torch.from_numpy(images_NHWC.astype(np.float32) / _middle(images_NHWC.dtype) - 1).permute(0, 3, 1, 2)


def to_images(x_NCHW: Tensor, dtype: np.dtype | type = np.uint8) -> np.ndarray:
    """float (N, 3, H, W) in [-1, 1] to uint8 or uint16 (N, H, W, 3), rounded to nearest."""
    scaled = (x_NCHW.float().clamp(-1, 1) + 1) * _middle(dtype)
    whole = scaled.round().to(torch.uint8 if dtype == np.uint8 else torch.int32)
    return whole.permute(0, 2, 3, 1).contiguous().cpu().numpy().astype(dtype, copy=False)


def _middle(dtype: np.dtype | type) -> float:
    """Of the range of a pixel."""
    return float(np.iinfo(dtype).max) / 2


def find_translation(path: Path, which: str = LATEST) -> Path:
    """The folder that `load_translator` reads: a checkpoint as `find_checkpoint` says, the one in an MLflow model, or a folder in
    the layout of the Hugging Face Hub."""
    in_mlflow = path / "artifacts" / NETWORK
    return path if is_hub(path) else find_checkpoint(in_mlflow if in_mlflow.is_dir() else path, which)


def opened(folder: Path) -> Checkpoint | Hub:
    """What is in such a folder."""
    return Hub(folder) if is_hub(folder) else Checkpoint(folder)


def load_translator(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    averaged: bool | None = None,
    direction: str = "AtoB",
    seed: int | None = None,
    example: np.ndarray | None = None,
    tiles: Tiles | None = None,
    dtype: torch.dtype | None = None,
) -> Translator:
    """The translation of a run (its newest checkpoint), or of a folder such as `find_translation` finds.

    averaged: its moving average; None: where the run kept one. seed: of styles or noise; None: the run's. Others as of
    `Translator`. UserError if there is none, or if it is damaged.
    """
    found = opened(find_translation(path))
    if "method.name" not in found.state["config"]:
        raise UserError(
            f"{path} holds no translator (a segmenter's run has none): give a run folder of launch/train.py"
        )
    config = todays_names(found.state["config"])
    section = {name.removeprefix("method."): value for name, value in config.items() if name.startswith("method.")}
    cls = METHODS[section["name"]].config
    translation = build(cls, completed(cls, section)).translation()
    for name, network in translation.named_children():
        stem = found.averaged(name)
        if averaged and stem == name:
            raise UserError(f"{found.folder} has no moving average: leave out --averaged")
        found.load_into(network, name if averaged is False else stem)
    chosen = config.get("seed", 0) if seed is None else seed
    return Translator(
        translation.to(device).eval(),
        device,
        seed=chosen,
        direction=direction,
        example=example,
        tiles=tiles,
        dtype=dtype,
    )
