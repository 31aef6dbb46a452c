"""ESPNetv2 against recorded outputs of the published network, and its published weights on real Cityscapes frames."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import UserError
from pipelines.labels import to_trainids
from trainer.segmentation import Segmenter, load_segmenter
from trainer.segmentation.espnetv2 import ESPNetv2, load_espnetv2

pytestmark = pytest.mark.slow

READY = Path(__file__).parents[3] / "infra" / "segmenters" / "espnetv2_s_2.0_city_1024x512.yaml"
FRAMES = ("frankfurt_000000_000576", "frankfurt_000001_058914")


def filled() -> ESPNetv2:
    """The network in evaluation mode with reproducible values in every tensor."""
    network, draw = ESPNetv2().eval(), np.random.default_rng(0)
    state = network.state_dict()
    for name in sorted(name for name, value in state.items() if value.is_floating_point()):
        value = draw.standard_normal(state[name].shape)
        if name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(value)
        elif value.ndim == 1:
            value = 0.1 * value + (0 if name.endswith(("mean", "bias")) else 0.7)
        else:
            value = value * np.sqrt(2 / np.prod(value.shape[1:]))
        state[name].copy_(torch.from_numpy(value))
    return network


@torch.no_grad()
def test_scores_of_the_published_network() -> None:
    x_NCHW = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, 64, 96))).float()
    scores_CHW = filled()(x_NCHW)[0]
    # Recorded from the published implementation with the same values in its tensors.
    recorded = [
        -0.24350542, -0.26235855, -0.33239561, -0.13731298, -0.09896452, -0.24776825, -0.01593236, -0.19094475,
        -0.11573005, -0.14933548, -0.11147781, -0.06086890, -0.03223817, 0.06928976, 0.05058408, 0.09011653,
    ]  # fmt: skip
    np.testing.assert_allclose(scores_CHW[::5, ::40, ::60].flatten(), recorded, atol=1e-5)
    assert scores_CHW.abs().mean().item() == pytest.approx(0.12067617, rel=1e-4)


@torch.no_grad()
def test_any_size() -> None:
    assert ESPNetv2(7).eval()(torch.zeros(2, 3, 37, 51)).shape == (2, 7, 37, 51)


def test_weights_of_another_network(tmp_path: Path) -> None:
    weights = ESPNetv2().state_dict()
    torch.save(weights, tmp_path / "good.pth")
    assert not load_espnetv2(tmp_path / "good.pth").training
    weights["base_net.level5.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "more.pth")
    with pytest.raises(UserError, match="more.pth is damaged or not of an ESPNetv2 segmenter at scale 2.0"):
        load_espnetv2(tmp_path / "more.pth")


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    """The published weights, loaded as a user does: the ready description beside the file."""
    folder = tmp_path_factory.mktemp("segmenter")
    weights = shared_data / "weights_seg_cityscapes" / f"{READY.stem}.pth"
    shutil.copy(READY, folder)
    (folder / weights.name).symlink_to(weights)
    return load_segmenter(folder / weights.name)


def test_published_weights(shared_data: Path) -> None:
    weights = shared_data / "weights_seg_cityscapes" / f"{READY.stem}.pth"
    network = load_espnetv2(weights)  # strict: every tensor by name and shape
    assert len(network.state_dict()) == 526
    assert sum(parameter.numel() for parameter in network.parameters()) == 789_242  # 0.79 M, as published


def test_real_frames(published: Segmenter, shared_data: Path) -> None:
    """The published weights read two whole validation frames as well as they should, and no better than the labels
    deserve: against the labels of another frame they fail."""
    folder = shared_data / "cityscapes_fullframe"
    truths = [to_trainids(np.asarray(Image.open(folder / "val_labelIds" / f"{name}.png"))) for name in FRAMES]
    labels = [published(np.asarray(Image.open(folder / "val_img" / f"{name}.jpg"))) for name in FRAMES]
    accuracy, mean_iou = scored(truths, labels)
    assert accuracy == pytest.approx(0.955, abs=0.005)
    assert mean_iou == pytest.approx(0.62, abs=0.01)
    accuracy, mean_iou = scored(truths[::-1], labels)
    assert accuracy < 0.7 and mean_iou < 0.2


def scored(truths: list[np.ndarray], labels: list[np.ndarray]) -> tuple[float, float]:
    """Pixel accuracy, and IoU averaged over the classes that occur in the truth."""
    truth, label = np.concatenate(truths).ravel(), np.concatenate(labels).ravel()
    truth, label = truth[truth < 19].astype(int), label[truth < 19]
    counts = np.bincount(19 * truth + label, minlength=361).reshape(19, 19)
    right, occurs = counts.diagonal(), counts.sum(axis=1) > 0
    union = counts.sum(axis=0) + counts.sum(axis=1) - right
    return right.sum() / counts.sum(), (right[occurs] / union[occurs]).mean()
