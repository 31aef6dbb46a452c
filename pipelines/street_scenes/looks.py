"""The appearances of a drawn scene: surfaces become light, haze and then a game's, a camera's or a painter's picture."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

from pipelines.street_scenes.draw import COLUMN, GROUND, OVERSAMPLE, Drawn, Material, Random
from pipelines.street_scenes.materials import Weather, shade
from pipelines.street_scenes.painting import painted
from pipelines.street_scenes.samples import take_samples

LookName = Literal["game", "camera", "painting"]
LOOK_NAMES = get_args(LookName)  # the order of their streams of random numbers


@dataclass(frozen=True, kw_only=True)
class Sky:
    """The hour and the weather: colours are RGB, 0..255."""

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    cloud: tuple[float, float, float]
    light: tuple[float, float, float]  # what white ground looks like in the sun, 255 is neutral
    cover: float  # 0 clear … 1 overcast


@dataclass(frozen=True, kw_only=True)
class Look:
    saturation: float  # of every surface, 1 leaves it
    gain: float  # of every surface's brightness
    shadow: float  # how much of the light a shadow takes
    soft_shadows: bool
    texture: float  # strength of the materials' noise, 1 is as designed
    haze: tuple[float, float]  # least and greatest share of haze per metre
    cloud_crispness: float  # contrast of the clouds' edges
    skies: tuple[Sky, ...]


GAME = Look(
    saturation=1.45, gain=1.12, shadow=0.44, soft_shadows=False, texture=0.45, haze=(0.0006, 0.002),
    cloud_crispness=3.0,
    skies=(
        Sky(zenith=(52, 122, 214), horizon=(176, 216, 246), cloud=(255, 255, 255), light=(262, 256, 244), cover=0.3),
        Sky(zenith=(46, 118, 216), horizon=(160, 210, 250), cloud=(255, 255, 255), light=(264, 258, 240), cover=0.05),
        Sky(zenith=(74, 126, 202), horizon=(255, 214, 152), cloud=(255, 238, 214), light=(276, 244, 204), cover=0.35),
        Sky(zenith=(60, 144, 220), horizon=(206, 232, 240), cloud=(250, 252, 255), light=(256, 256, 250), cover=0.55),
    ),
)  # fmt: skip
CAMERA = Look(
    saturation=0.52, gain=0.98, shadow=0.28, soft_shadows=True, texture=1.25, haze=(0.003, 0.008), cloud_crispness=1.0,
    skies=(
        Sky(zenith=(208, 216, 218), horizon=(234, 236, 232), cloud=(244, 244, 240), light=(250, 254, 248), cover=0.9),
        Sky(zenith=(176, 192, 204), horizon=(226, 228, 222), cloud=(238, 238, 234), light=(254, 252, 242), cover=0.6),
        Sky(zenith=(190, 198, 198), horizon=(218, 218, 208), cloud=(224, 224, 216), light=(240, 246, 240), cover=1.0),
        Sky(zenith=(198, 202, 206), horizon=(238, 230, 212), cloud=(240, 236, 226), light=(256, 248, 234), cover=0.7),
    ),
)  # fmt: skip
PAINTING = Look(
    saturation=1.25, gain=1.1, shadow=0.4, soft_shadows=True, texture=0.6, haze=(0.0005, 0.0015), cloud_crispness=1.5,
    skies=(
        Sky(zenith=(92, 130, 196), horizon=(250, 214, 170), cloud=(255, 236, 214), light=(278, 246, 200), cover=0.5),
        Sky(zenith=(70, 150, 180), horizon=(246, 226, 176), cloud=(252, 226, 220), light=(270, 250, 206), cover=0.4),
    ),
)  # fmt: skip
LOOKS: dict[str, Look] = {"game": GAME, "camera": CAMERA, "painting": PAINTING}


def picture(drawn: Drawn, draws: Random, look_name: LookName) -> np.ndarray:
    """The scene in that look, uint8 (H, W, 3) RGB. draws: the look's own stream of random numbers."""
    look = LOOKS[look_name]
    rgb_CHW = _lit(drawn, draws, look, draws.among(look.skies))
    if look_name == "painting":
        return painted(_to_image(rgb_CHW), draws)
    return _developed(rgb_CHW) if look_name == "game" else _exposed(rgb_CHW, draws)


def _lit(drawn: Drawn, draws: Random, look: Look, sky: Sky) -> np.ndarray:
    """The picture's radiance, float32 (3, H, W), 0..255 and a little beyond."""
    canvas, samples = drawn.canvas, take_samples(drawn)
    table, ids = samples.table, samples.ids
    haze = np.float32(draws.between(*look.haze))
    weather = Weather(sky.cover, look.cloud_crispness, (draws.between(0, 256), draws.between(0, 256)))
    mix, light, inverse_z = shade(canvas, samples, look.texture, weather)
    material = table[COLUMN["material"]]
    receives = (look.shadow / 255 * np.isin(material, GROUND)).astype(np.float32)
    light *= 1 - _shadow(drawn, look).ravel().take(samples.places) * receives.take(ids)
    clear = inverse_z / (inverse_z + haze)  # exp(-haze · Z) to first order, and cheaper
    open_sky = np.flatnonzero((material == Material.SKY).take(ids))
    clear[open_sky] = np.sqrt((1 - samples.y.take(open_sky) / canvas.y0).clip(0, 1))

    first, second = _recoloured(table, look, sky)
    light *= clear
    mix *= light
    clear -= 1
    height, width = canvas.height // OVERSAMPLE, canvas.width // OVERSAMPLE
    out = np.empty((3, height * width), np.float32)
    for channel in range(3):
        colour = first[channel].take(ids)
        colour *= light
        extra = (second[channel] - first[channel]).take(ids)
        extra *= mix
        colour += extra
        colour -= sky.horizon[channel] * clear
        samples.resolve(colour, out[channel])
    return out.reshape(3, height, width)


def _shadow(drawn: Drawn, look: Look) -> np.ndarray:
    """How much of the sun is kept from every raster pixel, uint8 (H, W)."""
    if not look.soft_shadows:
        return drawn.shadow
    image = Image.fromarray(drawn.shadow).reduce(4).filter(ImageFilter.BoxBlur(1))
    return np.asarray(image.resize(drawn.shadow.shape[::-1], Image.Resampling.BILINEAR))


def _recoloured(table: np.ndarray, look: Look, sky: Sky) -> tuple[np.ndarray, np.ndarray]:
    """The two colours of every surface in this look, each float32 (3, surfaces)."""
    colours = []
    for name in ("red", "red2"):
        rgb = table[COLUMN[name] : COLUMN[name] + 3]
        grey = rgb.mean(axis=0)
        rgb = (grey + look.saturation * (rgb - grey)).clip(4, 250) * look.gain
        colours.append(rgb * (np.array(sky.light, np.float32) / 255)[:, None])
    colours[0][:, 0], colours[1][:, 0] = sky.zenith, sky.cloud
    return colours[0], colours[1]


def _to_image(rgb_CHW: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(rgb_CHW.clip(0, 255) + 0.5, 0, 2).astype(np.uint8))


def _developed(rgb_CHW: np.ndarray) -> np.ndarray:
    """A game's tone curve: more contrast around the middle."""
    x = rgb_CHW * np.float32(1 / 255)
    x = x.clip(0, 1)
    return _to_image(255 * (0.6 * x + 0.4 * x * x * (3 - 2 * x)))


def _exposed(rgb_CHW: np.ndarray, draws: Random) -> np.ndarray:
    """A camera's: blur, vignette, cast, flat contrast, grain."""
    height, width = rgb_CHW.shape[1:]
    soft = Image.fromarray(_to_image(rgb_CHW)).filter(ImageFilter.BoxBlur(height * draws.between(0.003, 0.006)))
    x = np.moveaxis(np.asarray(soft), 2, 0).astype(np.float32)
    cast = np.array([draws.between(0.95, 1.0), draws.between(0.98, 1.02), draws.between(0.93, 1.0)], np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    vignette = 1 - draws.between(0.1, 0.24) * (np.linspace(-1, 1, width, dtype=np.float32) ** 2 + 0.8 * y**2) / 1.8
    exposure, black, amount = draws.between(0.82, 0.94), draws.between(12, 24), draws.between(0.03, 0.06)
    x *= (cast * exposure)[:, None, None] * vignette
    x += black
    grain = np.frombuffer(draws.generator.bytes(4 * height * width), np.uint8).reshape(4, height, width)
    noise = grain.astype(np.float32)
    noise -= 127.5
    noise *= amount
    x += noise[3]  # in brightness, and a little in colour
    x += 0.5 * noise[:3]
    return _to_image(x)
