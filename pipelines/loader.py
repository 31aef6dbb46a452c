"""Unpaired batches from a prepared data set, the same ones for any number of ranks and after any restart."""

import itertools
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from infra.storage import open_storage
from pipelines.cache import ShardCache
from pipelines.decode import EncodedCrop, make_decoder
from pipelines.manifest import DOMAINS, Split, load_manifest
from pipelines.order import SampleOrder, augmentation, micro_batch_slots

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are cut."""

    # Resumable: the same data may lie elsewhere. That it is the same, its manifest tells.
    root: str | None = option(None, "prepared data: a folder or s3://bucket/prefix", flag="--data", resumable=True)
    crop: int = option(256, "side of the random square crop, in pixels", flag="--crop")
    flip: bool = option(True, "mirror half of the crops left to right")
    window: int = option(8, "shards whose samples are shuffled together")
    decoder: str = option("auto", "image decoder; auto is DALI where installed", choices=("auto", "dali", "pillow"))
    threads: int = option(4, "decoding threads per rank", resumable=True)
    prefetch: int = option(2, "training steps decoded ahead", resumable=True)
    cache_dir: str | None = option(None, "shards from S3 are kept here [~/.cache/srunit/shards]", resumable=True)

    def __post_init__(self) -> None:
        for name in ("crop", "window", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise UserError(f"--data.{name} is {getattr(self, name)}: give at least 1")


@dataclass
class Batch:
    """One micro-batch of unpaired images.

    source, target: float32 (b, 3, crop, crop) in [-1, 1], RGB, channels-last, on the loader's device.
    source_keys, target_keys: the samples' names. slots: int64 (b,), their places in the global batch, on the CPU.
    """

    source: Tensor
    target: Tensor
    source_keys: list[str]
    target_keys: list[str]
    slots: Tensor


class _Domain:
    """One domain of the training split: the encoded image at each position, and how it is cut."""

    def __init__(self, name: str, split: Split, cache: ShardCache, config: DataConfig, seed: int) -> None:
        if config.crop > min(split.image_size):
            width, height = split.image_size
            raise UserError(
                f"the crop of {config.crop} pixels is larger than the {name} images of {width}x{height}: "
                f"pass --crop {min(width, height)} or less, or prepare larger images"
            )
        self._name = name
        self._split = split
        self._cache = cache
        self._config = config
        self._seed = seed
        self._order = SampleOrder([shard.samples for shard in split.shards], seed, name, config.window)

    def prefetch(self, position: int) -> None:
        """Have the shards fetched that the positions from this one on need."""
        self._cache.prefetch(self._split.shards[index] for index in self._order.upcoming_shards(position))

    def read(self, position: int) -> tuple[str, EncodedCrop]:
        """(key, what to decode) at a global position."""
        shard_index, sample_index = self._order.locate(position)
        shard = self._split.shards[shard_index]
        opened = self._cache.open(shard)
        entry = opened.entries[sample_index]
        x, y, flip = augmentation(
            self._seed, self._name, position, self._split.image_size, self._config.crop, flip=self._config.flip
        )
        return entry.key, EncodedCrop(opened.read(entry.image), x, y, flip, name=f"image {entry.key} in {shard.name}")


class UnpairedLoader:
    """Endless training batches: iterating yields, per step from `first_step` on, this rank's list of micro-batches.

    root_url: a prepared data set. seed: the run's. global_batch: pairs per step, over all ranks and micro-batches.
    accumulation: micro-batches per rank and step. first_step: steps already done, to resume.

    A thread decodes `config.prefetch` steps ahead. One iteration at a time: a new one ends the one before and begins
    at `first_step` again. Raises UserError for data or sizes that cannot work: when made, or, where a shard or an
    image is damaged, from the iteration.
    """

    def __init__(
        self,
        root_url: str,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        first_step: int = 0,
    ) -> None:
        storage = open_storage(root_url)
        self.manifest = load_manifest(storage)
        splits = {name: self.manifest.split("train", name) for name in DOMAINS}
        self.source_samples = splits["source"].samples
        self.steps_per_epoch = self.source_samples / global_batch
        self._slots = micro_batch_slots(global_batch, accumulation, rank, world_size)
        self._global_batch = global_batch
        self._first_step = first_step
        self._depth = config.prefetch
        self._device = device
        self._ahead: _Ahead[list[Batch]] | None = None
        # The indexes of the windows in use, those after them, and those before them.
        keep = 3 * len(DOMAINS) * config.window
        self._cache = ShardCache(storage, Path(config.cache_dir) if config.cache_dir else None, keep)
        self._domains = [_Domain(name, split, self._cache, config, seed) for name, split in splits.items()]
        images = len(DOMAINS) * global_batch // world_size
        self._decoder = make_decoder(
            config.decoder, crop=config.crop, device=device, threads=config.threads, batch=images
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        self._stop()
        self._ahead = ahead = _Ahead(map(self._load, itertools.count(self._first_step)), self._depth)
        try:
            for batches in ahead:
                if self._device.type == "cuda":
                    # Made on the decoder's stream, which must not use the memory again before this one is done with it.
                    for batch in batches:
                        batch.source.record_stream(torch.cuda.current_stream(self._device))
                        batch.target.record_stream(torch.cuda.current_stream(self._device))
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

    def _load(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        first = step * self._global_batch
        for domain in self._domains:
            domain.prefetch(first)
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
