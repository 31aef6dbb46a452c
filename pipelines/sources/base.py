"""Sources and items: what is to be prepared, named and listed but not yet read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from infra.errors import UserError
from pipelines.images import image_size, read_image, read_stored, resize, resize_label
from pipelines.labels import IGNORE, to_trainids

LAST_LABELID = 34  # of the 35 ids, -1 apart, in Cityscapes and in the public GTA5 release


class Item(Protocol):
    """One sample to be prepared. It is small and is sent to another process, which loads it."""

    @property
    def name(self) -> str:
        """What the sample is called after its number in the key."""

    @property
    def origin(self) -> dict[str, Any]:
        """Where it came from, without the place of the files on this machine."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is read from."""

    def check(self) -> None:
        """Look at the files' headers. UserError names what cannot be used."""

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        """RGB image and uint8 (H, W) trainIds or None, both at size = (width, height). UserError as in `check`."""


@dataclass(frozen=True)
class Source:
    """What is to be prepared: the samples of every split by "split/domain", and how they were chosen.

    parameters: the source's name and options, in JSON's types. paired, grey_histograms (by split): as in the manifest. sizes:
    (width, height) by split, of those whose images keep their own.
    """

    parameters: dict[str, Any]
    splits: dict[str, Sequence[Item]]
    paired: bool = False
    grey_histograms: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """The parameters, and for each split how many samples of which files and sizes it is made from."""
        return self.parameters | {"inputs": {name: fingerprint(items) for name, items in self.splits.items()}}


def fingerprint(items: Sequence[Item]) -> dict[str, Any]:
    """How many samples there are, and a SHA-256 over where each comes from and the sizes of its files, in bytes."""
    try:
        listed = [[item.origin, [path.stat().st_size for path in item.files]] for item in items]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename} ({error.strerror}): check the path and its permissions"
        ) from error
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode())
    return {"samples": len(items), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class ImageFile:
    """An unlabelled image. `path` is relative to `root`."""

    root: Path
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def origin(self) -> dict[str, Any]:
        return {"file": self.path.as_posix()}

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.root / self.path,)

    def check(self) -> None:
        image_size(self.root / self.path)

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        return resize(read_image(self.root / self.path), size), None


@dataclass(frozen=True)
class LabelledImage(ImageFile):
    """An image with a label file of the same size: labelIds, a palette of them, or the Cityscapes colours."""

    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.root / self.path, self.root / self.label)

    def check(self) -> None:
        if not self.sizes_agree():
            image, label = self.files
            raise UserError(
                f"the label {label} does not have the size of its image {image}: mend or remove the two "
                f"(gta5 has --leave-out-mismatched)"
            )

    def sizes_agree(self) -> bool:
        image, label = self.files
        return image_size(image) == image_size(label)

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        return resize(read_image(self.root / self.path), size), resize_label(
            read_trainids(self.root / self.label), size
        )


def read_trainids(path: Path) -> np.ndarray:
    """A Cityscapes or GTA5 label file as uint8 (H, W) trainIds. UserError names a file that does not hold such labels."""
    stored = read_stored(path)
    if stored.ndim == 2 and stored.max() > LAST_LABELID:
        raise UserError(
            f"the label {path} holds the id {stored.max()}, but ids end at {LAST_LABELID}: use the labelIds files"
        )
    try:
        label = to_trainids(stored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if stored.ndim == 3 and (label == IGNORE).all():
        raise UserError(
            f"the label {path} holds none of the 19 class colours: use Cityscapes' colours or the labelIds files"
        )
    return label
