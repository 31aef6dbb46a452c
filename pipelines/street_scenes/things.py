"""The things that stand and move in a street, each drawn at its place: X, Z of its foot, in metres."""

from functools import cache

import numpy as np

from pipelines.street_scenes.draw import Canvas, Colour, Material, Random

TYRE: Colour = (28, 28, 30)
CHROME: Colour = (150, 150, 152)
STEEL: Colour = (112, 114, 116)
SKIN: tuple[Colour, ...] = ((226, 180, 150), (198, 146, 112), (140, 94, 66), (92, 62, 46))
CLOTHES: tuple[Colour, ...] = (
    (40, 48, 78), (38, 38, 42), (150, 40, 44), (210, 206, 196), (60, 92, 140), (96, 84, 62), (190, 140, 50),
    (58, 96, 70),
)  # fmt: skip
PAINTS: tuple[Colour, ...] = (
    (200, 200, 204), (40, 42, 48), (120, 124, 130), (170, 34, 36), (36, 70, 140), (224, 222, 214), (60, 92, 80),
    (196, 150, 50), (84, 24, 36), (70, 110, 150),
)  # fmt: skip
LEAVES: tuple[Colour, ...] = ((74, 118, 46), (92, 130, 50), (58, 102, 50), (108, 132, 58))
BARK: tuple[Colour, ...] = ((88, 74, 62), (76, 68, 60), (104, 92, 80))
GLASS: Colour = (36, 46, 58)
SKY_ON_GLASS: Colour = (150, 176, 196)


# Vegetation


@cache
def crown_outlines() -> tuple[tuple[tuple[float, float], ...], ...]:
    """Ragged discs of radius about 1: 16 outlines of 20 points."""
    generator = np.random.Generator(np.random.Philox(key=[0, 77]))
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    outlines = []
    for _ in range(16):
        radius = 0.92 + 0.13 * np.sin(angle * 3 + 6.28 * generator.random()) + 0.24 * (generator.random(20) - 0.5)
        points = np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)
        outlines.append(tuple(map(tuple, points.round(4).tolist())))
    return tuple(outlines)


def _blob(canvas: Canvas, draws: Random, surface: int, x: float, y: float, z: float, rx: float, ry: float) -> None:
    unit = canvas.scale / z
    cx, cy = canvas.project(x, y, z)
    rx, ry, outline = rx * unit, ry * unit, draws.among(crown_outlines())
    if -1.3 * rx < cx < canvas.width + 1.3 * rx:
        canvas.raster_polygon(surface, [(cx + rx * dx, cy + ry * dy) for dx, dy in outline])


def _leaves(canvas: Canvas, colour: Colour, z: float, bottom: float, top: float, light: float) -> int:
    shade = (colour[0] * 0.46, colour[1] * 0.54, colour[2] * 0.54)
    return canvas.surface(
        "vegetation", colour, shade, z=z, material=Material.FOLIAGE, light=light, params=(bottom, top, 0.0, 0.0)
    )


def tree(canvas: Canvas, draws: Random, x: float, z: float, height: float, sun: float) -> None:
    """A broad or slender tree. sun: -1 the light comes from the left, 1 from the right."""
    slender = draws.chance(0.2)
    width = height * (draws.between(0.16, 0.2) if slender else draws.between(0.3, 0.4))
    foot = height * (0.12 if slender else draws.between(0.24, 0.34))
    middle, half = (foot + height) / 2, (height - foot) / 2
    trunk = canvas.surface("vegetation", draws.vary(draws.among(BARK), 0.15), z=z)
    girth = 0.02 * height + 0.05
    canvas.upright(trunk, z, x, [(-girth, 0), (girth, 0), (girth * 0.6, middle), (-girth * 0.6, middle)])
    green = draws.vary(draws.among(LEAVES), 0.12)
    dark, fair, bright = (_leaves(canvas, green, z, foot, height, light) for light in (0.8, 1.0, 1.2))
    _blob(canvas, draws, dark, x, middle, z, width, half)
    # Farther away fewer clumps will do; that must not depend on the size of the picture.
    clumps = 3 if width / z > 0.09 else 1
    for _ in range(clumps):
        dx, dy = draws.between(-0.55, 0.55), draws.between(-0.5, 0.35)
        _blob(canvas, draws, fair, x + dx * width, middle + dy * half, z, width * 0.55, half * 0.5)
    for _ in range(max(1, clumps - 1)):
        dx, dy = draws.between(-0.15, 0.5) * sun, draws.between(0.1, 0.5)
        _blob(canvas, draws, bright, x + dx * width, middle + dy * half, z, width * 0.45, half * 0.38)


def palm(canvas: Canvas, draws: Random, x: float, z: float, height: float) -> None:
    trunk = canvas.surface("vegetation", draws.vary((132, 108, 80)), z=z)
    lean = draws.between(-0.4, 0.4)
    canvas.upright(trunk, z, x, [(-0.18, 0), (0.18, 0), (lean + 0.1, height), (lean - 0.1, height)])
    green = draws.vary((84, 128, 52), 0.1)
    for light, reach in ((0.7, 1.0), (1.1, 0.85)):
        leaf = _leaves(canvas, green, z, height - 2, height + 1, light)
        for k in range(7):
            angle = -0.5 + 4.1 * (k + draws.unit() * 0.6) / 7
            dx, dy = reach * 2.1 * float(np.cos(angle)), reach * 1.3 * float(np.sin(angle))
            tip = (lean + dx, height + dy - 0.55)
            bend = (lean + dx * 0.6, height + dy * 0.75 + 0.35)
            canvas.upright(
                leaf, z, x, [(lean, height - 0.1), bend, tip, (bend[0], bend[1] - 0.4), (lean, height - 0.35)]
            )


def bush(canvas: Canvas, draws: Random, x: float, z: float, height: float) -> None:
    leaves = _leaves(canvas, draws.vary(draws.among(LEAVES), 0.15), z, -0.3, height, draws.between(0.85, 1.1))
    _blob(canvas, draws, leaves, x, height * 0.45, z, height * draws.between(0.7, 1.1), height * 0.55)


# Street furniture


def _post(canvas: Canvas, surface: int, x: float, z: float, height: float, radius: float) -> None:
    canvas.rectangle(surface, x - radius, x + radius, 0, height, z)


def lamp_post(canvas: Canvas, draws: Random, x: float, z: float, reach: float) -> None:
    """reach: how far its arm goes over the road, signed."""
    pole = canvas.surface("pole", draws.vary(STEEL, 0.2), z=z)
    height = draws.between(6.0, 8.0)
    _post(canvas, pole, x, z, height, 0.09)
    canvas.upright(pole, z, x, [(0, height), (reach, height + 0.45), (reach, height + 0.3), (0, height - 0.15)])
    canvas.rectangle(pole, x + reach - 0.3, x + reach + 0.3, height + 0.25, height + 0.45, z)


def traffic_light(canvas: Canvas, draws: Random, x: float, z: float, reach: float = 0.0) -> None:
    """reach: 0 for a plain post; otherwise a second head hangs from an arm of that length (signed) over the road."""
    pole = canvas.surface("pole", draws.vary(STEEL, 0.15), z=z)
    box = canvas.surface("traffic light", (34, 36, 34), z=z)
    lit = draws.among((0, 2, 2, 0, 1))
    heads = [(x, 2.5)]
    if reach:
        _post(canvas, pole, x, z, 5.9, 0.1)
        canvas.upright(pole, z, x, [(0, 5.9), (reach, 6.1), (reach, 5.95), (0, 5.7)])
        heads.append((x + reach, 5.0))
    else:
        _post(canvas, pole, x, z, 3.5, 0.08)
    for cx, bottom in heads:
        canvas.rectangle(box, cx - 0.24, cx + 0.24, bottom, bottom + 1.15, z)
        for k, colour in enumerate(((235, 50, 40), (240, 180, 50), (60, 220, 110))):
            lamp = canvas.surface(
                "traffic light", colour if k == lit else (colour[0] * 0.3, colour[1] * 0.3, colour[2] * 0.3), z=z
            )
            canvas.disc(lamp, cx, bottom + 0.94 - 0.36 * k, z, 0.15, 0.15)


def traffic_sign(canvas: Canvas, draws: Random, x: float, z: float) -> None:
    pole = canvas.surface("pole", STEEL, z=z)
    bottom = draws.between(2.1, 2.5)
    _post(canvas, pole, x, z, bottom + 0.4, 0.045)
    rim, face = (
        canvas.surface("traffic sign", colour, z=z)
        for colour in draws.among((((196, 30, 34), (240, 240, 236)), ((238, 238, 236), (28, 78, 168)),
                                   ((196, 30, 34), (206, 40, 42)), ((230, 180, 40), (240, 200, 60)),
                                   ((238, 238, 236), (30, 120, 70))))
    )  # fmt: skip
    shape, r = draws.whole(0, 2), draws.between(0.38, 0.5)
    for surface, s in ((rim, r), (face, r * 0.72)):
        if shape == 0:
            canvas.disc(surface, x, bottom + r, z, s, s)
        elif shape == 1:
            canvas.upright(surface, z, x, [(-s, bottom + r * 0.8 - s * 0.7), (s, bottom + r * 0.8 - s * 0.7),
                                           (0, bottom + r * 0.8 + s)])  # fmt: skip
        else:
            canvas.rectangle(surface, x - s, x + s, bottom + r - s, bottom + r + s, z)


# People and two-wheelers


def person(canvas: Canvas, draws: Random, x: float, z: float, *, seat: float = 0.0, name: str = "person") -> None:
    """A standing or walking person; with seat > 0 a rider whose hips are at that height."""
    tall = draws.between(1.55, 1.9) if draws.chance(0.88) else draws.between(1.1, 1.4)
    lift = seat - 0.48 * tall if seat else 0.0
    legs, coat, skin, hair = (
        canvas.surface(name, draws.vary(draws.among(palette), 0.15), z=z, light=light)
        for palette, light in ((CLOTHES, 0.85), (CLOTHES, 1.05), (SKIN, 1.0), (BARK, 0.55))
    )
    stride = draws.between(0.05, 0.3)
    bottom = max(0.25, lift) if seat else 0.0
    for side in (-1, 1):
        foot = side * (0.2 if seat else stride)
        canvas.upright(legs, z, x, [(side * 0.16, lift + 0.5 * tall), (0.0, lift + 0.5 * tall), (foot - 0.07, bottom),
                                    (foot + 0.09, bottom)])  # fmt: skip
        hand = (side * draws.between(0.24, 0.34), lift + 0.5 * tall)
        canvas.upright(coat, z, x, [(side * 0.14, lift + 0.82 * tall), (side * 0.24, lift + 0.78 * tall), hand,
                                    (hand[0] - side * 0.1, hand[1])])  # fmt: skip
    canvas.upright(coat, z, x, [(-0.21, lift + 0.82 * tall), (0.21, lift + 0.82 * tall), (0.18, lift + 0.46 * tall),
                                (-0.18, lift + 0.46 * tall)])  # fmt: skip
    canvas.disc(skin, x, lift + 0.915 * tall, z, 0.115, 0.145)
    canvas.disc(hair, x, lift + 0.955 * tall, z, 0.12, 0.09)


def bicycle(canvas: Canvas, draws: Random, x: float, z: float, *, sideways: bool, ridden: bool) -> None:
    frame = canvas.surface("bicycle", draws.vary(draws.among(PAINTS), 0.1), z=z, light=0.9)
    black = canvas.surface("bicycle", TYRE, z=z)
    if sideways:
        for dx in (-0.52, 0.52):
            canvas.ring(black, x + dx, 0.34, z, 0.34, 0.34, 0.07)
        canvas.stroke(frame, [(x - 0.52, 0.34, z), (x - 0.12, 0.36, z), (x + 0.36, 0.8, z), (x - 0.22, 0.8, z),
                              (x - 0.52, 0.34, z)], 0.07)  # fmt: skip
        canvas.stroke(frame, [(x + 0.52, 0.34, z), (x + 0.36, 1.0, z), (x + 0.5, 1.02, z)], 0.06)
        canvas.stroke(black, [(x - 0.12, 0.36, z), (x - 0.25, 0.92, z)], 0.06)
        if ridden:
            person(canvas, draws, x - 0.08, z, seat=0.95, name="rider")
        return
    if ridden:
        person(canvas, draws, x, z, seat=0.95, name="rider")
    canvas.rectangle(black, x - 0.06, x + 0.06, 0, 0.75, z)
    canvas.rectangle(frame, x - 0.3, x + 0.3, 0.96, 1.03, z)


def motorcycle(canvas: Canvas, draws: Random, x: float, z: float, *, ridden: bool) -> None:
    """Seen from behind."""
    body = canvas.surface("motorcycle", draws.vary(draws.among(PAINTS), 0.1), z=z)
    black = canvas.surface("motorcycle", TYRE, z=z)
    lamp = canvas.surface("motorcycle", (220, 50, 44), z=z)
    if ridden:
        person(canvas, draws, x, z, seat=0.92, name="rider")
    canvas.rectangle(black, x - 0.11, x + 0.11, 0, 0.62, z)
    canvas.upright(body, z, x, [(-0.2, 0.5), (0.2, 0.5), (0.28, 0.8), (0.12, 0.95), (-0.12, 0.95), (-0.28, 0.8)])
    canvas.rectangle(black, x - 0.42, x + 0.42, 1.05, 1.12, z)
    canvas.disc(lamp, x, 0.74, z, 0.09, 0.06)
