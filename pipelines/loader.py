"""Batches from a prepared data set, the same ones for any number of ranks and after any restart."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from infra.storage import open_storage
from infra.views import SINGLE_CROP, CropWithBox, LabelledCrop, Tiles, View, labelled_domain
from pipelines.ahead import Ahead
from pipelines.cache import ShardCache
from pipelines.config import DataConfig
from pipelines.decode import Decoder, Undecodable, make_decoder
from pipelines.domain import Pick
from pipelines.health import DataHealth
from pipelines.manifest import DOMAINS, Split, load_manifest
from pipelines.matching.domain import make_domains
from pipelines.order import micro_batch_slots
from pipelines.shards import LABEL_SPACE

_Running = list[Callable[[], Tensor]]  # of each decoder what waits for its result

CALL_IMAGES = 64  # of one call to the decoder: in smaller ones its threads wait for each other (docs/data.md, Speed)


@dataclass
class Batch:
    """One micro-batch of unpaired images.

    source, target: float32 (b, 3, h, w) of the crop's size, in [-1, 1], RGB, channels-last, on the loader's device.
    source_keys, target_keys: the samples' names. slots: int64 (b,), their places in the global batch, on the CPU.
    source_boxes, target_boxes: int64 (b, 2), on the CPU: (x, y) of the left upper corner of the box in each image, in
    pixels; none without `CropWithBox`. source_labels: uint8 (b, h, w) trainIds of the sources, cut and mirrored like them, 255 =
    ignore, on the loader's device; none where the view does not ask for them.
    """

    source: Tensor
    target: Tensor
    source_keys: list[str]
    target_keys: list[str]
    slots: Tensor
    source_boxes: Tensor | None = None
    target_boxes: Tensor | None = None
    source_labels: Tensor | None = None


@dataclass
class LabelledBatch:
    """One micro-batch of labelled images.

    images: as in `Batch`. labels: uint8 (b, h, w) trainIds, 255 = ignore, cut and mirrored like the images, on the loader's
    device. keys: the samples' names. slots: int64 (b,), their places in the global batch, on the CPU.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]
    slots: Tensor


class Loader:
    """Endless training batches: iterating yields, per step from `first_step` on, this rank's list of micro-batches, each a
    `Batch` or, where labels are wanted, a `LabelledBatch`.

    root_url: a prepared data set. view: what is wanted of each image. seed: the run's.
    global_batch: positions per step, over all ranks and micro-batches. accumulation: micro-batches per rank and step.
    first_step: steps already done, to resume.

    Threads read and decode `config.prefetch` steps ahead. One iteration at a time: a new one ends the one before and begins
    at `first_step` again. Raises UserError for data or sizes that cannot work: when made, or, where a shard or an
    image is damaged, from the iteration.

    A sample that cannot be had and is to be skipped leaves its position to a replacement drawn for that position, which
    depends on no rank, thread or earlier step. health: what happened to the data, and what was skipped. steps_per_call: how
    many steps are decoded together. crop: (width, height) of every image in a batch. epoch_samples: images of the source
    (or of the only domain) that make an epoch.
    """

    def __init__(
        self,
        root_url: str,
        config: DataConfig,
        view: View = SINGLE_CROP,
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
        manifest = load_manifest(storage)
        domains = (view.domain,) if isinstance(view, LabelledCrop) else DOMAINS
        self.splits = [manifest.split("train", name) for name in domains]
        self.epoch_samples = view.epoch if isinstance(view, Tiles) else self.splits[0].samples
        if labels_of := labelled_domain(view):
            _check_labels(labels_of, self.splits[domains.index(labels_of)], root_url, view)
        self._slots = micro_batch_slots(global_batch, accumulation, rank, world_size)
        self._config, self._view = config, view
        self._global_batch = global_batch
        self._images_per_step = len(domains) * global_batch // world_size
        self.steps_per_call = max(1, min(config.prefetch, CALL_IMAGES // self._images_per_step))
        self._first_step = first_step
        self._device = device
        self._ahead: tuple[Ahead[Any], ...] = ()
        self.health = DataHealth()
        self._cache = ShardCache(
            storage,
            Path(config.cache_dir) if config.cache_dir else None,
            keep=3 * len(domains) * config.window,  # the windows in use, those after them, those before them
            limit_bytes=None if config.cache_gb is None else round(config.cache_gb * 1e9),
            health=self.health,
        )
        self._domains = make_domains(
            storage,
            manifest,
            domains,
            config,
            view,
            cache=self._cache,
            health=self.health,
            seed=seed,
            global_batch=global_batch,
        )
        self._failed: set[str] = set()  # samples
        if len({domain.crop for domain in self._domains}) > 1:
            raise UserError(f"--crop none takes images whole, but those of {root_url} differ in size between source and "
                            "target: pass a --crop that fits into both, or prepare them in one size")  # fmt: skip
        self.crop = self._domains[0].crop
        self._prefetch(first_step * global_batch)  # while the decoders are made
        self._decoders = [self._make_decoder(labels=False)]
        if labels_of:
            self._decoders.append(self._make_decoder(labels=True))

    def _make_decoder(self, labels: bool) -> Decoder:
        # Pillow keeps the zoomed image decoded, which is less work than to decode it for each tile.
        kind = "pillow" if isinstance(self._view, Tiles) else self._config.decoder
        return make_decoder(
            kind, crop=self.crop, device=self._device, threads=self._config.threads,
            batch=self.steps_per_call * self._images_per_step, labels=labels,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[Any]]:
        self._stop()
        # Two threads, so that the next samples are read while these are decoded.
        firsts = itertools.count(self._first_step, self.steps_per_call)
        picks = Ahead(map(self._pick_steps, firsts), 1)
        ahead = Ahead(self._load(picks), self._config.prefetch)
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

    def _load(self, calls: Iterator[list[Pick]]) -> Iterator[list[Any]]:
        """The micro-batches of each step. The next call begins before the last one is met: its threads always have work."""
        begun = map(self._begin, calls)
        for (picks, running), _ in itertools.pairwise(begun):
            yield from self._finish(picks, running)

    def _begin(self, picks: list[Pick]) -> tuple[list[Pick], _Running]:
        picks = [self._fit(pick) for pick in picks]
        return picks, self._start(picks)

    def _finish(self, picks: list[Pick], running: _Running) -> Iterator[list[Any]]:
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
        count = len(self._domains) * len(self._slots[0])  # images of a micro-batch
        parts = [picks[start : start + count] for start in range(0, len(picks), count)]
        of_parts = zip(*(each.chunk(len(parts)) for each in decoded), strict=True)
        batches = [self._batch(part, each) for part, each in zip(parts, of_parts, strict=True)]
        for start in range(0, len(batches), len(self._slots)):
            yield batches[start : start + len(self._slots)]

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
        images, *labels = self._decoders
        running = [images.begin([pick.crops[0] for pick in picks])]
        labelled = [place for place, pick in enumerate(picks) if len(pick.crops) > 1]
        for decoder in labels if labelled else ():
            decode = decoder.begin([picks[place].crops[1] for place in labelled])
            running.append(functools.partial(_at_places, decode, labelled))
        return running

    def _batch(self, picks: Sequence[Pick], decoded: Sequence[Tensor]) -> Batch | LabelledBatch:
        """A micro-batch from its samples and what they were decoded to, in the order (domain, slot)."""
        keys = [pick.key for pick in picks]
        slots = torch.tensor([pick.position % self._global_batch for pick in picks[: len(self._slots[0])]])
        if isinstance(self._view, LabelledCrop):
            images, labels = decoded
            return LabelledBatch(images, labels, keys, slots)
        pixels, *of_sources = decoded
        source, target = pixels.split(len(slots))
        batch = Batch(source, target, keys[: len(slots)], keys[len(slots) :], slots)
        if of_sources:
            (batch.source_labels,) = of_sources
        if isinstance(self._view, CropWithBox):
            batch.source_boxes, batch.target_boxes = torch.tensor([pick.box for pick in picks]).split(len(slots))
        return batch


def _at_places(decode: Callable[[], Tensor], places: Sequence[int]) -> Tensor:
    """What is decoded of the samples in these places; faults are named by them."""
    try:
        return decode()
    except Undecodable as error:
        raise Undecodable({places[place]: reason for place, reason in error.faults.items()}) from None


def _check_labels(domain: str, split: Split, root_url: str, view: View) -> None:
    """UserError if there are none, or of another space than the project's classes."""
    if split.label_space is None:
        other = (
            "choose the other --domain" if isinstance(view, LabelledCrop) else "give --method.semantic.labels predicted"
        )
        raise UserError(f"the {domain} images of {root_url} have no labels: {other}, or prepare data that has")
    if split.label_space != LABEL_SPACE:
        raise UserError(
            f"the labels of {root_url} are of the space {split.label_space!r}, not {LABEL_SPACE}: prepare it again"
        )
