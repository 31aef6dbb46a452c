"""SemST: two scales, their fusion, and the mutual information of source and translation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from tests.trainer import drawn
from tests.trainer.small import crop_of, method_config, small_method
from tests.trainer.test_methods import TAPS, at, make, pairs, play, with_gradient
from trainer.losses import adversarial_loss, hard_negative_weights, hdce, mutual_information
from trainer.methods.semst import Semst, SemstConfig
from trainer.networks import ProjectionHeads, ResnetGenerator
from trainer.networks.fusion import ScaleFusion, cut, halved, paste, slide
from trainer.networks.sizes import Sizes
from trainer.translator import Translator, to_images

CROP, LOCAL = crop_of("semst"), 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- mutual information ---------------------------------------------------------------------------------------------------


def slow_information(x: Tensor, y: Tensor, sign: float, joint: bool) -> Tensor:
    """Of n pairs, both (n,), by 81 functions of each pair of an x and a y."""
    centres = torch.linspace(-1, 1, 9, dtype=x.dtype)

    def basis(one: Tensor, other: Tensor) -> Tensor:
        kernels = [(sign * (each[:, None] - centres) ** 2 / 2).exp() for each in (one, other)]
        return (kernels[0][:, :, None] * kernels[1][:, None, :]).flatten(1)

    together, apart = basis(x, y), basis(x.repeat_interleave(len(y)), y.repeat(len(x)))
    moments = (together.T @ together / len(together) + apart.T @ apart / len(apart)) / 2
    target = (together if joint else apart).mean(dim=0)
    weights = torch.linalg.solve(moments + 0.05 * torch.eye(81, dtype=x.dtype), target)
    return 2 * weights @ target - weights @ moments @ weights - 1


@pytest.mark.parametrize("kernel", ["gaussian", "published"])
@pytest.mark.parametrize("numerator", ["product", "joint"])
def test_17_kernels_are_the_81_functions_of_all_pairs(kernel: str, numerator: str) -> None:
    x = normal(3, 12).clamp(-1, 1).requires_grad_()
    y = (x.detach() / 2 + normal(3, 12, seed=1) / 4).requires_grad_()
    fast = mutual_information(x, y, kernel, numerator)
    sign = 1.0 if kernel == "published" else -1.0
    slow = torch.stack([slow_information(*pair, sign, numerator == "joint") for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-10)
    for one, other in zip(
        torch.autograd.grad(fast.sum(), [x, y]), torch.autograd.grad(slow.sum(), [x, y]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_what_says_more_of_the_other_has_more_information() -> None:
    x, noise = normal(1, 4000) / 2, normal(1, 4000, seed=1) / 2
    same, noisy, independent = (float(mutual_information(x, y)) for y in (x, (x + noise) / 2**0.5, noise))
    assert same > 0.15 > noisy > 0.05 > 0.01 > abs(independent)


def test_half_precision_is_computed_in_single() -> None:
    x, y = (normal(1, 500, seed=seed).div(2).bfloat16() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = mutual_information(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, mutual_information(x.float(), y.float()))


# ---- fusion -----------------------------------------------------------------------------------------------------------------


def test_the_map_is_even_at_first_and_has_the_parameters_of_the_paper() -> None:
    fusion = ScaleFusion(256)
    fusion.start_even()
    assert sum(p.numel() for p in fusion.parameters()) == 2 * 65_792 + 3 * 590_080 + 2_949_376 + 257
    small = ScaleFusion(4)
    features = torch.randn(2, 4, 5, 6)
    assert small(features, (20, 24)).std() > 0
    small.start_even()
    assert torch.equal(small(features, (20, 24)), torch.full((2, 1, 20, 24), 0.5))


def test_halving_is_bilinear_and_windows_are_cut_and_pasted_at_their_corners() -> None:
    images = normal(2, 3, 16, 24)
    torch.testing.assert_close(halved(images), F.interpolate(images, scale_factor=0.5, mode="bilinear"))
    corners = [(8, 0), (16, 8)]
    windows = cut(images, corners, 8)
    assert torch.equal(windows[0], images[0, :, 0:8, 8:16]) and torch.equal(windows[1], images[1, :, 8:16, 16:24])
    pasted = paste(windows, corners, (16, 24))
    assert torch.equal(cut(pasted, corners, 8), windows)
    assert float(pasted.abs().sum()) == pytest.approx(float(windows.abs().sum()))


def test_windows_keep_layout_and_gradient() -> None:
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    windows = cut(images, [(0, 8), (8, 8)], 8)
    assert windows.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(windows.sum(), images)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gradient, paste(torch.ones_like(windows), [(0, 8), (8, 8)], (16, 16)))


def test_outside_the_window_all_relies_on_the_coarse_picture() -> None:
    fusion = ScaleFusion(4).double()
    coarse, fine, scale = normal(2, 3, 12, 12), normal(2, 3, 8, 8, seed=1), torch.full((2, 1, 12, 12), 0.7).double()
    fused = fusion.fuse_windows(coarse, fine, scale, [(0, 0), (16, 8)])
    enlarged = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(fused[0, :, 10:, :], enlarged[0, :, 10:, :])
    torch.testing.assert_close(fused[1, :, :, :14], enlarged[1, :, :, :14])
    whole = 0.3 * enlarged[0, :, 2:6, 2:6] + 0.7 * fine[0, :, 2:6, 2:6]
    torch.testing.assert_close(fused[0, :, 2:6, 2:6], whole)


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (8, 72), (56, 40)])
def test_sliding_windows_cover_the_image(size: tuple[int, int]) -> None:
    images, shapes = normal(2, 3, *size), set()

    def identity(window: Tensor) -> Tensor:
        shapes.add(tuple(window.shape[2:]))
        return window

    torch.testing.assert_close(slide(identity, images, 16), images)
    assert shapes == {(min(16, size[0]), min(16, size[1]))}


# ---- the method ---------------------------------------------------------------------------------------------------------------


def slow_branch(method: Semst, name: str, image: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The translation of one image by one generator, and its losses at the places drawn, tap by tap."""
    network: ResnetGenerator = getattr(method, f"generator_{name}")
    heads: ProjectionHeads = getattr(method, f"heads_{name}")
    made: Tensor = network(image)
    contrasts, structures = [], []
    for k, tap in enumerate(TAPS):
        rows = []
        for picture in (image, made):
            feature = network.model[: tap + 1](picture)[0].flatten(1)
            ids = drawn.patch_ids(at(step).draws, name, tap, feature.shape[1], method.config.patches)
            projected = heads.get_submodule(f"mlp_{k}")(feature[:, ids].T)
            rows.append(projected / (projected.norm(dim=1, keepdim=True) + 1e-7))
        key, query = rows[0].detach(), rows[1]
        contrasts.append(hdce(query, key, hard_negative_weights(key, 1, 10.0)).mean())
        entries = [0.5 * 8**0.5 * each.flatten()[None] for each in (key, query)]
        structures.append(-mutual_information(*entries))
    return made, {"hDCE": 0.1 * torch.stack(contrasts).mean(), "TS": 0.5 * torch.stack(structures).mean()}


def test_a_step_is_what_the_definition_says() -> None:
    method, batch = make("semst", patches=16, lambda_src=0.0), pairs(2, CROP)
    with torch.no_grad():
        method.scale_fusion.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    named, found = play(method, batch, at())
    expected: dict[str, list[Tensor]] = {}
    for i in range(2):
        image, target = batch.source[i : i + 1], batch.target[i : i + 1]
        (x, y), (u, v) = batch.source_boxes[i].tolist(), batch.target_boxes[i].tolist()
        small, window = F.avg_pool2d(image, 2), image[:, :, y : y + LOCAL, x : x + LOCAL]
        (coarse, of_coarse), (fine, of_fine) = (
            slow_branch(method, *pair, 0) for pair in (("global", small), ("local", window))
        )
        scale = method.scale_fusion(method.generator_global.encode(small, [16])[0], coarse.shape[2:])
        rows, columns = slice(y // 2, (y + LOCAL) // 2), slice(x // 2, (x + LOCAL) // 2)
        mask = torch.zeros_like(scale)
        mask[:, :, rows, columns] = scale[:, :, rows, columns]
        padded = torch.zeros_like(image)
        padded[:, :, y : y + LOCAL, x : x + LOCAL] = fine
        large = [F.interpolate(each, scale_factor=2, mode="bilinear") for each in ((1 - mask) * coarse, mask)]
        fused = (large[0] + large[1] * padded)[:, :, y : y + LOCAL, x : x + LOCAL]
        reals = F.avg_pool2d(target, 2), target[:, :, v : v + LOCAL, u : u + LOCAL]
        for made, real, name in zip((coarse, fused), reals, ("global", "fused"), strict=True):
            judge = method.get_submodule(f"discriminator_{name}")
            for kind, score, wanted in (
                ("G_GAN", judge(made), True),
                ("D_fake", judge(made), False),
                ("D_real", judge(real), True),
            ):
                expected.setdefault(kind, []).append(adversarial_loss("lsgan", score, wanted))
        for branch, losses in (("global", of_coarse), ("local", of_fine)):
            for kind, value in losses.items():
                expected.setdefault(f"{kind}_{branch}", []).append(value)
    assert set(named) == {*expected, "G", "acc/D_fake", "acc/D_real"}
    for name, values in expected.items():
        assert float(named[name]) == pytest.approx(float(torch.stack(values).mean().detach()), rel=1e-9), name
    total = torch.stack([torch.stack(values).mean() for name, values in expected.items() if name[:2] != "D_"]).sum()
    assert float(named["G"]) == pytest.approx(total.item())
    for name, network in method.networks("generator").items():
        gradients = torch.autograd.grad(total, list(network.parameters()), retain_graph=True)
        for (key, _), expected_gradient in zip(network.named_parameters(), gradients, strict=True):
            given = found[f"{name}.{key}"]
            assert given is not None
            torch.testing.assert_close(
                given, expected_gradient, rtol=1e-6, atol=1e-9 * float(expected_gradient.abs().max()) + 1e-12
            )


def test_a_translation_fuses_what_both_generators_make_of_the_whole_image() -> None:
    method, image = small_method("semst").double(), normal(1, 3, 40, 56).clamp(-1, 1)
    product = method.product
    large = F.interpolate(product.generator_global(halved(image)), scale_factor=2, mode="bilinear")
    with torch.no_grad():
        product.scale_fusion.output.bias.fill_(-40.0)
        torch.testing.assert_close(product(image), large)
        product.scale_fusion.output.bias.fill_(40.0)
        torch.testing.assert_close(product(image), slide(product.generator_local, image, LOCAL))


@pytest.mark.parametrize("size", [(17, 16), (50, 61)])
def test_it_translates_pictures_of_any_size(size: tuple[int, int]) -> None:
    picture = to_images(torch.rand(1, 3, *size) * 2 - 1)[0]
    assert Translator(small_method("semst").product)(picture).shape == picture.shape
    with pytest.raises(UserError, match="too small: give 16 pixels"):
        Translator(small_method("semst").product)(picture[:12])


def test_options_of_the_objective() -> None:
    batch = pairs(2, CROP)
    usual, _ = play(make("semst"), batch, at())
    assert {"SRC_global", "SRC_local", "TS_global", "TS_local"} <= usual.keys()
    bare, _ = play(make("semst", lambda_src=0.0, ts__weight=0.0), batch, at())
    judged = {"D_fake", "D_real", "acc/D_fake", "acc/D_real"}
    assert set(bare) == judged | {"G", "G_GAN", "hDCE_global", "hDCE_local"}
    changes: list[dict[str, Any]] = [
        {"ts__space": "pixels"}, {"ts__kernel": "published"}, {"ts__numerator": "joint"}, {"ts__spread": 0.4},
        {"ts__taps": (12, 16)}, {"ts__weight": 1.0},
    ]  # fmt: skip
    values = [float(play(make("semst", **change), batch, at())[0]["TS_local"]) for change in changes]
    assert len({*values, float(usual["TS_local"])}) == len(changes) + 1


def test_pixels_are_compared_as_the_branches_see_them() -> None:
    method, batch = make("semst", ts__space="pixels", ts__kernel="published"), pairs(1, CROP)
    outputs = method(batch, at())
    named, _ = play(method, batch, at())
    for name, view in (("global", outputs.coarse), ("local", outputs.fine)):
        expected = -0.5 * mutual_information(view.source.flatten(1), view.made.flatten(1), "published")
        assert float(named[f"TS_{name}"]) == pytest.approx(expected.item())


def test_one_discriminator_may_see_the_whole_fused_picture() -> None:
    method, batch = make("semst", adversarial="fused"), pairs(2, CROP)
    assert "discriminator_global" not in dict(method.named_children())
    named, _ = play(method, batch, at())
    score = method.discriminator_fused(method(batch, at()).fused)
    assert float(named["G_GAN"]) == pytest.approx(adversarial_loss("lsgan", score, True).item())
    assert {"generator_global", "generator_local", "scale_fusion"} <= with_gradient(method)


def test_sizes() -> None:
    assert small_method("semst").sizes(1) == Sizes(8, 2 * LOCAL)
    assert small_method("semst").product.sizes == Sizes(8, 16)
    config = method_config("semst")
    assert isinstance(config, SemstConfig) and (config.view.side, config.view.grid) == (LOCAL, 8)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("local", 20, "no multiple of 8"),
        ("local", 0, "no multiple of 8"),
        ("local", 16, "too small for these networks: give a multiple of 8 from 24 up"),
        ("ts__taps", (5,), "tap 5 of method.ts.taps has no projection head"),
        ("ts__weight", -1.0, "method.ts.weight must be 0 or more"),
        ("ts__spread", 0.0, "method.ts.spread positive"),
        ("lambda_gan", -1.0, "is negative"),
        ("identity", True, "unknown option"),
    ],
)
def test_impossible_options_are_refused(option: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        small_method("semst", **{option: value})
