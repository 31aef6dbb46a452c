"""Preparing a source: every image is read and resized once, in parallel, and written into shards with a manifest.

A preparation that was killed is continued by running it again: shards whose index is there are kept, and the result
is the same to the byte. `preparing.json` holds the provenance until the manifest, which is written last, takes over, and
what each shard is made from: input that was mended in between costs its own shards and no others.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from infra.errors import UserError
from infra.storage import Storage
from pipelines.distributions import CHART, distributions
from pipelines.images import encode
from pipelines.manifest import MANIFEST, SPLITS, Manifest, Split, load_manifest
from pipelines.shards import IMAGE_FORMATS, LABEL_SPACE, Sample, ShardFacts, build_tar, read_shard, write_shard
from pipelines.sources.base import Item, Source, fingerprint
from pipelines.workers import on_cluster, parallel

PREPARING = "preparing.json"
STREET_SIZE = (512, 256)  # of street scenes, as in the SRUNIT paper
PAINTING_SIZE = (384, 256)  # of a street that is painted and photographed
FOLDER_SIZE = (256, 256)  # of everything else, as CUT trains on


@dataclass(frozen=True)
class Encoding:
    """How samples are stored. size: (width, height) in pixels, none where the source has one for each split; quality: of JPEG,
    1 to 100; shard_size: samples a shard."""

    size: tuple[int, int] | None
    format: str = "jpg"
    quality: int = 95
    shard_size: int = 256

    def __post_init__(self) -> None:
        if self.format not in IMAGE_FORMATS:
            raise UserError(f"the image format {self.format!r} does not exist: use one of {', '.join(IMAGE_FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"the JPEG quality {self.quality} is impossible: give 1 to 100")
        if self.shard_size < 1:
            raise UserError(f"{self.shard_size} samples a shard are impossible: give 1 or more")


@dataclass(frozen=True)
class _Task:
    """One shard to be made. first: the number of its first sample within the split."""

    storage: Storage
    name: str
    first: int
    items: Sequence[Item]
    size: tuple[int, int]
    encoding: Encoding


def prepare(
    source: Source,
    storage: Storage,
    encoding: Encoding,
    workers: int = 1,
    progress: bool = True,
    address: str | None = None,
) -> Manifest:
    """Write the source's samples to a data root and return the manifest.

    A root that holds the same preparation already is left as it is. UserError for a root prepared otherwise, a split
    without samples, or input that cannot be used; all headers are read before the first byte is written.
    workers: number of processes, each of which holds one shard in memory. progress: print, and show progress bars. address: of
    a Ray cluster whose machines do the work instead, one worker for each of their CPUs; all see the input and the root.
    """
    provenance = json.loads(json.dumps(source.provenance() | asdict(encoding)))  # in the types it is read back in
    manifest = prepared_before(storage, provenance)
    if manifest is None:
        facts = _make_shards(source, storage, encoding, provenance, workers, progress, address)
        greys = source.grey_histograms
        splits = {name: split_of(facts[name], _size(source, name, encoding), greys.get(name)) for name in source.splits}
        manifest = complete(storage, Manifest(splits, source.paired, provenance))
    elif progress:
        print(f"already prepared: {storage.url}")
    return manifest


def prepared_before(storage: Storage, provenance: dict[str, Any]) -> Manifest | None:
    """The manifest of the same preparation, if it was completed. UserError if the root holds another one."""
    try:
        storage.size(MANIFEST)
    except FileNotFoundError:
        return None
    manifest = load_manifest(storage)
    _refuse_difference(storage, manifest.provenance, provenance)
    if storage.list(PREPARING):  # killed between its last two steps
        storage.delete(PREPARING)
    return manifest


def complete(storage: Storage, manifest: Manifest) -> Manifest:
    """Write what comes last, once all shards are there. UserError if one is not: other machines have written it elsewhere."""
    there = {name for split in SPLITS for name in storage.list(f"{split}/")}
    made = [shard.name for split in manifest.splits.values() for shard in split.shards]
    if missing := [name for name in made if name not in there]:
        raise UserError(
            f"{storage.url}/{missing[0]} is not there, though it was made: name an output that all machines see alike"
        )
    _write_chart(storage, manifest)
    storage.write(MANIFEST, manifest.to_json().encode())
    storage.delete(PREPARING)
    return manifest


def claim(storage: Storage, provenance: dict[str, Any], inputs: dict[str, str]) -> None:
    """Mark the root as being prepared in this way. If it holds shards already, check that it is so marked, and remove
    those whose input is no longer what they were made from. inputs: a hash of the input of each shard, by its name."""
    there = [name for split in SPLITS for name in storage.list(f"{split}/")]
    if there:
        try:
            before = json.loads(storage.read(PREPARING))
        except FileNotFoundError:
            if prepared_before(storage, provenance) is None:
                raise UserError(
                    f"{storage.url} holds files of unknown origin ({there[0]}): empty it, or name another output"
                ) from None
            before = provenance | {"shards": inputs}  # somebody has completed the same preparation in the meantime
        made_from = before.pop("shards", {})
        if made_from.items() & inputs.items():  # the same data, of which some was mended, added or removed
            before["inputs"] = provenance["inputs"]
        _refuse_difference(storage, before, provenance)
        for name in there:  # sorted: an index goes before its tar
            shard = name.replace(".index.json", ".tar")
            if made_from.get(shard) != inputs.get(shard):
                storage.delete(name)
    marked = provenance | {"shards": inputs}
    storage.write(PREPARING, (json.dumps(marked, indent=1, sort_keys=True) + "\n").encode())
    storage.sweep()


def _refuse_difference(storage: Storage, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    there, wanted = _flat(there), _flat(wanted)
    for name in sorted(there | wanted, key=lambda name: (name != "source", name.startswith("inputs."), name)):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{storage.url} was prepared with {name} = {there.get(name)}, not {wanted.get(name)}: "
                f"name another output, or delete it first"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _size(source: Source, split: str, encoding: Encoding) -> tuple[int, int]:
    size = source.sizes.get(split, encoding.size)
    assert size, f"neither the source nor the encoding has a size for {split}"
    return size


def _make_shards(
    source: Source,
    storage: Storage,
    encoding: Encoding,
    provenance: dict[str, Any],
    workers: int,
    progress: bool,
    address: str | None,
) -> dict[str, list[ShardFacts]]:
    """Make or keep every shard; the facts of each by split, in order."""
    step = encoding.shard_size
    tasks = {
        split: [
            _Task(
                storage, f"{split}/{first // step:06d}.tar", first, items[first : first + step],
                _size(source, split, encoding), encoding,
            )
            for first in range(0, len(items), step)
        ]
        for split, items in source.splits.items()
    }  # fmt: skip
    flat = [task for of_split in tasks.values() for task in of_split]

    def bar(results: Iterable[ShardFacts | None], title: str) -> list[Any]:
        total = sum(len(task.items) for task in flat)
        with tqdm(desc=title, total=total, unit="image", disable=not progress) as shown:
            collected = []
            for task, result in zip(flat, results, strict=True):
                collected.append(result)
                shown.update(len(task.items))
        return collected

    here = (min(workers, len(flat)), [__name__, "webdataset"], "give fewer --workers or a smaller --shard-size")
    with on_cluster(address) if address else parallel(*here) as run:
        bar(run(_check, flat), "checking")
        claim(storage, provenance, {task.name: fingerprint(task.items)["sha256"] for task in flat})
        facts = iter(bar(run(_make_shard, flat), "preparing"))
    return {split: [next(facts) for _ in of_split] for split, of_split in tasks.items()}


def _check(task: _Task) -> None:
    for item in task.items:
        item.check()


def _make_shard(task: _Task) -> ShardFacts:
    kept = read_shard(task.storage, task.name)
    if kept is not None:
        return kept
    encoding = task.encoding
    samples = (_sample(task.first + place, item, task.size) for place, item in enumerate(task.items))
    return write_shard(task.storage, task.name, build_tar(samples, encoding.format, encoding.quality))


def _sample(number: int, item: Item, size: tuple[int, int]) -> Sample:
    image, label = item.load(size)
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", item.name)[:60]  # no "." or "/", and short enough for any tar header
    return Sample(f"{number:06d}-{readable}", image, label, item.origin)


def split_of(
    facts: Sequence[ShardFacts], size: tuple[int, int], grey_histogram: tuple[int, ...] | None = None
) -> Split:
    """A split of those shards. size: of its images."""
    histograms = [each.class_histogram for each in facts if each.class_histogram is not None]
    return Split(
        shards=tuple(each.shard for each in facts),
        image_size=size,
        label_space=LABEL_SPACE if histograms else None,
        class_histogram=tuple(np.sum(histograms, axis=0).tolist()) if histograms else None,
        grey_histogram=grey_histogram,
    )


def _write_chart(storage: Storage, manifest: Manifest) -> None:
    if not distributions(manifest):
        return
    # Imported here, since the worker processes import this module and have no use for a second of matplotlib.
    from pipelines.distribution_chart import distribution_chart

    chart = distribution_chart(manifest)
    if chart is not None:
        storage.write(CHART, encode(chart, "png"))
