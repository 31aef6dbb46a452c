"""SinCUT beside what recordings prove: noise, tiles, second derivatives, options. test_methods.py has its steps on two ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from infra.storage import LocalStorage
from infra.views import Tiles
from launch.runs.config import make_config, parse_arguments
from launch.runs.training import check_sizes
from pipelines.loader import Loader
from tests.pipelines.shardmaker import write_root
from tests.trainer.small import method_config, small_method
from tests.trainer.test_methods import at, pairs
from trainer.methods.sincut import SincutTranslation
from trainer.networks.resample import Blur
from trainer.networks.stylegan2 import StyleDiscriminator, StyleGenerator, into_tiles
from trainer.translator import Translator


def noisy(**options: Any) -> Any:
    """A method whose noise shows."""
    method = small_method("sincut", global_batch=4, **options).double()
    with torch.no_grad():
        method.generator.decoder.convs[-2].noise.weight.fill_(1.0)
    return method


# ---- noise ------------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_step_belongs_to_slots_and_both_domains_have_their_own() -> None:
    method, batch = noisy(), pairs()
    batch.source[1] = batch.source[0]
    batch.target = batch.source.clone()
    whole = method(batch, at(3))
    assert not torch.allclose(whole.fake[0], whole.fake[1], atol=1e-3)  # of equal images
    part = method(batch[1:3], at(3))
    torch.testing.assert_close(part.fake, whole.fake[1:3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(part.identity, whole.identity[1:3], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(whole.fake, whole.identity, atol=1e-3)
    assert not torch.allclose(whole.fake, method(batch, at(4)).fake, atol=1e-3)
    with torch.no_grad():
        method.generator.decoder.convs[-2].noise.weight.zero_()
    torch.testing.assert_close(method(batch, at(3)).fake, method(batch, at(4)).fake)


def picture(height: int = 20, width: int = 31) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_translation_has_the_noise_of_its_image_and_seed() -> None:
    """At any size, odd ones too."""
    translation = noisy().product.float()
    one, image = Translator(translation, seed=1), picture()
    seen = one(image, key="a")
    assert seen.shape == image.shape
    assert np.array_equal(seen, Translator(translation, seed=1)(image, key="a"))
    assert not np.array_equal(seen, one(image, key="b"))
    assert not np.array_equal(seen, Translator(translation, seed=2)(image, key="a"))
    assert len({each.tobytes() for each in one(np.stack([image, image]), key="a")}) == 2


def test_a_translation_stays_in_the_range_of_images_and_without_noise_has_none() -> None:
    generator = StyleGenerator(ngf=1)
    x = torch.rand(1, 3, 8, 12) * 80 - 40
    assert generator(x).abs().max() > 1  # what D sees is not bounded
    translation = SincutTranslation(generator)
    assert translation(x).abs().max() <= 1 and torch.equal(translation(x), generator(x).clamp(-1, 1))
    assert translation.code_shape(8, 12) == (1, 8, 12)


# ---- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("padding", "stride"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_blur_and_its_first_and_second_derivatives(padding: int, stride: int, layout: torch.memory_format) -> None:
    """Against torch's own convolution, on a map that is not square."""
    blur = Blur(padding, stride, gain=4.0).double()
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(x, blur.kernel.expand(2, 1, 4, 4), stride=stride, padding=padding, groups=2)

    assert blur.kernel.sum() == 4
    torch.testing.assert_close(blur(x), plain(x))
    assert blur(x).is_contiguous(memory_format=layout)
    for make in (blur, plain):
        assert torch.autograd.gradcheck(make, x)
    assert torch.autograd.gradgradcheck(blur, x)


def test_a_discriminator_scores_the_tiles_of_each_image_by_rows() -> None:
    network = StyleDiscriminator(ndf=1, size=8)
    x = torch.rand(2, 3, 16, 24)
    scores = network(x)
    cut = [x[i : i + 1, :, y : y + 8, z : z + 8] for i in range(2) for y in (0, 8) for z in (0, 8, 16)]
    torch.testing.assert_close(scores, torch.cat([network(tile) for tile in cut]))
    assert torch.equal(into_tiles(x, 8), torch.cat(cut)) and into_tiles(cut[0], 8) is cut[0]


@pytest.mark.parametrize("ngf", [1, 8, 10])
def test_widths_are_those_of_stylegan2(ngf: int) -> None:
    assert StyleGenerator(ngf=ngf).tap_channels((0, 1, 2, 4)) == [3, 8 * ngf, 16 * ngf, 16 * ngf]
    assert StyleGenerator(ngf=ngf, size=128).tap_channels((1, 2)) == [4 * ngf, 8 * ngf]
    assert StyleGenerator(ngf=64, size=32).tap_channels((1, 2)) == [512, 512]  # no more than that


def test_weights_are_n01_whatever_the_rule_of_the_others_and_by_the_seed() -> None:
    one, same, other = (small_method("sincut", seed=seed, generator__ngf=4) for seed in (1, 1, 2))
    weight = one.generator.encoder.convs[3].conv1[0].weight
    assert abs(float(weight.detach().std()) - 1) < 0.02
    assert float(one.heads.mlp_1[0].weight.detach().std()) < 0.01  # Xavier's, of gain 0.02
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
    assert not torch.equal(weight, other.generator.encoder.convs[3].conv1[0].weight)


def test_code_without_a_second_derivative_is_left_to_networks_that_need_none() -> None:
    with_r1, without = small_method("sincut"), small_method("sincut", lambda_r1=0.0)
    assert with_r1.discriminator not in with_r1.compiled_parts() and without.discriminator in without.compiled_parts()
    assert len(with_r1.compiled_parts()) == 7  # the residual blocks


def test_an_encoder_of_its_own_and_a_bank_go_with_it() -> None:
    method = small_method("sincut", separate_encoder=True, all_negatives=False, bank__size=8)
    assert set(method.networks("generator")) == {"generator", "heads", "output_encoder", "output_heads"}
    batch = pairs(2)
    for name in ("source", "target"):
        setattr(batch, name, getattr(batch, name).float())
    loss, _ = method.loss("generator", method(batch, at()), batch, at())
    loss.backward()
    method.after_step([batch], at())
    assert method.output_encoder.encoder.convs[1][0].weight.grad.abs().max() > 0


# ---- losses -----------------------------------------------------------------------------------------------------------


def test_weights_of_the_added_losses_and_what_is_reported() -> None:
    batch = pairs(2)
    plain = small_method("sincut").double()
    weighted = small_method("sincut", lambda_r1=3.0, lambda_idt=5.0).double()
    for phase, name, more in (("discriminator", "D_R1", 2.0), ("generator", "idt", 4.0)):
        (one, named), (other, same) = (m.loss(phase, m(batch, at()), batch, at()) for m in (plain, weighted))
        assert torch.equal(named[name], same[name])  # before its weight
        assert (other - one).item() == pytest.approx(more * float(named[name]))
    outputs = plain(batch, at())
    assert float(named["idt"]) == pytest.approx((outputs.identity - batch.target).abs().mean().item())
    without = small_method("sincut", lambda_r1=0.0, lambda_idt=0.0)
    assert not without.parts


def test_the_penalty_is_of_tiles() -> None:
    """The mean over tiles: an image of four has the penalty of their mean, not of their sum."""
    method = small_method("sincut", discriminator__size=16).double()
    batch = pairs(1)
    tiles = into_tiles(batch.target, 16)
    x = tiles.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(method.discriminator(x).sum(), x)
    _, named = method.loss("discriminator", method(batch, at()), batch, at())
    assert float(named["D_R1"]) == pytest.approx(float(slopes.square().flatten(1).sum(1).mean()) / 2)


def test_the_identity_of_mirrored_images_is_compared_with_mirrored_ones() -> None:
    batch = pairs(2)
    method = small_method("sincut", flip_equivariance=True, generator__ngf=1).double()
    for step in range(6):
        outputs = method(batch, at(step))
        _, named = method.loss("generator", outputs, batch, at(step))
        seen = batch.target.flip(3) if outputs.flipped else batch.target
        assert float(named["idt"]) == pytest.approx((outputs.identity - seen).abs().mean().item())


# ---- options ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones() -> None:
    config = make_config({"method.name": "sincut", "task": "horse2zebra"})
    optim, method = config.optim, config.method
    assert (optim.lr, optim.beta1, optim.beta2, optim.global_batch, optim.epochs, optim.decay_epochs) == (
        0.002, 0.0, 0.99, 16, 8, 8)  # fmt: skip
    assert method.view == Tiles(zoom=1 / 3, epoch=100_000) and config.data.crop == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"all_negatives": False}, "one patch per image has no negatives"),
        ({"lambda_r1": -1.0}, "are weights"),
        ({"identity": False}, "give method.lambda_idt 0 as well"),
        ({"zoom": 0.0}, "a factor above 0 and up to 1"),
        ({"zoom": 1.5}, "a factor above 0 and up to 1"),
        ({"epoch": 0}, "counts crops"),
        ({"patches": 0}, "method.patches 1 or more"),
        ({"discriminator__size": 48}, "no power of two"),
        ({"generator__size": 4}, "no power of two"),
        ({"generator__ngf": 0}, "--ngf 0"),
        ({"discriminator__ndf": 0}, "--ndf 0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        method_config("sincut", **options)


def test_a_tap_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="tap 6 does not exist in this generator: choose from 0 to 5"):
        small_method("sincut", taps=(0, 6))
    with pytest.raises(UserError, match="tap 4 does not exist"):
        small_method("sincut", generator__blocks=2)


def test_crops_are_whole_tiles() -> None:
    sizes = small_method("sincut", discriminator__size=64).sizes(16)
    for side in (64, 128):
        check_sizes(sizes, (side, side), 256)
    with pytest.raises(UserError, match="pass --crop 64 or more"):
        check_sizes(sizes, (48, 48), 256)
    with pytest.raises(UserError, match="pass --crop 64, or prepare"):
        check_sizes(sizes, (96, 96), 256)


def test_of_images_smaller_than_a_tile_the_remedy_is_one_that_is_taken(tmp_path: Path) -> None:
    write_root(LocalStorage(tmp_path), (1,), (1,), (50, 36))

    def start(*options: str) -> None:
        job = parse_arguments(["--method", "sincut", "--data.decoder", "pillow", *options])
        loader = Loader(str(tmp_path), job.data, job.method.view, seed=0, global_batch=16, device=torch.device("cpu"))
        loader.close()
        check_sizes(job.method.build(seed=0, global_batch=16).sizes(16), loader.crop, 36)

    with pytest.raises(
        UserError, match="crop of 64 pixels is larger than the source images of 50x36: pass "
    ) as refused:
        start()
    start(*str(refused.value).split(": pass ")[1].split(",")[0].split())


def test_a_step_takes_the_whole_batch_at_once() -> None:
    with pytest.raises(UserError, match="needs the whole global batch at once"):
        make_config({"method.name": "sincut", "optim.accumulation": 2})
