"""What a prepared data set says of itself: one `manifest.json` at its root, one index file beside each shard.

    ROOT/manifest.json                       splits, shards, hashes, sizes, class histograms (small, whatever the data's size)
    ROOT/train/source/000000.tar             plain WebDataset: KEY.jpg (or KEY.png), KEY.label.png if labelled, KEY.json
    ROOT/train/source/000000.index.json      per sample: key and the byte range of each part inside the tar
    ROOT/{train,test}/{source,target}/...
    ROOT/distributions.png                   the splits' histograms as a picture, if they have any
    ROOT/matches/NAME.{npy,json,png}         which target crops are like which source crops (pipelines/matching)

The manifest is written last, so a folder with a manifest is a complete data set.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from infra.errors import UserError
from infra.storage import Storage

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "test")
DOMAINS = ("source", "target")


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
    provenance: how the data was made (the source's name and every parameter), enough to make it again."""

    splits: dict[str, Split]
    paired: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        raw = json.loads(text)
        if raw.get("format") != FORMAT:
            raise UserError(
                f"manifest format {raw.get('format')!r} is not {FORMAT}: prepare the data again with this version"
            )
        splits = {
            name: Split(
                shards=tuple(Shard(**shard) for shard in split["shards"]),
                image_size=tuple(split["image_size"]),
                label_space=split["label_space"],
                class_histogram=None if split["class_histogram"] is None else tuple(split["class_histogram"]),
                grey_histogram=tuple(split["grey_histogram"]) if split.get("grey_histogram") else None,
            )
            for name, split in raw["splits"].items()
        }
        return cls(splits=splits, paired=raw["paired"], provenance=raw["provenance"])

    def split(self, split: str, domain: str) -> Split:
        """The split of that name; UserError if it is absent or has no samples."""
        found = self.splits.get(f"{split}/{domain}")
        if found is None or found.samples == 0:
            raise UserError(
                f"the data has no {split} images of the {domain} domain: prepare it again with images on that side"
            )
        return found


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
        return Manifest.from_json(data.decode())
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{storage.url}/{MANIFEST} is damaged ({error}): prepare the data again") from None


def identity(storage: Storage) -> str:
    """SHA-256 of the manifest at a data root, which has the hash of every shard: the same data anywhere, or other data."""
    load_manifest(storage)  # says what is wrong where there is none
    return hashlib.sha256(storage.read(MANIFEST)).hexdigest()


def index_to_json(entries: list[SampleEntry]) -> str:
    return json.dumps([[e.key, e.image, e.label] for e in entries]) + "\n"


def index_from_json(text: str) -> list[SampleEntry]:
    return [
        SampleEntry(key, tuple(image), None if label is None else tuple(label))
        for key, image, label in json.loads(text)
    ]
