import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from trainer.losses import (
    accuracy,
    adversarial_loss,
    mean_inverse,
    patch_nce,
    perturbation,
    relative_perturbation,
    robustness_loss,
)


def unit_rows(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def test_patch_nce_counts_each_group_apart() -> None:
    query, key = unit_rows(12, 0), unit_rows(12, 1)
    together = patch_nce(query, key, groups=3)
    apart = torch.cat([patch_nce(q, k, groups=1) for q, k in zip(query.split(4), key.split(4), strict=True)])
    torch.testing.assert_close(together, apart)
    assert (patch_nce(query, key, groups=1) > together).all()  # more negatives


def test_patch_nce_by_hand() -> None:
    query, key = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    # Row 0: its own key at 0.6, the other at 0.8, and the masked diagonal at -10.
    expected = -0.6 / 8 + math.log(math.exp(0.6 / 8) + math.exp(0.8 / 8) + math.exp(-10 / 8))
    torch.testing.assert_close(patch_nce(query, key, groups=1, temperature=8), torch.tensor([expected, expected]))


def test_patch_nce_teaches_the_query_alone() -> None:
    query, key = unit_rows(4, 2).requires_grad_(), unit_rows(4, 3).requires_grad_()
    patch_nce(query, key, groups=2).sum().backward()
    assert query.grad is not None and query.grad.any() and key.grad is None


def test_patch_nce_over_ranks_equals_one_rank() -> None:
    query, key = unit_rows(12, 2), unit_rows(12, 3)
    whole = patch_nce(query, key, groups=1)
    ranks = [patch_nce(q, key, groups=1, first_positive=6 * rank) for rank, q in enumerate(query.split(6))]
    torch.testing.assert_close(torch.cat(ranks), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype: torch.dtype) -> None:
    query, key = unit_rows(6, 4).float(), unit_rows(6, 5).float()
    with torch.autocast("cpu", dtype=dtype):
        loss = patch_nce(query, key, groups=2)
        score = torch.full((2, 1, 3, 3), 0.1, dtype=dtype)
        adversarial = adversarial_loss("lsgan", score, real=True)
    assert loss.dtype == adversarial.dtype == torch.float32
    torch.testing.assert_close(loss, patch_nce(query, key, groups=2), rtol=0, atol=0)
    torch.testing.assert_close(adversarial, (score.float() - 1).square().mean(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["lsgan", "vanilla", "nonsaturating", "wgangp"])
@pytest.mark.parametrize("real", [True, False])
def test_adversarial_loss_falls_towards_its_target(kind: str, real: bool) -> None:
    towards = 1.0 if real else 0.0
    near, far = torch.full((2, 1, 3, 3), towards), torch.full((2, 1, 3, 3), 1 - towards)
    assert adversarial_loss(kind, near, real) < adversarial_loss(kind, far, real)


@pytest.mark.parametrize(("kind", "scores"), [("lsgan", (0.4, 0.6, 0.7, 3.0)), ("vanilla", (-0.1, 0.1, 0.2, 5.0))])
def test_accuracy_counts_scores_on_the_right_side(kind: str, scores: tuple[float, ...]) -> None:
    score = torch.tensor(scores, dtype=torch.bfloat16).view(1, 1, 2, 2).requires_grad_()
    assert accuracy(kind, score, real=True).item() == 0.75 and accuracy(kind, score, real=False).item() == 0.25
    found = accuracy(kind, score, real=True)
    assert found.dtype == torch.float32 and not found.requires_grad


def draws(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    normal = torch.randn(2, channels, 40, 50, generator=generator, dtype=torch.float64)
    return normal, torch.rand(2, 1, 40, 50, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [3, 32])
def test_perturbation_of_the_paper(channels: int) -> None:
    normal, uniform = draws(channels)
    tau, magnitude = perturbation(normal, uniform, max_norm=0.1)
    torch.testing.assert_close(tau.norm(dim=1, keepdim=True), magnitude)
    assert magnitude.min() >= 1e-7 and magnitude.max() <= 0.1
    torch.testing.assert_close(magnitude.mean(), torch.tensor(0.05, dtype=torch.float64), rtol=0.02, atol=0)
    # The direction is uniform on the sphere: 4,000 of them average to about 0 in every channel.
    direction = tau / magnitude
    assert direction.mean(dim=(0, 2, 3)).abs().max() < 5 / math.sqrt(channels * 4000)


def test_norms_begin_at_the_least() -> None:
    normal, uniform = draws(4)
    tau, magnitude = perturbation(normal, uniform, max_norm=0.1, least_norm=0.04)
    torch.testing.assert_close(tau.norm(dim=1, keepdim=True), magnitude)
    torch.testing.assert_close(magnitude, 0.04 + 0.06 * uniform)


def test_published_perturbation_has_the_full_norm() -> None:
    normal, uniform = draws(4)
    tau, magnitude = perturbation(normal, uniform, max_norm=0.1, rule="published")
    torch.testing.assert_close(tau.norm(dim=1, keepdim=True), torch.full_like(uniform, 0.1))
    torch.testing.assert_close(magnitude, perturbation(normal, uniform, max_norm=0.1)[1])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_a_relative_perturbation_is_a_share_of_the_features_at_its_pixel(scale: float) -> None:
    normal, uniform = draws(4)
    features = (scale * normal.flip(0)).requires_grad_()
    tau, ratio = relative_perturbation(normal, uniform, features, 0.05, 0.5)
    torch.testing.assert_close(ratio, 0.05 + 0.45 * uniform)
    torch.testing.assert_close(tau.norm(dim=1, keepdim=True), ratio * features.detach().norm(dim=1, keepdim=True))
    torch.testing.assert_close(torch.cosine_similarity(tau, normal), torch.ones_like(uniform[:, 0]))
    assert not tau.requires_grad


@pytest.mark.parametrize(("least", "most"), [(0.05, 0.5), (0.03, 0.1)])
def test_the_mean_of_the_inverse_of_a_uniform_draw(least: float, most: float) -> None:
    draws = least + (most - least) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert mean_inverse(least, most) == pytest.approx((1 / draws).mean().item(), rel=1e-6)


def test_robustness_loss_by_hand() -> None:
    source = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # two images, two patches each
    perturbed = torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, 6.0], [1.0, 0.0]])
    magnitude = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.8, 1.0]]).reshape(2, 1, 2, 2)
    loss = robustness_loss(source, perturbed, magnitude, ids=torch.tensor([3, 1]))
    torch.testing.assert_close(loss, torch.tensor((5 / 0.4 + 2 / 0.2 + 6 / 1.0 + 1 / 0.6) / 4))


def test_robustness_loss_has_a_finite_gradient_at_no_distance() -> None:
    source = torch.ones(3, 4, requires_grad=True)
    robustness_loss(source, source.detach(), torch.full((1, 1, 2, 2), 0.1), torch.tensor([0, 1, 2])).backward()
    assert source.grad is not None and torch.equal(source.grad, torch.zeros(3, 4))


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="adversarial loss hinge does not exist: choose lsgan, vanilla"):
        adversarial_loss("hinge", torch.zeros(1), real=True)
    with pytest.raises(UserError, match="perturbation rule fixed does not exist: choose paper or published"):
        perturbation(*draws(3), max_norm=0.1, rule="fixed")
