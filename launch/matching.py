"""What `launch/prepare.py match` does: finds target crops that are like each source crop."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infra.devices import usual_device
from infra.errors import UserError
from infra.storage import open_storage
from pipelines.images import parse_size
from pipelines.inspection import describe_matches
from pipelines.manifest import load_manifest
from pipelines.matching.make import MatchOptions, make_match
from pipelines.matching.match import FOLDER, WAYS
from pipelines.shards import LABEL_SPACE
from trainer.segmentation.load import description_sha256, load_segmenter, weights_sha256
from trainer.segmentation.segmenter import Segmenter, check_label_space


class Labeller:
    """Labels images with a segmenter, which each process that gets this object loads once. Errors: `load_segmenter`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        """uint8 RGB (H, W, 3) to uint8 trainIds (H, W)."""
        return _load(self.path)(image_HWC)


@functools.lru_cache(1)
def _load(path: Path) -> Segmenter:
    return load_segmenter(path, usual_device())


def match(
    root: str,
    by: Sequence[str],
    *,
    grid: str | None = None,
    k: int = 10,
    crop: int | str | None = 256,
    name: str | None = None,
    mirror: bool = True,
    workers: int = 1,
) -> None:
    """Make a match and say what it changes. by: "labels", "thumbnail", or "segmenter" and the segmenter's path. Errors:
    `make_match`, `load_segmenter`."""
    way, *paths = by
    if way not in WAYS or len(paths) != (way == "segmenter"):
        raise UserError(f"--by {' '.join(by)} is no way to match: give 'segmenter RUN', 'labels' or 'thumbnail'")
    try:
        side = None if crop is None else int(crop)
    except ValueError:
        raise UserError(f"--crop {crop} is no size: give a number of pixels, or none for whole images") from None
    try:
        squares = None if grid is None else parse_size(grid)
    except UserError:
        raise UserError(f"--grid {grid} is no grid: write COLUMNSxROWS, for example 4x4") from None
    options = MatchOptions(by=way, name=name or way, grid=squares, k=k, crop=side, mirror=mirror)
    labeller, weights, description = None, None, None
    if paths:
        labeller = Labeller(Path(paths[0]))
        segmenter = _load(labeller.path)
        check_label_space(segmenter, LABEL_SPACE)
        weights, description = weights_sha256(segmenter), description_sha256(labeller.path)
    facts = make_match(root, options, labeller, weights, description, workers)
    storage = open_storage(root)
    for line in describe_matches(storage, load_manifest(storage), [options.name]):
        print(line)
    if facts.shares:
        print(f"the same as a chart: {storage.url}/{FOLDER}/{options.name}.png")
    print(
        f"to train with it: --data {root} --data.match {options.name}"
        + (f" --crop {crop or 'none'}" if crop != 256 else "")
    )


def matched(root: str, way: str, crop: int | None, segmenter: Path | None = None) -> str:
    """The name of the match of a data root that is made in this way, with all else as usual; it is made where it is missing.
    segmenter: for that way; its weights are part of the name. Errors: `match`."""
    weights = f"-{weights_sha256(_load(segmenter))[:12]}" if segmenter else ""
    name = f"{way}{weights}-{crop or 'whole'}"
    match(root, [way, *([str(segmenter)] if segmenter else [])], crop=crop, name=name, workers=os.cpu_count() or 1)
    return name
