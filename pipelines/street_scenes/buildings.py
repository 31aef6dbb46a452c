"""Houses: a facade along the street, the end that faces the camera, and a roof."""

from pipelines.street_scenes.draw import Canvas, Colour, Material, Random

FLOOR = 3.1  # metres
FACADES: tuple[Colour, ...] = (
    (196, 164, 120), (206, 190, 158), (176, 112, 88), (150, 144, 138), (210, 204, 192), (188, 150, 132),
    (160, 168, 172), (200, 176, 110), (134, 92, 78), (170, 178, 160),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((150, 84, 66), (96, 88, 86), (120, 72, 60), (82, 86, 94))
PANES: tuple[Colour, ...] = ((58, 76, 96), (48, 58, 70), (78, 98, 118))


def building(
    canvas: Canvas, draws: Random, *, side: int, floors: int, style: float, sun: tuple[float, float],
    near: tuple[float, float], far: tuple[float, float],
) -> None:  # fmt: skip
    """side: -1 left of the street, 1 right. near, far: (X, Z) of the facade's two ends. style: 0..1, modern to old."""
    (x1, z1), (x2, z2) = near, far
    height = floors * FLOOR + draws.between(0.4, 1.2)
    wall, pane = draws.vary(draws.among(FACADES), 0.1), draws.vary(draws.among(PANES), 0.15)
    pitch = draws.between(2.2, 3.6)
    glazed = draws.between(0.6, 0.9) if style < 0.3 else draws.between(0.36, 0.56)
    params = (pitch, FLOOR, glazed, draws.whole(0, 250))
    street_light, end_light = (0.74, 0.96) if side * sun[0] < 0 else (1.06, 0.84)

    depth = draws.between(9, 14)
    end = canvas.surface("building", wall, pane, z=z1, material=Material.FACADE, light=end_light, params=params)
    face = canvas.surface(
        "building", wall, pane, plane=canvas.receding_plane(x1, z1, x2, z2), material=Material.FACADE,
        light=street_light, params=params,
    )  # fmt: skip
    old = style > 0.45 and floors <= 4
    if old:
        _pitched_roof(canvas, draws, side, near, far, height, depth, end)
    canvas.polygon(end, [(x1, 0, z1), (x1, height, z1), (x1 + side * depth, height, z1), (x1 + side * depth, 0, z1)])
    canvas.polygon(face, [(x1, 0, z1), (x1, height, z1), (x2, height, z2), (x2, 0, z2)])
    trim = canvas.surface(
        "building", (wall[0] * 0.8, wall[1] * 0.8, wall[2] * 0.8), plane=canvas.receding_plane(x1, z1, x2, z2),
        light=street_light,
    )  # fmt: skip
    for low, high in ((height - 0.35, height), (FLOOR - 0.2, FLOOR + 0.1)):
        canvas.polygon(trim, [(x1, low, z1), (x1, high, z1), (x2, high, z2), (x2, low, z2)])
    if floors > 1 and draws.chance(0.4):
        _awning(canvas, draws, side, near, far)
    dx, dz = sun[0] * height, sun[1] * height
    canvas.cast([(x1, z1), (x2, z2), (x2 + dx, z2 + dz), (x1 + dx, z1 + dz)])
    canvas.cast([(x1, z1), (x1 + side * depth, z1), (x1 + side * depth + dx, z1 + dz), (x1 + dx, z1 + dz)])


def _pitched_roof(
    canvas: Canvas, draws: Random, side: int, near: tuple[float, float], far: tuple[float, float], eaves: float,
    depth: float, gable: int,
) -> None:  # fmt: skip
    (x1, z1), (x2, z2) = near, far
    ridge, half = eaves + draws.between(2.2, 4.0), side * depth / 2
    tiles = canvas.surface(
        "building", draws.vary(draws.among(ROOFS), 0.12), plane=canvas.receding_plane(x1, z1, x2, z2), light=0.95
    )
    canvas.polygon(tiles, [(x1, eaves, z1), (x1 + half, ridge, z1), (x2 + half, ridge, z2), (x2, eaves, z2)])
    canvas.polygon(gable, [(x1, eaves, z1), (x1 + half, ridge, z1), (x1 + 2 * half, eaves, z1)])


def _awning(canvas: Canvas, draws: Random, side: int, near: tuple[float, float], far: tuple[float, float]) -> None:
    (x1, z1), (x2, z2) = near, far
    cloth = canvas.surface(
        "building", draws.vary(draws.among(((170, 50, 48), (44, 96, 72), (50, 84, 140), (214, 176, 80))), 0.1), z=z1
    )
    u1, u2 = draws.between(0.05, 0.4), draws.between(0.6, 0.95)
    (xa, za), (xb, zb) = ((x1 + (x2 - x1) * u, z1 + (z2 - z1) * u) for u in (u1, u2))
    out = -side * 1.1
    canvas.polygon(cloth, [(xa, 3.0, za), (xa + out, 2.45, za), (xb + out, 2.45, zb), (xb, 3.0, zb)])
