"""A translation in tiles, with the numbers that the whole image would give and memory for one tile.

The network runs once on maps of features that hold no numbers, but know how to compute any part of themselves from parts of
the maps before. So convolutions see beyond a tile's edge exactly as far as they reach, and borders are padded at the image's
border alone. A norm needs the statistics of the whole map: it goes over all its tiles once, and computes every part later with
what it found. What would be computed again and again is kept in a file meanwhile, if it is small enough (KEPT in `maps.py`);
the widest maps, at the image's own resolution, are computed twice or more, for about half of a generator's arithmetic again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.tiling.layers import on_maps, padded
from trainer.tiling.maps import Map, Part, Span, Sweep, Tiles
from trainer.translation import Translation

__all__ = ["Span", "Tiles", "in_tiles"]


@torch.no_grad()
def in_tiles(
    translation: Translation,
    tiles: Tiles,
    read: Part,
    size: tuple[int, int],
    codes: Tensor | None,
    direction: str,
    write: Callable[[Span, Span, Tensor], object],
) -> None:
    """Translate one image of this (height, width). read: gives a part of it, (1, 3, h, w); write: takes one of the translation.

    UserError for networks that are more than convolutions, norms and what goes pixel by pixel.
    """
    height, width = size
    multiple = translation.sizes.multiple
    widths = (0, -width % multiple, 0, -height % multiple)
    dtype = read((0, 1), (0, 1)).dtype
    sweep = Sweep(tiles, (height + widths[3], width + widths[1]), dtype, planned=True)
    for _ in range(2):  # first without a number, for how many tiles there will be
        image = padded(Map(sweep, 3, size, read), widths, first=1)
        with on_maps(translation):
            result = translation(image, codes, direction)
        shown = Map(sweep, 3, size, result.part)
        for rows, columns in sweep.over(shown):
            write(rows, columns, shown.part(rows, columns))
        sweep = Sweep(tiles, sweep.image, dtype, planned=False, total=sweep.done)
