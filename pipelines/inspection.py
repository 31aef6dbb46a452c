"""Looking at a prepared data set: what it holds, and whether every byte is still what was written."""

import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO

from tqdm import tqdm

from infra.errors import UserError
from infra.storage import Storage
from pipelines.distributions import Distribution, distributions, training_mismatch
from pipelines.labels import CLASSES
from pipelines.manifest import Manifest, Split, index_from_json
from pipelines.matching.match import load_match, names
from pipelines.shards import index_tar

_BAR = 40  # characters of the longest bar
_SHOWN = 0.005  # of grey levels, those from this share on


def describe(manifest: Manifest) -> str:
    """Counts, sizes and, where they were counted, the share of each class or grey level, as text for a terminal."""
    made_from = manifest.provenance.get("source", "unknown")
    lines = [f"made from {made_from}, test images {'' if manifest.paired else 'not '}paired"]
    found = distributions(manifest)
    for name, split in manifest.splits.items():
        lines += ["", *_describe_split(name, split, found.get(name))]
    mismatch = training_mismatch(found)
    if mismatch is not None:
        lines += ["", f"train/source and train/target differ in {mismatch:.2%} of their pixels (total variation)"]
    return "\n".join(lines)


def _describe_split(name: str, split: Split, found: Distribution | None) -> list[str]:
    width, height = split.image_size
    mebibytes = sum(shard.bytes for shard in split.shards) / 2**20
    shards = f"{len(split.shards)} shard{'s' * (len(split.shards) > 1)}"
    lines = [f"{name}: {split.samples} images of {width}x{height} in {shards}, {mebibytes:.1f} MiB"]
    if split.class_histogram is None:
        lines.append("  no labels")
    if found is None:
        return lines
    if split.class_histogram is None:
        lines[-1] += "; grey levels of the maps:"
    least = 0 if found.names == CLASSES else _SHOWN
    largest = found.shares.max() or 1
    for label, share in zip(found.names, found.shares, strict=True):
        if share >= least:
            lines.append(f"  {label:<14} {share:7.2%}  {'#' * round(_BAR * share / largest)}".rstrip())
    return lines


def describe_matches(storage: Storage, manifest: Manifest, wanted: Sequence[str] | None = None) -> Iterator[str]:
    """A line for each match of the data, or each one wanted. UserError, after the others, for the first that does not serve."""
    problem = None
    for name in names(storage) if wanted is None else wanted:
        try:
            facts = load_match(storage, manifest, name).facts
        except UserError as error:
            problem = problem or error
            continue
        (width, height), kept = facts.crop, f"{facts.k} target crops for each source crop"
        line = f"match {name}: by {facts.by}, {kept} of {width}x{height}, from {facts.used:.0%} of the target images"
        if facts.shares:
            before, after = facts.mismatch()
            line += f"; they differ from the source's in {after:.2%} of their pixels, unmatched ones in {before:.2%}"
        yield line
    if problem:
        raise problem


def verify(storage: Storage, manifest: Manifest, progress: bool = True) -> None:
    """Read every shard and index, compare sizes and SHA-256, and the index with its tar. UserError names the first that is
    missing or damaged."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard in tqdm(shards, "verifying", unit="shard", disable=not progress):
        tar = _verified(storage, shard.name, shard.bytes, shard.sha256)
        index = _verified(storage, shard.index_name, None, shard.index_sha256)
        try:
            found = index_from_json(index)
        except ValueError as error:
            raise UserError(f"{storage.url}/{shard.index_name} is no index ({error}): prepare the data again") from None
        if found != index_tar(shard.name, BytesIO(tar)):
            raise UserError(
                f"{storage.url}/{shard.index_name} does not tell what its shard holds: prepare the data again"
            )


def _verified(storage: Storage, name: str, size: int | None, sha256: str) -> bytes:
    remedy = "restore it from a copy, or delete the data and prepare it again"
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise UserError(f"{storage.url}/{name} is missing: {remedy}") from None
    if size is not None and len(data) != size:
        raise UserError(f"{storage.url}/{name} has {len(data)} bytes instead of {size}: {remedy}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{storage.url}/{name} is damaged, its SHA-256 is wrong: {remedy}")
    return data
