"""Which images are kept, and that the page shows each picture in its place."""

import itertools
from collections.abc import Iterable

import numpy as np
import pytest

from trainer.evaluation.worst import WorstImages
from trainer.samples import GAP

PALETTE = np.arange(256 * 3, dtype=np.uint32).reshape(256, 3).astype(np.uint8)
SCORES = {0: 0.5, 1: 0.1, 2: 0.5, 3: 0.9, 4: 0.5, 5: 0.2}
HEIGHT, WIDTH, TEXT = 128, 256, 21  # TEXT: height of a line at size 14


def collected(indices: Iterable[int], *, target: bool = False, width: int = WIDTH) -> WorstImages:
    worst = WorstImages(3, PALETTE)
    for index in indices:
        colours = [np.full((HEIGHT, width, 3), 50 * k + index, np.uint8) for k in range(3)]
        labels = [np.full((HEIGHT, width), k, np.uint8) for k in (7, 255)]
        worst.update(
            index,
            SCORES[index],
            f"image {index}: sky → vegetation 22 %",
            source=colours[0],
            translation=colours[1],
            predicted=labels[0],
            truth=labels[1],
            target=colours[2] if target else None,
        )
    return worst


def kept(worst: WorstImages) -> list[int]:
    return [case.index for case in worst.cases]


def test_lowest_scores_then_lowest_indices_in_whatever_order_they_come() -> None:
    for order in itertools.permutations(range(6)):
        assert kept(collected(order)) == [1, 5, 0]


@pytest.mark.parametrize("cut", range(7))
def test_parts_keep_the_same_as_the_whole(cut: int) -> None:
    late = collected(range(cut, 6))
    late.merge(collected(range(cut)))
    assert kept(late) == [1, 5, 0]
    assert np.array_equal(late.page(), collected(range(6)).page()) and kept(late) == [1, 5, 0]


@pytest.mark.parametrize(("target", "columns"), [(False, 4), (True, 5)])
def test_each_picture_is_in_its_place(target: bool, columns: int) -> None:
    page = collected([3, 0, 1], target=target).page()
    assert page.shape == (TEXT + 3 * (TEXT + HEIGHT + 2 * GAP), columns * WIDTH + (columns - 1) * GAP, 3)
    for row, index in enumerate((1, 0, 3)):
        top = TEXT + GAP + row * (TEXT + HEIGHT + 2 * GAP)
        caption, pictures = page[top : top + TEXT], page[top + TEXT + GAP :][:HEIGHT]
        assert caption.min() < 50 and caption[:, -50:].min() == 255
        expected = [[index] * 3, [50 + index] * 3, PALETTE[7], PALETTE[255], [100 + index] * 3][:columns]
        for column, colour in enumerate(expected):
            picture = pictures[:, column * (WIDTH + GAP) :][:, :WIDTH]
            assert (picture == colour).all()
    for column in range(columns):
        assert page[:TEXT, column * (WIDTH + GAP) :][:, :WIDTH].min() < 50, "each column has its title"


def test_small_pictures_are_enlarged() -> None:
    page = collected([0], width=100).page()  # to 300 pixels, whose text is 22 high
    assert page.shape == (2 * 22 + 3 * HEIGHT + 2 * GAP, 4 * 300 + 3 * GAP, 3)


def test_the_arrow_is_drawn_and_not_a_box() -> None:
    """A font draws one and the same box for every character that it lacks."""
    from trainer.evaluation.worst import _text

    assert not np.array_equal(_text("→", 40, 20), _text("\ue000", 40, 20))
