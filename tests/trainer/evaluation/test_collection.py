"""All metrics together, on pictures whose red channel is the class that the segmenter sees."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from infra.errors import UserError
from trainer.evaluation import Example, MetricCollection, compute_metrics

CLASSES = ("road", "building", "sky", "vegetation")
ROAD, BUILDING, SKY, VEGETATION = range(4)
DELTAS = (30, 50)

SEGMENTATION = {"pxAcc", "clsAcc", "mIoU", "per_class", "drift"}
FLIPS = {"flip_rate", "flips", "skipped", "sky_to_vegetation"}  # no building in these scenes
DISTRIBUTIONS = {"class_distribution", "total_variation"}
PAIRED = {"Dist", "Acc"}
FIDELITY = {"FID", "KID"}


def red(image: np.ndarray) -> np.ndarray:
    """A segmenter."""
    return image[..., 0]


def extractor() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5)).requires_grad_(False)


def labels(*classes: int) -> np.ndarray:
    """(1, n) of these classes."""
    return np.array([classes], np.uint8)


def picture(label: np.ndarray) -> np.ndarray:
    """In which the segmenter sees these classes."""
    return np.repeat(label[..., None], 3, axis=2)


def counted(
    *cases: tuple[np.ndarray, np.ndarray | None, np.ndarray | None],
    segmenter: Callable[[np.ndarray], np.ndarray] | None = red,
    extractor: nn.Module | None = None,
) -> MetricCollection:
    """The metrics of (picture, true target, label), one after the other."""
    metrics = MetricCollection(CLASSES, DELTAS, extractor)
    for index, (image, target, label) in enumerate(cases):
        predicted = segmenter(image) if segmenter and label is not None else None
        metrics.update(Example(index, image, target, label, predicted))
    return metrics


def computed(
    *, paired: bool = True, labelled: bool = True, real_labelled: bool = True, **networks: Any
) -> dict[str, Any]:
    """The metrics of two scenes for data that have pairs, source labels and real target labels, or lack them."""
    truth = labels(ROAD, ROAD, SKY, VEGETATION)
    scene = (picture(truth), picture(truth) if paired else None, truth if labelled else None)
    of_sources = counted(scene, scene, **networks)
    real = counted(*[(picture(truth), None, truth if real_labelled else None)] * 2, **networks)
    return compute_metrics(of_sources, of_sources, real)


@pytest.mark.parametrize(
    ("case", "here", "ceiling"),
    [
        ({}, SEGMENTATION | FLIPS | DISTRIBUTIONS | PAIRED, True),
        ({"paired": False}, SEGMENTATION | FLIPS | DISTRIBUTIONS, True),
        ({"real_labelled": False}, SEGMENTATION | PAIRED, False),
        ({"labelled": False}, PAIRED, True),
        ({"labelled": False, "paired": False, "real_labelled": False}, set(), False),
        ({"segmenter": None}, PAIRED, False),
        ({"segmenter": None, "paired": False}, set(), False),
    ],
)
def test_only_what_applies_is_there(case: dict[str, Any], here: set[str], ceiling: bool) -> None:
    result = computed(**case)
    assert result.keys() - {"baseline", "ceiling"} == here | FIDELITY
    assert result["baseline"].keys() == (here - DISTRIBUTIONS) | FIDELITY
    assert ("ceiling" in result) == ceiling
    assert not ceiling or result["ceiling"].keys() == SEGMENTATION
    json.dumps(result, allow_nan=False)


def test_fid_and_kid_are_numbers_or_say_why_not() -> None:
    without, given = computed(), computed(extractor=extractor())
    assert without["FID"] == without["KID"] == "not available: no Inception weights were given (--inception FILE)"
    assert given["FID"] == pytest.approx(0, abs=1e-9) and isinstance(given["KID"], float)
    assert given["baseline"]["FID"] == given["FID"]
    alone = counted((picture(labels(SKY)), None, None), extractor=extractor())
    assert compute_metrics(alone, alone, alone)["FID"].startswith("not available: there are 1 images")


def test_translation_baseline_and_ceiling_are_of_the_right_pictures() -> None:
    truth, target = labels(ROAD, SKY), picture(labels(100, 100))
    translation, source, real = labels(ROAD, ROAD), labels(ROAD, SKY), labels(SKY, VEGETATION)
    result = compute_metrics(
        counted((picture(translation), target, truth)),
        counted((picture(source), target, truth)),
        counted((picture(real), None, labels(SKY, SKY))),
    )
    assert [part["pxAcc"] for part in (result, result["baseline"], result["ceiling"])] == [0.5, 1.0, 0.5]
    assert result["Dist"] == pytest.approx(100 * 3**0.5)
    assert result["baseline"]["Dist"] == pytest.approx((100 + 98) / 2 * 3**0.5)
    assert result["skipped"] == result["baseline"]["skipped"] == ["road"]


def test_a_flip_that_was_built_in_is_found() -> None:
    """Of 10 pixels 4 are sky; the translation turns 2 of these into vegetation, and 1 in 4 is seen so in real images."""
    truth = labels(*[ROAD] * 6, *[SKY] * 4)
    seen = labels(*[ROAD] * 6, SKY, SKY, VEGETATION, VEGETATION)
    real_truth, real_seen = labels(ROAD, *[SKY] * 4), labels(ROAD, SKY, SKY, SKY, VEGETATION)
    result = compute_metrics(
        counted((picture(seen), None, truth)),
        counted((picture(truth), None, truth)),
        counted((picture(real_seen), None, real_truth)),
    )
    assert result["flip_rate"] == pytest.approx(0.4 * (0.5 - 0.25))
    assert result["baseline"]["flip_rate"] == result["baseline"]["sky_to_vegetation"] == 0
    assert result["sky_to_vegetation"] == 0.25 and "building_to_vegetation" not in result
    assert [part["drift"] for part in (result, result["baseline"], result["ceiling"])] == [0.2, 0, 0.2]
    assert result["drift"] == pytest.approx(result["total_variation"]["source_translation"])
    assert result["flips"] == [{"true": "sky", "seen": "vegetation", "excess": 0.25, "of_all": pytest.approx(0.1)}]


def test_the_targets_distribution_is_that_of_its_training_images() -> None:
    truth = labels(ROAD, ROAD, SKY, 255)
    translated = counted((picture(labels(ROAD, VEGETATION, VEGETATION, ROAD)), None, truth))
    real = counted((picture(labels(ROAD, SKY)), None, labels(ROAD, SKY)))
    result = compute_metrics(translated, translated, real, target_histogram=[10, 0, 0, 30])
    shares = result["class_distribution"]
    assert shares["source"] == pytest.approx({"road": 2 / 3, "sky": 1 / 3, "vegetation": 0})
    assert shares["translation"] == pytest.approx({"road": 1 / 3, "sky": 0, "vegetation": 2 / 3})
    assert shares["target"] == {"road": 0.25, "sky": 0.0, "vegetation": 0.75}
    assert shares["target_seen"] == {"road": 0.5, "sky": 0.5, "vegetation": 0.0}
    assert result["total_variation"]["source_target"] == pytest.approx(0.75)
    assert compute_metrics(translated, translated, real)["class_distribution"]["target"]["sky"] == 0.5  # no histogram


def test_parts_merged_in_any_order_give_the_same_bits() -> None:
    noise = np.random.default_rng(0)
    network = extractor()

    def part_of(places: list[int], kind: int) -> MetricCollection:
        metrics = MetricCollection(CLASSES, DELTAS, network)
        for place in places:
            random = np.random.default_rng((kind, place))
            image, target = random.integers(0, 256, (2, 6, 5, 3), np.uint8)
            label = random.integers(0, 4, (6, 5), np.uint8)
            metrics.update(Example(place, image, target, label, image[..., 0] % 4))
        return metrics

    def result(parts: list[list[int]]) -> str:
        merged = []
        for kind in range(3):
            whole, *others = (part_of(part, kind) for part in parts)
            for other in others:
                whole.merge(other)
            merged.append(whole)
        translated, untranslated, real = merged
        return json.dumps(compute_metrics(translated, untranslated, real))

    places = list(range(6))
    expected = result([places])
    for parts in itertools.permutations(np.array_split(noise.permutation(places), 3)):
        assert result([part.tolist() for part in parts]) == expected


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (labels(ROAD, 4), r"a true label is 4, which is neither a trainId of the 4 classes \(0 to 3\) nor 255"),
        (labels(ROAD, ROAD, ROAD), "true labels of 3x1 pixels and predicted labels of 2x1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(label: np.ndarray, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        counted((picture(labels(ROAD, ROAD)), None, label))
