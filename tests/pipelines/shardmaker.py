"""Small valid data roots for tests, without the preparation script."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from infra.storage import LocalStorage, Storage
from pipelines.manifest import MANIFEST, Manifest, Shard, Split, index_from_json, load_manifest
from pipelines.shards import LABEL_SPACE, Sample, build_tar, write_shard


def smooth_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A random RGB image of (width, height) with edges of every strength, as photographs have and noise has not."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_split(
    storage: Storage,
    name: str,
    shard_sizes: Sequence[int],
    size: tuple[int, int] = (48, 32),
    *,
    format: str = "jpg",
    labelled: bool = True,
    seed: int = 0,
) -> Split:
    """Write "phase/domain": shards of so many samples each; keys count on over the shards ("source_000007")."""
    rng = np.random.default_rng(seed)
    prefix, count, shards = name.split("/")[1], 0, []
    for number, samples in enumerate(shard_sizes):
        tar = build_tar(
            (
                Sample(
                    f"{prefix}_{key:06d}",
                    smooth_image(rng, size),
                    rng.integers(0, 19, size[::-1], dtype=np.uint8) if labelled else None,
                )
                for key in range(count, count + samples)
            ),
            format,
        )
        shards.append(write_shard(storage, f"{name}/{number:06d}.tar", tar).shard)
        count += samples
    return Split(tuple(shards), size, LABEL_SPACE if labelled else None)


def write_root(
    storage: Storage,
    source: Sequence[int] = (4, 3, 4),
    target: Sequence[int] = (3, 4),
    size: tuple[int, int] = (48, 32),
    *,
    format: str = "jpg",
) -> Manifest:
    """Write a training set with shards of these sizes in each domain, and its manifest."""
    manifest = Manifest(
        {
            "train/source": write_split(storage, "train/source", source, size, format=format, seed=1),
            "train/target": write_split(storage, "train/target", target, size, format=format, seed=2),
        }
    )
    storage.write(MANIFEST, manifest.to_json().encode())
    return manifest


def break_samples(root: Path, *keys: str, part: str = "image") -> None:
    """Overwrite the beginning of samples' images (or labels) inside whole tars; the manifest says that so they were made."""
    manifest = load_manifest(LocalStorage(root))

    def broken(shard: Shard) -> Shard:
        data = bytearray((root / shard.name).read_bytes())
        for entry in index_from_json((root / shard.index_name).read_text()):
            if entry.key in keys:
                offset, _ = getattr(entry, part)
                data[offset : offset + 64] = bytes(64)
        (root / shard.name).write_bytes(data)
        return dataclasses.replace(shard, sha256=hashlib.sha256(data).hexdigest())

    splits = {
        name: dataclasses.replace(split, shards=tuple(broken(shard) for shard in split.shards))
        for name, split in manifest.splits.items()
    }
    (root / MANIFEST).write_text(dataclasses.replace(manifest, splits=splits).to_json())
