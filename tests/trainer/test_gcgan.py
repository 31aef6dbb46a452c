"""GcGAN's geometry and options; its step is held to recordings in parity/."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from launch.runs.config import make_config
from tests.trainer.small import small_method
from tests.trainer.test_methods import Pairs, at, pairs
from trainer.losses import l1_distance
from trainer.methods.gcgan import GcGan, GcGanConfig


def make(**options: Any) -> GcGan:
    method: GcGan = small_method("gcgan", global_batch=2, **options).double()
    return method


def losses(method: GcGan, batch: Pairs) -> dict[str, Tensor]:
    outputs = method(batch, at())
    generator, discriminator = (method.loss(phase, outputs, batch, at())[1] for phase in ("generator", "discriminator"))
    return generator | discriminator


@pytest.mark.parametrize(("geometry", "corner"), [("rot90", (0, -1)), ("vflip", (-1, 0))])
def test_where_the_upper_left_corner_goes(geometry: str, corner: tuple[int, int]) -> None:
    method, image = make(geometry=geometry), torch.rand(1, 3, 6, 8).contiguous(memory_format=torch.channels_last)
    turned = method.f(image)
    assert torch.equal(turned[:, :, corner[0], corner[1]], image[:, :, 0, 0])
    assert torch.equal(method.f_back(turned), image)
    assert turned.is_contiguous(memory_format=torch.channels_last)
    assert method.f(image.contiguous()).is_contiguous()


@pytest.mark.parametrize("geometry", ["rot90", "vflip"])
def test_images_need_not_be_square(geometry: str) -> None:
    images = torch.rand(2, 2, 3, 24, 32, dtype=torch.float64)
    found = losses(make(geometry=geometry), Pairs(images[0], images[1], torch.arange(2)))
    assert all(torch.isfinite(value) for value in found.values())


def test_a_shared_generator_is_two_with_the_same_weights() -> None:
    batch, shared, crossed = pairs(2), make(), make(generators="cross")
    own, turned = crossed.generators
    assert own is not turned and shared.generators[0] is shared.generators[1]
    assert shared.networks("generator").keys() == {"generator"}
    assert crossed.networks("generator").keys() == {"generator", "generator_gc"}
    expected = losses(shared, batch)
    assert losses(crossed, batch)["Gc"] != expected["Gc"]
    turned.load_state_dict(own.state_dict())
    for name, value in losses(crossed, batch).items():
        torch.testing.assert_close(value, expected[name])


def test_the_inconsistency_has_the_gradient_of_one_distance_with_both_sides_moving() -> None:
    method = make()
    plain, turned = (torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    once = l1_distance(plain, method.f_back(turned))
    ours = method.inconsistency(plain, turned)
    torch.testing.assert_close(ours, 2 * once)
    for one, other in zip(
        torch.autograd.grad(ours, [plain, turned]), torch.autograd.grad(once, [plain, turned]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_without_an_identity_loss_the_targets_are_not_translated() -> None:
    method, batch = make(lambda_identity=0.0), pairs(2)
    assert [translated.identity for translated in method(batch, at())] == [None, None]
    assert losses(method, batch).keys() == {
        "G_AB", "G_gc_AB", "Gc", "G", "D_B", "acc/D_B_fake", "acc/D_B_real"
    }  # fmt: skip


def test_what_the_published_code_did_for_a_task() -> None:
    found = {
        task: make_config({"method.name": "gcgan", "task": task}).method
        for task in ("label2city", "horse2zebra", "summer2winter", "gta2city")
    }
    settings = {
        task: (method.generators, method.lambda_identity)
        for task, method in found.items()
        if isinstance(method, GcGanConfig)
    }
    assert settings == {
        "label2city": ("share", 3.0), "horse2zebra": ("cross", 5.0), "summer2winter": ("cross", 5.0),
        "gta2city": ("share", 5.0),
    }  # fmt: skip


def test_the_smallest_images_that_it_says_are_the_smallest_that_it_takes() -> None:
    method = make()
    side = method.sizes(2).first
    assert all(torch.isfinite(value) for value in losses(method, pairs(2, side)).values())
    with pytest.raises(RuntimeError):
        losses(method, pairs(2, side - 4))


@pytest.mark.parametrize("name", ["lambda_gan", "lambda_geometry", "lambda_identity", "buffer"])
def test_a_negative_number_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"method.{name} = -1\S* .*give 0"):
        make(**{name: -1})
