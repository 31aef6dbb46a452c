"""How the image at a position is cut: pure functions of (seed, domain, position), as in `pipelines.order`.

A size is (width, height) in pixels. A word is 64 random bits: multiplied by n and shifted, it is uniform over n values, up to
a bias of n / 2^64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from infra.errors import UserError
from infra.views import CropWithBox, Tiles, View
from pipelines.order import permutation, random_words

Size = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """A crop: its left upper corner in pixels, and whether it is mirrored left to right once it is cut.

    zoomed: the size that the image is resized to before; None: it stays as it is. box: the left upper corner of the box
    inside the crop as it is delivered.
    """

    x: int
    y: int
    flip: bool
    zoomed: Size | None = None
    box: tuple[int, int] | None = None


class Cuts:
    """Where the crops of one domain lie.

    image_size: of its images. crop: of every crop. flip: half of them are mirrored. UserError if a box does not fit.
    """

    def __init__(
        self, view: View, *, seed: int, domain: str, image_size: Size, crop: Size, global_batch: int, flip: bool
    ) -> None:
        if isinstance(view, CropWithBox) and view.side > min(crop):
            raise UserError(
                f"a box of {view.side} pixels does not fit into crops of {crop[0]}x{crop[1]}: "
                f"pass --crop {view.side} or more, or give the method a smaller box"
            )
        self._view, self._seed, self._domain = view, seed, domain
        self._image_size, self._crop, self._flip = image_size, crop, flip
        self._global_batch = global_batch

    def __call__(self, position: int) -> Cut:
        x, y, flip = augmentation(self._seed, self._domain, position, self._image_size, self._crop, flip=self._flip)
        if isinstance(self._view, Tiles):
            return self._tile(self._view, *divmod(position, self._global_batch), flip=flip)
        box = self._box(self._view, position) if isinstance(self._view, CropWithBox) else None
        return Cut(x, y, flip, box=box)

    def _box(self, view: CropWithBox, position: int) -> tuple[int, int]:
        words = self._words("box", position, 2)
        x, y = (
            (word * ((part - view.side) // view.grid + 1) >> 64) * view.grid
            for word, part in zip(words, self._crop, strict=True)
        )
        return x, y

    def _tile(self, view: Tiles, step: int, slot: int, *, flip: bool) -> Cut:
        """A cell of a grid that lies at a random place on the zoomed image, both the same for the whole step; the cells go
        to the slots in a random order, and in a new one once all are used."""
        *zoom, start_x, start_y = self._words("zoom", step, 4)
        factors = (view.zoom + (1 - view.zoom) * (word / 2**64) for word in zoom)
        zoomed = zoomed_size(self._image_size, factors, self._crop)
        (columns, spare_x), (rows, spare_y) = map(divmod, zoomed, self._crop)
        turn, number = divmod(slot, columns * rows)
        cell = int(permutation(self._seed, f"tiles/{self._domain}", (turn, step), columns * rows)[number])
        x = (start_x * (spare_x + 1) >> 64) + cell // rows * self._crop[0]
        y = (start_y * (spare_y + 1) >> 64) + cell % rows * self._crop[1]
        return Cut(x, y, flip, zoomed)

    def _words(self, name: str, counter: int, count: int) -> list[int]:
        return [int(word) for word in random_words(self._seed, f"{name}/{self._domain}", (0, counter), count)]


def augmentation(
    seed: int, domain: str, position: int, image_size: Size, crop: Size, *, flip: bool = True
) -> tuple[int, int, bool]:
    """The crop and flip of the sample at a global position: (x, y, flipped).

    x, y: the crop's left upper corner in pixels, uniform over all places where a crop fits into an image. flipped: true
    with probability 1/2; never with `flip` off, which leaves the crops as they are.
    """
    words = [int(word) for word in random_words(seed, f"augmentation/{domain}", (0, position), 3)]
    x, y = (word * (whole - part + 1) >> 64 for word, whole, part in zip(words, image_size, crop, strict=False))
    return x, y, flip and bool(words[2] >> 63)


def zoomed_size(image_size: Size, factors: Iterable[float], crop: Size) -> Size:
    """The size of an image whose width and height are multiplied by one factor each; neither becomes smaller than the crop's
    (as in the single-image data set of CUT's published code)."""
    width, height = (
        round(max(part, factor * side)) for part, factor, side in zip(crop, factors, image_size, strict=True)
    )
    return width, height
