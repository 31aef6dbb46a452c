"""Batches from a prepared data set, the same ones for any number of ranks and after any restart; unpaired ones here."""

import atexit
import itertools
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from infra.config import option
from infra.errors import UserError
from infra.storage import open_storage
from pipelines.cache import OpenShard, ShardCache, UnusableShard
from pipelines.decode import Decoder, EncodedCrop, Undecodable, make_decoder
from pipelines.health import DataHealth
from pipelines.manifest import DOMAINS, SampleEntry, Shard, Split, load_manifest
from pipelines.order import SampleOrder, augmentation, micro_batch_slots

T = TypeVar("T")
_Running = list[Callable[[], Tensor]]  # of each decoder what waits for its result

ATTEMPTS = 100  # samples tried for one position before the data is given up
CALL_IMAGES = 64  # of one call to the decoder: in smaller ones its threads wait for each other (docs/data.md, Speed)


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
    prefetch: int = option(4, "training steps decoded ahead", resumable=True)
    cache_dir: str | None = option(None, "shards from S3 are kept here [~/.cache/srunit/shards]", resumable=True)
    cache_gb: float | None = option(
        None, "limit of that cache in GB of 10^9 bytes: the least recently used shards go [no limit]", resumable=True
    )
    on_bad_sample: str = option(
        "fail", "an image that cannot be decoded or cropped: stop with its name, or train on another in its place",
        flag="--on-bad-sample", choices=("fail", "skip"), resumable=True,
    )  # fmt: skip
    on_bad_shard: str = option(
        "fail", "a shard that is missing or damaged: stop with its name, or train on others in its place",
        flag="--on-bad-shard", choices=("fail", "skip"), resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("crop", "window", "threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--data.{name} is {value}: give at least 1")
        if self.cache_gb is not None and self.cache_gb <= 0:
            raise UserError(f"--data.cache-gb is {self.cache_gb:g}: give more than 0, or leave it out for no limit")


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


@dataclass(frozen=True)
class Pick:
    """The sample that a position gets.

    attempt: how many samples before it could not be had. key: its name in the shard. name: what to call it in a report.
    crops: the image to decode and, where labels are wanted, its label map, cut alike.
    """

    domain: "Domain"
    position: int
    attempt: int
    key: str
    name: str
    crops: tuple[EncodedCrop, ...]


class Domain:
    """One domain of the training split: what is stored at each position, and how it is cut.

    crop: (width, height) of every crop. UserError if the images are smaller than the crop asked for.
    """

    def __init__(
        self, name: str, split: Split, cache: ShardCache, config: DataConfig, seed: int, health: DataHealth, *, labels: bool
    ) -> None:  # fmt: skip
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
        self._config = config
        self._seed = seed
        self._health = health
        self._labels = labels
        self._order = SampleOrder([shard.samples for shard in split.shards], seed, name, config.window)
        self._order_guard = threading.Lock()
        self._left_out: set[int] = set()  # shards

    def upcoming(self, position: int) -> list[Shard]:
        """The shards that the positions from this one on need, the first of them first."""
        with self._order_guard:
            upcoming = self._order.upcoming_shards(position)
        return [self._split.shards[index] for index in upcoming if index not in self._left_out]

    def pick(self, position: int, attempt: int = 0) -> Pick:
        """The sample in turn at a global position or, after so many attempts at others, the one that replaces it.

        Two threads may ask. Samples in shards that are left out are passed over. UserError if none is left to try.
        """
        for number in range(attempt, ATTEMPTS):
            with self._order_guard:
                shard_index, sample_index = (
                    self._order.replacement(position, number) if number else self._order.locate(position)
                )
            opened = self._open(shard_index)
            if opened is not None:
                shard, entry = self._split.shards[shard_index], opened.entries[sample_index]
                name = f"{entry.key} in {shard.name}"
                return Pick(self, position, number, entry.key, name, self._crops(position, opened, entry, name))
        raise UserError(
            f"none of {ATTEMPTS} {self._name} samples drawn for one place can be used: prepare the data again, "
            "or copy all of it"
        )

    def _open(self, index: int) -> OpenShard | None:
        """A shard by its index; None if it is left out."""
        if index in self._left_out:
            return None
        shard = self._split.shards[index]
        try:
            return self._cache.open(shard)
        except UnusableShard as error:
            if self._config.on_bad_shard == "fail":
                raise
            self._left_out.add(index)
            self._health.bad_shard(shard.name, str(error))
            return None

    def _crops(self, position: int, shard: OpenShard, entry: SampleEntry, name: str) -> tuple[EncodedCrop, ...]:
        x, y, flip = augmentation(
            self._seed, self._name, position, self._split.image_size, self.crop, flip=self._config.flip
        )
        image = EncodedCrop(shard.read(entry.image), x, y, flip, f"image {name}")
        if not self._labels:
            return (image,)
        if entry.label is None:
            raise UserError(f"image {name} has no label: prepare the data again with a label for every image")
        return image, EncodedCrop(shard.read(entry.label), x, y, flip, f"the label of {name}")


class Loader(ABC, Generic[T]):
    """Endless training batches: iterating yields, per step from `first_step` on, this rank's list of micro-batches.

    root_url: a prepared data set. domains: those it reads; the first one's length makes the epoch. seed: the run's.
    global_batch: positions per step, over all ranks and micro-batches. accumulation: micro-batches per rank and step.
    first_step: steps already done, to resume.

    Threads read and decode `config.prefetch` steps ahead. One iteration at a time: a new one ends the one before and begins
    at `first_step` again. Raises UserError for data or sizes that cannot work: when made, or, where a shard or an
    image is damaged, from the iteration.

    A sample that cannot be had and is to be skipped leaves its position to a replacement drawn for that position, which
    hangs on no rank, thread or earlier step. health: what happened to the data, and what was left out. steps_per_call: how
    many steps are decoded together. crop: (width, height) of every image in a batch.
    """

    labels: ClassVar[bool] = False  # whether label maps are read, too

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
        self.steps_per_call = max(1, min(config.prefetch, CALL_IMAGES // self._images_per_step))
        self._first_step = first_step
        self._device = device
        self._ahead: tuple[_Ahead[Any], ...] = ()
        self.health = DataHealth()
        self._cache = ShardCache(
            storage,
            Path(config.cache_dir) if config.cache_dir else None,
            keep=3 * len(domains) * config.window,  # the windows in use, those after them, those before them
            limit_bytes=None if config.cache_gb is None else round(config.cache_gb * 1e9),
            health=self.health,
        )
        self._domains = [
            Domain(name, split, self._cache, config, seed, self.health, labels=self.labels)
            for name, split in zip(domains, self.splits, strict=True)
        ]
        self._failed: set[str] = set()  # samples
        if len({domain.crop for domain in self._domains}) > 1:
            raise UserError(f"--crop none takes images whole, but those of {root_url} differ in size between source and "
                            "target: pass a --crop that fits into both, or prepare them in one size")  # fmt: skip
        self.crop = self._domains[0].crop
        self._prefetch(first_step * global_batch)  # while the decoders are made
        self._decoders = [self._make_decoder(labels=labels) for labels in ((False, True) if self.labels else (False,))]

    def _make_decoder(self, labels: bool) -> Decoder:
        return make_decoder(
            self._config.decoder, crop=self.crop, device=self._device, threads=self._config.threads,
            batch=self.steps_per_call * self._images_per_step, labels=labels,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[T]]:
        self._stop()
        # Two threads, so that the next samples are read while these are decoded.
        firsts = itertools.count(self._first_step, self.steps_per_call)
        picks = _Ahead(map(self._pick_steps, firsts), 1)
        ahead = _Ahead(self._load(picks), self._config.prefetch)
        self._ahead = (picks, ahead)
        try:
            for batches in ahead:
                if self._device.type == "cuda":
                    # Made on the decoder's stream, which must not use the memory again before this one is done with it.
                    for value in (value for batch in batches for value in vars(batch).values()):
                        if isinstance(value, Tensor) and value.is_cuda:
                            value.record_stream(torch.cuda.current_stream(self._device))
                yield batches
        finally:
            self._stop()

    def close(self) -> None:
        """Stop the threads; the loader cannot be used afterwards."""
        self._stop()
        self._cache.close()
        for decoder in self._decoders:
            decoder.close()

    def _stop(self) -> None:
        for ahead in self._ahead:
            ahead.close()

    def _pick_steps(self, first_step: int) -> list[Pick]:
        """This rank's samples of the steps that are decoded together, from this one on, read but not decoded: in the order
        (step, micro-batch, domain, slot)."""
        picks = []
        for step in range(first_step, first_step + self.steps_per_call):
            first = step * self._global_batch
            self._prefetch(first)
            picks += [domain.pick(first + slot) for slots in self._slots for domain in self._domains for slot in slots]
        return picks

    def _prefetch(self, position: int) -> None:
        """Have shards fetched, of all domains in turn: no batch can do without any of them."""
        in_turn = itertools.zip_longest(*(domain.upcoming(position) for domain in self._domains))
        self._cache.prefetch(shard for shards in in_turn for shard in shards if shard)

    def _load(self, calls: Iterator[list[Pick]]) -> Iterator[list[T]]:
        """The micro-batches of each step. The next call begins before the last one is met: its threads always have work."""
        begun = map(self._begin, calls)
        for (picks, running), _ in itertools.pairwise(begun):
            yield from self._finish(picks, running)

    def _begin(self, picks: list[Pick]) -> tuple[list[Pick], _Running]:
        picks = [self._fit(pick) for pick in picks]
        return picks, self._start(picks)

    def _finish(self, picks: list[Pick], running: _Running) -> Iterator[list[T]]:
        while True:
            try:
                decoded = [result() for result in running]
                break
            except Undecodable as error:
                if self._config.on_bad_sample == "fail":
                    raise
                for place, reason in error.faults.items():
                    bad = picks[place]
                    self._failed.add(bad.name)
                    self.health.bad_sample(bad.name, reason)
                    picks[place] = self._fit(bad.domain.pick(bad.position, bad.attempt + 1))
                running = self._start(picks)
        keys, size = [pick.key for pick in picks], self._images_per_step
        for start in range(0, len(picks), size):
            yield self._batches(keys[start : start + size], [each[start : start + size] for each in decoded])

    def _fit(self, pick: Pick) -> Pick:
        """The pick or, where it fails again, the next one. One that failed elsewhere may be fit for the crop of this
        position (whoever has not seen it fail uses it), so it is tried, but alone: it cannot cost a whole step twice."""
        while pick.name in self._failed:
            try:
                for result in self._start([pick]):
                    result()
                return pick
            except Undecodable:
                pick = pick.domain.pick(pick.position, pick.attempt + 1)
        return pick

    def _start(self, picks: Sequence[Pick]) -> _Running:
        parts = zip(*(pick.crops for pick in picks), strict=True)
        return [decoder.begin(crops) for decoder, crops in zip(self._decoders, parts, strict=True)]

    @abstractmethod
    def _batches(self, keys: list[str], decoded: list[Tensor]) -> list[T]:
        """The micro-batches of a step from its samples' keys, images and, if read, label maps, ordered as in
        `_pick_steps`."""


class UnpairedLoader(Loader[Batch]):
    """Pairs of a source and a target image that have nothing to do with each other; see `Loader`."""

    def _batches(self, keys: list[str], decoded: list[Tensor]) -> list[Batch]:
        (images,) = decoded
        size = len(self._slots[0])
        keys_of = [keys[start : start + size] for start in range(0, len(keys), size)]
        images_of = images.split(size)
        return [
            Batch(images_of[2 * m], images_of[2 * m + 1], keys_of[2 * m], keys_of[2 * m + 1], torch.tensor(slots))
            for m, slots in enumerate(self._slots)
        ]


class _Ahead(Iterator[T], Generic[T]):
    """Runs an endless iterator in a thread, up to `depth` items ahead. Its exception reaches the consumer."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[T | Exception] = queue.Queue(depth)
        stopped = threading.Event()
        thread = threading.Thread(target=_run_ahead, args=(items, self._ready, stopped), name="decode", daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _stop_ahead, thread, self._ready, stopped)
        # No thread may be left inside native code at the interpreter's exit. Finalizers run there at a time of their own;
        # what is registered now runs before DALI, registered when it was imported, shuts down.
        self._stop.atexit = False
        atexit.register(self._stop)

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stop()
        atexit.unregister(self._stop)


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
    with suppress(queue.Full):
        ready.put_nowait(StopIteration())  # lets a waiting get through
