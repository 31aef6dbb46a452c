"""The charts hold the classes and numbers they should, and are pictures of the promised size."""

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluation import charts
from trainer.evaluation.charts import distribution_chart, flip_chart
from trainer.evaluation.confusion import ConfusionMatrix
from trainer.evaluation.distribution import class_distributions
from trainer.evaluation.flips import flips

CLASSES = ("road", "car", "sky", "vegetation")
TRANSLATED, REAL = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
TRANSLATED.counts += np.array([[200, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 280, 120, 0], [0, 0, 0, 0, 0]])
REAL.counts += np.array([[200, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 50, 0, 0], [0, 0, 0, 50, 0]])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that were made into pictures."""
    figures: list[Figure] = []
    render = charts._drawn

    def keep(figure: Figure) -> np.ndarray:
        figures.append(figure)
        return render(figure)

    monkeypatch.setattr(charts, "_drawn", keep)
    yield figures


def is_picture(image: np.ndarray) -> bool:
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[1:] == (900, 3) and image.std() > 10


def ticks(axes: Axes, axis: str) -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{axis}ticklabels")()]


def test_flip_chart(drawn: list[Figure]) -> None:
    assert is_picture(flip_chart(flips(TRANSLATED, REAL)))
    axes = drawn[0].axes[0]
    # Vegetation is no class of the source but is seen in it; the car of one pixel is below one percent.
    assert ticks(axes, "y") == ["road", "sky"] and ticks(axes, "x") == ["road", "sky", "vegetation"]
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert cells == {(1, 1): "-30", (2, 1): "+30"}
    assert "flip rate 20.1 %" in axes.get_title()


def test_distribution_chart(drawn: list[Figure]) -> None:
    assert is_picture(distribution_chart(class_distributions(TRANSLATED, REAL)))
    axes = drawn[0].axes[0]
    assert ticks(axes, "y") == ["sky", "road", "car", "vegetation"]  # by share in the source
    target = next(bars for bars in axes.containers if bars.get_label() == "target (true labels)")
    assert [bar.get_width() for bar in target] == pytest.approx([100 / 6, 400 / 6, 0, 100 / 6])
    assert axes.yaxis_inverted()


def test_charts_of_a_single_class() -> None:
    one = ConfusionMatrix(CLASSES)
    one.counts[0, 0] = 5
    assert is_picture(flip_chart(flips(one, one)))
    assert is_picture(distribution_chart(class_distributions(one, one)))


def test_same_figures_same_picture() -> None:
    result = flips(TRANSLATED, REAL)
    assert np.array_equal(flip_chart(result), flip_chart(result))
