"""A match as it is stored beside the data, for training to draw from.

    ROOT/matches/NAME.npy     int32 (source cells, k): codes of the nearest target crops, nearest first
    ROOT/matches/NAME.json    written last: what it was made of and how, its hash, what it changes (`Facts`)
    ROOT/matches/NAME.png     shares of the classes, where classes are known

A code is twice a target cell, plus 1 where the candidate is that crop mirrored left to right.
"""

import dataclasses
import hashlib
import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.shapes import read_shape
from infra.storage import Storage
from pipelines.cuts import Size
from pipelines.distributions import Distribution, total_variation
from pipelines.labels import CLASSES
from pipelines.manifest import Manifest
from pipelines.matching.descriptors import Grid
from pipelines.matching.lattice import Lattice

FOLDER = "matches"
FORMAT = 1
SHARES = ("source", "target", "matched target")
WAYS = ("segmenter", "labels", "thumbnail")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a match's .json says.

    by: one of WAYS. grid: columns and rows of squares on a crop. k: candidates of each source cell. crop: of all crops. mirror:
    whether mirrored crops are candidates. manifest: SHA-256 of the data's. segmenter: SHA-256 of its weights, where one is used;
    description: of what an outside one is said to be.
    sha256: of the .npy. used: the share of target images that some source cell lists. classes: whose they are, "labels" or
    "segmenter"; none where they are not known. shares: of classes, for each of SHARES.
    """

    by: str
    grid: Grid
    k: int
    crop: Size
    mirror: bool
    manifest: str
    segmenter: str | None = None
    description: str | None = None
    sha256: str = ""
    used: float = 0.0
    classes: str | None = None
    shares: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> "Facts":
        """ValueError, in one line, for what cannot be those of a match."""
        found = read_shape(cls, text)
        if found.shares and {name: len(values) for name, values in found.shares.items()} != dict.fromkeys(
            SHARES, len(CLASSES)
        ):
            raise ValueError(f"shares are not those of {len(CLASSES)} classes in {', '.join(SHARES)}")
        return found

    def mismatch(self) -> tuple[float, float]:
        """Total variation between the classes of source crops and those of target crops: unmatched, matched."""
        source, *others = (Distribution(CLASSES, np.array(self.shares[name])) for name in SHARES)
        before, after = (total_variation(source, other) for other in others)
        return before, after

    def made_of(self) -> dict[str, Any]:
        """Everything that decides what is found, by the name of its option."""
        fixed = ("manifest", "by", "segmenter", "description", "grid", "k", "crop", "mirror")
        return {name: getattr(self, name) for name in fixed}


@dataclass(frozen=True)
class Match:
    """codes: int32 (source cells, k)."""

    facts: Facts
    codes: np.ndarray


def check_name(name: str) -> None:
    """UserError for what cannot be the name of a match."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or name == "none":
        raise UserError(f"{name!r} cannot be the name of a match: use letters, digits, '-', '_' and '.', and not none")


def file_of(name: str, kind: str) -> str:
    return f"{FOLDER}/{name}.{kind}"


def names(storage: Storage) -> list[str]:
    """The finished matches of a data root."""
    found = (file.removeprefix(f"{FOLDER}/") for file in storage.list(f"{FOLDER}/"))
    return [file.removesuffix(".json") for file in found if file.endswith(".json") and "/" not in file]


def load_facts(storage: Storage, name: str) -> Facts:
    """UserError if there is no such match, or it is damaged."""
    check_name(name)
    try:
        text = storage.read(file_of(name, "json"))
    except FileNotFoundError:
        there = ", ".join(names(storage))
        raise UserError(
            f"there is no match {name} at {storage.url}: make it with launch/prepare.py match {storage.url}"
            + (f", or choose one of {there}" if there else "")
        ) from None
    try:
        facts = Facts.from_json(text)
    except ValueError as error:
        raise _damaged(storage, name, "json", error) from None
    if facts.format != FORMAT:
        raise UserError(f"the match {name} of {storage.url} has the format {facts.format}, not {FORMAT}: "
                        "make it again with this version under another --name")  # fmt: skip
    return facts


def load_match(storage: Storage, manifest: Manifest, name: str) -> Match:
    """The match of that name. UserError if there is none, it is damaged, or it was made for other data."""
    facts = load_facts(storage, name)
    if facts.manifest != manifest.sha256:
        raise UserError(f"the match {name} of {storage.url} was made for other data: make one for these with "
                        f"launch/prepare.py match {storage.url} and another --name")  # fmt: skip
    try:
        data = storage.read(file_of(name, "npy"))
    except FileNotFoundError:
        raise _damaged(storage, name, "npy", "it is missing") from None
    if hashlib.sha256(data).hexdigest() != facts.sha256:
        raise _damaged(storage, name, "npy", f"its SHA-256 is not that of {name}.json")
    codes = np.load(io.BytesIO(data), allow_pickle=False)
    cells = [
        split.samples * Lattice(split.image_size, facts.crop).cells
        for split in (manifest.split("train", domain) for domain in ("source", "target"))
    ]
    if codes.shape != (cells[0], facts.k) or codes.max() >= 2 * cells[1]:
        raise _damaged(storage, name, "npy", "it does not fit the data")
    return Match(facts, codes)


def _damaged(storage: Storage, name: str, kind: str, reason: object) -> UserError:
    return UserError(f"{storage.url}/{file_of(name, kind)} is damaged ({reason}): delete {name}.json beside it and make the "
                     f"match again with launch/prepare.py match {storage.url}")  # fmt: skip


def image_weights(codes: np.ndarray, cells: int, images: int) -> np.ndarray:
    """How much each target image counts among the k candidates of a cell: one over how often the cells list it, so that
    those that are seldom listed are drawn more often: float64 (images,). cells: of one target image."""
    listed = np.bincount(codes.ravel() // (2 * cells), minlength=images)
    return 1 / np.maximum(1, listed)
