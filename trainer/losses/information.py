"""How much two sets of numbers say about each other: the relative squared-loss mutual information, as Guo et al. 2022,
"Alleviating Semantics Distortion in Unsupervised Low-Level Image-to-Image Translation via Structure Consistency Constraint"
(SCC), estimate it."""

import torch
from torch import Tensor

CENTRES = 9  # of the basis, evenly from -1 to 1
RIDGE = 0.05
SIGNS = {"gaussian": -1.0, "published": 1.0}


def mutual_information(x: Tensor, y: Tensor, kernel: str = "gaussian", numerator: str = "product") -> Tensor:
    """Of n pairs in each row of x and y, both (B, n), of numbers near [-1, 1]: (B,), float32 or wider; gradients flow into both.

    About 0 for independent numbers. The larger the more one says about the other; it depends on their spread, too.
    kernel: gaussian, exp(-d^2 / 2) of the distance from a centre, or published, exp(d^2 / 2), as the authors' code has it: a
    basis as well, which sees relations that are not monotone better, and overflows far outside [-1, 1] (from 5 on in float32).
    numerator: what the ratio of densities is fitted to: product, the mean of the basis over all pairs of an x and a y, as the
    authors' code has it; or joint, over the n pairs, the usual numerator of a measure of dependence.

    The basis are 81 products k(x - a) k(y - b). Products of two kernels are one kernel, half as wide, at the middle of the two
    centres, of which there are 17. So the 81 x 81 moments come from 17 numbers for each x and each y.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype, sign = torch.promote_types(x.dtype, torch.float32), SIGNS[kernel]
        x, y = x.to(dtype), y.to(dtype)
        centres = torch.linspace(-1, 1, CENTRES, dtype=dtype, device=x.device)
        middles = torch.linspace(-1, 1, 2 * CENTRES - 1, dtype=dtype, device=x.device)
        pair = torch.arange(CENTRES, device=x.device)[:, None] + torch.arange(CENTRES, device=x.device)
        apart = (sign * (centres[:, None] - centres).square() / 4).exp().double()  # what is left of two kernels

        wide_x, wide_y = (_kernels(sign / 2, each, centres) for each in (x, y))  # (B, n, 9)
        half_x, half_y = (_kernels(sign, each, middles) for each in (x, y))  # (B, n, 17)
        moments_x, moments_y = (apart * half.mean(dim=1)[:, pair] for half in (half_x, half_y))  # (B, 9, 9)
        of_product = torch.einsum("zij,zkl->zikjl", moments_x, moments_y)
        together = half_x.transpose(1, 2) @ half_y / x.shape[1]  # (B, 17, 17)
        of_joint = torch.einsum("ij,kl,zikjl->zikjl", apart, apart, _at_pairs(together, pair))
        moments = ((of_product + of_joint) / 2).flatten(3).flatten(1, 2)  # (B, 81, 81)
        if numerator == "joint":
            target = (wide_x.transpose(1, 2) @ wide_y / x.shape[1]).flatten(1)
        else:
            target = (wide_x.mean(dim=1)[:, :, None] * wide_y.mean(dim=1)[:, None, :]).flatten(1)  # (B, 81)

        # The moments are symmetric and not negative. The host need not wait for a GPU to learn that it went well.
        factor, _ = torch.linalg.cholesky_ex(
            moments + RIDGE * torch.eye(CENTRES**2, dtype=moments.dtype, device=x.device)
        )
        weights = torch.cholesky_solve(target[..., None], factor)
        fitted = (weights * target[..., None]).sum(dim=(1, 2))
        return (2 * fitted - (weights * (moments @ weights)).sum(dim=(1, 2)) - 1).to(dtype)


def _kernels(factor: float, x: Tensor, centres: Tensor) -> Tensor:
    """exp(factor * d^2) of the distance of each number (B, n) from each centre (m,): (B, n, m) in float64, since a GPU may round
    the factors of products in float32 to 10 bits."""
    return (factor * (x[..., None] - centres).square()).exp().double()


def _at_pairs(together: Tensor, pair: Tensor) -> Tensor:
    """(B, 17, 17) at the middles of all pairs of centres: (B, 9, 9, 9, 9) by centre a of x, b of y, and the other two."""
    return together[:, pair[:, None, :, None], pair[None, :, None, :]]
