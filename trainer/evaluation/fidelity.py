"""FID and KID: how far the look of the translations is from that of the real target images."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainer.evaluation.base import Example, Metric
from trainer.evaluation.inception import SIZE
from trainer.translator import to_tensor

FEWEST = 2  # images of each kind: one has no covariance


class Features(Metric):
    """What a network sees in each image of a set, kept by the image's index.

    The set is the same in whatever order the images came and over however many parts they were spread. Images go
    through the network one at a time: kernels may sum differently for batches of different sizes, and how many images
    share a batch would depend on the number of parts.

    extractor: (1, 3, 299, 299) in [-1, 1] -> (1, d), e.g. `load_inception`. None: images are passed over.
    """

    def __init__(self, extractor: nn.Module | None) -> None:
        self.extractor = extractor
        self.by_index: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.by_index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"extractor": None}  # other processes need what was seen, not the network

    @torch.no_grad()
    def update(self, example: Example) -> None:
        """The image, of any size, is resized as the CUT supplement does: bilinear, corners not aligned, not anti-aliased."""
        if self.extractor is None:
            return
        x_1CHW = to_tensor(example.image[None]).to(next(self.extractor.parameters()).device)
        x_1CHW = F.interpolate(x_1CHW, (SIZE, SIZE), mode="bilinear", align_corners=False)
        self.by_index[example.index] = self.extractor(x_1CHW)[0].cpu().numpy()

    def merge(self, other: "Features") -> None:
        """An image that both have counts once."""
        self.by_index |= other.by_index

    def compute(self, real: "Features") -> dict[str, float | str]:
        return fidelity(self, real)

    def array(self) -> np.ndarray:
        """(N, d) float64, by ascending index."""
        return np.stack([self.by_index[index] for index in sorted(self.by_index)]).astype(np.float64)


def fidelity(images: Features, real: Features) -> dict[str, float | str]:
    """{"FID": …, "KID": …} of a set of images against real images of the target domain.

    The two sets need not be pairs or equally many. Where there are no numbers, their place is taken by "not available: …"
    with the reason.
    """
    if min(len(images), len(real)) >= FEWEST:
        images_Nd, real_Md = images.array(), real.array()
        return {"FID": fid(images_Nd, real_Md), "KID": kid(images_Nd, real_Md)}
    if real.extractor is None:
        reason = "no Inception weights were given (--inception FILE)"
    else:
        reason = f"there are {len(images)} images and {len(real)} real ones, of each it takes {FEWEST}"
    return dict.fromkeys(("FID", "KID"), f"not available: {reason}")


def fid(a_Nd: np.ndarray, b_Md: np.ndarray) -> float:
    """Fréchet distance, squared, of two Gaussians with the features' means m and covariances C (Heusel et al. 2017):

        |m_a - m_b|² + Tr(C_a + C_b - 2 (C_a C_b)^½)

    a_Nd, b_Md: float64 features, N, M >= 2. The covariances are unbiased (divided by N - 1), as in pytorch-fid.
    Equal sets give 0. Too large for few images, in expectation: see docs/evaluation.md.
    """
    root_a, root_b = _covariance_root(a_Nd), _covariance_root(b_Md)
    # With C = RᵀR the eigenvalues of C_a C_b are the squared singular values of R_a R_bᵀ. No root is taken of a
    # singular matrix, which C is with N <= d, so nothing gets complex and no digits are lost.
    mixed = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = ((a_Nd.mean(axis=0) - b_Md.mean(axis=0)) ** 2).sum()
    return max(0.0, float(distance + (root_a**2).sum() + (root_b**2).sum() - 2 * mixed))


def _covariance_root(features_Nd: np.ndarray) -> np.ndarray:
    """R of shape (min(N, d), d), with RᵀR the covariance of the features."""
    centred = features_Nd - features_Nd.mean(axis=0)
    return np.linalg.qr(centred / np.sqrt(len(centred) - 1)).R


def kid(a_Nd: np.ndarray, b_Md: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with kernel (x·y/d + 1)³ (Bińkowski et al. 2018, Sec. 4).

    a_Nd, b_Md: float64 features, N, M >= 2. All pairs of images are taken at once, where the paper averages over random
    subsets: the same expectation, less variance, and nothing drawn. Without bias, so it can fall below 0.
    """
    within_a, within_b = _kernel(a_Nd, a_Nd), _kernel(b_Md, b_Md)
    return float(_mean_of_others(within_a) + _mean_of_others(within_b) - 2 * _kernel(a_Nd, b_Md).mean())


def _kernel(a_Nd: np.ndarray, b_Md: np.ndarray) -> np.ndarray:
    return (a_Nd @ b_Md.T / a_Nd.shape[1] + 1) ** 3


def _mean_of_others(kernel_NN: np.ndarray) -> float:
    """The mean over all pairs of two different images."""
    count = len(kernel_NN)
    return (kernel_NN.sum() - np.trace(kernel_NN)) / (count * (count - 1))
