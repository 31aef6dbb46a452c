"""The losses of the ablations against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.losses import (
    consistency_loss,
    gradient_norms,
    patch_nce,
    self_distance_loss,
    self_distances,
    smoothness_loss,
)
from trainer.losses.constraints import patch_distances, soft_histograms
from trainer.networks import PatchDiscriminator


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=draw, dtype=torch.float64) * 2 - 1


# ---- E1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 7])
def test_self_distance_is_the_plain_loop(width: int) -> None:
    source, translation = images(2, 5, width), images(2, 5, width, seed=1)
    source[1] *= 0.1  # so that one difference is positive and one negative
    mean, std = torch.tensor([0.3, 0.5]), torch.tensor([0.1, 0.2])

    def distance(image: Tensor) -> float:
        shift = width - 3  # the right half begins there
        pixels = [
            abs(float(image[c, y, x] - image[c, y, x + shift])) for c in range(3) for y in range(5) for x in range(3)
        ]
        return sum(pixels) / len(pixels)

    expected = [
        abs((distance(x) - 0.3) / 0.1 - (distance(made) - 0.5) / 0.2)
        for x, made in zip(source, translation, strict=True)
    ]
    assert self_distances(source).tolist() == pytest.approx([distance(x) for x in source])
    assert self_distance_loss(source, translation, mean, std).item() == pytest.approx(sum(expected) / 2)


# ---- E2 ---------------------------------------------------------------------------------------------------------------


def slow_histogram(values: list[float]) -> list[float]:
    bins = [0.0] * 16
    for value in values:
        place = (value + 1) / 2 * 15
        low = min(math.floor(place), 14)
        bins[low] += 1 - (place - low)
        bins[low + 1] += place - low
    return [each / len(values) for each in bins]


def slow_patch_distance(image: Tensor, one: tuple[int, int], other: tuple[int, int]) -> float:
    total = 0.0
    for channel in image:
        histograms = [slow_histogram(channel[y : y + 8, x : x + 8].flatten().tolist()) for y, x in (one, other)]
        total += sum(abs(a - b) for a, b in zip(*histograms, strict=True)) / 2
    return total / 3


def test_smoothness_is_the_plain_loop() -> None:
    source, translation = images(2, 10, 13), images(2, 10, 13, seed=1).pow(3)
    corners = torch.tensor([0, 7, 17, 5, 12, 16])  # of a grid of 3 x 6 places
    at = [divmod(place, 6) for place in corners.tolist()]
    pairs = list(zip(at[:3], at[3:], strict=True))
    slow = [[slow_patch_distance(image, *pair) for pair in pairs] for image in source]
    torch.testing.assert_close(patch_distances(source, corners), torch.tensor(slow, dtype=torch.float64))
    made = [[slow_patch_distance(image, *pair) for pair in pairs] for image in translation]
    expected = (torch.tensor(slow) - torch.tensor(made)).abs().mean().item()
    assert smoothness_loss(source, translation, corners).item() == pytest.approx(expected, rel=1e-6)


def test_histograms_hold_every_value_once() -> None:
    edges = torch.tensor([[-1.0, 1.0, 0.0, 0.3]], requires_grad=True)
    histogram = soft_histograms(edges)
    assert histogram.shape == (1, 16) and histogram.sum().item() == pytest.approx(1)
    assert histogram[0, 0].item() == histogram[0, 15].item() == 0.25
    histogram[0, 9].backward()  # centred at 0.2, so 0.3 is beside it
    assert edges.grad is not None and edges.grad[0, 3] != 0


def test_patch_distance_is_0_for_equal_and_1_for_strange_patches() -> None:
    image = torch.full((1, 3, 8, 16), -1.0)
    image[..., 8:] = 1.0
    assert patch_distances(image, torch.tensor([0, 0, 0, 8])).tolist() == [[0.0, 1.0]]


# ---- E5, E6 -----------------------------------------------------------------------------------------------------------


def test_consistency_is_the_mean_distance() -> None:
    source, translated = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert consistency_loss(source, translated).item() == pytest.approx(3.5)


def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(ndf=2).double()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_norms_and_their_gradient_are_finite_differences(count: int, layout: torch.memory_format) -> None:
    net: PatchDiscriminator = discriminator().to(memory_format=layout)  # type: ignore[call-overload]
    at = images(count, 24, 24).contiguous(memory_format=layout)
    step, norms = 1e-6, gradient_norms(net, at)
    towards = torch.randn(at[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for image, norm in zip(at, norms, strict=True):
        copy = image[None].clone().requires_grad_()
        net(copy).mean().backward()
        slope = copy.grad
        assert slope is not None and norm.item() == pytest.approx(slope.norm().item(), rel=1e-9)
        with torch.no_grad():
            difference = (net(image + step * towards[None]).mean() - net(image - step * towards[None]).mean()) / (
                2 * step
            )
        assert difference.item() == pytest.approx((slope[0] * towards).sum().item(), rel=1e-5)

    weights = [parameter for name, parameter in net.named_parameters() if name.endswith("weight")]
    gradients = torch.autograd.grad(norms.sum(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        sums = []
        for sign in (1, -1):
            weight.data.add_(sign * step * change)
            sums.append(gradient_norms(net, at).sum().item())
            weight.data.sub_(sign * step * change)
        assert (sums[0] - sums[1]) / (2 * step) == pytest.approx((gradient * change).sum().item(), rel=1e-4, abs=1e-8)


def test_gradient_norms_are_float32_under_autocast() -> None:
    net, at = discriminator().float(), images(1, 24, 24).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = gradient_norms(net, at.bfloat16())
    torch.testing.assert_close(norms, gradient_norms(net, at.bfloat16().float()), rtol=0, atol=0)
    assert norms.dtype == torch.float32 and at.grad is None


def test_a_flat_discriminator_has_no_slope_and_a_finite_gradient() -> None:
    net = nn.Conv2d(3, 1, 3)
    nn.init.zeros_(net.weight)
    gradient_norms(net, images(1, 8, 8).float()).sum().backward()
    assert net.weight.grad is not None and torch.equal(net.weight.grad, torch.zeros_like(net.weight))


# ---- external negatives -------------------------------------------------------------------------------------------------


def unit_rows(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("internal", [True, False])
def test_external_negatives_are_the_plain_sum(internal: bool) -> None:
    query, key, external = unit_rows(6, 0), unit_rows(6, 1), unit_rows(9, 2)
    losses = patch_nce(query, key, 2 if internal else 6, 0.5, external=external)
    for row in range(6):
        image = range(3 * (row // 3), 3 * (row // 3) + 3)
        negatives = [key[other] for other in image if other != row] if internal else []
        scores = [math.exp(float(query[row] @ each) / 0.5) for each in [*negatives, *external]]
        positive = math.exp(float(query[row] @ key[row]) / 0.5)
        masked = math.exp(-10 / 0.5)
        assert losses[row].item() == pytest.approx(-math.log(positive / (positive + sum(scores) + masked)))


def test_keys_learn_when_they_are_asked_to() -> None:
    query, key = unit_rows(4, 2), unit_rows(4, 3).requires_grad_()
    patch_nce(query, key, groups=2, teach_keys=True).sum().backward()
    assert key.grad is not None and key.grad.any()
