"""Batches from a prepared data set, the same ones for any number of ranks and after any restart; unpaired ones here."""

import itertools
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from infra.storage import open_storage
from pipelines.cache import OpenShard, ShardCache
from pipelines.decode import Decoder, EncodedCrop, make_decoder
from pipelines.manifest import DOMAINS, SampleEntry, Split, load_manifest
from pipelines.order import SampleOrder, augmentation, micro_batch_slots

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are cut."""

    # Resumable: the same data may lie elsewhere. That it is the same, its manifest tells.
    root: str | None = option(None, "prepared data: a folder or s3://bucket/prefix", flag="--data", resumable=True)
    crop: int | None = option(256, "side of the random square crop in pixels; none: the whole image", flag="--crop")
    flip: bool = option(True, "mirror half of the crops left to right")
    window: int = option(8, "shards whose samples are shuffled together")
    decoder: str = option("auto", "image decoder; auto is DALI where installed", choices=("auto", "dali", "pillow"))
    threads: int = option(4, "decoding threads per rank", resumable=True)
    prefetch: int = option(2, "training steps decoded ahead", resumable=True)
    cache_dir: str | None = option(None, "shards from S3 are kept here [~/.cache/srunit/shards]", resumable=True)

    def __post_init__(self) -> None:
        for name in ("crop", "window", "threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--data.{name} is {value}: give at least 1")


@dataclass
class Batch:
    """One micro-batch of unpaired images.

    source, target: float32 (b, 3, h, w) of the crop's size, in [-1, 1], RGB, channels-last, on the loader's device.
    source_keys, target_keys: the samples' names. slots: int64 (b,), their places in the global batch, on the CPU.
    """

    source: Tensor
    target: Tensor
    source_keys: list[str]
    target_keys: list[str]
    slots: Tensor


class Domain:
    """One domain of the training split: what is stored at each position, and how it is cut.

    crop: (width, height) of every crop. UserError if the images are smaller than the crop asked for.
    """

    def __init__(self, name: str, split: Split, cache: ShardCache, config: DataConfig, seed: int) -> None:
        width, height = split.image_size
        if config.crop and config.crop > min(width, height):
            raise UserError(
                f"the crop of {config.crop} pixels is larger than the {name} images of {width}x{height}: "
                f"pass --crop {min(width, height)} or less, or prepare larger images"
            )
        self.crop = (config.crop, config.crop) if config.crop else (width, height)
        self._name = name
        self._split = split
        self._cache = cache
        self._flip = config.flip
        self._seed = seed
        self._order = SampleOrder([shard.samples for shard in split.shards], seed, name, config.window)

    def prefetch(self, position: int) -> None:
        """Have the shards fetched that the positions from this one on need."""
        self._cache.prefetch(self._split.shards[index] for index in self._order.upcoming_shards(position))

    def read(self, position: int) -> tuple[str, EncodedCrop]:
        """(key, image to decode) at a global position."""
        shard, entry, name = self._find(position)
        return entry.key, self._cut(position, shard.read(entry.image), f"image {name}")

    def read_labelled(self, position: int) -> tuple[str, EncodedCrop, EncodedCrop]:
        """(key, image to decode, its label map to decode) at a global position, both cut alike."""
        shard, entry, name = self._find(position)
        if entry.label is None:
            raise UserError(f"image {name} has no label: prepare the data again with a label for every image")
        image = self._cut(position, shard.read(entry.image), f"image {name}")
        return entry.key, image, self._cut(position, shard.read(entry.label), f"the label of {name}")

    def _find(self, position: int) -> tuple[OpenShard, SampleEntry, str]:
        """(shard, place in it, name for people) of the sample at a position."""
        shard_index, sample_index = self._order.locate(position)
        shard = self._split.shards[shard_index]
        opened = self._cache.open(shard)
        entry = opened.entries[sample_index]
        return opened, entry, f"{entry.key} in {shard.name}"

    def _cut(self, position: int, encoded: bytes, name: str) -> EncodedCrop:
        x, y, flip = augmentation(self._seed, self._name, position, self._split.image_size, self.crop, flip=self._flip)
        return EncodedCrop(encoded, x, y, flip, name)


class Loader(ABC, Generic[T]):
    """Endless training batches: iterating yields, per step from `first_step` on, this rank's list of micro-batches.

    root_url: a prepared data set. domains: those it reads; the first one's length makes the epoch. seed: the run's.
    global_batch: positions per step, over all ranks and micro-batches. accumulation: micro-batches per rank and step.
    first_step: steps already done, to resume.

    A thread decodes `config.prefetch` steps ahead. One iteration at a time: a new one ends the one before and begins
    at `first_step` again. Raises UserError for data or sizes that cannot work: when made, or, where a shard or an
    image is damaged, from the iteration.
    """

    def __init__(
        self,
        root_url: str,
        config: DataConfig,
        *,
        domains: Sequence[str] = DOMAINS,
        seed: int,
        global_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        first_step: int = 0,
    ) -> None:
        storage = open_storage(root_url)
        manifest = load_manifest(storage)
        self.splits = [manifest.split("train", name) for name in domains]
        self.epoch_samples = self.splits[0].samples
        self._slots = micro_batch_slots(global_batch, accumulation, rank, world_size)
        self._config = config
        self._global_batch = global_batch
        self._images_per_step = len(domains) * global_batch // world_size
        self._first_step = first_step
        self._device = device
        self._ahead: _Ahead[list[T]] | None = None
        # The indexes of the windows in use, those after them, and those before them.
        keep = 3 * len(domains) * config.window
        self._cache = ShardCache(storage, Path(config.cache_dir) if config.cache_dir else None, keep)
        self._domains = [
            Domain(name, split, self._cache, config, seed) for name, split in zip(domains, self.splits, strict=True)
        ]
        if len({domain.crop for domain in self._domains}) > 1:
            raise UserError(f"--crop none takes images whole, but those of {root_url} differ in size between source and "
                            "target: pass a --crop that fits into both, or prepare them in one size")  # fmt: skip
        self._decoder = self._make_decoder()

    def _make_decoder(self, labels: bool = False) -> Decoder:
        return make_decoder(
            self._config.decoder, crop=self._domains[0].crop, device=self._device, threads=self._config.threads,
            batch=self._images_per_step, labels=labels,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[T]]:
        self._stop()
        steps = map(self._load_step, itertools.count(self._first_step))
        self._ahead = ahead = _Ahead(steps, self._config.prefetch)
        try:
            for batches in ahead:
                if self._device.type == "cuda":
                    # Made on the decoder's stream, which must not use the memory again before this one is done with it.
                    for value in (value for batch in batches for value in vars(batch).values()):
                        if isinstance(value, Tensor) and value.is_cuda:
                            value.record_stream(torch.cuda.current_stream(self._device))
                yield batches
        finally:
            ahead.close()

    def close(self) -> None:
        """Stop the threads; the loader cannot be used afterwards."""
        self._stop()
        self._cache.close()
        self._decoder.close()

    def _stop(self) -> None:
        if self._ahead:
            self._ahead.close()

    def _load_step(self, step: int) -> list[T]:
        first = step * self._global_batch
        for domain in self._domains:
            domain.prefetch(first)
        return self._load(first)

    @abstractmethod
    def _load(self, first: int) -> list[T]:
        """This rank's micro-batches of the step whose slot 0 is the global position `first`."""


class UnpairedLoader(Loader[Batch]):
    """Pairs of a source and a target image that have nothing to do with each other; see `Loader`."""

    def _load(self, first: int) -> list[Batch]:
        # In the order (micro-batch, domain, slot), decoded at once so that all threads have work.
        groups = [[domain.read(first + slot) for slot in slots] for slots in self._slots for domain in self._domains]
        images = self._decoder.decode([crop for group in groups for _, crop in group]).split(len(self._slots[0]))
        keys = [[key for key, _ in group] for group in groups]
        return [
            Batch(images[2 * m], images[2 * m + 1], keys[2 * m], keys[2 * m + 1], torch.tensor(slots))
            for m, slots in enumerate(self._slots)
        ]


class _Ahead(Iterator[T], Generic[T]):
    """Runs an endless iterator in a thread, up to `depth` items ahead. Its exception reaches the consumer."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[T | Exception] = queue.Queue(depth)
        stopped = threading.Event()
        thread = threading.Thread(target=_run_ahead, args=(items, self._ready, stopped), name="decode", daemon=True)
        thread.start()
        # A finalizer also runs at the interpreter's exit, where a thread must not be left inside native code.
        self.close = weakref.finalize(self, _stop_ahead, thread, self._ready, stopped)

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item


def _run_ahead(items: Iterator[T], ready: "queue.Queue[T | Exception]", stopped: threading.Event) -> None:
    try:
        for item in items:
            ready.put(item)
            if stopped.is_set():
                return
    except Exception as error:
        ready.put(error)


def _stop_ahead(thread: threading.Thread, ready: "queue.Queue[T | Exception]", stopped: threading.Event) -> None:
    stopped.set()
    while not ready.empty():  # lets a waiting put through; there is room for the one after it
        ready.get()
    # Not for ever: a shard that does not arrive may keep the thread waiting. It is a daemon.
    thread.join(timeout=10)
