import dataclasses
import hashlib
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest

from infra.errors import UserError
from pipelines.labels import CLASSES, class_histogram
from pipelines.street_scenes import SOURCE_LAYOUT, TARGET_LAYOUT, Layout, LookName, render

pytestmark = pytest.mark.slow

SIZE = (128, 64)
LOOKS: tuple[LookName, ...] = get_args(LookName)
SKY, VEGETATION, ROAD = (CLASSES.index(name) for name in ("sky", "vegetation", "road"))


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@pytest.fixture(scope="module")
def histograms() -> dict[str, np.ndarray]:
    """Pixels per scene and class, int64 (scenes, 19), of each domain's default layout."""
    return {
        name: np.stack(
            [class_histogram(render(3, i, layout=layout, look="game", size=(256, 128))[1]) for i in range(120)]
        )
        for name, layout in (("source", SOURCE_LAYOUT), ("target", TARGET_LAYOUT))
    }


def test_a_scene_depends_on_its_number_alone_not_on_the_process_or_on_what_was_drawn_before() -> None:
    script = (
        "import hashlib; from pipelines.street_scenes import *;"
        "a, b = render(7, 5, layout=TARGET_LAYOUT, look='camera', size=(128, 64));"
        "print(hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for before in (3, 9):
        render(7, before, layout=SOURCE_LAYOUT, look="game", size=SIZE)
    assert digest(*render(7, 5, layout=TARGET_LAYOUT, look="camera", size=SIZE)) == elsewhere.strip()


def test_seed_index_and_layout_each_make_another_scene() -> None:
    def label(seed: int, index: int, layout: Layout = SOURCE_LAYOUT) -> str:
        return digest(render(seed, index, layout=layout, look="game", size=SIZE)[1])

    dense = dataclasses.replace(SOURCE_LAYOUT, open_lots=0.0)
    assert len({label(0, 0), label(0, 1), label(1, 0), label(0, 0, dense)}) == 4


@pytest.mark.parametrize("layout", [SOURCE_LAYOUT, TARGET_LAYOUT])
def test_the_looks_share_the_label_map_and_differ_as_the_domains_do(layout: Layout) -> None:
    chroma, contrast = (dict.fromkeys(LOOKS, 0.0) for _ in range(2))
    for index in range(8):
        labels = []
        for look in LOOKS:
            image, label = render(1, index, layout=layout, look=look, size=SIZE)
            labels.append(label)
            surfaces = image[label != SKY].astype(int)
            chroma[look] += np.ptp(surfaces, axis=1).mean()
            contrast[look] += surfaces.mean(axis=1).std()
        assert all((label == labels[0]).all() for label in labels)
    assert chroma["game"] > 1.5 * chroma["camera"], "the game look is the saturated one"
    assert chroma["painting"] > 2 * chroma["camera"]
    assert contrast["game"] > 1.3 * contrast["camera"], "the camera look is the flat one"


def test_a_painting_is_in_strokes_and_drawn_the_same_again() -> None:
    """Many pixels have the colour of a neighbour, since a stroke has one colour; those of a photo have grain."""

    def even(look: LookName) -> float:
        image, _ = render(1, 0, layout=SOURCE_LAYOUT, look=look, size=SIZE)
        return float((image[:, 1:] == image[:, :-1]).all(axis=2).mean())

    assert even("painting") > 0.25 and even("camera") < 0.05
    one, again = (render(1, 0, layout=SOURCE_LAYOUT, look="painting", size=SIZE) for _ in range(2))
    assert digest(*one) == digest(*again)


def test_edges_of_labels_are_edges_of_the_picture() -> None:
    """Where two classes meet, colours change more than elsewhere: label and image come from one drawing."""
    across, inside = [], []
    for index in range(8):
        image, label = render(2, index, layout=SOURCE_LAYOUT, look="game", size=(256, 128))
        change = np.abs(np.diff(image.astype(int), axis=1)).mean(axis=2)
        edge = label[:, 1:] != label[:, :-1]
        across.append(change[edge].mean())
        inside.append(change[~edge].mean())
    assert np.mean(across) > 5 * np.mean(inside)


@pytest.mark.parametrize("size", [(32, 32), (256, 128), (256, 256), (100, 57), (64, 200), (640, 96)])
@pytest.mark.parametrize("look", LOOKS)
def test_any_size(size: tuple[int, int], look: LookName) -> None:
    image, label = render(0, 4, layout=TARGET_LAYOUT, look=look, size=size)
    assert image.shape == (size[1], size[0], 3) and image.dtype == np.uint8
    assert label.shape == (size[1], size[0]) and label.dtype == np.uint8
    assert label.max() < len(CLASSES)
    assert image.flags["C_CONTIGUOUS"] and label.flags["C_CONTIGUOUS"]


def test_a_larger_picture_shows_the_same_world_in_more_detail() -> None:
    for index in range(5):
        _, small = render(0, index, layout=TARGET_LAYOUT, look="game", size=(128, 64))
        _, large = render(0, index, layout=TARGET_LAYOUT, look="game", size=(512, 256))
        assert (large[::4, ::4] == small).mean() > 0.9


def test_a_wider_picture_shows_the_same_world_and_more_of_it() -> None:
    _, narrow = render(0, 6, layout=TARGET_LAYOUT, look="game", size=(128, 128))
    _, wide = render(0, 6, layout=TARGET_LAYOUT, look="game", size=(256, 128))
    assert (wide[:, 64:192] == narrow).mean() > 0.99


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(UserError, match="31x64"):
        render(0, 0, layout=SOURCE_LAYOUT, look="game", size=(31, 64))


def test_every_class_occurs_in_both_domains(histograms: dict[str, np.ndarray]) -> None:
    for name, histogram in histograms.items():
        scenes = (histogram >= 6).sum(axis=0)
        rare = {CLASSES[k]: int(scenes[k]) for k in range(19) if scenes[k] < 6}
        assert not rare, f"{name}: classes in fewer than 6 of {len(histogram)} scenes: {rare}"


def test_the_domains_differ_in_sky_and_vegetation_as_the_papers_do(histograms: dict[str, np.ndarray]) -> None:
    source, target = (histograms[name].sum(axis=0) / histograms[name].sum() for name in ("source", "target"))
    assert source[SKY] > 2.5 * target[SKY]
    assert target[VEGETATION] > 2.5 * source[VEGETATION]
    for name in ("road", "sidewalk", "building", "car"):  # the rest is comparable
        k = CLASSES.index(name)
        assert 0.5 < source[k] / target[k] < 2, name


def test_each_scene_is_a_street(histograms: dict[str, np.ndarray]) -> None:
    for histogram in histograms.values():
        share = histogram / histogram.sum(axis=1, keepdims=True)
        assert (share[:, ROAD] > 0.1).all() and (share[:, SKY] < 0.6).all()
        assert ((histogram > 0).sum(axis=1) >= 6).all()
    _, label = render(0, 0, layout=SOURCE_LAYOUT, look="game", size=SIZE)
    assert (label[-4:] == ROAD).mean() > 0.5


def test_layout_parameters_do_what_they_say() -> None:
    def share(name: str, **changes: Any) -> float:
        layout = dataclasses.replace(TARGET_LAYOUT, **changes)
        labels = [render(5, i, layout=layout, look="game", size=SIZE)[1] for i in range(12)]
        return float(np.mean([(label == CLASSES.index(name)).mean() for label in labels]))

    assert share("sky", open_lots=1.0, street_trees=0.0, lot_trees=0.0) > 2 * share("sky", open_lots=0.0)
    assert share("vegetation", street_trees=0.0, lot_trees=0.0) < 0.5 * share("vegetation")
    assert share("car", parked_cars=0.0, traffic=0.0) == 0.0
    assert share("person", pedestrians=0.0) < share("person", pedestrians=12.0)
    assert share("train", trams=0.0) == 0.0 < share("train", trams=1.0)


@pytest.mark.parametrize("change", [{"street_trees": 1.5}, {"floors": (5, 2)}, {"traffic": -1.0}])
def test_an_impossible_layout_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(SOURCE_LAYOUT, **change)
