"""Dist and Acc(delta) on pictures whose distances can be worked out by hand, and against the plain formulas."""

import numpy as np
import pytest

from trainer.evaluation import Example, deltas_of
from trainer.evaluation.paired import PairedDistance


def picture(*pixels: tuple[int, int, int]) -> np.ndarray:
    return np.array([pixels], np.uint8)


def random_pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def measured(distance: PairedDistance, translations: np.ndarray, targets: np.ndarray) -> PairedDistance:
    for translation, target in zip(translations, targets, strict=True):
        distance.update(Example(0, translation, target))
    return distance


def test_by_hand() -> None:
    target = picture((10, 20, 30), (0, 0, 0), (255, 255, 255), (100, 100, 100))
    translation = picture((10, 20, 30), (3, 0, 4), (0, 0, 0), (100, 70, 60))
    distance = PairedDistance((4, 5, 40, 41))
    distance.update(Example(0, translation, target))
    metrics = distance.compute(distance)
    assert metrics["Dist"] == pytest.approx((0 + 5 + 255 * 3**0.5 + 50) / 4, rel=1e-14)
    # The largest differences are 0, 4, 255 and 40, and the bound is strict.
    assert metrics["Acc"] == {"4": 0.25, "5": 0.5, "40": 0.5, "41": 0.75}


def test_as_the_formulas_say() -> None:
    translations, targets = np.split(random_pictures(8), 2)
    distance = measured(PairedDistance(), translations, targets)
    metrics = distance.compute(distance)
    difference = translations.astype(np.float64) - targets
    assert metrics["Dist"] == pytest.approx(np.linalg.norm(difference, axis=-1).mean(), rel=1e-13)
    expected = {str(delta): (np.abs(difference).max(axis=-1) < delta).mean() for delta in (30, 50)}
    assert metrics["Acc"] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("cut", range(8))
def test_parts_in_any_order_give_the_same_bits(cut: int) -> None:
    translations, targets = np.split(random_pictures(16), 2)
    whole = measured(PairedDistance(), translations, targets)
    late = measured(PairedDistance(), translations[cut:][::-1], targets[cut:][::-1])
    late.merge(measured(PairedDistance(), translations[:cut], targets[:cut]))
    assert late.compute(late) == whole.compute(whole)


@pytest.mark.parametrize(("task", "deltas"), [("gta2city", (30, 50)), ("map2photo", (30, 50)), ("photo2map", (3, 5))])
def test_the_papers_thresholds(task: str, deltas: tuple[int, int]) -> None:
    assert deltas_of(task) == deltas
