"""L_robust of SRUNIT: what a small perturbation of the features may change in the semantics of the translation."""

import math

import torch
from torch import Tensor

from infra.errors import UserError
from trainer.networks.heads import sample_patches

LEAST_NORM = 1e-7  # of the paper


def perturbation(
    normal: Tensor, uniform: Tensor, max_norm: float, rule: str = "paper", least_norm: float = LEAST_NORM
) -> tuple[Tensor, Tensor]:
    """tau_k, one random vector for each pixel of a feature map, and the norm that divides the distance (Sec. 5.3).

    normal: draws of N(0, 1), (B, C, H, W). uniform: draws of U(0, 1), (B, 1, H, W). max_norm: T > least_norm.
    The direction is uniform on the unit sphere of the channels, the magnitude uniform in [least_norm, T].
    rule "paper": tau = magnitude * direction. "published": tau = T * direction, as the authors' code does, although
    the distance is divided by the magnitude all the same.
    Returns tau (B, C, H, W) and magnitude (B, 1, H, W).
    """
    direction = normal / (normal.norm(dim=1, keepdim=True) + 1e-12)
    magnitude = least_norm + (max_norm - least_norm) * uniform
    match rule:
        case "paper":
            return magnitude * direction, magnitude
        case "published":
            return max_norm * direction, magnitude
        case _:
            raise UserError(f"perturbation rule {rule} does not exist: choose paper or published")


def relative_perturbation(
    normal: Tensor, uniform: Tensor, features: Tensor, least: float, most: float
) -> tuple[Tensor, Tensor]:
    """tau_k of |tau_k| = r |f|: a random vector for each pixel of a feature map, as long as a share r of the features' own
    vector there, so that one range of r means the same at every tap.

    normal, uniform: as for `perturbation`. features: (B, C, H, W), which no gradient flows into from here.
    Returns tau (B, C, H, W) and r (B, 1, H, W), uniform in [least, most], 0 < least < most.
    """
    ratio = least + (most - least) * uniform
    held = features.detach()
    norm = torch.linalg.vector_norm(held, dim=1, keepdim=True, dtype=torch.promote_types(held.dtype, torch.float32))
    return ratio * norm * normal / (normal.norm(dim=1, keepdim=True) + 1e-12), ratio


def mean_inverse(least: float, most: float) -> float:
    """E[1/u] of a u uniform in [least, most], 0 < least < most: what the division by a drawn norm multiplies a loss by."""
    return math.log(most / least) / (most - least)


def robustness_loss(source: Tensor, perturbed: Tensor, magnitude: Tensor, ids: Tensor) -> Tensor:
    """L_k of Eqn. 3 at sampled patches, a scalar: the mean of |F_k(source) - F_k(perturbed)|_2 / |tau_k|_2.

    source, perturbed: (B * n, dim), the same patches `ids` (n,) projected by head k, image-major; gradients flow into
    both. magnitude: (B, 1, H, W) from `perturbation`, or r from `relative_perturbation`. L_robust is the mean of L_k over
    the taps.
    """
    return (_distance(source, perturbed) / sample_patches(magnitude, ids).squeeze(1)).mean()


def consistency_loss(source: Tensor, translated: Tensor) -> Tensor:
    """L_k^sc of SRUNIT's supplement (Appendix G, E5) at sampled patches, a scalar: the mean of
    |F_k(source) - F_k(translated)|_2.

    source, translated: (B * n, dim), the same patches projected by head k; gradients flow into both.
    """
    return _distance(source, translated).mean()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    # 1e-12: a root has no gradient at 0.
    return ((one - other).square().sum(dim=1) + 1e-12).sqrt()
