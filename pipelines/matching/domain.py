"""The target domain of training data whose crops are matched: what it shows at a position follows from the source there."""

import dataclasses
import functools
import itertools
from bisect import bisect_right
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.storage import Storage
from infra.views import LabelledCrop, Tiles, View
from pipelines.config import DataConfig
from pipelines.cuts import Cut
from pipelines.domain import Domain
from pipelines.manifest import Manifest, Shard
from pipelines.matching.lattice import Lattice
from pipelines.matching.match import Facts, image_weights, load_match
from pipelines.order import random_words

AHEAD = 512  # positions whose shards are fetched in advance
_Plan = tuple[int, int, Cut]


def make_domains(
    storage: Storage, manifest: Manifest, names: tuple[str, ...], config: DataConfig, view: View, **shared: Any
) -> list[Domain]:
    """The domains of the training data by name; with `data.match` the target's positions follow the source's.

    shared: what `Domain` takes beside. UserError for a match that does not fit the data, the crop or the view.
    """
    splits = {name: manifest.split("train", name) for name in names}
    if config.match is None:
        return [Domain(name, split, config=config, view=view, **shared) for name, split in splits.items()]
    if isinstance(view, LabelledCrop | Tiles):
        raise UserError("--data.match pairs crops of two images, and what is trained here "
                        f"takes {'labelled images of one domain' if isinstance(view, LabelledCrop) else 'tiles of one image'}: "
                        "leave it out")  # fmt: skip
    source = Domain("source", splits["source"], config=config, view=view, **shared)
    target = MatchedDomain(source, storage, manifest, config=config, view=view, **shared)
    return [source, target]


class MatchedDomain(Domain):
    """The target: at each position one of the k candidates of the crop that the source has there.

    The candidate is drawn by (seed, position), those of seldom listed images more often (`image_weights`). The crop lies
    from the candidate's cell as the source's crop does from its own, mirrored if one of source and candidate is, and inside
    the image. A sample that cannot be had is replaced by the next candidate drawn, and after the last by any target.
    """

    def __init__(
        self, source: Domain, storage: Storage, manifest: Manifest, *, config: DataConfig, seed: int, **shared: Any
    ) -> None:
        split = manifest.split("train", "target")
        super().__init__("target", split, config=config, seed=seed, **shared)
        assert config.match is not None
        match = load_match(storage, manifest, config.match)
        _check_fits(match.facts, self.crop, config)
        self._source, self._seed, self._codes = source, seed, match.codes
        size = manifest.split("train", "source").image_size
        self._source_lattice, self._lattice = (Lattice(each, self.crop) for each in (size, split.image_size))
        self._weights = image_weights(match.codes, self._lattice.cells, split.samples)
        self._starts, self._source_starts = (
            list(itertools.accumulate((shard.samples for shard in each.shards), initial=0))
            for each in (split, manifest.split("train", "source"))
        )
        self._most_shards = min(2 * config.window, len(split.shards))
        # Asked for the shards ahead at every step, and then for the sample.
        self._matched = functools.lru_cache(4 * AHEAD)(self._draw)

    def planned(self, position: int, attempt: int = 0) -> _Plan:
        candidates = self._matched(position)
        return candidates[attempt] if attempt < len(candidates) else super().planned(position, attempt)

    def upcoming(self, position: int) -> list[Shard]:
        found: dict[int, None] = {}
        for ahead in range(position, position + AHEAD):
            if len(found) == self._most_shards:
                break
            found[self._matched(ahead)[0][0]] = None
        return [self._split.shards[index] for index in found if index not in self._skipped]

    def _draw(self, position: int) -> tuple[_Plan, ...]:
        """The candidates of a position in the order in which they are tried, which is a weighted draw without replacement:
        of exponential variables whose rates are the weights, the least comes first (Efraimidis and Spirakis, 2006)."""
        shard, sample, cut = self._source.planned(position)
        cell = self._source_lattice.nearest(cut.x, cut.y)
        codes = self._codes[(self._source_starts[shard] + sample) * self._source_lattice.cells + cell]
        words = random_words(self._seed, "match/target", (0, position), len(codes))
        waits = -np.log((words + 0.5) / 2**64) / self._weights[codes // (2 * self._lattice.cells)]
        place_x, place_y = self._source_lattice.place(cell)
        own = self._cuts(position)
        return tuple(
            self._plan(int(codes[place]), own, cut, (cut.x - place_x, cut.y - place_y))
            for place in np.argsort(waits, kind="stable")
        )

    def _plan(self, code: int, own: Cut, source: Cut, offset: tuple[int, int]) -> _Plan:
        """A candidate's sample and how it is cut. own: what the target has at this position without a match: its box."""
        image, cell = divmod(code // 2, self._lattice.cells)
        mirrored = bool(code % 2)
        x, y = self._lattice.place(cell)
        moved = (x - offset[0] if mirrored else x + offset[0], y + offset[1])
        x, y = (
            min(max(0, value), whole - part)
            for value, whole, part in zip(moved, self._lattice.image_size, self.crop, strict=True)
        )
        shard = bisect_right(self._starts, image) - 1
        return shard, image - self._starts[shard], dataclasses.replace(own, x=x, y=y, flip=source.flip != mirrored)


def _check_fits(facts: Facts, crop: tuple[int, int], config: DataConfig) -> None:
    if facts.crop != crop:
        raise UserError(
            "the match {} is of crops of {}x{} pixels, and the training's are {}x{}: ".format(
                config.match, *facts.crop, *crop
            )
            + f"make another with launch/prepare.py match --crop {config.crop or 'none'} and another --name, "
            "or give the --crop of this one"
        )
    if facts.mirror and not config.flip:
        raise UserError(f"the match {config.match} has mirrored candidates, and --data.flip false mirrors nothing: "
                        "make another with launch/prepare.py match --no-mirror and another --name")  # fmt: skip
