"""How the two colours of a surface mix at each pixel, and how bright they are: one function per material."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.street_scenes.draw import COLUMN, OVERSAMPLE, Canvas, Material
from pipelines.street_scenes.samples import RasterSamples
from pipelines.street_scenes.textures import look_up, look_up_smooth, noise

GRAIN, DIRT, LEAVES, CLOUDS = (1, 0.2), (2, 1.0), (3, 0.75), (4, 1.6)  # arguments of noise()


@dataclass(frozen=True)
class Weather:
    """cover: 0 clear … 1 overcast. crispness: contrast of the clouds' edges. offset: where the clouds are, texels."""

    cover: float
    crispness: float
    offset: tuple[float, float]


@dataclass
class Pixels:
    """The pixels of one material, each array float32 (n,) unless said otherwise.

    x, y: raster coordinates. z: depth. across, above: world X and Y, metres. ids: rows of the table, int (n,).
    mix: the share of the second colour, to be filled. light: a factor of brightness, to be changed.
    """

    canvas: Canvas
    table: np.ndarray
    ids: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    across: np.ndarray
    above: np.ndarray
    mix: np.ndarray
    light: np.ndarray
    texture: float
    weather: Weather

    def parameter(self, k: int) -> np.ndarray:
        return self.table[COLUMN["p0"] + k].take(self.ids)

    def upright_pixels(self, metres: np.ndarray | float) -> np.ndarray:
        """How many picture pixels that length takes, upright."""
        return metres * (self.canvas.scale / OVERSAMPLE) / self.z

    def level_pixels(self, metres: np.ndarray | float) -> np.ndarray:
        """The same along a wall, which a slant compresses by dZ/dx = slant · Z²."""
        slant = np.abs(self.table[COLUMN["inverse_z_x"]]).take(self.ids)
        across = self.z * (OVERSAMPLE / self.canvas.scale)
        return metres / np.maximum(across, OVERSAMPLE * slant * self.z * self.z)


def _inside(margin: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The share of a pixel that lies inside an edge: margin is the distance to it, in periods of `pixels` pixels."""
    return (margin * pixels + 0.5).clip(0, 1)


def _resolved(pixels: np.ndarray) -> np.ndarray:
    """1 where a pattern whose period takes that many pixels can be drawn, falling to 0 where it would alias."""
    return ((pixels - 1.5) * 0.5).clip(0, 1)


def _fraction(values: np.ndarray) -> np.ndarray:
    return values - np.floor(values)


def _sky(p: Pixels) -> None:
    """Clouds on a plane overhead, so that they shrink towards the horizon; the sun where it is in view."""
    elevation = (p.canvas.y0 - p.y) / p.canvas.height
    far = 1 / (elevation + 0.12)
    u = (p.x - p.canvas.x0) / p.canvas.height * far * 46 + p.weather.offset[0]
    clouds = look_up_smooth(noise(*CLOUDS), u, far * 30 + p.weather.offset[1])
    p.mix[:] = ((clouds + p.weather.cover * 2 - 1) * p.weather.crispness + 0.3).clip(0, 1)
    p.light -= 0.1 * p.mix * (1 - p.mix)
    if p.canvas.sun is not None:
        distance = np.hypot(p.x - p.canvas.sun[0], p.y - p.canvas.sun[1]) / p.canvas.height
        glow = (0.045 / (distance + 0.01)).clip(0, 1) * (1 - 0.8 * p.weather.cover)
        p.mix += (1 - p.mix) * glow
        p.light += 0.35 * glow


def _asphalt(p: Pixels) -> None:
    near = 1 / (1 + p.z * 0.1)
    p.light += p.texture * 0.13 * near * look_up(noise(*GRAIN), p.across * 42, p.z * 42)
    p.light += p.texture * 0.09 * look_up(noise(*DIRT), p.across * 9, p.z * 3)


def _paving(p: Pixels) -> None:
    across, along = _fraction(p.across / p.parameter(0)), _fraction(p.z / p.parameter(1))
    p.mix[:] = ((across < 0.07) | (along < 0.07)) * (0.55 / (1 + (p.z * 0.06) ** 2))
    p.light += p.texture * 0.12 * look_up(noise(*DIRT), p.across * 14, p.z * 6)


def _grass(p: Pixels) -> None:
    blades = look_up(noise(*GRAIN), p.across * 24, p.z * 10)
    p.mix[:] = (0.4 + (0.2 + 0.25 * p.texture) * blades / (1 + p.z * 0.04)).clip(0, 1)
    p.light += 0.14 * look_up(noise(*DIRT), p.across * 6, p.z * 3)


def _facade(p: Pixels) -> None:
    """Rows of windows; the ground floor has wide ones. Parameters: window pitch, floor height, glazed share, seed."""
    along = p.across + p.z  # runs along a receding wall and across one that faces the camera
    pitch, floor, glazed, seed = (p.parameter(k) for k in range(4))
    u, v = along / pitch, p.above / floor
    column, storey = np.floor(u), np.floor(v)
    u -= column
    v -= storey
    wide, high = p.level_pixels(pitch), p.upright_pixels(floor)
    shop = storey < 1
    beside = np.where(shop, 0.42, glazed * 0.5) - np.abs(u - 0.5)
    above = np.where(shop, 0.36, 0.3) - np.abs(v - 0.52)
    pane = _inside(beside, wide) * _inside(above, high)
    frame = _inside(beside + 0.05, wide) * _inside(above + 0.05, high) - pane
    # Glass mirrors a brighter sky towards its top, and some rooms have curtains.
    chance = look_up(noise(*GRAIN), column * 7 + seed, storey * 13 + seed)
    glass = (0.92 - 0.5 * (v - 0.2).clip(0, 1) - 0.28 * chance).clip(0.15, 1)
    resolved, average = _resolved(wide), glazed * 0.48
    p.mix[:] = average + resolved * (pane * glass - average)
    p.light += resolved * (0.12 * frame + 0.07 * p.texture * look_up(noise(*GRAIN), along * 30, p.above * 30))
    p.light += p.texture * 0.12 * look_up(noise(*DIRT), along * 8, p.above * 8)


def _masonry(p: Pixels) -> None:
    """Courses of stones. Parameters: length and height of a stone, height of the wall."""
    along = p.across + p.z
    length, height = p.parameter(0), p.parameter(1)
    course = p.above / height
    row = np.floor(course)
    wide, high = p.level_pixels(length), p.upright_pixels(height)
    stone = _inside(0.45 - np.abs(_fraction(along / length + 0.5 * row) - 0.5), wide)
    stone *= _inside(0.43 - np.abs(course - row - 0.5), high)
    coping = p.above > p.parameter(2) - 0.15
    p.mix[:] = 0.7 * (1 - stone) * ~coping * _resolved(np.minimum(wide, high))
    p.light += coping * 0.12 + p.texture * 0.14 * look_up(noise(*DIRT), along * 14, p.above * 14)


def _railing(p: Pixels) -> None:
    """Bars between two rails. Parameters: pitch of the bars, height."""
    pitch, height = p.parameter(0), p.parameter(1)
    wide = p.level_pixels(pitch)
    gap = _inside(0.32 - np.abs(_fraction((p.across + p.z) / pitch) - 0.5), wide)
    rail = (p.above > height - 0.12) | (np.abs(p.above - 0.25) < 0.06)
    p.mix[:] = ~rail * (0.6 + _resolved(wide) * (gap - 0.6))


def _foliage(p: Pixels) -> None:
    """Leaves in clumps, lighter at the top. Parameters: heights of the lowest and the highest leaf."""
    bottom, top = p.parameter(0), p.parameter(1)
    fine = np.minimum(26, 520 / p.z)  # texels per metre: no finer than the eye resolves
    clumps = look_up(noise(*LEAVES), (p.across + p.z) * fine, p.above * fine)
    p.mix[:] = (0.38 - (0.38 + 0.3 * p.texture) * clumps).clip(0, 1)
    p.light *= 0.72 + 0.42 * ((p.above - bottom) / (top - bottom)).clip(0, 1)


def _gradient(p: Pixels) -> None:
    """From the first colour to the second between two heights (the parameters)."""
    bottom, top = p.parameter(0), p.parameter(1)
    p.mix[:] = ((p.above - bottom) / (top - bottom)).clip(0, 1)


_PAINTERS: dict[Material, Callable[[Pixels], None]] = {
    Material.SKY: _sky,
    Material.ASPHALT: _asphalt,
    Material.PAVING: _paving,
    Material.GRASS: _grass,
    Material.FACADE: _facade,
    Material.MASONRY: _masonry,
    Material.RAILING: _railing,
    Material.FOLIAGE: _foliage,
    Material.GRADIENT: _gradient,
}


def shade(
    canvas: Canvas, samples: RasterSamples, texture: float, weather: Weather
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every sample, float32 (n,): the share of the second colour, the brightness, and 1/Z."""
    table = samples.table
    inverse_z = table[COLUMN["inverse_z_x"]].take(samples.ids)
    inverse_z *= samples.x
    inverse_z += table[COLUMN["inverse_z"]].take(samples.ids)
    slope = table[COLUMN["inverse_z_y"]].take(samples.ids)
    slope *= samples.y
    inverse_z += slope
    np.maximum(inverse_z, 1e-4, out=inverse_z)
    mix = np.zeros_like(inverse_z)
    light = table[COLUMN["light"]].take(samples.ids)
    material = table[COLUMN["material"]].astype(np.uint8).take(samples.ids)
    for kind, paint in _PAINTERS.items():
        where = np.flatnonzero(material == kind)
        if not where.size:
            continue
        x, y, z = samples.x.take(where), samples.y.take(where), 1 / inverse_z.take(where)
        unit = z / canvas.scale
        pixels = Pixels(
            canvas, table, samples.ids.take(where), x, y, z,
            across=(x - canvas.x0) * unit, above=canvas.camera_height - (y - canvas.y0) * unit,
            mix=np.zeros_like(z), light=light.take(where), texture=texture, weather=weather,
        )  # fmt: skip
        paint(pixels)
        mix[where], light[where] = pixels.mix, pixels.light
    return mix, light, inverse_z
