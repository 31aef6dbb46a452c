"""Unlabelled images in folders: two domains apart (CycleGAN, CUT, AFHQ) or side by side in one file (pix2pix)."""

import re
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
LETTERS = ("A", "B")
_TRAIN = ("train{}", "train/{}")
_TEST = ("test{}", "test/{}", "val/{}")
_SCENE_OF_TWO = re.compile(r"(.+)_([^_]+)_to_([^_]+)")  # pix2pix' night2day: camera, left image, right image


def folders(directory: Path, domains: tuple[str, str] = LETTERS) -> Source:
    """Two folders of images for training, the source's and the target's, and where they exist two for testing.

    domains: what the two are called. NAME is DIR/trainNAME or DIR/train/NAME, and for testing DIR/testNAME, DIR/test/NAME
    or DIR/val/NAME, whichever of them is there. UserError for a name without a training folder.
    """
    splits: dict[str, Sequence[Item]] = {}
    for split, places in (("train", _TRAIN), ("test", _TEST)):
        for domain, name in zip(("source", "target"), domains, strict=True):
            candidates = [directory / place.format(name) for place in places]
            folder = next((each for each in candidates if each.is_dir()), None)
            if folder is not None:
                splits[f"{split}/{domain}"] = [
                    ImageFile(directory, path.relative_to(directory)) for path in find_images(folder)
                ]
            elif split == "train":
                raise UserError(
                    f"the folder {candidates[0]} does not exist, nor does {candidates[1]}: "
                    f"check the path, or name the two with --domains"
                )
    parameters: dict[str, Any] = {"source": "folders"}
    return Source(parameters if domains == LETTERS else parameters | {"domains": list(domains)}, splits)


def single_images(source: Path, target: Path, limit: int | None = None) -> Source:
    """One image of each domain, as SinCUT takes them, for training and for testing; each keeps its aspect and, up to `limit`
    pixels for its longer side, its size. UserError for files that are no images."""
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} pixels is impossible: give 1 or more, such as 1024")
    files = {"source": source, "target": target}
    splits: dict[str, Sequence[Item]] = {
        f"{split}/{domain}": [ImageFile(path.parent, Path(path.name))]
        for split in ("train", "test")
        for domain, path in files.items()
    }
    sizes = {name: _limited(image_size(files[name.partition("/")[2]]), limit) for name in splits}
    return Source({"source": "images", "limit": limit}, splits, sizes=sizes)


def _limited(size: tuple[int, int], limit: int | None) -> tuple[int, int]:
    factor = min(1.0, limit / max(size)) if limit else 1.0
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


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


def paired(directory: Path, direction: str = "AtoB", distinct: bool = False) -> Source:
    """DIR/train and, as test pairs, DIR/test or else DIR/val: images of A (left half) and B (right half) side by side.

    direction: "AtoB" makes the left halves the source, "BtoA" the right ones. The two test domains keep the pairing.
    distinct: files are called SCENE_A_to_B, as in night2day, where one image is part of many pairs; each A and each B
    is trained on once. UserError for a file of another name.
    """
    if direction not in DIRECTIONS:
        raise UserError(f"the direction {direction!r} does not exist: use one of {', '.join(DIRECTIONS)}")
    folders_of = {"train": directory / "train"}
    held_out = next((directory / name for name in ("test", "val") if (directory / name).is_dir()), None)
    if held_out is not None:
        folders_of["test"] = held_out
    splits: dict[str, Sequence[Item]] = {}
    for split, folder in folders_of.items():
        paths = [path.relative_to(directory) for path in find_images(folder)]
        for domain in ("source", "target"):
            right = (domain == "target") == (direction == "AtoB")
            halves = [HalfImage(directory, path, right) for path in paths]
            splits[f"{split}/{domain}"] = _each_once(halves) if distinct and split == "train" else halves
    parameters: dict[str, Any] = {"source": "paired", "direction": direction}
    return Source(parameters | ({"distinct": True} if distinct else {}), splits, paired="test" in folders_of)


def _each_once(halves: Sequence[HalfImage]) -> list[HalfImage]:
    """The first half that shows each image, by the names of the files."""
    first: dict[tuple[str, str], HalfImage] = {}
    for half in halves:
        named = _SCENE_OF_TWO.fullmatch(half.path.stem)
        if named is None:
            raise UserError(f"{half.root / half.path} is not called SCENE_A_to_B as in night2day: leave out --distinct")
        first.setdefault((named[1], named[3 if half.right else 2]), half)
    return list(first.values())
