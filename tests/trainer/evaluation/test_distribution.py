"""Class distributions, counted by hand."""

import json

import numpy as np
import pytest

from infra.errors import UserError
from trainer.evaluation.confusion import ConfusionMatrix
from trainer.evaluation.distribution import class_distributions, total_variation

CLASSES = ("road", "sky", "vegetation")


def matrix(*rows: list[int]) -> ConfusionMatrix:
    confusion = ConfusionMatrix(CLASSES)
    confusion.counts += np.array(rows)
    return confusion


# Half of the sky was turned into vegetation, and a tenth of the road into nothing.
TRANSLATED = matrix([9, 0, 0, 1], [0, 5, 5, 0], [0, 0, 0, 0])
REAL = matrix([6, 0, 0, 0], [0, 0, 0, 0], [1, 0, 3, 0])


def test_shares_by_hand() -> None:
    metrics = class_distributions(TRANSLATED, REAL).metrics()
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["class_distribution"] == {
        "source": {"road": 0.5, "sky": 0.5, "vegetation": 0, "none": 0},
        "translation": {"road": 0.45, "sky": 0.25, "vegetation": 0.25, "none": 0.05},
        "target": {"road": 0.6, "sky": 0, "vegetation": 0.4, "none": 0},
        "target_seen": {"road": 0.7, "sky": 0, "vegetation": 0.3, "none": 0},
    }
    assert metrics["total_variation"] == {
        "source_target": pytest.approx(0.5),
        "translation_target": pytest.approx(0.3),
        "source_translation": pytest.approx(0.3),
        "target_seen_target": pytest.approx(0.1),
    }


def test_the_training_targets_come_first_where_they_are_known() -> None:
    distributions = class_distributions(TRANSLATED, REAL, target_histogram=(10, 10, 20))
    assert distributions.target.tolist() == [0.25, 0.25, 0.5, 0]
    assert distributions.target_seen.tolist() == [0.7, 0, 0.3, 0]


def test_names_that_never_occur_are_not_shown() -> None:
    road_only = matrix([4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])
    shown = class_distributions(road_only, road_only).metrics()["class_distribution"]
    assert shown == {part: {"road": 1} for part in ("source", "translation", "target", "target_seen")}


def test_total_variation_is_the_share_that_must_change() -> None:
    assert total_variation(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert total_variation(np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.3, 0.3])) == pytest.approx(0.1)


def test_unlabelled_images_are_named() -> None:
    nothing = matrix([0] * 4, [0] * 4, [0] * 4)
    with pytest.raises(UserError, match="no pixel of the source images"):
        class_distributions(nothing, REAL)
    with pytest.raises(UserError, match="no pixel of the target images"):
        class_distributions(TRANSLATED, nothing)
