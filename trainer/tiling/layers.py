"""What layers make of maps: which part of its input a layer needs for a part of its output."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.blocks import LayerNorm2d
from trainer.networks.norm import EPSILON, InstanceNorm2d
from trainer.networks.padding import Pad2d, mirrored
from trainer.networks.resample import Blur, BlurDownsample, BlurUpsample, Doubled, blurred, spread
from trainer.tiling.maps import RULES, Map, Span, unsupported


def _windowed(
    x: Map, channels: int, kernel: Span, apply: Callable[[Tensor], Tensor], stride: int = 1, padding: int = 0
) -> Map:
    """What sees `kernel` pixels of x for each of its own, `stride` apart, with zeros around the map. apply: the same without."""
    size = tuple((extent + 2 * padding - side) // stride + 1 for extent, side in zip(x.size, kernel, strict=True))

    def part(*spans: Span) -> Tensor:
        seen = [
            (a * stride - padding, (b - 1) * stride - padding + side)
            for (a, b), side in zip(spans, kernel, strict=True)
        ]
        return apply(_with_zeros(x, seen))

    return Map(x.sweep, channels, (size[0], size[1]), part)


def _with_zeros(x: Map, spans: Sequence[Span]) -> Tensor:
    """A part of a map that may reach beyond its border."""
    inside = [(max(0, a), min(extent, b)) for (a, b), extent in zip(spans, x.size, strict=True)]
    (top, bottom), (left, right) = ((first - a, b - last) for (a, b), (first, last) in zip(spans, inside, strict=True))
    part = x.part(*inside)
    return F.pad(part, (left, right, top, bottom)) if top or bottom or left or right else part


def _transposed(
    x: Map,
    channels: int,
    kernel: int,
    apply: Callable[[Tensor], Tensor],
    stride: int,
    padding: int,
    output_padding: int,
) -> Map:
    """The transpose of such a window with one stride and kernel each way. apply: the same without padding, each pixel of its
    input being spread over `kernel` pixels."""
    size = tuple((extent - 1) * stride - 2 * padding + kernel + output_padding for extent in x.size)

    def part(*spans: Span) -> Tensor:
        # Pixel o gets what the pixels i give with o = i stride - padding + j, for j from 0 to kernel - 1.
        seen = [(-(-(a + padding - kernel + 1) // stride), (b - 1 + padding) // stride + 1) for a, b in spans]
        result = apply(_with_zeros(x, seen))
        starts = [a + padding - first * stride for (a, _), (first, _) in zip(spans, seen, strict=True)]
        rows, columns = (slice(start, start + b - a) for start, (a, b) in zip(starts, spans, strict=True))
        return result[:, :, rows, columns]

    return Map(x.sweep, channels, (size[0], size[1]), part)


def padded(x: Map, widths: tuple[int, int, int, int], first: int) -> Map:
    """As `Pad2d`: widths left, right, top, bottom; first: where the mirror stands."""
    left, right, top, bottom = widths

    def part(*spans: Span) -> Tensor:
        seen = [
            torch.tensor([mirrored(at - before, extent, first) for at in range(*span)])
            for span, before, extent in zip(spans, (top, left), x.size, strict=True)
        ]
        region = x.part(*((int(places.min()), int(places.max()) + 1) for places in seen))
        for dim, places in zip((2, 3), seen, strict=True):
            places = places - places.min()
            if len(places) != region.shape[dim] or (places.diff() != 1).any():
                region = region.index_select(dim, places.to(region.device))
        return region

    return Map(x.sweep, x.channels, (x.size[0] + top + bottom, x.size[1] + left + right), part)


# ---- torch's functions ------------------------------------------------------------------------------------------------


def _both(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _one(value: int | Sequence[int]) -> int:
    first, second = _both(value)
    if first != second:
        raise unsupported("a window that is not square")
    return first


def _conv2d(
    x: Map,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Map:
    kernel = [_one(dilation) * (side - 1) + 1 for side in weight.shape[2:]]

    def apply(part: Tensor) -> Tensor:
        return F.conv2d(part, weight, bias, stride, 0, dilation, groups)

    return _windowed(x, weight.shape[0], (kernel[0], kernel[1]), apply, _one(stride), _one(padding))


def _conv_transpose2d(
    x: Map, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Map:  # fmt: skip
    if _one(dilation) != 1:
        raise unsupported("a dilated transposed convolution")

    def apply(part: Tensor) -> Tensor:
        return F.conv_transpose2d(part, weight, bias, stride, 0, 0, groups)

    kernel = _one(weight.shape[2:])
    return _transposed(x, weight.shape[1] * groups, kernel, apply, _one(stride), _one(padding), _one(output_padding))


def _interpolate(x: Map, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any) -> Map:
    if scale_factor != 2 or mode != "nearest":
        raise unsupported("interpolate")

    def part(*spans: Span) -> Tensor:
        region = x.part(*((a // 2, (b - 1) // 2 + 1) for a, b in spans))
        rows, columns = (slice(a % 2, a % 2 + b - a) for a, b in spans)
        return F.interpolate(region, scale_factor=2)[:, :, rows, columns]

    return Map(x.sweep, x.channels, (2 * x.size[0], 2 * x.size[1]), part)


RULES |= {"conv2d": _conv2d, "conv_transpose2d": _conv_transpose2d, "interpolate": _interpolate}

# ---- our own layers ---------------------------------------------------------------------------------------------------


@contextmanager
def on_maps(network: nn.Module) -> Iterator[None]:
    """Inside, the layers that are not made of torch's functions take maps, too."""
    layers = [layer for layer in network.modules() if type(layer) in _LAYERS]
    try:
        for layer in layers:
            layer.forward = functools.partial(_LAYERS[type(layer)], layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _pad2d(layer: Pad2d, x: Map) -> Map:
    return padded(x, layer.widths, layer.first)


def _blur_downsample(layer: BlurDownsample, x: Map) -> Map:
    kernel = layer.filt.shape[2]
    smaller = _windowed(layer.pad(x), x.channels, (kernel, kernel), lambda part: blurred(part, layer.filt, 0, 2), 2)
    return x.sweep.kept(smaller)


def _doubled(layer: Doubled, x: Map) -> Map:
    return _interpolate(x, scale_factor=layer.scale_factor, mode=layer.mode)


def _blur_upsample(layer: BlurUpsample, x: Map) -> Map:
    def apply(part: Tensor) -> Tensor:
        return spread(part, layer.filt, 0, (0, 0))

    return _transposed(layer.pad(x), x.channels, layer.filt.shape[2], apply, 2, 3, layer.output_padding[0])


def _blur(layer: Blur, x: Map) -> Map:
    kernel = layer.kernel.repeat(x.channels, 1, 1, 1)
    side = kernel.shape[2]
    return _windowed(
        x, x.channels, (side, side), lambda part: blurred(part, kernel, 0, layer.stride), layer.stride, layer.padding
    )


def _instance_norm(layer: InstanceNorm2d, x: Map) -> Map:
    x, mean, squares = x.sweep.statistics(x)
    scale = (squares / (x.size[0] * x.size[1]) + EPSILON).rsqrt()
    if not layer.affine:
        return _scaled(x, mean, scale, torch.zeros_like(mean), layer.slope)
    return _scaled(x, mean, scale * layer.weight.double().cpu(), layer.bias.double().cpu(), layer.slope)


def _layer_norm(layer: LayerNorm2d, x: Map) -> Map:
    x, mean, squares = x.sweep.statistics(x)
    pixels = x.size[0] * x.size[1]
    whole = mean.mean()
    variance = (squares + pixels * (mean - whole).square()).sum() / (pixels * x.channels - layer.sample)
    deviation = variance.sqrt() + EPSILON if layer.sample else (variance + EPSILON).sqrt()
    scale = layer.gain.double().cpu() / deviation
    return _scaled(x, whole.expand_as(scale), scale, layer.shift.double().cpu(), slope=1.0)


def _scaled(x: Map, mean: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Map:
    """Of each channel (x - mean) scale + shift, then an activation."""

    def part(rows: Span, columns: Span) -> Tensor:
        y = x.part(rows, columns)
        dtype = torch.promote_types(y.dtype, torch.float32)
        less, factor, more = (each.to(y.device, dtype)[:, None, None] for each in (mean, scale, shift))
        return F.leaky_relu(torch.addcmul(more, y.to(dtype) - less, factor), slope).to(y.dtype)

    return Map(x.sweep, x.channels, x.size, part)


_LAYERS: dict[type[nn.Module], Callable[..., Map]] = {
    Pad2d: _pad2d, BlurDownsample: _blur_downsample, BlurUpsample: _blur_upsample, Blur: _blur,
    InstanceNorm2d: _instance_norm, LayerNorm2d: _layer_norm, Doubled: _doubled,
}  # fmt: skip
