"""Distances between and within images, which DistanceGAN holds (Benaim and Wolf 2017), and SRUNIT's E1 after it."""

import torch
from torch import Tensor


def self_distances(images: Tensor, halves: str = "left-right") -> Tensor:
    """|L(x) - R(x)|_1 of each image (B, C, H, W), as the mean over pixels and channels: (B,), float32 or wider.

    L and R are the left and the right half, or with "top-bottom" the upper and the lower one; of an odd side, the middle line
    belongs to neither.
    """
    axis = 3 if halves == "left-right" else 2
    images, side = wide(images), images.shape[axis]
    first, last = images.narrow(axis, 0, side // 2), images.narrow(axis, side - side // 2, side // 2)
    return (first - last).abs().mean(dim=(1, 2, 3))


def pair_distances(rows: Tensor, others: Tensor) -> Tensor:
    """The mean over elements of |x_i - y_j|: (n, d) and (m, d), images as rows, to (n, m), float32 or wider."""
    return torch.cdist(wide(rows), wide(others), p=1) / rows.shape[1]


def distance_changes(of_source: Tensor, of_translation: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """|(d(x) - mu_X) / sigma_X - (d(G(x)) - mu_Y) / sigma_Y| for distances d of any shape, the same for x and G(x).

    mean, std: (2,), of the distances in the domain of x and in that of G(x).
    """
    return ((of_source - mean[0]) / std[0] - (of_translation - mean[1]) / std[1]).abs()


def self_distance_loss(source: Tensor, translation: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """L_dist (E1), a scalar: the mean over images of `distance_changes` of their self-distances.

    source, translation: (B, C, H, W).
    SRUNIT's supplement prints no absolute value, without which the term would have no minimum; DistanceGAN has it.
    """
    return distance_changes(self_distances(source), self_distances(translation), mean, std).mean()


def wide(images: Tensor) -> Tensor:
    """As float32 or wider."""
    return images.to(torch.promote_types(images.dtype, torch.float32))
