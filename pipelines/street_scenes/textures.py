"""Noise textures, made once per process and looked up by every scene."""

from functools import cache

import numpy as np

SIDE = 256  # texels; every texture tiles


@cache
def noise(stream: int, roughness: float) -> np.ndarray:
    """A tileable texture, float32 (SIDE, SIDE), values -1..1 with zero mean: noise whose amplitude falls as
    1/frequency^roughness (0: grain, 1: dirt, 1.5: clouds).

    Values are whole multiples of 1/127, so that the last bits of a platform's FFT do not reach the pictures.
    """
    white = np.random.Generator(np.random.Philox(key=[stream, 0])).random((SIDE, SIDE)) - 0.5
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    frequency[0, 0] = np.inf
    texture = np.fft.irfft2(np.fft.rfft2(white) / frequency**roughness, s=(SIDE, SIDE))
    texture = np.round((texture / (2.5 * texture.std())).clip(-1, 1) * 127) / 127
    texture = texture.astype(np.float32)
    texture.setflags(write=False)
    return texture


def look_up(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The texel at (u, v), nearest, wrapping; u and v are float arrays in texels."""
    flat = (v.astype(np.int32) & (SIDE - 1)) * SIDE + (u.astype(np.int32) & (SIDE - 1))
    return texture.ravel().take(flat)


def look_up_smooth(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The same, bilinear: for textures whose texels grow larger than a pixel."""
    u0, v0 = np.floor(u), np.floor(v)
    du, dv = u - u0, v - v0
    left, right = u0.astype(np.int32) & (SIDE - 1), (u0.astype(np.int32) + 1) & (SIDE - 1)
    top, bottom = (v0.astype(np.int32) & (SIDE - 1)) * SIDE, ((v0.astype(np.int32) + 1) & (SIDE - 1)) * SIDE
    flat = texture.ravel()
    upper = flat.take(top + left) * (1 - du) + flat.take(top + right) * du
    lower = flat.take(bottom + left) * (1 - du) + flat.take(bottom + right) * du
    return upper * (1 - dv) + lower * dv
