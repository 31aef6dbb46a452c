"""What a method wants of the images: it states one of these (`MethodConfig.view`), and the loader fulfils it.

Whatever is drawn for a view is a function of (seed, domain, step, slot) (pipelines/cuts.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One random crop of each image, as large as `data.crop`, half of them mirrored: unpaired sources and targets.

    source_labels: and the label map of each source, cut alike: `Batch.source_labels`.
    """

    source_labels: bool = False


@dataclass(frozen=True, kw_only=True)
class CropWithBox:
    """`Crop`, and in each crop a random square: `Batch.source_boxes` and `target_boxes`.

    side: of the square, in pixels. grid: its corner lies at multiples of this, counted from the crop's.
    """

    side: int
    grid: int = 1
    source_labels: bool = False


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Many crops of one image, the first of each domain: in each step it is zoomed, width and height by themselves, and cut into
    tiles as large as `data.crop`, half of them mirrored. The tiles of a step do not overlap, unless it takes more than there are.

    zoom: the least factor of either side; each is drawn from [zoom, 1], and no side becomes smaller than a tile.
    epoch: tiles (of the source) that count as one epoch.
    """

    zoom: float
    epoch: int


@dataclass(frozen=True, kw_only=True)
class LabelledCrop:
    """`Crop` of one domain ("source" or "target"), and its label map cut alike: `LabelledBatch`."""

    domain: str


View = Crop | CropWithBox | Tiles | LabelledCrop

SINGLE_CROP = Crop()
"""What a method gets that says nothing else."""


def labelled_domain(view: View) -> str | None:
    """The domain whose label maps are wanted beside its images."""
    if isinstance(view, LabelledCrop):
        return view.domain
    return "source" if isinstance(view, Crop | CropWithBox) and view.source_labels else None
