"""Matching: what a lattice, a descriptor and the search find, held to slow and plain ways of the same."""

import numpy as np
import pytest
import torch

from pipelines.labels import IGNORE
from pipelines.matching.descriptors import Squares, mirrored, of_classes, of_pixels
from pipelines.matching.lattice import Lattice
from pipelines.matching.search import nearest

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "crop", "xs", "ys"),
    [
        ((110, 75), (32, 32), [*range(0, 78, 8), 78], [*range(0, 43, 8), 43]),
        ((64, 32), (32, 32), [0, 8, 16, 24, 32], [0]),
        ((5, 4), (2, 2), [0, 1, 2, 3], [0, 1, 2]),
        ((40, 30), (40, 30), [0], [0]),
    ],
)
def test_a_lattice_has_a_place_every_quarter_crop_and_one_at_the_border(
    size: tuple[int, int], crop: tuple[int, int], xs: list[int], ys: list[int]
) -> None:
    lattice = Lattice(size, crop)
    assert [axis.tolist() for axis in lattice.axes] == [xs, ys]
    assert [lattice.place(cell) for cell in range(lattice.cells)] == [(x, y) for y in ys for x in xs]
    shares = np.zeros(lattice.cells)
    for x in range(size[0] - crop[0] + 1):
        for y in range(size[1] - crop[1] + 1):
            apart = [
                max(abs(x - cell_x), abs(y - cell_y)) for cell_x, cell_y in map(lattice.place, range(lattice.cells))
            ]
            assert apart[lattice.nearest(x, y)] == min(apart) or crop[0] != crop[1]
            shares[lattice.nearest(x, y)] += 1
    assert np.allclose(lattice.shares(), shares / shares.sum())


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
def test_classes_are_counted_in_each_square_of_each_cell(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 19, (41, 57)).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.2] = IGNORE
    classes[20:30, 20:40] = IGNORE  # squares without any class
    lattice = Lattice((57, 41), (22, 22))
    counts = Squares(lattice, grid).count(classes)
    for cell in range(lattice.cells):
        x, y = lattice.place(cell)
        for row in range(grid[1]):
            for column in range(grid[0]):
                top, bottom = (y + 22 * each // grid[1] for each in (row, row + 1))
                left, right = (x + 22 * each // grid[0] for each in (column, column + 1))
                expected = np.bincount(classes[top:bottom, left:right].ravel(), minlength=256)[:19]
                assert (counts[cell, row, column] == expected).all()
    assert (of_classes(counts).reshape(counts.shape)[counts.sum(-1) > 0].max(-1) > 0).all()


def test_the_descriptor_of_a_mirrored_crop_is_that_of_the_mirrored_image() -> None:
    rng = np.random.default_rng(0)
    lattice, grid = Lattice((48, 16), (16, 16)), (4, 4)
    image = rng.integers(0, 256, (16, 48, 3)).astype(np.uint8)
    classes = rng.integers(0, 19, (16, 48)).astype(np.uint8)
    squares = Squares(lattice, grid)
    for whole, flipped in (
        (of_pixels(image, squares), of_pixels(image[:, ::-1], squares)),
        (of_classes(squares.count(classes)), of_classes(squares.count(classes[:, ::-1]))),
    ):
        assert (mirrored(whole, grid) == flipped[::-1]).all() and (whole != flipped[::-1]).any()


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("values", [2, 128])
def test_the_search_is_exact_and_takes_the_first_of_equals(k: int, values: int) -> None:
    """With two values most distances are shared by many candidates."""
    rng = np.random.default_rng(k)
    source, target = (rng.integers(0, values, (count, 24)).astype(np.uint8) for count in (70, 300))
    distance = np.square(source[:, None].astype(int) - target[None].astype(int)).sum(2)
    expected = np.argsort(distance, axis=1, kind="stable")[:, :k]
    for cuts in ([], [7, 40, 200]):  # the second begins with fewer than k
        parts = np.split(target, cuts)
        blocks = zip([0, *cuts], parts, strict=True)
        assert (nearest(source, blocks, k, CPU) == expected).all()


def test_distances_of_the_largest_descriptors_stay_whole() -> None:
    """64 squares with one class each, 254 apart from one another at most; float32 would round larger sums."""
    source = np.full((1, 64 * 4), 127, np.uint8)
    target = np.full((4, 64 * 4), 127, np.uint8)
    target[:, 0] = 124, 126, 125, 127
    assert nearest(source, [(0, target)], 4, CPU).tolist() == [[3, 1, 2, 0]]
