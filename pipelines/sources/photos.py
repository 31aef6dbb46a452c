"""Unlabelled images in folders: two domains apart (CycleGAN, CUT) or side by side in one file (pix2pix)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.errors import UserError
from pipelines.images import find_images, image_size, read_image, resize
from pipelines.sources.base import ImageFile, Item, Source

DIRECTIONS = ("AtoB", "BtoA")


def folders(directory: Path) -> Source:
    """DIR/trainA and DIR/trainB, and where they exist DIR/testA and DIR/testB: A is the source, B the target."""
    splits: dict[str, Sequence[Item]] = {}
    for phase in ("train", "test"):
        for domain, letter in (("source", "A"), ("target", "B")):
            folder = directory / f"{phase}{letter}"
            if phase == "train" or folder.is_dir():
                splits[f"{phase}/{domain}"] = [
                    ImageFile(directory, path.relative_to(directory)) for path in find_images(folder)
                ]
    return Source({"source": "folders"}, splits)


@dataclass(frozen=True)
class HalfImage(ImageFile):
    """The left or the right half of an image file."""

    right: bool

    @property
    def origin(self) -> dict[str, Any]:
        return {"file": self.path.as_posix(), "half": "right" if self.right else "left"}

    def check(self) -> None:
        if image_size(self.root / self.path)[0] % 2:
            raise UserError(
                f"{self.root / self.path} has an odd width, so it is not two images side by side: remove it"
            )

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        both = read_image(self.root / self.path)
        left = both.width // 2 if self.right else 0
        return resize(both.crop((left, 0, left + both.width // 2, both.height)), size), None


def paired(directory: Path, direction: str = "AtoB") -> Source:
    """DIR/train and, as test pairs, DIR/test or else DIR/val: images of A (left half) and B (right half) side by side.

    direction: "AtoB" makes the left halves the source, "BtoA" the right ones. The two test domains keep the pairing.
    """
    if direction not in DIRECTIONS:
        raise UserError(f"the direction {direction!r} does not exist: use one of {', '.join(DIRECTIONS)}")
    folders_of = {"train": directory / "train"}
    held_out = next((directory / name for name in ("test", "val") if (directory / name).is_dir()), None)
    if held_out is not None:
        folders_of["test"] = held_out
    splits: dict[str, Sequence[Item]] = {}
    for phase, folder in folders_of.items():
        paths = [path.relative_to(directory) for path in find_images(folder)]
        for domain in ("source", "target"):
            right = (domain == "target") == (direction == "AtoB")
            splits[f"{phase}/{domain}"] = [HalfImage(directory, path, right) for path in paths]
    return Source({"source": "paired", "direction": direction}, splits, paired="test" in folders_of)
