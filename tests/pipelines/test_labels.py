import numpy as np
import pytest

from infra.errors import UserError
from pipelines.labels import (
    CAMVID_TO_TRAINID,
    CLASSES,
    IGNORE,
    LABELID_TO_TRAINID,
    PALETTE,
    class_histogram,
    colourise,
    from_colours,
    from_labelids,
    to_trainids,
)

# The benchmark's own table (cityscapesScripts, labels.py), written out a second time.
LABELIDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def test_every_class_has_its_labelid_and_all_other_ids_are_ignored() -> None:
    assert from_labelids(np.array(LABELIDS, np.uint8)).tolist() == list(range(19))
    others = np.array([i for i in range(256) if i not in LABELIDS], np.uint8)
    assert (from_labelids(others) == IGNORE).all()
    assert LABELID_TO_TRAINID.dtype == np.uint8 and LABELID_TO_TRAINID.shape == (256,)


def test_ids_beyond_a_byte_are_ignored_not_wrapped() -> None:
    assert from_labelids(np.array([-1, 7, 256 + 7, 33], np.int32)).tolist() == [IGNORE, 0, IGNORE, 18]


def test_colours_go_there_and_back() -> None:
    label = np.random.default_rng(0).integers(0, 19, (7, 11)).astype(np.uint8)
    assert (from_colours(colourise(label)) == label).all()


def test_a_colour_one_step_off_is_ignored() -> None:
    for channel in range(3):
        for step in (-1, 1):
            near = PALETTE.astype(int)
            near[:, channel] += step
            keep = ((near >= 0) & (near <= 255)).all(axis=1)
            assert (from_colours(near[keep].astype(np.uint8)) == IGNORE).all()
    assert from_colours(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)).tolist() == [[IGNORE, IGNORE]]


def test_known_colours() -> None:
    known = {"road": (128, 64, 128), "sky": (70, 130, 180), "vegetation": (107, 142, 35), "bicycle": (119, 11, 32)}
    for name, rgb in known.items():
        assert CLASSES[from_colours(np.array(rgb, np.uint8))] == name
    assert colourise(np.array([[IGNORE]], np.uint8)).tolist() == [[[0, 0, 0]]]


def test_a_label_file_is_read_as_ids_or_as_colours_by_its_shape() -> None:
    label = np.arange(19, dtype=np.uint8).reshape(1, 19)
    rgb = colourise(label)
    rgba = np.concatenate([rgb, np.full((1, 19, 1), 255, np.uint8)], axis=2)
    assert (to_trainids(np.array([LABELIDS], np.uint8)) == label).all()
    assert (to_trainids(rgb) == label).all() and (to_trainids(rgba) == label).all()
    with pytest.raises(UserError, match=r"\(4, 4, 2\)"):
        to_trainids(np.zeros((4, 4, 2), np.uint8))


def test_camvid() -> None:
    names = ["sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence", "car", "person"]
    assert [CLASSES[CAMVID_TO_TRAINID[k]] for k in range(10)] == names
    assert CLASSES[CAMVID_TO_TRAINID[10]] == "rider"
    assert (CAMVID_TO_TRAINID[11:] == IGNORE).all()


def test_histogram_leaves_ignored_pixels_out() -> None:
    histogram = class_histogram(np.array([[0, 0, 18], [IGNORE, IGNORE, 5]], np.uint8))
    assert histogram.shape == (19,) and histogram.dtype == np.int64
    assert histogram[[0, 5, 18]].tolist() == [2, 1, 1] and histogram.sum() == 4
