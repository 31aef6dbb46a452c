"""CycleGAN's options; its step is held to recordings in parity/."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from tests.trainer.small import small_method
from tests.trainer.test_methods import Pairs, at, pairs
from trainer.methods.cyclegan import CycleGan


def make(**options: Any) -> CycleGan:
    method: CycleGan = small_method("cyclegan", global_batch=2, **options).double()
    return method


def losses(method: CycleGan, batch: Pairs) -> dict[str, Tensor]:
    outputs = method(batch, at())
    generator, discriminator = (method.loss(phase, outputs, batch, at())[1] for phase in ("generator", "discriminator"))
    return {name: value for name, value in (generator | discriminator).items() if not name.startswith("acc/")}


def test_a_weight_of_nothing_leaves_its_passes_out() -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    batch = pairs(2)
    for options, passes, named in (
        ({}, 4, {"cycle_A", "cycle_B"}),
        ({"lambda_b": 0.0}, 3, {"cycle_A"}),
        ({"lambda_b": 0.0, "identity": 0.5}, 3, {"cycle_A", "idt_B"}),
        ({"lambda_a": 0.0, "lambda_b": 0.0}, 2, set()),
    ):
        method, calls = make(**options), 0
        for side in method.sides:
            side.generator.register_forward_hook(count)
        assert losses(method, batch).keys() == {"G_A", "G_B", "G", "D_A", "D_B"} | named
        assert calls == passes


def test_an_identity_loss_has_the_weight_of_the_cycle_of_the_same_images() -> None:
    batch = pairs(2)
    one, other = (losses(make(identity=0.5, lambda_a=weight), batch) for weight in (10.0, 20.0))
    for name, factor in ("cycle_A", 2), ("cycle_B", 1), ("idt_A", 1), ("idt_B", 2):
        assert float(other[name]) == pytest.approx(factor * float(one[name])), name


def test_each_discriminator_remembers_the_translations_of_its_own_side() -> None:
    method, batch = make(buffer=4), pairs(2)
    fakes = [translated.fake for translated in method(batch, at())]
    losses(method, batch)
    kept = method.slot_state()
    assert kept.keys() == {f"buffer_{side}/{slot}" for side in "ab" for slot in (0, 1)}
    for side, fake in zip("ab", fakes, strict=True):
        assert all(torch.equal(kept[f"buffer_{side}/{slot}"][0], fake[slot]) for slot in (0, 1))


def test_it_translates_both_ways() -> None:
    method, images = make(), pairs(1).source
    there, back = (method.product(images, None, direction) for direction in ("AtoB", "BtoA"))
    torch.testing.assert_close(there, method.sides[0].generator(images))
    torch.testing.assert_close(back, method.sides[1].generator(images))
    assert not torch.equal(there, back)


def test_the_smallest_images_that_it_says_are_the_smallest_that_it_takes() -> None:
    method = make(identity=0.5)
    side = method.sizes(2).first
    assert side == 24 and not method.sizes(2).fit(side - 4, side)
    assert all(torch.isfinite(value) for value in losses(method, pairs(2, side)).values())
    with pytest.raises(RuntimeError):
        losses(method, pairs(2, side - 4))


@pytest.mark.parametrize("name", ["lambda_a", "lambda_b", "identity", "buffer"])
def test_a_negative_number_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"method.{name} = -1\S* .*give 0"):
        make(**{name: -1})
