"""Instance normalisation with its activation, in one step and in the layout that the features have.

torch's own operator copies channels-last features to contiguous ones and, on a CPU (seen in torch 2.13), returns wrong
gradients, silently, for a batch of one image whose gradient arrives channels-last. Neither happens here.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks import norm_batch, norm_fused

EPSILON = 1e-5
FLAT = 1e-6 * EPSILON  # variance of a channel that has none: float32 hardly tells EPSILON + FLAT from EPSILON


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm without running statistics (Ulyanov et al. 2016), then an activation: (B, C, H, W) to the same shape,
    layout and dtype; the statistics are float32 or wider.

    slope: of the activation below 0: 1 for none, 0 for ReLU, 0.2 for the LeakyReLU of a discriminator.
    guarded: a channel without variance passes no gradient back. By the formula it is multiplied by 1 / sqrt(EPSILON) =
    316, and an image of one colour, such as a crop of a label map, has such channels at every norm: in a deep network
    the product overflows.
    affine: a weight and a bias of each channel, before the activation.
    triton: on a GPU, by our Triton kernels instead of torch's operators; the engine sets it.
    """

    def __init__(self, channels: int, slope: float = 1.0, *, guarded: bool = False, affine: bool = False) -> None:
        super().__init__(channels, eps=EPSILON, affine=affine)
        self.slope = slope
        self.guarded = guarded
        self.triton = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.affine:
            return norm_activation(x, self.slope, guarded=self.guarded, triton=self.triton)
        y = norm_activation(x, 1.0, guarded=self.guarded, triton=self.triton)
        weight, bias = (each.to(y.dtype)[:, None, None] for each in (self.weight, self.bias))
        return F.leaky_relu(y * weight + bias, self.slope)


def norm_activation(x: Tensor, slope: float, *, guarded: bool = False, triton: bool = False) -> Tensor:
    """What InstanceNorm2d computes. Keeps x for the backward pass, and no second map of that size."""
    if torch.compiler.is_exporting():  # one operator, which other programs have; they have no gradients to guard
        y = F.instance_norm(x.to(_statistics_dtype(x)), eps=EPSILON).to(x.dtype)
        return y if slope == 1 else F.leaky_relu(y, slope) if slope else F.relu(y)
    if torch.compiler.is_compiling():  # which fuses the plain one with its neighbours
        return plain_norm_activation(x, slope, guarded=guarded)
    return _NormActivation.apply(x, slope, guarded, _kernels(x, triton))


def plain_norm_activation(x: Tensor, slope: float, *, guarded: bool = False) -> Tensor:
    """The same by its definition: the reference of the fast kernels, and where the gradient of a gradient comes from."""
    wide = x.to(_statistics_dtype(x))
    variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
    y = (wide - mean) * (variance + EPSILON).rsqrt()
    return F.leaky_relu(torch.where(variance > FLAT, y, y.detach()) if guarded else y, slope).to(x.dtype)


class _NormActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, guarded: bool, kernels: ModuleType | None) -> Tensor:
        x = x.contiguous(memory_format=_layout(x))
        flat = FLAT if guarded else -1.0
        y, mean, rstd = kernels.forward(x, slope, EPSILON, flat) if kernels else _forward(x, slope, flat)
        ctx.save_for_backward(x, mean, rstd)
        ctx.slope, ctx.guarded, ctx.kernels = slope, guarded, kernels
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            y = plain_norm_activation(x, ctx.slope, guarded=ctx.guarded)
            return torch.autograd.grad(y, x, gradient, create_graph=True)[0], None, None, None
        backward = ctx.kernels.backward if ctx.kernels else _backward
        return backward(gradient.contiguous(memory_format=_layout(x)), x, mean, rstd, ctx.slope), None, None, None


def _forward(x: Tensor, slope: float, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and each image's means and 1 / standard deviations (B, C): 0 where the variance is at most `flat`."""
    y, mean, rstd = _normalise(x)
    return (y if slope == 1 else F.leaky_relu_(y, slope)), mean, norm_batch.without_flat(rstd, EPSILON, flat)


def _backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    if slope != 1:
        # Normalising again costs less than keeping the result for the signs in it.
        gradient = torch.ops.aten.leaky_relu_backward(gradient, _normalise(x)[0], slope, True)
    batch, channels, height, width = x.shape
    wanted = [True, False, False]
    if _in_groups(x):
        ones = torch.ones_like(mean[0])
        return torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, ones, batch, channels, height * width, channels, wanted
        )[0]
    images = _as_single_images(x)
    ones = mean.new_ones(images[0].shape[1])
    of_images = [
        torch.ops.aten.native_batch_norm_backward(g, image, ones, None, None, m, r, True, EPSILON, wanted)[0]
        for g, image, m, r in zip(
            _as_single_images(gradient), images, mean.view(len(images), -1), rstd.view(len(images), -1), strict=True
        )
    ]
    return (of_images[0] if len(of_images) == 1 else torch.cat(of_images)).view(x.shape)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    dtype = _statistics_dtype(x)  # which is that of the weights
    if _in_groups(x):
        ones = torch.ones(channels, dtype=dtype, device=x.device)
        return torch.ops.aten.native_group_norm(x, ones, None, batch, channels, height * width, channels, EPSILON)
    y = torch.empty_like(x)
    images, results = _as_single_images(x), _as_single_images(y)
    mean, rstd = torch.empty(2, len(images), images[0].shape[1], dtype=dtype, device=x.device)
    ones = torch.ones_like(mean[0])
    for image, result, m, r in zip(images, results, mean, rstd, strict=True):
        torch.ops.aten.native_batch_norm.out(
            image, ones, None, None, None, True, 0.0, EPSILON, out=result, save_mean=m, save_invstd=r
        )
    return y, mean.view(batch, channels), rstd.view(batch, channels)


def _in_groups(x: Tensor) -> bool:
    """Whether group norm takes these features, all images at once. In channels-last its backward is slow. CUDA's takes
    weights of the features' own type alone, and would round the statistics to it."""
    return x.is_contiguous() and not x.is_cuda


def _as_single_images(x: Tensor) -> tuple[Tensor, ...]:
    """The features as batch norm takes them, which knows one image's statistics only: contiguous ones as the channels of
    one image, others image by image."""
    return (x.view(1, -1, *x.shape[2:]),) if x.is_contiguous() else x.split(1)


def _kernels(x: Tensor, triton: bool) -> ModuleType | None:
    """What takes these features, all images at once, where torch's own norms do not: channels-last ones on a GPU."""
    if _in_groups(x) or x.is_contiguous() or not x.is_cuda:
        return None
    return norm_fused if triton and x.dtype != torch.float64 else norm_batch


def _layout(x: Tensor) -> torch.memory_format:
    # Features of one channel or of one pixel are both.
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
