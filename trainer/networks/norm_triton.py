"""Instance norm with its activation as Triton kernels, for channels-last features on a GPU.

Each pass over the features is cut into runs of pixels, whose sums are added up in a fixed order: no atomics, so the same
input gives the same bits. All arithmetic is float32. Nothing but the input and its statistics is kept for the backward
pass; where the activation has its kink is seen from them again.
"""

# A kernel's parameters are pointers and numbers of Triton, which have no Python types; not every machine has Triton.
# mypy: disable-error-code="no-untyped-def, import-not-found"

import torch
import triton
import triton.language as tl
from torch import Tensor

RUN = 256  # pixels of an image that one program sums up
PIXELS, CHANNELS = 32, 64  # of the block that a program holds at a time


def forward(x: Tensor, slope: float, epsilon: float, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W), channels-last, to leaky_relu(normalised x), and its mean and 1 / standard deviation (B, C), which is 0
    where the variance is at most `flat`."""
    batch, channels, pixels, runs = _sizes(x)
    means, squares = x.new_empty(2, batch, runs, channels, dtype=torch.float32)
    mean, rstd, kept = x.new_empty(3, batch, channels, dtype=torch.float32)
    columns = triton.cdiv(channels, CHANNELS)
    _moments[batch, runs, columns](x, means, squares, pixels, channels, RUN, PIXELS, CHANNELS)
    _combine[batch, columns](
        means, squares, mean, rstd, kept, pixels, channels, runs, epsilon, flat, RUN, PIXELS, CHANNELS
    )
    y = torch.empty_like(x)
    _normalise[batch, runs, columns](x, mean, rstd, y, pixels, channels, slope, RUN, PIXELS, CHANNELS)
    return y, mean, kept


def backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    """The gradient of `forward`'s x from that of its result, both channels-last (B, C, H, W)."""
    batch, channels, pixels, runs = _sizes(x)
    sums, products = x.new_empty(2, batch, runs, channels, dtype=torch.float32)
    of_gradient, of_product = x.new_empty(2, batch, channels, dtype=torch.float32)
    columns = triton.cdiv(channels, CHANNELS)
    _gradient_sums[batch, runs, columns](
        gradient, x, mean, rstd, sums, products, pixels, channels, slope, RUN, PIXELS, CHANNELS
    )
    _average[batch, columns](sums, products, of_gradient, of_product, pixels, channels, runs, PIXELS, CHANNELS)
    result = torch.empty_like(x)
    _input_gradient[batch, runs, columns](
        gradient, x, mean, rstd, of_gradient, of_product, result, pixels, channels, slope, RUN, PIXELS, CHANNELS
    )
    return result


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    batch, channels, height, width = x.shape
    return batch, channels, height * width, triton.cdiv(height * width, RUN)


@triton.jit
def _block(start, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets into the features of all images, and which of them exist, of a block of this program's image."""
    rows = start + tl.arange(0, PIXELS)[:, None]
    columns = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    offsets = (tl.program_id(0).to(tl.int64) * pixels + rows) * channels + columns
    return offsets, (rows < pixels) & (columns < channels)


@triton.jit
def _statistic(pointer, channels, CHANNELS: tl.constexpr):
    """One number for each channel of this program's image, (1, CHANNELS)."""
    columns = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    return tl.load(pointer + tl.program_id(0) * channels + columns, mask=columns < channels, other=0.0)[None, :]


@triton.jit
def _store_of_run(pointer, values, channels, CHANNELS: tl.constexpr):
    """One number for each channel of this program's run of pixels."""
    columns = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(pointer + place * channels + columns, values, mask=columns < channels)


@triton.jit
def _moments(
    x, means, squares, pixels, channels, RUN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(1) * RUN
    total = tl.zeros((CHANNELS,), tl.float32)
    for step in range(0, RUN, PIXELS):
        offsets, exists = _block(first + step, pixels, channels, PIXELS, CHANNELS)
        total += tl.sum(tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32), axis=0)
    mean = total / tl.minimum(pixels - first, RUN)
    square = tl.zeros((CHANNELS,), tl.float32)
    for step in range(0, RUN, PIXELS):
        offsets, exists = _block(first + step, pixels, channels, PIXELS, CHANNELS)
        centred = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) - mean[None, :]
        square += tl.sum(tl.where(exists, centred * centred, 0.0), axis=0)
    _store_of_run(means, mean, channels, CHANNELS)
    _store_of_run(squares, square, channels, CHANNELS)


@triton.jit
def _runs(start, runs, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets into the sums of runs, and which of them exist, of a block of this program's image and channels."""
    rows = start + tl.arange(0, PIXELS)[:, None]
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return (tl.program_id(0) * runs + rows) * channels + columns, (rows < runs) & (columns < channels)


@triton.jit
def _store_of_image(pointer, values, channels, CHANNELS: tl.constexpr):
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(pointer + tl.program_id(0) * channels + columns, values, mask=columns < channels)


@triton.jit
def _combine(
    means, squares, mean, rstd, kept, pixels, channels, runs, epsilon, flat,
    RUN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The statistics of whole images from those of their runs (Chan et al. 1979, "Updating Formulae")."""
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, runs, PIXELS):
        offsets, exists = _runs(start, runs, channels, PIXELS, CHANNELS)
        counts = tl.minimum(pixels - (start + tl.arange(0, PIXELS)) * RUN, RUN).to(tl.float32)
        total += tl.sum(tl.load(means + offsets, mask=exists, other=0.0) * counts[:, None], axis=0)
    centre = total / pixels
    square = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, runs, PIXELS):
        offsets, exists = _runs(start, runs, channels, PIXELS, CHANNELS)
        counts = tl.minimum(pixels - (start + tl.arange(0, PIXELS)) * RUN, RUN).to(tl.float32)
        away = tl.load(means + offsets, mask=exists, other=0.0) - centre[None, :]
        within = tl.load(squares + offsets, mask=exists, other=0.0)
        square += tl.sum(tl.where(exists, within + away * away * counts[:, None], 0.0), axis=0)
    variance = square / pixels
    scale = 1 / tl.sqrt(variance + epsilon)
    _store_of_image(mean, centre, channels, CHANNELS)
    _store_of_image(rstd, scale, channels, CHANNELS)
    _store_of_image(kept, tl.where(variance > flat, scale, 0.0), channels, CHANNELS)


@triton.jit
def _average(
    sums, products, of_gradient, of_product, pixels, channels, runs, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    total = tl.zeros((CHANNELS,), tl.float32)
    product = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, runs, PIXELS):
        offsets, exists = _runs(start, runs, channels, PIXELS, CHANNELS)
        total += tl.sum(tl.load(sums + offsets, mask=exists, other=0.0), axis=0)
        product += tl.sum(tl.load(products + offsets, mask=exists, other=0.0), axis=0)
    _store_of_image(of_gradient, total / pixels, channels, CHANNELS)
    _store_of_image(of_product, product / pixels, channels, CHANNELS)


@triton.jit
def _normalise(
    x, mean, rstd, y, pixels, channels, slope,
    RUN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    centre, scale = _statistic(mean, channels, CHANNELS), _statistic(rstd, channels, CHANNELS)
    for step in range(0, RUN, PIXELS):
        offsets, exists = _block(tl.program_id(1) * RUN + step, pixels, channels, PIXELS, CHANNELS)
        normal = (tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) - centre) * scale
        tl.store(y + offsets, tl.where(normal > 0, normal, normal * slope), mask=exists)


@triton.jit
def _gradient_sums(
    gradient, x, mean, rstd, sums, products, pixels, channels, slope,
    RUN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    centre, scale = _statistic(mean, channels, CHANNELS), _statistic(rstd, channels, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float32)
    product = tl.zeros((CHANNELS,), tl.float32)
    for step in range(0, RUN, PIXELS):
        offsets, exists = _block(tl.program_id(1) * RUN + step, pixels, channels, PIXELS, CHANNELS)
        normal = (tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) - centre) * scale
        given = tl.load(gradient + offsets, mask=exists, other=0.0).to(tl.float32)
        given = tl.where(normal > 0, given, given * slope)
        total += tl.sum(given, axis=0)
        product += tl.sum(given * normal, axis=0)
    _store_of_run(sums, total, channels, CHANNELS)
    _store_of_run(products, product, channels, CHANNELS)


@triton.jit
def _input_gradient(
    gradient, x, mean, rstd, of_gradient, of_product, result, pixels, channels, slope,
    RUN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    centre, scale = _statistic(mean, channels, CHANNELS), _statistic(rstd, channels, CHANNELS)
    first, second = _statistic(of_gradient, channels, CHANNELS), _statistic(of_product, channels, CHANNELS)
    for step in range(0, RUN, PIXELS):
        offsets, exists = _block(tl.program_id(1) * RUN + step, pixels, channels, PIXELS, CHANNELS)
        normal = (tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) - centre) * scale
        given = tl.load(gradient + offsets, mask=exists, other=0.0).to(tl.float32)
        given = tl.where(normal > 0, given, given * slope)
        tl.store(result + offsets, scale * (given - first - normal * second), mask=exists)
