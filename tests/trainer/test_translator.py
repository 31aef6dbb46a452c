"""A trained generator as a thing to use."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.config import flatten
from infra.errors import UserError
from trainer.checkpoint import find_checkpoint
from trainer.checkpointer import Checkpointer
from trainer.methods import SrunitConfig
from trainer.networks.config import GeneratorConfig
from trainer.pyfunc import save_pyfunc_model
from trainer.translation import OneGenerator, TwoGenerators
from trainer.translator import (
    Translator,
    load_translator,
    to_images,
    to_tensor,
)

METHOD = SrunitConfig(name="srunit", generator=GeneratorConfig(ngf=4, blocks=6))


def translation(seed: int) -> OneGenerator:
    torch.manual_seed(seed)
    return OneGenerator(METHOD.generator.build()).eval()


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints; the newer has a moving average."""
    folder = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(folder / "checkpoints", keep=2)
    config = flatten(METHOD, "method.") | {"seed": 0}
    checkpointer.save(9, {"generator": translation(1).generator.state_dict()}, {"step": 9, "config": config})
    newer = {"generator": translation(2).generator.state_dict(), "generator_ema": translation(3).generator.state_dict()}
    checkpointer.save(10, newer, {"step": 10, "config": config})
    return folder


def test_pixels_survive_the_way_to_tensors_and_back() -> None:
    every_value = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x_NCHW = to_tensor(every_value)
    assert x_NCHW.shape == (1, 3, 16, 16) and (x_NCHW.min().item(), x_NCHW.max().item()) == (-1, 1)
    assert np.array_equal(to_images(x_NCHW), every_value)
    assert to_images(torch.full((1, 3, 1, 1), 1.5)).max() == 255


def test_sixteen_bits_come_and_go_as_eight_do() -> None:
    every_256th = (np.arange(0, 65536, 256, dtype=np.uint16) + 3).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_images(to_tensor(every_256th), np.uint16), every_256th)
    translator, image = Translator(translation(0)), picture()
    deep = translator(image.astype(np.uint16) * 257)
    assert deep.dtype == np.uint16 and np.array_equal((deep / 257).round().astype(np.uint8), translator(image))
    assert len(np.unique(deep)) > 256  # they are used


class Styled(OneGenerator):
    """Paints an image in its style."""

    code = 3

    def forward(self, x_NCHW: torch.Tensor, code: torch.Tensor | None = None, direction: str = "AtoB") -> torch.Tensor:
        assert code is not None
        return code[:, :, None, None].expand_as(x_NCHW)


def test_an_image_has_its_own_style_wherever_it_is_translated() -> None:
    network, image = Styled(METHOD.generator.build()), picture()
    styles = {
        (seed, key): Translator(network, seed=seed)(image, key=key)[0, 0].tolist()
        for seed in (0, 1)
        for key in ("a", "b")
    }
    assert len({tuple(style) for style in styles.values()}) == 4
    assert Translator(network)(image, key="b")[0, 0].tolist() == styles[0, "b"]
    first, second = Translator(network)(np.stack([image, image]), key="a")
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("size", [(12, 20), (13, 18), (5, 5), (8, 7), (31, 6)])
def test_any_size_comes_back_at_its_size(size: tuple[int, int]) -> None:
    network = translation(0)
    image = picture(*size)
    padded = np.pad(image, ((0, -size[0] % 4), (0, -size[1] % 4), (0, 0)), mode="reflect")
    with torch.no_grad():
        expected = to_images(network(to_tensor(padded[None])))[0, : size[0], : size[1]]
    translated = Translator(network)(image)
    assert translated.shape == image.shape and translated.dtype == np.uint8
    assert np.array_equal(translated, expected) and translated.std() > 0


def test_a_batch_is_its_images() -> None:
    translator = Translator(translation(0))
    images = np.stack([picture(seed=seed) for seed in range(3)])
    each = np.stack([translator(image) for image in images])
    assert np.abs(translator(images).astype(int) - each).max() <= 1  # a rounding at most
    assert not np.array_equal(each[0], each[1])


@pytest.mark.parametrize(
    "image",
    [
        picture().astype(np.float32) / 255,
        picture()[:, :, 0],
        np.dstack([picture(), picture()[:, :, :1]]),
        picture()[None, None],
    ],
    ids=["float", "gray", "with alpha", "five axes"],
)
def test_what_is_no_rgb_image_is_named(image: np.ndarray) -> None:
    with pytest.raises(UserError, match="cannot be translated: give uint8 RGB of shape"):
        Translator(translation(0))(image)


@pytest.mark.parametrize("size", [(4, 8), (8, 1)])
def test_an_image_that_is_too_small_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"an image of {size[1]}x{size[0]} is too small: give 5 pixels"):
        Translator(translation(0))(picture(*size))


def test_a_run_is_its_newest_checkpoint_and_the_moving_average_in_it(run: Path) -> None:
    image, newest = picture(), run / "checkpoints" / "step_10"
    assert find_checkpoint(run) == find_checkpoint(newest) == find_checkpoint(newest, "auto") == newest
    averaged, plain, older = (Translator(translation(seed))(image) for seed in (3, 2, 1))
    assert np.array_equal(load_translator(run)(image), averaged)
    assert np.array_equal(load_translator(newest, averaged=False)(image), plain)
    assert np.array_equal(load_translator(run / "checkpoints" / "step_9")(image), older)
    assert not np.array_equal(averaged, plain) and not np.array_equal(plain, older)


def test_one_of_the_checkpoints_of_a_run_is_meant(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoints = folder / "checkpoints"
    steps = {name: checkpoints / name for name in ("step_9", "step_10")}
    assert find_checkpoint(folder, "auto") == find_checkpoint(folder, "latest") == steps["step_10"]
    assert find_checkpoint(folder, "step_9") == steps["step_9"]
    with pytest.raises(UserError, match=f"{folder} has no checkpoint best .its training did not evaluate it.: give latest "
                                        "or step_9, step_10"):  # fmt: skip
        find_checkpoint(folder, "best")
    (checkpoints / "best").symlink_to("step_9")
    assert find_checkpoint(folder, "auto") == find_checkpoint(folder, "best") == steps["step_9"]
    assert find_checkpoint(folder) == find_checkpoint(folder, "latest") == steps["step_10"]
    with pytest.raises(UserError, match="has no checkpoint step_8: give latest or step_9, step_10"):
        find_checkpoint(folder, "step_8")
    with pytest.raises(UserError, match="step_9 is a checkpoint, not a run that has a best: give the run folder"):
        find_checkpoint(steps["step_9"], "best")


def test_an_average_that_is_not_there_is_not_promised(run: Path) -> None:
    older, newer = (run / "checkpoints" / name for name in ("step_9", "step_10"))
    assert np.array_equal(load_translator(newer, averaged=True)(picture()), load_translator(newer)(picture()))
    with pytest.raises(UserError, match="step_9 has no moving average: leave out --averaged"):
        load_translator(older, averaged=True)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} is neither a run folder nor a checkpoint: give runs/NAME"):
        load_translator(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"the run {tmp_path} has no complete checkpoint yet"):
        load_translator(tmp_path)


def test_mlflow_predicts_the_same_pixels(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = tmp_path / "model"
    for _ in range(2):  # the second takes the place of the first
        save_pyfunc_model(folder, run / "checkpoints" / "step_10", ["generator"], load_translator)
    model = mlflow.pyfunc.load_model(str(folder))
    translator = load_translator(run)
    for image in (picture(13, 18), np.stack([picture(), picture(seed=1)])):
        assert np.array_equal(model.predict(image), translator(image))


def test_both_directions_of_two_generators() -> None:
    first, second = (translation(seed).generator for seed in (1, 2))
    both = TwoGenerators(first, second).eval()
    image = picture()
    for direction, generator in (("AtoB", first), ("BtoA", second)):
        expected = Translator(OneGenerator(generator))(image)
        assert np.array_equal(Translator(both, direction=direction)(image), expected)
    with pytest.raises(UserError, match="translates AtoB, not BtoA"):
        Translator(OneGenerator(first), direction="BtoA")


def test_a_method_without_styles_takes_none_from_an_example() -> None:
    with pytest.raises(UserError, match="no styles to take from an example"):
        Translator(translation(0))(picture(), example=picture())
