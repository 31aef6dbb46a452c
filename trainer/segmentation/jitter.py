"""Random changes of an image's look that leave its classes alone: what a segmenter trained on one domain should not rely on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.draws import Draws

# Of each factor or size the most that it differs from 1, or 0, at strength 1.
BRIGHTNESS, CONTRAST, SATURATION = 0.5, 0.5, 0.9
HUE = math.pi / 3  # radians
GAMMA = 0.6  # of its logarithm
BLUR = 1.5  # pixels, the standard deviation
NOISE = 0.08  # of the range of a colour, the standard deviation
REACH = 4  # pixels that a blur looks at on either side

# RGB to luminance and two differences of colours, which a change of hue turns (NTSC's YIQ).
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
_RGB = torch.linalg.inv(torch.tensor(_YIQ, dtype=torch.float64)).tolist()  # and back


def jittered(images: Tensor, slots: Tensor, strength: float, draws: Draws) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1], float32 or wider, with another look for each slot (b,) of the global batch, by the seed
    and the step: in turn gamma, brightness, contrast, saturation, hue, blur and noise, all uniform up to `strength` times the
    most. Their labels stay right.
    The same shape, range and memory format. strength: from 0 to 1.
    """
    device, dtype = images.device, images.dtype
    # On the CPU, so that an image looks the same on every device; the noise is drawn where it is used.
    uniforms = torch.stack([stream.uniform(7) for stream in draws.per_slot(slots, "jitter")])
    drawn = strength * uniforms.to(device, dtype, non_blocking=True).T[:, :, None, None, None]
    signed = 2 * drawn - strength
    x = (images + 1) / 2
    x = x.clamp(1e-6, 1) ** (GAMMA * signed[0]).exp()
    x = x * (1 + BRIGHTNESS * signed[1])
    mean = _mixed(x, _YIQ[:1]).mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + CONTRAST * signed[2])
    x = _recoloured(x, 1 + SATURATION * signed[3], HUE * signed[4]).clamp(0, 1)
    x = _blurred(x, BLUR * drawn[5])
    noise = torch.stack(
        [
            stream.normal(*images.shape[1:], dtype=dtype)
            for stream in draws.per_slot(slots, "jitter noise", device=device)
        ]
    )
    x = (x + NOISE * drawn[6] * noise).clamp(0, 1) * 2 - 1
    return torch.empty_like(images).copy_(x)


def _mixed(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """Sums of the colours with these factors, one for each row: (b, rows, h, w)."""
    return torch.stack([sum(factor * x[:, k] for k, factor in enumerate(row)) for row in rows], 1)  # type: ignore[misc]


def _recoloured(x: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """The differences of colours multiplied and turned, (b, 1, 1, 1) each, at the same luminance."""
    y, i, q = _mixed(x, _YIQ).split(1, 1)
    cosine, sine = saturation * hue.cos(), saturation * hue.sin()
    turned = torch.cat([y, cosine * i - sine * q, sine * i + cosine * q], 1)
    return _mixed(turned, _RGB)


def _blurred(x: Tensor, deviation: Tensor) -> Tensor:
    """With a Gaussian of this standard deviation (b, 1, 1, 1) in pixels; the images are continued by their borders."""
    for dim in (2, 3):
        padding = (0, 0, REACH, REACH) if dim == 2 else (REACH, REACH, 0, 0)
        padded, length = F.pad(x, padding, mode="replicate"), x.shape[dim]
        total, weights = torch.zeros_like(x), torch.zeros_like(deviation)
        for offset in range(-REACH, REACH + 1):
            weight = (-(offset**2) / (2 * deviation.square().clamp(min=1e-4))).exp()
            total, weights = total + weight * padded.narrow(dim, REACH + offset, length), weights + weight
        x = total / weights
    return x
