"""Describing every crop of the training images, by several processes, into a work folder that keeps what is done."""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.errors import UserError
from infra.storage import LocalStorage
from pipelines.dataset import ImageDataset
from pipelines.matching.descriptors import Grid, Squares, of_classes, of_pixels
from pipelines.matching.lattice import Lattice
from pipelines.workers import parallel

Predict = Callable[[np.ndarray], np.ndarray]
"""An RGB image uint8 (H, W, 3) to trainIds uint8 (H, W). It is sent to other processes."""

_IMAGES, _CELLS = 64, 8192  # of one piece of work, at most


@dataclass(frozen=True)
class Piece:
    """Consecutive training images of a domain. first: the number of the first of them."""

    domain: str
    first: int
    images: int

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.first:09d}.npz"


def pieces_of(domain: str, images: int, cells: int) -> list[Piece]:
    """cells: of one image."""
    step = max(1, min(_IMAGES, _CELLS // cells))
    return [Piece(domain, first, min(step, images - first)) for first in range(0, images, step)]


@dataclass(frozen=True)
class Describer:
    """Describes the crops of one domain, one piece after another.

    by: "segmenter", "labels" or "thumbnail". predict: the segmenter, where there is one. classes: whether pixels by class
    are wanted beside a thumbnail; they are there otherwise. work: the folder that descriptors are kept in.
    """

    root: str
    by: str
    lattice: Lattice
    grid: Grid
    predict: Predict | None
    classes: bool
    work: Path

    def __call__(self, piece: Piece) -> None:
        """Write the piece's descriptors uint8 (cells, d) and, where they are known, pixels by class int32 (cells, 19)."""
        torch.set_num_threads(1)  # a processor each; and a segmenter's sums are the same for any number of processes
        images = _open(self.root, piece.domain)
        squares = _squares(self.lattice, self.grid)
        descriptors, counts = [], []
        for number in range(piece.first, piece.first + piece.images):
            image, label = images.read(number)
            self._check_size(image, number, piece.domain)
            if self.by == "thumbnail":
                descriptors.append(of_pixels(image, squares))
                if self.classes:
                    counts.append(squares.count(self._label(label, number, piece.domain)).sum((1, 2)))
            else:
                classes = self.predict(image) if self.predict else self._label(label, number, piece.domain)
                found = squares.count(classes)
                descriptors.append(of_classes(found))
                counts.append(found.sum((1, 2)))
        buffer = io.BytesIO()
        arrays = {"descriptors": np.concatenate(descriptors)}
        if counts:
            arrays["counts"] = np.concatenate(counts).astype(np.int32)
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        LocalStorage(self.work).write(piece.name, buffer.getvalue())

    def _check_size(self, image: np.ndarray, number: int, domain: str) -> None:
        width, height = self.lattice.image_size
        if image.shape[:2] != (height, width):
            raise UserError(f"training image {number} of the {domain} domain is {image.shape[1]}x{image.shape[0]}, not "
                            f"{width}x{height} as the manifest says: prepare the data again")  # fmt: skip

    def _label(self, label: np.ndarray | None, number: int, domain: str) -> np.ndarray:
        if label is None:
            raise UserError(f"training image {number} of the {domain} domain has no label: prepare the data again with a "
                            "label for every image, or match --by segmenter or thumbnail")  # fmt: skip
        return label


@functools.lru_cache(2)
def _open(root: str, domain: str) -> ImageDataset:
    return ImageDataset(root, "train", domain)


@functools.lru_cache(2)
def _squares(lattice: Lattice, grid: Grid) -> Squares:
    return Squares(lattice, grid)


def describe(describers: dict[str, Describer], pieces: Sequence[Piece], workers: int, progress: bool) -> None:
    """Have all pieces described that are not yet. describers: by domain."""
    threads = torch.get_num_threads()
    preload = [__name__, *{type(each.predict).__module__ for each in describers.values() if each.predict}]
    there = {piece: (describers[piece.domain].work / piece.name).is_file() for piece in pieces}
    missing = [piece for piece in pieces if not there[piece]]
    total, done = (sum(piece.images for piece in some) for some in (pieces, [p for p in pieces if there[p]]))
    try:
        with (
            tqdm(desc="describing", total=total, initial=done, unit="image", disable=not progress) as bar,
            parallel(min(workers, max(1, len(missing))), preload, "give fewer --workers") as run,
        ):
            jobs = run(_describe, [describers[piece.domain] for piece in missing], missing)
            for piece, _ in zip(missing, jobs, strict=True):
                bar.update(piece.images)
    finally:
        torch.set_num_threads(threads)
        _open.cache_clear()


def _describe(describer: Describer, piece: Piece) -> None:
    describer(piece)
