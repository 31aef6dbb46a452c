"""Writing and reading back whole shards: plain WebDataset tars whose bytes depend on their samples only."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from infra.errors import UserError, first_line
from infra.images import DAMAGED, STORED, open_image
from infra.storage import Storage
from pipelines.images import encode
from pipelines.labels import class_histogram
from pipelines.manifest import SampleEntry, Shard, index_to_json

IMAGE_FORMATS = ("jpg", "png")
LABEL_SPACE = "cityscapes19"
WRITE_ATTEMPTS = 3
_END_OF_TAR = bytes(tarfile.BLOCKSIZE)  # twice


class DamagedShard(UserError):
    """A shard whose bytes are not what was written."""


@dataclass(frozen=True)
class Sample:
    """One image on its way into a shard.

    key: unique in its split, without "." (WebDataset cuts a member's name there) and without "/".
    image: RGB. label: uint8 (H, W) trainIds of the image's size, or a PNG file of them, or None. origin: goes into KEY.json.
    """

    key: str
    image: Image.Image
    label: np.ndarray | bytes | None = None
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardFacts:
    """What the manifest needs to know of one shard. class_histogram: pixels per trainId, None if nothing is labelled."""

    shard: Shard
    image_size: tuple[int, int]
    class_histogram: tuple[int, ...] | None


def build_tar(samples: Iterable[Sample], format: str = "jpg", quality: int = 95) -> bytes:
    """The samples as a WebDataset tar: KEY.jpg or KEY.png, KEY.label.png if labelled, KEY.json.

    Owner and time are fixed, so the same samples give the same bytes. quality: of JPEG, 1 to 100.
    """
    from webdataset import TarWriter  # brings torch, a second or two, which only who writes shards should wait for

    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, user="root", group="root", mtime=0) as tar:
        for sample in samples:
            parts: dict[str, Any] = {"__key__": sample.key, format: encode(sample.image, format, quality)}
            label = sample.label
            if label is not None:
                parts["label.png"] = label if isinstance(label, bytes) else encode(Image.fromarray(label), "png")
            parts["json"] = json.dumps(sample.origin, sort_keys=True).encode()
            tar.write(parts)
    return buffer.getvalue()


def write_shard(storage: Storage, name: str, tar: bytes) -> ShardFacts:
    """Store a shard, then its index: a shard whose index is there is complete. UserError if they stay damaged there."""
    _write_verified(storage, name, tar)
    facts, index = _describe(name, tar)
    _write_verified(storage, facts.shard.index_name, index)
    return facts


def _write_verified(storage: Storage, name: str, data: bytes) -> None:
    """Read back what was written. An ETag would not do: it is a hash of the content in some stores only."""
    for _ in range(WRITE_ATTEMPTS):
        storage.write(name, data)
        if storage.read(name) == data:
            return
    raise UserError(f"{storage.url}/{name} does not hold what was written there: check the store and the network to it")


def read_shard(storage: Storage, name: str) -> ShardFacts | None:
    """The facts of a stored shard, from all of its bytes; None if it or its index is missing, damaged or at odds."""
    try:
        facts, index = _describe(name, storage.read(name))
        return facts if storage.read(facts.shard.index_name) == index else None
    except (FileNotFoundError, DamagedShard):
        return None


def read_samples(tar: bytes, bad: Callable[[str, str], None]) -> list[Sample]:
    """The samples of a whole shard, in order; their labels are left as PNG files. bad: called with the key of one whose image or
    label cannot be decoded, and with what is wrong; where it returns, the sample is left out."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for member in archive:
            key, _, part = member.name.partition(".")
            content = archive.extractfile(member)
            assert content is not None
            parts.setdefault(key, {})[part] = content.read()
    samples = []
    for key, found in parts.items():
        try:
            image = open_image(io.BytesIO(next(found[f] for f in IMAGE_FORMATS if f in found)), STORED).convert("RGB")
            if "label.png" in found:
                open_image(io.BytesIO(found["label.png"]), STORED).load()
        except DAMAGED as error:
            bad(key, f"cannot be decoded ({first_line(error)})")
            continue
        samples.append(Sample(key, image, found.get("label.png"), json.loads(found["json"])))
    return samples


def index_tar(name: str, tar: BinaryIO) -> list[SampleEntry]:
    """Key and byte ranges of every sample in an open tar, in its order. DamagedShard if it is cut off or not such a tar."""
    members = _plain_members(tar)
    if members is None:
        tar.seek(0)
        with suppress(tarfile.TarError), tarfile.open(fileobj=tar, mode="r:") as archive:
            members = [(member.name, member.offset_data, member.size) for member in archive]
    parts_of: dict[str, dict[str, tuple[int, int]]] = {}
    for member_name, offset, length in members or ():
        key, _, part = member_name.partition(".")
        part = "image" if part in IMAGE_FORMATS else part
        parts_of.setdefault(key, {})[part] = (offset, length)
    # tarfile does not miss the end marker when it is cut off.
    if not _ends_as_tar(tar) or not parts_of or not all("image" in parts for parts in parts_of.values()):
        raise DamagedShard(f"the shard {name} is truncated or not a tar of images: prepare or copy it again")
    return [SampleEntry(key, parts["image"], parts.get("label.png")) for key, parts in parts_of.items()]


def _plain_members(tar: BinaryIO) -> list[tuple[str, int, int]] | None:
    """(name, offset, length) of the files in a tar of nothing but files with short names, as almost all shards are; None for
    any other. tarfile finds the same in seven times the time."""
    members: list[tuple[str, int, int]] = []
    place = 0
    while True:
        tar.seek(place)
        header = tar.read(tarfile.BLOCKSIZE)
        if header == _END_OF_TAR:
            return members
        try:
            name, length, stated = header[:100].rstrip(b"\0").decode(), int(header[124:135], 8), int(header[148:154], 8)
        except ValueError:
            return None
        # A regular file, a header of the usual kind, and nothing where a long name would go on.
        plain = header[156:157] == b"0" and header[257:263] == b"ustar\0" and header[345:346] == b"\0"
        # Its checksum is the sum of all bytes, and counts itself as eight spaces.
        if not plain or length < 0 or "\0" in name or sum(header) - sum(header[148:156]) + 8 * ord(" ") != stated:
            return None
        place += tarfile.BLOCKSIZE
        members.append((name, place, length))
        place += -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _ends_as_tar(tar: BinaryIO) -> bool:
    tar.seek(max(0, tar.seek(0, os.SEEK_END) - 2 * tarfile.BLOCKSIZE))
    return tar.read() == 2 * _END_OF_TAR


def _describe(name: str, tar: bytes) -> tuple[ShardFacts, bytes]:
    """The facts of a shard and the bytes of its index file."""
    entries = index_tar(name, io.BytesIO(tar))
    index = index_to_json(entries).encode()
    shard = Shard(
        name=name,
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        samples=len(entries),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    histograms = [class_histogram(np.asarray(_open(tar, entry.label))) for entry in entries if entry.label]
    histogram = tuple(np.sum(histograms, axis=0).tolist()) if histograms else None
    return ShardFacts(shard, _open(tar, entries[0].image).size, histogram), index


def _open(tar: bytes, place: tuple[int, int]) -> Image.Image:
    offset, length = place
    return open_image(io.BytesIO(tar[offset : offset + length]), STORED)
