"""A data root made from others, shard by shard: other images or labels, the same keys.

As a preparation is (`pipelines/prepare.py`), it is continued where it was killed, and its manifest is written last.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from infra.console import ProgressLine
from infra.errors import UserError
from infra.storage import Storage
from pipelines.cache import ShardCache, UnusableShard
from pipelines.health import DataHealth
from pipelines.manifest import Manifest, Shard, Split
from pipelines.prepare import Encoding, claim, complete, prepared_before, split_of
from pipelines.ranks import ALONE, Ranks, on_first
from pipelines.shards import Sample, ShardFacts, build_tar, read_samples, read_shard, write_shard
from pipelines.stream import stream
from pipelines.workers import on_cluster

Change = Callable[[list[Sample]], list[Sample]]
_OnItsWay = ShardFacts | bytes | list[Sample] | None


@dataclass(frozen=True)
class Part:
    """The shards of a split of another root.

    change: what becomes of the samples of a shard, as many in the same order and size; None: the shards are copied byte for
    byte. by: what that depends on beside the samples, as a text. prefix: goes before the keys, where another part of the split
    may have the same.
    """

    storage: Storage
    split: Split
    change: Change | None
    by: str
    prefix: str = ""

    def input_of(self, shard: Shard) -> str:
        """A hash of all that a new shard is made from."""
        return hashlib.sha256(f"{shard.sha256} {self.by} {self.prefix}".encode()).hexdigest()


@dataclass(frozen=True)
class Faults:
    """What is done with images and shards that cannot be read: a UserError names the first, or they are left out and the log
    names them."""

    skip_samples: bool = False
    skip_shards: bool = False


STRICT = Faults()


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
    greys: Mapping[str, tuple[int, ...]] | None = None,
    faults: Faults = STRICT,
    ranks: Ranks = ALONE,
    cache_dir: Path | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Manifest:
    """Write a root whose splits are made of those parts, and return its manifest; one that is complete is left as it is.

    parameters: how they were chosen, in JSON's types, with the name of it all as "source". paired, greys: as in the manifest; of
    splits of which something was left out there are no pairs. ranks: share the shards; all must call it with the same.
    cache_dir: where shards from S3 are kept. address: of a Ray cluster whose machines do the work; all see both places, and
    changes are copied to them. UserError for a root made otherwise, and for parts of several image sizes.
    """
    works = {
        f"{name}/{number:06d}.tar": (part, shard)
        for name, parts in splits.items()
        for number, (part, shard) in enumerate((part, shard) for part in parts for shard in part.split.shards)
    }
    inputs = {name: part.input_of(shard) for name, (part, shard) in works.items()}
    provenance = json.loads(json.dumps({**parameters, "inputs": _inputs(splits), **asdict(encoding)}))
    sizes = {name: _size(name, parts) for name, parts in splits.items()}
    manifest = on_first(ranks, lambda: _begun(storage, provenance, inputs))
    if manifest is not None:
        return manifest
    making = _Making(storage, works, encoding, faults, cache_dir)
    mine = [*works][ranks.rank :: ranks.world_size]
    facts: dict[str, ShardFacts | None] = {}
    total = sum(works[name][1].samples for name in mine)
    with ProgressLine(total, unit="images", title="image", enabled=progress and ranks.rank == 0) as line:
        for name, made in making.all(mine) if address is None else _on_cluster(making, mine, address):
            facts[name] = made
            line.update(works[name][1].samples)

    def finished() -> Manifest:
        found = {name: made for each in gathered or () for name, made in each.items()}
        of_split = {
            split: [made for name in works if name.rpartition("/")[0] == split and (made := found[name])]
            for split in splits
        }
        whole = all(made and made.shard.samples == works[name][1].samples for name, made in found.items())
        new = {name: split_of(of_split[name], sizes[name], (greys or {}).get(name)) for name in splits}
        return complete(storage, Manifest(new, paired and whole, provenance))

    gathered = ranks.gather(facts)
    return on_first(ranks, finished)


def _on_cluster(making: "_Making", names: Sequence[str], address: str) -> Iterator[tuple[str, ShardFacts | None]]:
    """As `_Making.all`."""
    with on_cluster(address, use_gpus=True, together=2) as run:  # one is read or written while the other is changed
        yield from zip(names, run(making, names), strict=True)


def _begun(storage: Storage, provenance: dict[str, Any], inputs: dict[str, str]) -> Manifest | None:
    """The manifest if all is there; otherwise the root is marked."""
    manifest = prepared_before(storage, provenance)
    if manifest is None:
        claim(storage, provenance, inputs)
    return manifest


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


@dataclass(frozen=True)
class _Making:
    """What is done for each new shard, by its name. What comes of a shard on its way: the facts of one that is there already,
    bytes to be copied, samples, or None where nothing of it can be had."""

    storage: Storage
    works: Mapping[str, tuple[Part, Shard]]
    encoding: Encoding
    faults: Faults
    cache_dir: Path | None
    health: DataHealth = field(default_factory=DataHealth)
    one: Lock = field(default_factory=Lock)  # is changed at a time

    def __reduce__(self) -> tuple[Any, ...]:
        return _Making, (self.storage, self.works, self.encoding, self.faults, self.cache_dir)

    def all(self, names: Sequence[str]) -> Iterator[tuple[str, ShardFacts | None]]:
        """Each with its facts, or None where nothing came of it."""
        return stream(names, self.read, self.change, self.write, ahead=1)

    def __call__(self, name: str) -> ShardFacts | None:
        found = self.read(name)
        with self.one:
            made = self.change(name, found)
        return self.write(name, made)

    def read(self, name: str) -> _OnItsWay:
        if there := read_shard(self.storage, name):
            return there
        part, shard = self.works[name]
        try:
            data = ShardCache(part.storage, self.cache_dir, keep=1).open(shard).path.read_bytes()
        except UnusableShard as error:
            if not self.faults.skip_shards:
                raise
            self.health.bad_shard(f"{part.storage.url}/{shard.name}", str(error))
            return None
        if part.change is None:
            return data

        def bad(key: str, reason: str) -> None:
            where = f"{key} in {part.storage.url}/{shard.name}"
            if not self.faults.skip_samples:
                raise UserError(f"{where} {reason}: prepare the data again without it, or give --on-bad-sample skip")
            self.health.bad_sample(where, reason)

        return read_samples(data, bad) or None

    def change(self, name: str, found: _OnItsWay) -> _OnItsWay:
        part = self.works[name][0]
        if not isinstance(found, list):
            return found
        assert part.change is not None
        return [dataclasses.replace(sample, key=part.prefix + sample.key) for sample in part.change(found)]

    def write(self, name: str, made: _OnItsWay) -> ShardFacts | None:
        if isinstance(made, list):
            made = build_tar(made, self.encoding.format, self.encoding.quality)
        return write_shard(self.storage, name, made) if isinstance(made, bytes) else made
