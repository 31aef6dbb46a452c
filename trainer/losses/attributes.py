"""What keeps drawn attributes apart from each other and near N(0, 1)."""

import torch
from torch import Tensor


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), in nats: the sum over the numbers of an
    attribute (b, n), as a scalar mean over images (Kingma and Welling 2014, Appendix B)."""
    return -(1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean() / 2


def mode_seeking_loss(one: Tensor, other: Tensor, code: Tensor, other_code: Tensor) -> Tensor:
    """How little images (b, ...) differ for codes (b, n) that differ: the mean over images of 1 / (mean |one - other| /
    mean |code - other_code| + 1e-5) (Mao et al. 2019, "Mode Seeking Generative Adversarial Networks", Eqn. 4, as the published
    DRIT++ has it)."""
    distances, codes = (
        (x.to(torch.promote_types(x.dtype, torch.float32)) - y).abs().flatten(1).sum(dim=1) / x[0].numel()
        for x, y in ((one, other), (code, other_code))
    )
    return (1 / (distances / codes + 1e-5)).mean()
