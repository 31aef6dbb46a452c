"""A segmenter trained here as a thing to use, and what is no such thing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from infra.errors import UserError
from tests.trainer.segmenters import network, save
from trainer.checkpointer import Checkpointer
from trainer.networks.config import GeneratorConfig
from trainer.pyfunc import save_pyfunc_model
from trainer.segmentation import load_segmenter
from trainer.segmentation.trained import load_trained, weights_hash
from trainer.translator import load_translator

SIZE = (32, 24)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, the newer one with a moving average."""
    save(tmp_path / "run", 9, segmenter=network(1))
    save(tmp_path / "run", 10, segmenter=network(2), segmenter_ema=network(3))
    return tmp_path / "run"


def picture(width: int = 32, height: int = 24, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def labels_of(seed: int, image: np.ndarray) -> np.ndarray:
    """What the network of that seed sees, by hand, in an image of the size of training."""
    with torch.no_grad():
        scores = network(seed)(torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None])
    return F.interpolate(scores, image.shape[:2], mode="bilinear")[0].argmax(0).numpy().astype(np.uint8)


def test_a_run_is_its_newest_checkpoint_and_the_moving_average_in_it(run: Path) -> None:
    image, older = picture(), run / "checkpoints" / "step_9"
    averaged, plain, first = (labels_of(seed, image) for seed in (3, 2, 1))
    assert np.array_equal(load_trained(run)(image), averaged)
    assert np.array_equal(load_trained(older)(image), first)
    assert not np.array_equal(averaged, plain) and not np.array_equal(averaged, first)
    assert np.array_equal(load_segmenter(run)(image), averaged)


def test_images_of_other_sizes_are_seen_at_the_size_of_training(run: Path) -> None:
    segmenter = load_trained(run)
    assert segmenter.input_size == SIZE and segmenter.label_space == "cityscapes19"
    assert segmenter(picture(80, 60)).shape == (60, 80)


def test_a_run_of_the_other_kind_is_named(run: Path, tmp_path: Path) -> None:
    generator_only = {"generator": GeneratorConfig(ngf=2, blocks=6).build().state_dict()}
    Checkpointer(tmp_path / "other" / "checkpoints", keep=1).save(1, generator_only, {"step": 1, "config": {}})
    with pytest.raises(UserError, match="other holds no segmenter: give a run folder of launch/train_segmenter.py"):
        load_trained(tmp_path / "other")
    with pytest.raises(UserError, match="run holds no translator .a segmenter's run has none.: give a run folder of"):
        load_translator(run)


def test_labels_that_nobody_knows_are_named(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, space="camvid11", segmenter=network(1))
    with pytest.raises(
        UserError, match="the segmenter .*run has the unknown label space 'camvid11': choose one of city"
    ):
        load_trained(tmp_path / "run")


def test_the_hash_of_weights_is_that_of_every_number_in_them() -> None:
    one = network(1)
    assert weights_hash(one) == weights_hash(network(1)) != weights_hash(network(2))
    next(module for module in one.modules() if isinstance(module, torch.nn.BatchNorm2d)).running_var[0] += 1e-6  # type: ignore[index]
    assert weights_hash(one) != weights_hash(network(1))


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a run folder nor a checkpoint"):
        load_trained(tmp_path)


def test_mlflow_predicts_the_same_labels(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    save_pyfunc_model(tmp_path / "model", run / "checkpoints" / "step_10", ["segmenter"], load_trained)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    one, other = picture(), picture(seed=1)
    expected = [load_trained(run)(image) for image in (one, other)]
    assert np.array_equal(model.predict(one), expected[0])
    assert np.array_equal(model.predict(np.stack([one, other])), np.stack(expected))
