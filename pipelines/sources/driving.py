"""The two driving data sets of the papers, as their publishers lay them out: Cityscapes and GTA5."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from infra.errors import UserError
from pipelines.images import find_images, resize_label
from pipelines.labels import colourise
from pipelines.sources.base import ImageFile, Item, LabelledImage, Source, read_trainids

CITYSCAPES_DOMAINS = ("source", "target", "label2city")
_PHOTO = "_leftImg8bit"
_LABEL = "_gtFine_labelIds"


@dataclass(frozen=True)
class CityscapesFrame(LabelledImage):
    """A photograph and its label map."""

    @property
    def name(self) -> str:
        return self.path.stem.removesuffix(_PHOTO)


@dataclass(frozen=True)
class LabelColours(ImageFile):
    """A label map drawn in the standard colours, labelled by itself. It is named as its photograph is."""

    @property
    def name(self) -> str:
        return self.path.stem.removesuffix(_LABEL)

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        label = resize_label(read_trainids(self.root / self.path), size)
        return Image.fromarray(colourise(label)), label


def cityscapes(directory: Path, domain: str = "label2city") -> Source:
    """Cityscapes: DIR/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with DIR/gtFine/.../*_gtFine_labelIds.png.

    domain: which side of a translation the photographs are. "label2city" makes both sides: the label maps in the
    standard colours are the source, the photographs the target, and the test frames (val) are pairs.
    """
    if domain not in CITYSCAPES_DOMAINS:
        raise UserError(f"the domain {domain!r} does not exist: use one of {', '.join(CITYSCAPES_DOMAINS)}")
    photos = {split: _cityscapes_frames(directory, folder) for split, folder in (("train", "train"), ("test", "val"))}
    side = "target" if domain == "label2city" else domain
    splits: dict[str, Sequence[Item]] = {}
    for split, frames in photos.items():
        if frames and domain == "label2city":
            splits[f"{split}/source"] = [LabelColours(frame.root, frame.label) for frame in frames]
        if frames:
            splits[f"{split}/{side}"] = list(frames)
    paired = domain == "label2city" and "test/source" in splits
    return Source({"source": "cityscapes", "domain": domain}, splits, paired)


def _cityscapes_frames(directory: Path, folder: str) -> list[CityscapesFrame]:
    """The frames of "train" or "val"; only "val" may be absent."""
    photos = directory / "leftImg8bit" / folder
    if folder == "val" and not photos.is_dir():
        return []
    frames = []
    for path in find_images(photos):
        if not path.stem.endswith(_PHOTO):
            raise UserError(f"{path} is not called *{_PHOTO}.png as in Cityscapes: remove it, or check the folder")
        stem = path.stem.removesuffix(_PHOTO)
        label = directory / "gtFine" / folder / path.relative_to(photos).parent / f"{stem}{_LABEL}.png"
        if not label.is_file():
            raise UserError(f"the label {label} is missing: unpack gtFine beside leftImg8bit, or remove {path.name}")
        frames.append(CityscapesFrame(directory, path.relative_to(directory), label.relative_to(directory)))
    return frames


def gta5(
    directory: Path, cityscapes_directory: Path | None = None, held_out: int = 500, leave_out_mismatched: bool = False
) -> Source:
    """GTA5 ("Playing for Data"): DIR/images/*.png with DIR/labels/*.png of the same names, as the source.

    held_out: the number of test images (500 in the SRUNIT paper): those whose file stem has the smallest SHA-256, so
    the choice depends on nothing but the names. cityscapes_directory: where it is given, Cityscapes is the target.
    leave_out_mismatched: the release holds a few labels of another size than their image; without this they are an
    error that names the file.
    """
    frames = _gta5_frames(directory)
    left_out = 0
    if leave_out_mismatched:
        kept = [frame for frame in tqdm(frames, "comparing sizes", unit="image", leave=False) if frame.sizes_agree()]
        frames, left_out = kept, len(frames) - len(kept)
    if not 0 <= held_out < len(frames):
        raise UserError(f"{held_out} of the {len(frames)} images in {directory} cannot be held out: change --held-out")
    by_hash = sorted(frames, key=lambda frame: hashlib.sha256(frame.name.encode()).hexdigest())
    test = set(by_hash[:held_out])
    splits: dict[str, Sequence[Item]] = {"train/source": [frame for frame in frames if frame not in test]}
    if test:
        splits["test/source"] = [frame for frame in frames if frame in test]
    if cityscapes_directory is not None:
        splits |= cityscapes(cityscapes_directory, "target").splits
    parameters = {
        "source": "gta5",
        "cityscapes": cityscapes_directory is not None,
        "held_out": held_out,
        "left_out": left_out,
    }
    return Source(parameters, splits)


def _gta5_frames(directory: Path) -> list[LabelledImage]:
    frames = []
    for path in find_images(directory / "images"):
        label = directory / "labels" / path.relative_to(directory / "images").with_suffix(".png")
        if not label.is_file():
            raise UserError(f"the label {label} is missing: unpack the labels beside the images, or remove {path}")
        frames.append(LabelledImage(directory, path.relative_to(directory), label.relative_to(directory)))
    return frames
