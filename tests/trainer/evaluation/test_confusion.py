"""pxAcc, clsAcc and mIoU by hand, against scikit-learn and torchmetrics, and in parts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from infra.errors import UserError
from trainer.evaluation.confusion import IGNORE, ConfusionMatrix

CLASSES = ("road", "building", "sky", "car")


def label(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def measured(truth: np.ndarray, predicted: np.ndarray) -> ConfusionMatrix:
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(truth, predicted)
    return matrix


def drawn(seed: int, values: list[int], right: float) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of `values`, alike in a share `right` of the pixels and by chance elsewhere."""
    generator = np.random.default_rng(seed)
    truth, other = generator.choice(np.array(values, np.uint8), (2, 40, 50))
    return truth, np.where(generator.random(truth.shape) < right, truth, other)


def test_by_hand() -> None:
    truth = label([0, 0, 0, 0], [1, 1, 2, 255])
    predicted = label([0, 0, 0, 1], [1, 2, 255, 0])
    matrix = measured(truth, predicted)
    assert matrix.counts.tolist() == [[3, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    scores = matrix.scores()
    assert scores["pxAcc"] == 4 / 7
    assert scores["clsAcc"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3, rel=1e-15)
    assert scores["mIoU"] == pytest.approx((3 / 4 + 1 / 3 + 0) / 3, rel=1e-15)
    assert scores["per_class"] == {
        "road": {"accuracy": 3 / 4, "IoU": 3 / 4, "share": 4 / 7},
        "building": {"accuracy": 1 / 2, "IoU": 1 / 3, "share": 2 / 7},
        "sky": {"accuracy": 0, "IoU": 0, "share": 1 / 7},
    }
    assert json.loads(json.dumps(scores)) == scores
    rates = matrix.rates()
    assert rates[0].tolist() == [0.75, 0.25, 0, 0, 0] and rates[2].tolist() == [0, 0, 0, 0, 1]
    assert np.isnan(rates[3]).all()


def test_drift_by_hand() -> None:
    """Of 8 pixels one of road, of sky and of car go to building, and one of building to none; places say nothing."""
    matrix = measured(label([0, 0, 0, 1], [1, 2, 2, 3]), label([0, 0, 1, 1], [255, 2, 1, 1]))
    assert matrix.drift() == (1 + 2 + 1 + 1 + 1) / 16
    assert measured(label([0, 1, 2]), label([2, 0, 1])).drift() == 0
    assert measured(label([0, 0]), label([255, 255])).drift() == 1


def test_drift_is_of_all_pixels_and_not_a_mean_over_images() -> None:
    one, other = measured(label([0, 0, 0]), label([1, 1, 1])), measured(label([1]), label([0]))
    assert one.drift() == other.drift() == 1
    one.merge(other)
    assert one.drift() == 0.5


def test_a_class_without_a_true_pixel_is_skipped_wherever_it_is_seen() -> None:
    unseen = measured(label([0, 0, 1, 1]), label([0, 0, 1, 0])).scores()
    seen = measured(label([0, 0, 1, 1]), label([0, 0, 1, 3])).scores()
    assert unseen["clsAcc"] == seen["clsAcc"] == (1 + 1 / 2) / 2
    assert unseen["mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert seen["mIoU"] == pytest.approx((1 + 1 / 2) / 2)
    assert set(seen["per_class"]) == {"road", "building"}


def test_as_scikit_learn_has_it() -> None:
    truth, predicted = drawn(0, [0, 1, 2, 255], right=0.6)
    predicted[0, :7] = 3
    matrix = measured(truth, predicted)
    counted = truth != IGNORE
    true, seen = truth[counted], np.where(predicted == IGNORE, 4, predicted)[counted]
    assert matrix.counts.tolist() == confusion_matrix(true, seen, labels=range(5))[:4].tolist()
    scores = matrix.scores()
    assert scores["pxAcc"] == pytest.approx(accuracy_score(true, seen), rel=1e-14)
    assert scores["mIoU"] == pytest.approx(jaccard_score(true, seen, labels=range(3), average="macro"), rel=1e-14)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert scores["clsAcc"] == pytest.approx(balanced_accuracy_score(true, seen), rel=1e-14)


def test_as_torchmetrics_has_it() -> None:
    truth, predicted = drawn(1, [0, 1, 2, 3], right=0.7)
    truth[:5] = IGNORE
    scores = measured(truth, predicted).scores()
    maps = torch.from_numpy(predicted).int(), torch.from_numpy(truth).int()
    expected = {
        "pxAcc": multiclass_accuracy(*maps, 4, "micro", ignore_index=IGNORE),
        "clsAcc": multiclass_accuracy(*maps, 4, "macro", ignore_index=IGNORE),
        "mIoU": multiclass_jaccard_index(*maps, 4, "macro", ignore_index=IGNORE),
    }
    assert {name: scores[name] for name in expected} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-6
    )
    each = multiclass_jaccard_index(*maps, 4, "none", ignore_index=IGNORE).tolist()
    assert [scores["per_class"][name]["IoU"] for name in CLASSES] == pytest.approx(each, rel=1e-6)


pixels = st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.sampled_from([0, 1, 2, 3, 255]))


@given(st.lists(pixels, min_size=1, max_size=30), st.data())
def test_parts_merge_to_the_whole(drawn_pixels: list[tuple[int, int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(drawn_pixels)))
    truth, predicted = np.array([drawn_pixels], np.uint8).transpose(2, 0, 1)
    whole, late = measured(truth, predicted), measured(truth[:, cut:], predicted[:, cut:])
    late.merge(measured(truth[:, :cut], predicted[:, :cut]))
    assert late.counts.tolist() == whole.counts.tolist()
    assert whole.counts.sum() == (truth != IGNORE).sum()


def test_bad_labels_are_named() -> None:
    with pytest.raises(UserError, match=r"a true label is 4, .* 4 classes \(0 to 3\) .* trainIds"):
        measured(label([0, 4, 7]), label([0, 0, 0]))
    with pytest.raises(UserError, match=r"a predicted label is 254, .* map the segmenter's outputs"):
        measured(label([0, 0, 0]), label([0, 254, 255]))
    with pytest.raises(UserError, match=r"of 3x1 pixels .* of 2x1 cannot be compared"):
        measured(label([0, 0, 0]), label([0, 0]))


def test_without_a_labelled_pixel_there_is_no_score() -> None:
    with pytest.raises(UserError, match="no pixel .* has a true class"):
        measured(label([255, 255]), label([0, 1])).scores()
