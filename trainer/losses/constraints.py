"""Constraints that SRUNIT is compared with: on distances of patches, and on the discriminator's slope.

SRUNIT's supplement, Appendix G: E2 after Zhang et al. 2019 (HarmonicGAN), E6 in the spirit of Gulrajani et al. 2017 (WGAN-GP).
"""

import torch
from torch import Tensor, nn

from trainer.losses.distances import wide

HISTOGRAM_BINS = 16  # per colour channel
PATCH_SIZE = 8  # pixels, both ways


def soft_histograms(values: Tensor) -> Tensor:
    """Histograms of the last dimension: (..., P) in [-1, 1] to (..., HISTOGRAM_BINS) that sum to 1.

    A value is shared between the two nearest bins, linearly, so that a gradient flows into it. The first bin's centre
    is -1 and the last one's is 1.
    """
    places = (values[..., None] + 1) / 2 * (HISTOGRAM_BINS - 1)
    bins = torch.arange(HISTOGRAM_BINS, device=values.device)
    return (1 - (places - bins).abs()).clamp(min=0).mean(dim=-2)


def patch_distances(images: Tensor, corners: Tensor) -> Tensor:
    """d(x_1, x_2) of n pairs of patches of each image (B, C, H, W) in [-1, 1]: (B, n) in [0, 1], float32 or wider.

    corners: (2 n,) int64, the patches' upper left pixels as flat positions in the (H - 7, W - 7) places where a patch
    fits; patch i makes a pair with patch n + i. The distance is half the L1 distance of the histograms, averaged over
    the channels: 0 where they agree, 1 where they share no bin.
    """
    width = images.shape[3]
    offsets = torch.arange(PATCH_SIZE, device=corners.device)
    top = corners.div(width - PATCH_SIZE + 1, rounding_mode="floor")
    left = corners % (width - PATCH_SIZE + 1)
    pixels = (top[:, None, None] + offsets[:, None]) * width + left[:, None, None] + offsets
    patches_BCNP = wide(images).flatten(2)[:, :, pixels.flatten(1)]
    one, other = soft_histograms(patches_BCNP).chunk(2, dim=2)
    return (one - other).abs().sum(dim=3).mean(dim=1) / 2


def smoothness_loss(source: Tensor, translation: Tensor, corners: Tensor) -> Tensor:
    """L_smooth (E2), a scalar: the mean over images and pairs of |d(x_1, x_2) - d(G(x_1), G(x_2))|.

    source, translation: (B, C, H, W) in [-1, 1], H and W 8 or more. corners: as in `patch_distances`.
    The supplement says that d measures histograms; bins, patch size and metric are not given there.
    """
    return (patch_distances(source, corners) - patch_distances(translation, corners)).abs().mean()


def gradient_norms(discriminator: nn.Module, images: Tensor) -> Tensor:
    """|grad_x mean(D(x))|_2 of each image (B, C, H, W): (B,), float32 or wider, autocast is off inside.

    The mean is over the patches that D scores: its gradient costs one backward pass, the Jacobian of all scores one for
    each. Gradients flow on into D's weights, none into the images. D must not mix images.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = wide(images).detach().requires_grad_().view(images.shape)  # a view: FLOPs of a leaf cannot be counted
        score = discriminator(images).flatten(1).mean(dim=1).sum()
        (slope,) = torch.autograd.grad(score, images, create_graph=True)
    return torch.linalg.vector_norm(slope.flatten(1), dim=1)
