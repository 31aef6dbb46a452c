"""One domain of the training data: which sample a position gets, and what is to be decoded of it."""

import logging
import threading
from dataclasses import dataclass

from infra.errors import UserError
from infra.views import Tiles, View, labelled_domain
from pipelines.cache import OpenShard, ShardCache, UnusableShard
from pipelines.config import DataConfig
from pipelines.cuts import Cut, Cuts
from pipelines.decode import EncodedCrop
from pipelines.health import DataHealth
from pipelines.manifest import SampleEntry, Shard, Split
from pipelines.order import FirstSample, SampleOrder

log = logging.getLogger(__name__)

ATTEMPTS = 100  # samples tried for one position before the data is given up


@dataclass(frozen=True)
class Pick:
    """The sample that a position gets.

    attempt: how many samples before it could not be had. key: its name in the shard. name: what to call it in a report.
    crops: the image to decode and, where labels are wanted, its label map, cut alike. box: see `Cut`.
    """

    domain: "Domain"
    position: int
    attempt: int
    key: str
    name: str
    crops: tuple[EncodedCrop, ...]
    box: tuple[int, int] | None


class Domain:
    """One domain of the training split: what is stored at each position, and how it is cut.

    crop: (width, height) of every crop. UserError if the images do not give what the view asks for.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        cache: ShardCache,
        config: DataConfig,
        view: View,
        health: DataHealth,
        *,
        seed: int,
        global_batch: int,
    ) -> None:
        width, height = split.image_size
        if config.crop and config.crop > min(width, height):
            largest = min(width, height)
            remedy = f"--crop {largest} or less"
            if isinstance(view, Tiles):  # whose sides are what a discriminator takes, a power of two
                side = 1 << (largest.bit_length() - 1)
                remedy = f"--crop {side} --method.discriminator.size {side}"
            raise UserError(
                f"the crop of {config.crop} pixels is larger than the {name} images of {width}x{height}: "
                f"pass {remedy}, or prepare larger images"
            )
        self.crop = (config.crop, config.crop) if config.crop else (width, height)
        self._name = name
        self._split = split
        self._cache = cache
        self._config = config
        self._health = health
        self._labels = labelled_domain(view) == name
        self._cuts = Cuts(
            view, seed=seed, domain=name, image_size=split.image_size, crop=self.crop, global_batch=global_batch,
            flip=config.flip,
        )  # fmt: skip
        self._order = _order(name, split, view, seed, config.window)
        self._order_guard = threading.Lock()
        self._skipped: set[int] = set()  # shards

    def upcoming(self, position: int) -> list[Shard]:
        """The shards that the positions from this one on need, the first of them first."""
        with self._order_guard:
            upcoming = self._order.upcoming_shards(position)
        return [self._split.shards[index] for index in upcoming if index not in self._skipped]

    def pick(self, position: int, attempt: int = 0) -> Pick:
        """The sample in turn at a global position or, after so many attempts at others, the one that replaces it.

        Two threads may ask. Samples in skipped shards are passed over. UserError if none is left to try.
        """
        for number in range(attempt, ATTEMPTS):
            shard_index, sample_index, cut = self.planned(position, number)
            opened = self._open(shard_index)
            if opened is not None:
                shard, entry = self._split.shards[shard_index], opened.entries[sample_index]
                name = f"{entry.key} in {shard.name}"
                return Pick(self, position, number, entry.key, name, self._crops(cut, opened, entry, name), cut.box)
        raise UserError(
            f"none of {ATTEMPTS} {self._name} samples drawn for one place can be used: prepare the data again, "
            "or copy all of it"
        )

    def planned(self, position: int, attempt: int = 0) -> tuple[int, int, Cut]:
        """(shard index, sample index in that shard, cut) of a position, whatever can be had: see `pick`."""
        with self._order_guard:
            shard, sample = self._order.replacement(position, attempt) if attempt else self._order.locate(position)
        return shard, sample, self._cuts(position)

    def _open(self, index: int) -> OpenShard | None:
        """A shard by its index; None if it is skipped."""
        if index in self._skipped:
            return None
        shard = self._split.shards[index]
        try:
            return self._cache.open(shard)
        except UnusableShard as error:
            if self._config.on_bad_shard == "fail":
                raise
            self._skipped.add(index)
            self._health.bad_shard(shard.name, str(error))
            return None

    def _crops(self, cut: Cut, shard: OpenShard, entry: SampleEntry, name: str) -> tuple[EncodedCrop, ...]:
        image = EncodedCrop(shard.read(entry.image), cut.x, cut.y, cut.flip, f"image {name}", cut.zoomed)
        if not self._labels:
            return (image,)
        if entry.label is None:
            raise UserError(f"image {name} has no label: prepare the data again with a label for every image")
        return image, EncodedCrop(shard.read(entry.label), cut.x, cut.y, cut.flip, f"the label of {name}")


def _order(name: str, split: Split, view: View, seed: int, window: int) -> SampleOrder | FirstSample:
    if not isinstance(view, Tiles):
        return SampleOrder([shard.samples for shard in split.shards], seed, name, window)
    if split.samples > 1:
        log.info("of the %d %s images the first is trained on, and no other", split.samples, name)
    return FirstSample()
