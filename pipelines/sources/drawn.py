"""The embedded data: procedural street scenes, drawn instead of read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.errors import UserError
from pipelines.sources.base import Item, Source
from pipelines.street_scenes import DRAWING, SOURCE_LAYOUT, TARGET_LAYOUT, Layout, LookName, between, render

# Where the worlds of each kind begin to be counted: far apart, so the test worlds are the same for every --count.
_TRAIN_SOURCE, _TRAIN_TARGET, _TEST = 0, 1_000_000, 2_000_000


@dataclass(frozen=True)
class StreetScene:
    """One world in one look, drawn at the size asked for."""

    seed: int
    index: int
    layout: Layout
    look: LookName

    @property
    def name(self) -> str:
        return f"world-{self.index}"

    @property
    def origin(self) -> dict[str, Any]:
        return {"seed": self.seed, "index": self.index, "look": self.look}

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def check(self) -> None:
        """There is nothing to read."""

    def load(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray | None]:
        image, label = render(self.seed, self.index, layout=self.layout, look=self.look, size=size)
        return Image.fromarray(image), label


def street_scenes(
    count: int = 400,
    test_count: int = 40,
    seed: int = 0,
    source_layout: Layout = SOURCE_LAYOUT,
    target_layout: Layout = TARGET_LAYOUT,
) -> Source:
    """`count` training scenes a domain, source worlds in the "game" look, other, target worlds in the "camera" look.

    The `test_count` test scenes are source worlds of their own, drawn in both looks: pairs.
    """
    if count < 1 or test_count < 0:
        raise UserError(f"{count} training and {test_count} test scenes are impossible: give at least 1 and 0")
    if max(count, test_count) > _TRAIN_TARGET:
        raise UserError(f"{max(count, test_count)} scenes are too many: give at most {_TRAIN_TARGET}")
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} is impossible: give 0 or more, below 2^64")

    def scenes(number: int, first: int, layout: Layout, look: LookName) -> Sequence[Item]:
        return [StreetScene(seed, first + place, layout, look) for place in range(number)]

    splits = {
        "train/source": scenes(count, _TRAIN_SOURCE, source_layout, "game"),
        "train/target": scenes(count, _TRAIN_TARGET, target_layout, "camera"),
    }
    if test_count:
        splits["test/source"] = scenes(test_count, _TEST, source_layout, "game")
        splits["test/target"] = scenes(test_count, _TEST, source_layout, "camera")
    parameters = {
        "source": "street-scenes",
        "drawing": DRAWING,
        "seed": seed,
        "source_layout": asdict(source_layout),
        "target_layout": asdict(target_layout),
    }
    return Source(parameters, splits, paired=test_count > 0)


def painted_street(seed: int = 0) -> Source:
    """One street of the source layout: as a painting the source, as a photo the target; the same two for testing."""
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} is impossible: give 0 or more, below 2^64")
    looks: dict[str, LookName] = {"source": "painting", "target": "camera"}
    splits: dict[str, Sequence[Item]] = {
        f"{split}/{domain}": [StreetScene(seed, 0, SOURCE_LAYOUT, look)]
        for split in ("train", "test")
        for domain, look in looks.items()
    }
    return Source({"source": "painting", "drawing": DRAWING, "seed": seed}, splits, paired=True)


def mismatched(share: float) -> Layout:
    """The target's layout when only that share, from 0 to 1, of the difference to the source's is wanted."""
    if not 0 <= share <= 1:
        raise UserError(f"a mismatch of {share} is impossible: give 0 (the source's layout) to 1 (the target's own)")
    return between(SOURCE_LAYOUT, TARGET_LAYOUT, share)


def change_layout(layout: Layout, changes: Sequence[str]) -> Layout:
    """The layout with "FIELD=NUMBER" or "FIELD=LOW,HIGH" applied. UserError names what does not fit the fields."""
    fields = asdict(layout)
    for change in changes:
        name, _, text = change.partition("=")
        if name not in fields:
            raise UserError(f"a street layout has no {name!r}: use one of {', '.join(fields)}")
        fields[name] = _parse_like(fields[name], name, text)
    return dataclasses.replace(layout, **fields)


def _parse_like(example: Any, name: str, text: str) -> Any:
    """The text as a number, or as a pair of them, of the kinds that the field holds."""
    kinds = [type(each) for each in (example if isinstance(example, tuple) else (example,))]
    try:
        values = tuple(kind(each) for kind, each in zip(kinds, text.split(","), strict=True))
    except ValueError:
        wanted = "LOW,HIGH" if isinstance(example, tuple) else "NUMBER"
        raise UserError(f"{name}={text} does not fit the street layout: write {name}={wanted}") from None
    return values if isinstance(example, tuple) else values[0]
