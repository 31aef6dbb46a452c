"""A data root made from others, shard by shard: other images or labels, the same keys.

As a preparation is (`pipelines/prepare.py`), it is continued where it was killed, and its manifest is written last.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infra.errors import UserError
from infra.storage import Storage
from pipelines.cache import ShardCache
from pipelines.manifest import Manifest, Shard, Split
from pipelines.prepare import Encoding, claim, complete, prepared_before, split_of
from pipelines.shards import Sample, ShardFacts, build_tar, read_samples, read_shard, write_shard

Change = Callable[[list[Sample]], list[Sample]]


@dataclass(frozen=True)
class Part:
    """The shards of a split of another root.

    change: what becomes of the samples of a shard, as many in the same order and size. by: what that depends on beside the
    samples, as a text. prefix: goes before the keys, where another part of the split may have the same.
    """

    storage: Storage
    split: Split
    change: Change
    by: str
    prefix: str = ""

    def input_of(self, shard: Shard) -> str:
        """A hash of all that a new shard is made from."""
        return hashlib.sha256(f"{shard.sha256} {self.by} {self.prefix}".encode()).hexdigest()


def encoding_of(manifest: Manifest) -> Encoding:
    """How the images of a root are stored."""
    known = {name: manifest.provenance[name] for name in ("format", "quality") if name in manifest.provenance}
    return Encoding(None, **known)


def derive(
    splits: Mapping[str, Sequence[Part]],
    storage: Storage,
    encoding: Encoding,
    parameters: Mapping[str, Any],
    *,
    paired: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Manifest:
    """Write a root whose splits are made of those parts, and return its manifest; one that is complete is left as it is.

    parameters: how they were chosen, in JSON's types, with the name of it all as "source". paired: as in the manifest.
    cache_dir: where shards from S3 are kept. UserError for a root made otherwise, and for parts of several image sizes.
    """
    works = {
        f"{name}/{number:06d}.tar": (part, shard)
        for name, parts in splits.items()
        for number, (part, shard) in enumerate((part, shard) for part in parts for shard in part.split.shards)
    }
    inputs = {name: part.input_of(shard) for name, (part, shard) in works.items()}
    provenance = json.loads(json.dumps({**parameters, "inputs": _inputs(splits), **asdict(encoding)}))
    manifest = prepared_before(storage, provenance)
    if manifest is not None:
        return manifest
    sizes = {name: _size(name, parts) for name, parts in splits.items()}
    claim(storage, provenance, inputs)
    facts: dict[str, list[ShardFacts]] = {name: [] for name in splits}
    total = sum(shard.samples for _, shard in works.values())
    with tqdm(desc=str(parameters["source"]), total=total, unit="image", disable=None if progress else True) as bar:
        for name, (part, shard) in works.items():
            made = read_shard(storage, name) or _make(storage, name, part, shard, encoding, cache_dir)
            facts[name.rpartition("/")[0]].append(made)
            bar.update(shard.samples)
    return complete(
        storage, Manifest({name: split_of(facts[name], sizes[name]) for name in splits}, paired, provenance)
    )


def _inputs(splits: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
    """As `Source.provenance` has them."""
    return {
        name: {
            "samples": sum(part.split.samples for part in parts),
            "sha256": hashlib.sha256(
                " ".join(part.input_of(shard) for part in parts for shard in part.split.shards).encode()
            ).hexdigest(),
        }
        for name, parts in splits.items()
    }


def _size(name: str, parts: Sequence[Part]) -> tuple[int, int]:
    (size, *others) = {part.split.image_size for part in parts}
    if others:
        sizes = " and ".join("{}x{}".format(*part.split.image_size) for part in parts)
        raise UserError(f"images of {sizes} cannot be together in {name}: prepare both domains in one size")
    return size


def _make(
    storage: Storage, name: str, part: Part, shard: Shard, encoding: Encoding, cache_dir: Path | None
) -> ShardFacts:
    opened = ShardCache(part.storage, cache_dir, keep=1).open(shard)
    samples = part.change(read_samples(opened.path.read_bytes()))
    named = [dataclasses.replace(sample, key=part.prefix + sample.key) for sample in samples]
    return write_shard(storage, name, build_tar(named, encoding.format, encoding.quality))
