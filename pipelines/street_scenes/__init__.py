"""The embedded data set: procedural street scenes with exact label maps, in several looks of the same world."""

import numpy as np

from infra.errors import UserError
from pipelines.street_scenes.draw import Random
from pipelines.street_scenes.layout import SOURCE_LAYOUT, TARGET_LAYOUT, Layout, between
from pipelines.street_scenes.looks import LOOK_NAMES, LookName, picture
from pipelines.street_scenes.street import compose

__all__ = ["DRAWING", "SOURCE_LAYOUT", "TARGET_LAYOUT", "Layout", "LookName", "between", "render"]

SMALLEST = 32
DRAWING = 1  # raised whenever the same arguments begin to draw another picture


def render(
    seed: int, index: int, *, layout: Layout, look: LookName, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Scene number `index` of the world `seed`: (image uint8 (H, W, 3) RGB, label uint8 (H, W) of trainIds 0..18).

    size is (width, height), at least 32 x 32. seed and index lie in 0..2^64-1. A pure function of its arguments; the
    label map and the geometry do not depend on the look, and the world not on the size: a wider picture shows more of
    it to the sides, a larger one the same in more detail. UserError if the size is too small.
    """
    if min(size) < SMALLEST:
        raise UserError(f"a street scene of {size[0]}x{size[1]} is too small: ask for at least {SMALLEST}x{SMALLEST}")
    drawn = compose(Random(seed, index, stream=0), layout, size)
    return picture(drawn, Random(seed, index, stream=1 + LOOK_NAMES.index(look)), look), drawn.labels()
