"""MUNIT beside its replay: any cut of the batch, who is trained, sizes, options, and the styles of translations."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from tests.trainer.small import method_config, small_method
from tests.trainer.test_methods import Pairs, at, close, pairs
from trainer.methods.munit import Munit
from trainer.networks.resample import Doubled
from trainer.translator import Translator

pytestmark = pytest.mark.slow

SIDE = 64


def make(**options: Any) -> Munit:
    """With weights as large as after some training."""
    method: Munit = small_method("munit", global_batch=4, **options).double()
    with torch.no_grad():
        for network in method.networks("discriminator").parameters():
            network.mul_(10)
    return method


def play(method: Munit, batch: Pairs, step: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name and gradients of one step without an update."""
    method.zero_grad()
    losses: dict[str, Tensor] = {}
    for phase in method.phases:
        loss, named = method.loss(phase.name, method(batch, at(step), phase.forward), batch, at(step))
        loss.backward()
        losses |= named
    return losses, {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gan", ["lsgan", "vanilla"])
def test_halves_of_a_batch_have_together_the_losses_and_gradients_of_the_whole(gan: str) -> None:
    method = make(gan=gan)
    batch = pairs(4, SIDE)
    losses, gradients = play(method, batch)
    parts = [play(copy.deepcopy(method), batch[2 * rank : 2 * rank + 2]) for rank in range(2)]
    close({name: (parts[0][0][name] + parts[1][0][name]) / 2 for name in losses}, losses)
    close({name: (parts[0][1][name] + parts[1][1][name]) / 2 for name in gradients}, gradients)


def test_the_discriminators_see_other_styles_than_the_generators_are_updated_on() -> None:
    method, batch = make(), pairs(1, SIDE)
    shown, made = method(batch, at(), "shown"), method(batch, at())
    assert not torch.allclose(shown["a"], made["a"].other, rtol=1e-3)
    assert not torch.equal(made["a"].drawn, made["b"].drawn)
    assert not torch.equal(made["a"].drawn, method(batch, at(1))["a"].drawn)


def test_without_its_weight_there_is_no_cycle() -> None:
    batch = pairs(1, SIDE)
    assert {"cycle_A", "cycle_B"} <= play(make(), batch)[0].keys()
    assert not {"cycle_A", "cycle_B"} & play(make(cycle=0.0), batch)[0].keys()


def test_the_smallest_crop_is_64_pixels() -> None:
    method = make()
    assert (method.sizes(1).first, method.sizes(1).multiple) == (SIDE, 4)
    play(method, pairs(1, method.sizes(1).first))
    with pytest.raises(RuntimeError, match="too small for reflection padding"):
        method.discriminator_a(pairs(1, 60).source)  # type: ignore[operator]
    smallest = method.product.sizes.first
    with torch.no_grad():
        assert method.product(pairs(1, smallest).source).shape[2:] == (smallest, smallest)
        assert method.product.code_of(pairs(1, smallest).source).shape == (1, 8)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("cycle", -1.0, "method.cycle = -1.0 is negative"),
        ("generator__ngf", 0, "must be 1 or more"),
        ("generator__style", 0, "must be 1 or more"),
        ("discriminator__scales", 0, "must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(option: str, value: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        method_config("munit", **{option: value})


def test_a_translation_takes_the_content_here_and_the_style_there() -> None:
    method = make()
    x, code = pairs(2, 32).source, torch.randn(2, 8, dtype=torch.float64)
    a, b = method.autoencoder("a"), method.autoencoder("b")
    with torch.no_grad():
        for direction, ours, theirs in ("AtoB", a, b), ("BtoA", b, a):
            expected = theirs.decode(ours.content_encoder(x), code)
            assert torch.equal(method.product(x, code, direction), expected)
            assert torch.equal(method.product.code_of(x, direction), theirs.style_encoder(x))
        assert torch.equal(method.product(x), method.product(x, torch.zeros_like(code)))


def test_images_take_the_style_of_an_example() -> None:
    method = make()
    for parameter in method.autoencoder_b.mlp.parameters():  # type: ignore[union-attr]
        parameter.data *= 3  # so that a style shows in 8 bits
    translator = Translator(method.product.float().eval())
    rng = np.random.default_rng(0)
    image, one, other = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3))
    of_one, of_other = (translator(image, example=example) for example in (one, other // 4))
    assert not np.array_equal(of_one, of_other)
    both = translator(np.stack([image, image]), example=one)
    assert np.abs(both.astype(int) - of_one).max() <= 1  # a rounding at most


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_doubling_is_torchs_upsampling(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Bit for bit and in its type, also where its gradient's sums of four are rounded once."""
    x = torch.randn(2, 12, 7, 9).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(2, 12, 14, 18).to(dtype).contiguous(memory_format=layout)
    made = []
    for layer in Doubled(), nn.Upsample(scale_factor=2):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        made.append((y, *torch.autograd.grad(y, x, weights)))
    for ours, theirs in zip(*made, strict=True):
        assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)


def test_doubling_is_one_operator_of_an_exported_graph() -> None:
    program = torch.export.export(Doubled(), (torch.zeros(1, 2, 4, 4),))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.aten.upsample_nearest2d.vec]
