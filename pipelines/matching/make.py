"""Making a match: describe all crops, find the nearest, write what was found and what it changes.

A match that was killed is continued by the same command, to the same bytes: descriptors and what was found of finished pieces
lie in a work folder, which is removed at the end. It is ROOT/matches/NAME.work, or for a root in S3 in the cache of this machine.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.cache_home import cache_home
from infra.devices import usual_device
from infra.errors import UserError
from infra.storage import LocalStorage, Storage, open_storage
from pipelines.images import encode
from pipelines.labels import CLASSES
from pipelines.manifest import DOMAINS, Split, load_manifest
from pipelines.matching.describe import Describer, Piece, Predict, describe, pieces_of
from pipelines.matching.descriptors import MOST_SQUARES, THUMBNAIL, Grid, mirrored
from pipelines.matching.lattice import Lattice
from pipelines.matching.match import FOLDER, SHARES, Facts, check_name, file_of, image_weights, load_facts, load_match
from pipelines.matching.search import nearest
from pipelines.shards import LABEL_SPACE
from pipelines.workers import check_workers

CLAIM = "match.json"  # in the work folder: what is being made


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """by: "segmenter", "labels" or "thumbnail". grid: columns and rows of squares on a crop; None where a thumbnail's is meant.
    k: candidates of each source cell. crop: the side of all crops in pixels; None for whole images. mirror: mirrored crops
    are candidates too. name: what the match is called."""

    by: str
    name: str
    grid: Grid | None = None
    k: int = 10
    crop: int | None = 256
    mirror: bool = True

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.by == "thumbnail" and self.grid:
            raise UserError(
                f"a thumbnail has {THUMBNAIL[0]}x{THUMBNAIL[1]} squares: leave out --grid, or match by classes"
            )
        if self.grid and self.grid[0] * self.grid[1] > MOST_SQUARES:
            raise UserError(f"a grid of {self.grid[0]}x{self.grid[1]} is too fine: give at most {MOST_SQUARES} squares")
        if self.k < 1:
            raise UserError(f"--k {self.k} is impossible: give 1 or more")

    @property
    def squares(self) -> Grid:
        return THUMBNAIL if self.by == "thumbnail" else self.grid or (4, 4)


def make_match(
    root: str,
    options: MatchOptions,
    predict: Predict | None = None,
    segmenter: str | None = None,
    description: str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Facts:
    """Make a match of a prepared data set, or leave the same one as it is. Searches on a GPU where there is one.

    predict, segmenter, description: what labels the images, where that is the way, and see `Facts`. UserError for what cannot be
    matched, for a match of that name that was made otherwise, and while another process makes it.
    """
    check_workers(workers)
    storage = open_storage(root)
    manifest = load_manifest(storage)
    splits = {domain: manifest.split("train", domain) for domain in DOMAINS}
    lattices = lattices_of(splits, options)
    if options.by == "labels":
        _check_labels(splits)
    candidates = splits["target"].samples * lattices["target"].cells * (2 if options.mirror else 1)
    if options.k > candidates:
        raise UserError(
            f"--k {options.k} is more than the {candidates} crops of the target images: give at most {candidates}"
        )
    asked = Facts(
        by=options.by, grid=options.squares, k=options.k, crop=lattices["source"].crop, mirror=options.mirror,
        manifest=manifest.sha256, segmenter=segmenter, description=description,
    )  # fmt: skip
    work = _work_folder(storage, options.name)
    there = _made_before(storage, options.name, asked)
    if there is not None:
        if progress:
            print(f"already matched: {storage.url}/{file_of(options.name, 'json')}")
        load_match(storage, manifest, options.name)
        shutil.rmtree(work, ignore_errors=True)
        return there
    with _claimed(work, asked, options.name):
        # Another process may have finished it since.
        there = _made_before(storage, options.name, asked)
        if there is None:
            maker = _Maker(storage, splits, lattices, asked, options.name, work, progress)
            there = maker.make(predict, workers)
        load_match(storage, manifest, options.name)  # what stays behind is whole
        shutil.rmtree(work, ignore_errors=True)
    return there


def lattices_of(splits: dict[str, Split], options: MatchOptions) -> dict[str, Lattice]:
    """Those of the crops of both domains. UserError for crops that cannot be cut, or are not of one size."""
    sizes = {split.image_size for split in splits.values()}
    if options.crop is None and len(sizes) > 1:
        raise UserError("whole images of {}x{} and {}x{} are not of one size: give a --crop that fits into both, or prepare them "
                        "in one".format(*splits["source"].image_size, *splits["target"].image_size))  # fmt: skip
    return {domain: _lattice(domain, split, options) for domain, split in splits.items()}


def _lattice(domain: str, split: Split, options: MatchOptions) -> Lattice:
    width, height = split.image_size
    crop = split.image_size if options.crop is None else (options.crop, options.crop)
    if min(crop) < 1 or crop[0] > width or crop[1] > height:
        raise UserError(f"crops of {crop[0]}x{crop[1]} pixels cannot be cut from the {domain} images of {width}x{height}: "
                        f"pass --crop {min(width, height)} or less")  # fmt: skip
    columns, rows = options.squares
    if columns > crop[0] or rows > crop[1]:
        raise UserError(f"a crop of {crop[0]}x{crop[1]} pixels has no {columns}x{rows} squares: give a larger --crop"
                        + ("" if options.by == "thumbnail" else " or a coarser --grid"))  # fmt: skip
    return Lattice(split.image_size, crop)


def _check_labels(splits: dict[str, Split]) -> None:
    for domain, split in splits.items():
        if split.label_space != LABEL_SPACE:
            raise UserError(f"the {domain} images have no labels of {LABEL_SPACE}: match --by segmenter or thumbnail, "
                            "or prepare data that has")  # fmt: skip


def _work_folder(storage: Storage, name: str) -> Path:
    if isinstance(storage, LocalStorage):
        return storage.root / FOLDER / f"{name}.work"
    return cache_home() / FOLDER / hashlib.sha256(f"{storage.url} {name}".encode()).hexdigest()[:16]


def _made_before(storage: Storage, name: str, asked: Facts) -> Facts | None:
    """The same match, if it was completed. UserError if another has its name."""
    try:
        storage.size(file_of(name, "json"))
    except FileNotFoundError:
        return None
    there = load_facts(storage, name)
    for option, value in asked.made_of().items():
        if there.made_of()[option] != value:
            raise UserError(f"the match {name} of {storage.url} was made with {option} = {there.made_of()[option]}, not "
                            f"{value}: give another --name, or delete its {name}.json first")  # fmt: skip
    return there


@contextmanager
def _claimed(work: Path, asked: Facts, name: str) -> Iterator[None]:
    """Hold the work folder, emptied of what belongs to other options. UserError while another process does."""
    folder = LocalStorage(work)
    claim = json.dumps(asked.made_of(), sort_keys=True).encode()
    with _locked(_made(work.parent) / f".{work.name}.lock", name):
        try:
            before: bytes | None = folder.read(CLAIM)
        except FileNotFoundError:
            before = None
        if before != claim:
            shutil.rmtree(work, ignore_errors=True)
            folder.write(CLAIM, claim)
        folder.sweep()
        yield


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards. UserError while another process does."""
    while True:
        with open(path, "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process makes the match {name}: wait for it, or give another --name"
                ) from None
            except OSError:
                pass  # a file system without locks
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))):
                continue  # who had it removed it after it was opened here
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): check its permissions") from None
    return folder


class _Maker:
    """The parts of making one match, in turn."""

    def __init__(
        self,
        storage: Storage,
        splits: dict[str, Split],
        lattices: dict[str, Lattice],
        asked: Facts,
        name: str,
        work: Path,
        progress: bool,
    ) -> None:
        self.storage, self.splits, self.lattices = storage, splits, lattices
        self.asked, self.name, self.work, self.progress = asked, name, work, progress
        self.pieces = {domain: pieces_of(domain, splits[domain].samples, lattices[domain].cells) for domain in DOMAINS}
        labelled = all(split.label_space == LABEL_SPACE for split in splits.values())
        self.classes = asked.by if asked.by != "thumbnail" else "labels" if labelled else None

    def make(self, predict: Predict | None, workers: int) -> Facts:
        describers = {
            domain: Describer(
                self.storage.url, self.asked.by, lattice, self.asked.grid, predict, self.classes is not None, self.work
            )
            for domain, lattice in self.lattices.items()
        }
        describe(describers, [piece for domain in DOMAINS for piece in self.pieces[domain]], workers, self.progress)
        self._search()
        codes = np.concatenate([self._found(piece) for piece in self.pieces["source"]])
        buffer = io.BytesIO()
        np.save(buffer, codes)
        weights = image_weights(codes, self.lattices["target"].cells, self.splits["target"].samples)
        used = np.unique(codes // (2 * self.lattices["target"].cells)).size / len(weights)
        facts = dataclasses.replace(
            self.asked, sha256=hashlib.sha256(buffer.getvalue()).hexdigest(), used=used, classes=self.classes,
            shares=self._shares(weights) if self.classes else {},
        )  # fmt: skip
        if facts.shares:
            from pipelines.matching.chart import match_chart  # a second of matplotlib, which workers can do without

            self.storage.write(file_of(self.name, "png"), encode(match_chart(self.name, facts), "png"))
        self.storage.write(file_of(self.name, "npy"), buffer.getvalue())
        self.storage.write(file_of(self.name, "json"), facts.to_json().encode())
        return facts

    def _search(self) -> None:
        """Find the candidates of every source piece that has none yet."""
        device = torch.device(usual_device())
        missing = [piece for piece in self.pieces["source"] if not self._found_file(piece).is_file()]
        total, left = (
            sum(piece.images for piece in some) * self.lattices["source"].cells
            for some in (self.pieces["source"], missing)
        )
        with tqdm(
            desc="searching", total=total, initial=total - left, unit="cell", unit_scale=True, disable=not self.progress
        ) as bar:
            for piece in missing:
                source = self._described(piece, "descriptors")
                found = nearest(source, self._candidates(), self.asked.k, device)
                if not self.asked.mirror:
                    found = 2 * found
                buffer = io.BytesIO()
                np.save(buffer, found.astype(np.int32))
                LocalStorage(self.work).write(str(self._found_file(piece).relative_to(self.work)), buffer.getvalue())
                bar.update(len(found))

    def _candidates(self) -> Iterator[tuple[int, np.ndarray]]:
        """All target crops, each followed by its mirrored one where those are wanted."""
        first = 0
        for piece in self.pieces["target"]:
            crops = self._described(piece, "descriptors")
            if self.asked.mirror:
                crops = np.stack([crops, mirrored(crops, self.asked.grid)], axis=1).reshape(-1, crops.shape[1])
            yield first, crops
            first += len(crops)

    def _shares(self, image_weights: np.ndarray) -> dict[str, tuple[float, ...]]:
        """Mean shares of the classes in random crops of the source, in random crops of the target, and in the target
        crops that are drawn for the source's."""
        weights = {
            domain: np.tile(lattice.shares(), self.splits[domain].samples) for domain, lattice in self.lattices.items()
        }
        drawn, first = np.zeros(len(weights["target"])), 0
        for piece in self.pieces["source"]:
            places = self._found(piece) // 2
            chances = image_weights[places // self.lattices["target"].cells]
            chances *= (weights["source"][first : first + len(places)] / chances.sum(1))[:, None]
            drawn += np.bincount(places.ravel(), chances.ravel(), minlength=len(drawn))
            first += len(places)
        means = [self._mean_shares(domain, weights[domain]) for domain in DOMAINS] + [
            self._mean_shares("target", drawn)
        ]
        return {
            name: tuple(float(f"{share:.6g}") for share in shares) for name, shares in zip(SHARES, means, strict=True)
        }

    def _mean_shares(self, domain: str, weights: np.ndarray) -> np.ndarray:
        """The classes' shares, float64 (19,), in the labelled pixels of crops that count with weights (cells,)."""
        total, first = np.zeros(len(CLASSES)), 0
        for piece in self.pieces[domain]:
            counts = self._described(piece, "counts")
            total += weights[first : first + len(counts)] @ (counts / np.maximum(1, counts.sum(1, keepdims=True)))
            first += len(counts)
        return total / max(total.sum(), 1e-12)

    def _described(self, piece: Piece, what: str) -> np.ndarray:
        path = self.work / piece.name
        with _made_anew_if_damaged(path), np.load(path) as arrays:
            return arrays[what]

    def _found_file(self, piece: Piece) -> Path:
        return self.work / "found" / f"{piece.first:09d}.npy"

    def _found(self, piece: Piece) -> np.ndarray:
        path = self._found_file(piece)
        with _made_anew_if_damaged(path):
            return np.load(path)


@contextmanager
def _made_anew_if_damaged(path: Path) -> Iterator[None]:
    """For what a crash of the machine may leave of a file. UserError for such a one, which is removed."""
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} is damaged ({error}) and was removed: the same command makes it anew") from None
