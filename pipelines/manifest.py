"""What a prepared data set says of itself: one `manifest.json` at its root, one index file beside each shard.

    ROOT/manifest.json                       splits, shards, hashes, sizes, class histograms (small, whatever the data's size)
    ROOT/train/source/000000.tar             plain WebDataset: KEY.jpg (or KEY.png), KEY.label.png if labelled, KEY.json
    ROOT/train/source/000000.index.json      per sample: key and the byte range of each part inside the tar, for who reads parts
    ROOT/{train,test}/{source,target}/...
    ROOT/distributions.png                   the splits' histograms as a picture, if they have any
    ROOT/matches/NAME.{npy,json,png}         which target crops are like which source crops (pipelines/matching)

The manifest is written last, so a folder with a manifest is a complete data set.
"""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from infra.errors import UserError
from infra.images import MAX_PIXELS
from infra.shapes import read_shape
from infra.storage import Storage
from pipelines.labels import CLASSES

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "test")
DOMAINS = ("source", "target")
_SHARD_NAME = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*\.tar")
_SHA256 = re.compile("[0-9a-f]{64}")
_Place = tuple[int, int]
_Index = tuple[tuple[str, _Place, _Place | None], ...]


@dataclass(frozen=True)
class Shard:
    """One tar file. `name` is relative to the root ("train/source/000000.tar"); `samples` counts images."""

    name: str
    bytes: int
    sha256: str
    samples: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.json"


@dataclass(frozen=True)
class Split:
    """One domain of one split, e.g. "train/source".

    image_size: (width, height) in pixels, the same for every image of the split.
    label_space: "cityscapes19" (trainIds 0..18, 255 = ignore) or None for unlabelled images.
    class_histogram: labelled pixels per trainId, without ignored pixels; None for unlabelled images.
    grey_histogram: pixels per bin of five grey levels in the maps of the split's pairs, if they were split by those.
    """

    shards: tuple[Shard, ...]
    image_size: tuple[int, int]
    label_space: str | None = None
    class_histogram: tuple[int, ...] | None = None
    grey_histogram: tuple[int, ...] | None = None

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """splits: by "split/domain". paired: the k-th test source and the k-th test target show the same scene.
    provenance: how the data was made (the source's name and every parameter), enough to make it again.
    sha256: of the manifest as it is stored, without this entry; what the data is known by. Empty in one that was not read.
    Manifests of earlier versions have no such entry, and are known by the hash of the whole file."""

    splits: dict[str, Split]
    paired: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    sha256: str = field(default="", compare=False)

    def to_json(self) -> str:
        plain = dataclasses.asdict(self)
        del plain["sha256"]
        return _written(plain | {"sha256": _digest(_written(plain))})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """UserError for another format; ValueError, in one line, for what cannot be a manifest."""
        found = read_shape(cls, text)
        if found.sha256:
            rest = {name: value for name, value in json.loads(text).items() if name != "sha256"}
            if _digest(_written(rest)) != found.sha256:
                raise ValueError("it is not what was written, as its own hash shows")
        else:
            found = dataclasses.replace(found, sha256=_digest(text))
        if found.format != FORMAT:
            raise UserError(f"manifest format {found.format} is not {FORMAT}: prepare the data again with this version")
        for name, split in found.splits.items():
            _check_split(name, split)
        return found

    def split(self, split: str, domain: str) -> Split:
        """The split of that name; UserError if it is absent or has no samples."""
        found = self.splits.get(f"{split}/{domain}")
        if found is None or found.samples == 0:
            raise UserError(
                f"the data has no {split} images of the {domain} domain: prepare it again with images on that side"
            )
        return found


def _written(plain: dict[str, Any]) -> str:
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()


def _check_split(name: str, split: Split) -> None:
    """ValueError for what no preparation writes. Names become paths, and hashes names of files in a cache."""
    for shard in split.shards:
        if not _SHARD_NAME.fullmatch(shard.name) or ".." in shard.name.split("/"):
            raise ValueError(f"{name}: {shard.name[:60]!r} cannot be the name of a shard")
        if not _SHA256.fullmatch(shard.sha256) or not _SHA256.fullmatch(shard.index_sha256):
            raise ValueError(f"{name}: {shard.name} has no SHA-256")
        if min(shard.bytes, shard.samples) < 0:
            raise ValueError(f"{name}: {shard.name} has less than nothing")
    if len({shard.name for shard in split.shards}) < len(split.shards):
        raise ValueError(f"{name} names a shard twice")
    pixels = math.prod(split.image_size)
    if min(split.image_size) < 1 or pixels > MAX_PIXELS:
        raise ValueError(f"{name} cannot have images of {split.image_size[0]}x{split.image_size[1]}")
    counts, greys = split.class_histogram, split.grey_histogram  # greys: of the maps before they were resized
    if counts is not None and (len(counts) != len(CLASSES) or sum(counts) > split.samples * pixels):
        raise ValueError(f"{name} has a histogram of classes that its images cannot have")
    if min((*(counts or ()), *(greys or ())), default=0) < 0:
        raise ValueError(f"{name} has a histogram with less than no pixels")


@dataclass(frozen=True)
class SampleEntry:
    """Where one sample lies inside its shard: (offset, length) in bytes; `label` is None for unlabelled images."""

    key: str
    image: tuple[int, int]
    label: tuple[int, int] | None = None


def load_manifest(storage: Storage) -> Manifest:
    """Read the manifest at a data root. UserError if there is none or it is damaged."""
    try:
        data = storage.read(MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"no prepared data at {storage.url} (no {MANIFEST}): make some with launch/prepare.py, or check the path"
        ) from None
    try:
        return Manifest.from_json(data)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{storage.url}/{MANIFEST} is damaged ({error}): prepare the data again") from None


def index_to_json(entries: list[SampleEntry]) -> str:
    return json.dumps([[e.key, e.image, e.label] for e in entries]) + "\n"


def index_from_json(text: str | bytes) -> list[SampleEntry]:
    """ValueError, in one line, for what cannot be an index."""
    return [SampleEntry(*entry) for entry in read_shape(_Index, text)]
