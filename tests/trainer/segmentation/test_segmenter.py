"""What a segmenter shows its network, and what it makes of the scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from trainer.segmentation import Segmenter, check_label_space


def segmenter(logits: Callable[[Tensor], Tensor], trainids: Sequence[int] = range(19), **options: Any) -> Segmenter:
    plain: dict[str, Any] = {"input_size": None, "mean": (0, 0, 0), "std": (1, 1, 1), "scale": 1}
    return Segmenter(logits, name="net", trainids=trainids, **plain | options)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scores(winners_hw: list[list[int]], classes: int = 19) -> Tensor:
    """(1, classes, h, w): 1 for the winner of each pixel, 0 for the others."""
    return torch.nn.functional.one_hot(torch.tensor(winners_hw), classes).permute(2, 0, 1)[None].float()


def seen(image: np.ndarray, **options: Any) -> np.ndarray:
    """What the network is shown of an image, (h, w, 3)."""
    inputs: list[Tensor] = []

    def network(x_NCHW: Tensor) -> Tensor:
        inputs.append(x_NCHW)
        return scores([[0]])

    segmenter(network, **options)(image)
    assert inputs[0].dtype == torch.float32 and inputs[0].shape[:2] == (1, 3)
    return inputs[0][0].permute(1, 2, 0).numpy()


def test_the_network_sees_normalised_pixels() -> None:
    image = picture(4, 6)
    mean, std = np.array((0.4, 0.5, 0.6)), np.array((0.1, 0.2, 0.3))
    normal = {"mean": mean, "std": std, "scale": 255}
    np.testing.assert_allclose(seen(image, **normal), (image / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(seen(image, channels="BGR", **normal), (image[..., ::-1] / 255 - mean) / std, atol=1e-5)


def test_the_network_sees_its_own_size() -> None:
    image = picture(20, 30)
    expected = np.asarray(Image.fromarray(image).resize((12, 5), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(seen(image, input_size=(12, 5)), expected)


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_labels_have_the_size_of_the_image(scale: int) -> None:
    label = segmenter(lambda x: scores([[3, 7]]))(picture(2 * scale, 4 * scale))
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, np.repeat([[3, 7]], 2 * scale, axis=1).repeat(2 * scale, axis=0))


def test_scores_are_interpolated_linearly() -> None:
    # Class 0 falls from 1 to 0 over a row of eight pixels: 1, 1, 7/8, 5/8, …; class 1 stands at 0.9.
    falling = torch.tensor([[1.0, 0.0], [0.9, 0.9]])[None, :, None]
    assert segmenter(lambda x: falling, (0, 1))(picture(1, 8)).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


def test_a_pixel_hears_all_scores_above_it() -> None:
    # One image pixel under four times four scores: class 1 holds the middle, class 0 most of the area.
    block = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    label = segmenter(lambda x: scores([row * 8 for row in block] * 8))(picture(8, 8))
    assert not label.any()


def test_outputs_become_trainids_and_those_of_no_class_never_win() -> None:
    strongest_is_background = scores([[0, 1, 2]], classes=4) + torch.tensor([0, 0, 0, 9.0])[:, None, None]
    label = segmenter(lambda x: strongest_is_background, (18, 5, 5, 255))(picture(1, 3))
    assert label.tolist() == [[18, 5, 5]]


@pytest.mark.parametrize("output", [torch.zeros(1, 20, 4, 4), torch.zeros(1, 19, 4, dtype=torch.int64)])
def test_other_outputs_than_the_map_names_are_refused(output: Tensor) -> None:
    with pytest.raises(UserError, match="segmenter net gives an output of shape .* correct trainids"):
        segmenter(lambda x: output)(picture(4, 4))


@pytest.mark.parametrize("trainids", [[*range(18), 19], [-1, 0], [255, 255]])
def test_trainids_outside_the_label_space_are_refused(trainids: list[int]) -> None:
    with pytest.raises(UserError, match="trainids of the segmenter net .* 0..18 of cityscapes19"):
        segmenter(torch.nn.Identity(), trainids)


def test_label_spaces_are_compared() -> None:
    with pytest.raises(UserError, match="unknown label space 'camvid11'"):
        segmenter(torch.nn.Identity(), label_space="camvid11")
    mine = segmenter(torch.nn.Identity())
    check_label_space(mine, "cityscapes19")
    with pytest.raises(UserError, match="net labels in cityscapes19 but the data in maps6: choose"):
        check_label_space(mine, "maps6")
