"""DRIT beside its replay: any cut of the batch, who is trained, sizes, refusals, options, and what a translation needs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from tests.trainer.small import method_config, small_method
from tests.trainer.test_methods import Pairs, at, close, pairs
from trainer.engines import Engine, EngineConfig
from trainer.losses.attributes import mode_seeking_loss
from trainer.methods.drit import Drit
from trainer.optim import OptimConfig
from trainer.step import train_step

pytestmark = pytest.mark.slow

SIDE = 64  # with a content discriminator of one strided layer


def make(**options: Any) -> Drit:
    options = {
        "generator__ngf": 2,
        "discriminator__ndf": 2,
        "every": 1,
        "mode_seeking": 1.0,
        "content_layers": 1,
    } | options
    method: Drit = small_method("drit", global_batch=4, **options).double()
    with torch.no_grad():  # as after some training
        for parameter in method.parameters():
            parameter.mul_(5)
    return method


def play(method: Drit, batch: Pairs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name and gradients of one step without an update."""
    method.zero_grad()
    losses: dict[str, Tensor] = {}
    for phase in method.phases:
        loss, named = method.loss(phase.name, method(batch, at(), phase.forward), batch, at())
        loss.backward()
        losses |= named
    return losses, {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"generator__attributes": "feature-wise", "second": "joint"}])
def test_halves_of_a_batch_have_together_the_losses_and_gradients_of_the_whole(options: dict[str, Any]) -> None:
    method, batch = make(**options), pairs(4, SIDE)
    losses, gradients = play(method, batch)
    parts = [play(copy.deepcopy(method), batch[2 * rank : 2 * rank + 2]) for rank in range(2)]
    close({name: (parts[0][0][name] + parts[1][0][name]) / 2 for name in losses}, losses)
    close({name: (parts[0][1][name] + parts[1][1][name]) / 2 for name in gradients}, gradients)


def test_random_images_are_seen_by_the_discriminators_of_drawn_attributes_alone() -> None:
    method, batch = make(), pairs(2, SIDE)
    losses, _ = play(method, batch)
    batch.source[1] *= 0.5
    others, _ = play(method, batch)
    assert {name for name in losses if not torch.equal(losses[name], others[name])} == {"D_A2"}


def moved(method: Drit, step: int) -> set[str]:
    """The networks that one step updates."""
    engine = Engine(EngineConfig(device="cpu", precision="fp32"))
    engine.prepare(method, OptimConfig())
    before = copy.deepcopy(method.state_dict())
    train_step(method, engine, [pairs(2, SIDE)], at(step))
    changed = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    return {name.partition(".")[0] for name in changed} - {"product"}


def test_two_of_three_steps_train_the_content_discriminator_alone() -> None:
    found = [moved(make(every=3), step) for step in range(3)]
    everything = {name for name, _ in make().named_children()} - {"product"}
    assert found == [{"content_discriminator"}] * 2 + [everything]


@pytest.mark.parametrize("second", ["recomputed", "joint"])
def test_drawn_attributes_do_not_train_the_attribute_encoder(second: str) -> None:
    batch = pairs(2, SIDE)
    with_it, without = (play(make(second=second, latent=latent), batch)[1] for latent in (10.0, 0.0))
    differing = {name.partition(".")[0] for name in with_it if not torch.equal(with_it[name], without[name])}
    assert differing == {"content_encoder", "generator"}


def test_the_second_update_is_taken_after_the_first() -> None:
    """At the new weights, so with other values than on the pass of the first."""
    losses = {}
    for second in "recomputed", "joint":
        method, engine = make(second=second), Engine(EngineConfig(device="cpu", precision="fp32"))
        engine.prepare(method, OptimConfig(lr=1e-3))
        losses[second] = train_step(method, engine, [pairs(2, SIDE)], at())
    assert losses["recomputed"]["G"] == losses["joint"]["G"]
    assert losses["recomputed"]["latent_A"] != losses["joint"]["latent_A"]


def test_mode_seeking_is_taken_image_by_image() -> None:
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2)]
    codes = [torch.randn(3, 8, generator=draw, dtype=torch.float64) for _ in range(2)]
    each = [mode_seeking_loss(*(x[i : i + 1] for x in (*images, *codes))) for i in range(3)]
    expected = [
        1 / ((images[0][i] - images[1][i]).abs().mean() / (codes[0][i] - codes[1][i]).abs().mean() + 1e-5)
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(each), torch.stack(expected))
    torch.testing.assert_close(mode_seeking_loss(*images, *codes), torch.stack(expected).mean())


def test_what_it_refuses() -> None:
    method = make(content_layers=3)
    assert (method.sizes(2).first, method.sizes(2).multiple) == (212, 4)
    assert make().sizes(2).first == SIDE
    with pytest.raises(UserError, match="takes images by twos"):
        method.sizes(1)
    with pytest.raises(RuntimeError, match="too small|can't be greater than"):
        play(method, pairs(2, 208))
    cases = [("every", 0, "must be 1 or more"), ("kl", -1.0, "method.kl = -1.0 is negative"),
             ("generator__code", 0, "must be 1 or more"), ("second", "published", "recomputed")]  # fmt: skip
    for option, value, words in cases:
        with pytest.raises(UserError, match=words):
            method_config("drit", **{option: value})


@pytest.mark.parametrize("attributes", ["concat", "feature-wise"])
def test_a_translation_needs_a_code_and_takes_that_of_an_example(attributes: str) -> None:
    method = make(generator__attributes=attributes)
    smallest = method.product.sizes.first
    x, code = pairs(2, smallest).source, torch.randn(2, 8, dtype=torch.float64)
    with torch.no_grad():
        for direction, here, there in ("AtoB", "a", "b"), ("BtoA", "b", "a"):
            expected = method.generator(method.content_encoder(x, here), code, there)
            assert torch.equal(method.product(x, code, direction), expected)
            assert torch.equal(method.product.code_of(x, direction), method.attribute_encoder(x, there).mean)
        assert torch.equal(method.product(x), method.product(x, torch.zeros_like(code)))
        assert method.product(x).shape == x.shape
