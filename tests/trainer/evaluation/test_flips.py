"""The flip matrix on confusion matrices whose flips are known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infra.errors import UserError
from trainer.evaluation.confusion import ConfusionMatrix
from trainer.evaluation.flips import Flips, flips

CLASSES = ("road", "building", "sky", "vegetation")
ROAD, BUILDING, SKY, VEGETATION, NONE = range(5)


def matrix(rows: list[list[int]]) -> ConfusionMatrix:
    confusion = ConfusionMatrix(CLASSES)
    confusion.counts += np.array(rows)
    return confusion


def perfect(*pixels: int) -> ConfusionMatrix:
    """A segmenter without errors, on images with so many pixels of each class."""
    return matrix([*map(list, np.eye(4, 5, dtype=int) * np.array(pixels)[:, None])])


def named(result: Flips) -> list[tuple[str, str]]:
    return [(pair.true, pair.seen) for pair in result.pairs]


def test_sky_painted_as_vegetation_counts_by_its_share() -> None:
    truth, seen = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    truth[:2] = seen[:2] = SKY  # 20 of 100 pixels
    seen[0, :6] = VEGETATION  # 30 % of them
    translated = ConfusionMatrix(CLASSES)
    translated.update(truth, seen)
    result = flips(translated, perfect(5, 5, 5, 5))
    assert result.rate == pytest.approx(0.2 * 0.3, rel=1e-15)
    assert named(result) == [("sky", "vegetation")] and result.skipped == ()
    assert result.pairs[0].excess == 0.3 and result.pairs[0].of_all == pytest.approx(0.06)
    assert result.matrix[SKY].tolist() == pytest.approx([0, 0, -0.3, 0.3, 0])
    assert [str(pair) for pair in result.pairs] == ["sky → vegetation 30 % of sky, 6.0 % of all pixels"]


def test_a_translation_read_like_real_images_has_no_flips_however_bad_the_segmenter() -> None:
    rates = np.array([[7, 2, 0, 1, 0], [3, 3, 3, 0, 1], [0, 5, 0, 5, 0], [1, 1, 1, 6, 1]])
    result = flips(matrix((rates * [[9], [1], [4], [2]]).tolist()), matrix((rates * [[3], [30], [7], [7]]).tolist()))
    assert result.rate == 0 and result.pairs == () and not result.matrix.any()


def test_the_segmenters_own_error_is_taken_off() -> None:
    real = matrix([[10, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 9, 1, 0], [0, 0, 0, 10, 0]])
    translated = matrix([[50, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 30, 20, 0], [0, 0, 0, 0, 0]])
    result = flips(translated, real)
    assert result.rate == pytest.approx(0.5 * (0.4 - 0.1))
    assert np.isnan(result.matrix[[BUILDING, VEGETATION]]).all()  # not in the source
    assert result.skipped == ()  # and so not missing either


def test_a_swap_counts_on_both_sides() -> None:
    translated = matrix([[6, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 3, 0], [0, 0, 1, 0, 0]])
    result = flips(translated, perfect(1, 1, 1, 1))
    assert result.rate == pytest.approx(0.4)
    assert named(result) == [("sky", "vegetation"), ("vegetation", "sky")]
    assert [pair.of_all for pair in result.pairs] == pytest.approx([0.3, 0.1])


def test_a_better_pair_does_not_make_up_for_a_worse_one() -> None:
    real = matrix([[8, 2, 0, 0, 0], *[[0] * 5] * 3])
    translated = matrix([[8, 0, 0, 2, 0], *[[0] * 5] * 3])
    assert flips(translated, real).rate == pytest.approx(0.2)


def test_a_translation_that_is_read_better_than_real_images_has_no_flips() -> None:
    real = matrix([[8, 2, 0, 0, 0], *[[0] * 5] * 3])
    result = flips(perfect(5, 0, 0, 0), real)
    assert result.rate == 0 and result.pairs == () and result.matrix[ROAD, ROAD] == pytest.approx(0.2)


def test_what_no_class_is_seen_in_has_flipped() -> None:
    result = flips(matrix([[0, 0, 0, 0, 8], *[[0] * 5] * 3]), perfect(1, 1, 1, 1))
    assert result.rate == 1 and named(result) == [("road", "none")]


def test_classes_without_a_reference_are_skipped_and_named() -> None:
    translated = matrix([[30, 0, 0, 10, 0], [0, 20, 0, 0, 0], [0, 0, 0, 60, 0], [0, 0, 0, 0, 0]])
    result = flips(translated, perfect(5, 5, 0, 5))
    assert result.skipped == ("sky",)
    assert result.rate == pytest.approx(10 / 60)  # of the 60 pixels that are not sky
    assert named(result) == [("road", "vegetation")] and np.isnan(result.matrix[SKY]).all()


@pytest.mark.parametrize("translated", [perfect(0, 0, 0, 0), perfect(0, 0, 5, 0)])
def test_nothing_to_compare(translated: ConfusionMatrix) -> None:
    with pytest.raises(UserError, match="no class occurs both .* labelled splits"):
        flips(translated, perfect(5, 5, 0, 5))


counts = arrays(np.int64, (4, 5), elements=st.integers(0, 20))


@given(counts, counts)
def test_the_rate_lies_between_the_loss_of_accuracy_and_one(translated: np.ndarray, real: np.ndarray) -> None:
    translated[0, 0] = real[0, 0] = 1  # something to compare
    result = flips(matrix(translated.tolist()), matrix(real.tolist()))
    compared = ~np.isnan(result.matrix[:, 0])
    weight = translated[compared].sum(axis=1) / translated[compared].sum()
    assert result.matrix[compared].sum(axis=1) == pytest.approx(0, abs=1e-12)
    assert weight @ -result.matrix.diagonal()[compared] - 1e-12 <= result.rate <= 1 + 1e-12


def test_pairs_with_a_name_are_metrics() -> None:
    names = ("building", "sky", "vegetation")
    translated, real = ConfusionMatrix(names), ConfusionMatrix(names)
    translated.counts[:] = [[6, 0, 4, 0], [1, 0, 1, 0], [0, 0, 5, 0]]
    real.counts[:] = [[5, 0, 5, 0], [0, 3, 1, 0], [0, 0, 9, 0]]
    metrics = flips(translated, real).metrics()
    assert metrics["sky_to_vegetation"] == 1 / 2 - 1 / 4
    assert metrics["building_to_vegetation"] == 0  # less often than in real images
    real.counts[1] = 0  # nothing is known of sky
    assert "sky_to_vegetation" not in flips(translated, real).metrics()


def test_metrics_hold_the_ten_worst_pairs() -> None:
    translated = matrix([[40, 1, 2, 3, 4], [5, 40, 6, 7, 8], [9, 10, 40, 11, 12], [13, 14, 15, 40, 16]])
    result = flips(translated, perfect(1, 1, 1, 1))
    metrics = result.metrics()
    assert json.loads(json.dumps(metrics)) == metrics
    assert len(result.pairs) == 16 and len(metrics["flips"]) == 10
    worst = metrics["flips"][0]
    assert worst == {"true": "vegetation", "seen": "none", "excess": 16 / 98, "of_all": pytest.approx(16 / 296)}
    shares = [pair.of_all for pair in result.pairs]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(result.rate)
    assert metrics["flip_rate"] == pytest.approx(136 / 296)
