"""What tests of preparation share: files to prepare, and what has become of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from infra.storage import Storage
from pipelines.manifest import Manifest, index_from_json
from pipelines.prepare import Encoding, prepare
from pipelines.sources.base import Source

SMALL = Encoding((16, 8), format="png", shard_size=3)


def save(path: Path, array: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def photo(number: int, width: int = 32, height: int = 16) -> np.ndarray:
    return np.full((height, width, 3), number, np.uint8)


def run(source: Source, storage: Storage, encoding: Encoding = SMALL) -> Manifest:
    return prepare(source, storage, encoding, progress=False)


def contents(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.list()}


def decoded(tar: bytes, place: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tar[place[0] : sum(place)])))


def parts(storage: Storage, manifest: Manifest, split: str) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """(key, image, label) of every sample, by way of the indexes."""
    found = []
    for shard in manifest.splits[split].shards:
        tar = storage.read(shard.name)
        for entry in index_from_json(storage.read(shard.index_name).decode()):
            label = None if entry.label is None else decoded(tar, entry.label)
            found.append((entry.key, decoded(tar, entry.image), label))
    return found


def labelled_parts(storage: Storage, manifest: Manifest, split: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The same, where every sample has a label."""
    found = parts(storage, manifest, split)
    labelled = [(key, image, label) for key, image, label in found if label is not None]
    assert len(labelled) == len(found)
    return labelled
