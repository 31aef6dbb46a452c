"""What lies beside the street: houses with their hedges, open ground with trees, walls and fences."""

from functools import partial

from pipelines.street_scenes import things
from pipelines.street_scenes.buildings import building
from pipelines.street_scenes.draw import NEAREST, Canvas, Colour, Material, Random
from pipelines.street_scenes.ground import PAVEMENT
from pipelines.street_scenes.layout import Layout
from pipelines.street_scenes.plan import STREET_END, Plan, Scenery, band

FENCES: tuple[Colour, ...] = ((84, 92, 84), (150, 118, 84), (60, 62, 66), (196, 192, 182))
WALLS: tuple[Colour, ...] = ((168, 140, 116), (176, 170, 158), (150, 96, 78), (190, 180, 160))


def lots(canvas: Canvas, draws: Random, layout: Layout, plan: Plan, side: int) -> Scenery:
    """Buildings and open ground along one side."""
    scenery: Scenery = []
    z = draws.between(0.7, 3.0)
    style = draws.unit()  # one street has one kind of house, more or less
    while z < STREET_END - 8:
        length = draws.between(9, 20)
        if plan.junction is not None and z < plan.junction < z + length + 2:
            length = plan.junction - z
        if plan.in_junction(z):
            z += 1.0
            continue
        if length > 3:
            is_open = draws.chance(layout.open_lots)
            fill = _open_lot if is_open else _built_lot
            contents: Scenery = []
            fill(canvas, draws, layout, plan, side, z, length, style, contents)
            # All of a lot lies behind what stands at the kerb before it.
            contents.sort(key=lambda item: -item[0])
            scenery += [(z + length - 1e-4 * k, paint) for k, (_, paint) in enumerate(contents)]
        z += length + (draws.between(0.5, 4.0) if draws.chance(0.3) else 0.0)
    return scenery


def _built_lot(
    canvas: Canvas, draws: Random, layout: Layout, plan: Plan, side: int, z: float, length: float, style: float,
    scenery: Scenery,
) -> None:  # fmt: skip
    setback = draws.between(2.0, 5.0) if draws.chance(0.25) else 0.0
    front = plan.front(side) + side * setback
    floors = draws.whole(*layout.floors)
    scenery.append((z, partial(
        building, canvas, draws, side=side, floors=floors, style=style, sun=plan.sun,
        near=(plan.at(front, z), z), far=(plan.at(front, z + length), z + length),
    )))  # fmt: skip
    if setback:
        if draws.chance(layout.hedges * 2):
            _hedge(canvas, draws, plan, side, z, z + length, scenery)
        else:
            _barrier(canvas, draws, layout, plan, side, z, z + length, scenery)
    elif draws.chance(layout.hedges * 0.4):
        _hedge(canvas, draws, plan, side, z + 1, z + length - 1, scenery)


def _open_lot(
    canvas: Canvas, draws: Random, layout: Layout, plan: Plan, side: int, z: float, length: float, style: float,
    scenery: Scenery,
) -> None:  # fmt: skip
    front = plan.front(side)
    if draws.chance(0.4):  # paved, not grown
        plane = canvas.ground_plane()
        yard = canvas.surface("sidewalk", draws.vary(PAVEMENT, 0.2), plane=plane, material=Material.ASPHALT)
        scenery.append((1e3 + z, partial(band, canvas, plan, yard, front, front + side * 40, z, z + length)))
    if draws.chance(layout.lot_trees):
        for k in range(draws.whole(2, 5)):
            tz, tx = z + draws.between(0.1, 0.9) * length, front + side * draws.between(2.5, 14)
            height = draws.between(*layout.tree_height)
            if tz > 4:
                scenery.append((tz + 0.5, partial(planted_tree, canvas, draws, plan, tx, tz, height)))
            if k < 2:
                bush = partial(things.bush, canvas, draws, plan.at(front + side * draws.between(1.5, 8), tz), tz,
                               draws.between(0.8, 2.2))  # fmt: skip
                scenery.append((tz + 0.4, bush))
    if draws.chance(layout.hedges):
        _hedge(canvas, draws, plan, side, z, z + length, scenery)
    else:
        _barrier(canvas, draws, layout, plan, side, z, z + length, scenery)


def planted_tree(canvas: Canvas, draws: Random, plan: Plan, lateral: float, z: float, height: float) -> None:
    x = plan.at(lateral, z)
    things.tree(canvas, draws, x, z, height, sun=-1.0 if plan.sun[0] > 0 else 1.0)
    _cast_crown(canvas, plan, x, z, height)


def _cast_crown(canvas: Canvas, plan: Plan, x: float, z: float, height: float) -> None:
    if z > 60:
        return
    dx, dz = plan.sun
    wide, middle = 0.3 * height, 0.62 * height
    cx, cz = x + dx * middle, z + dz * middle
    octagon = ((1, 0.4), (0.4, 1), (-0.4, 1), (-1, 0.4), (-1, -0.4), (-0.4, -1), (0.4, -1), (1, -0.4))
    canvas.cast([(cx + a * wide * (1 + 0.5 * abs(dx)), cz + b * wide) for a, b in octagon])
    canvas.cast([(x - 0.12, z), (x + 0.12, z), (cx + 0.12, cz), (cx - 0.12, cz)])


def _screen(
    canvas: Canvas, plan: Plan, side: int, z1: float, z2: float, height: float, name: str, material: Material,
    colours: tuple[Colour, Colour], params: tuple[float, float, float, float], inset: float,
) -> None:  # fmt: skip
    """An upright band along the front of the lots."""
    z1 = max(z1, NEAREST)
    lateral = plan.front(side) + side * inset
    x1, x2 = plan.at(lateral, z1), plan.at(lateral, z2)
    light = 0.82 if side * plan.sun[0] < 0 else 1.05
    surface = canvas.surface(
        name, *colours, plane=canvas.receding_plane(x1, z1, x2, z2), material=material, light=light, params=params
    )
    canvas.polygon(surface, [(x1, 0, z1), (x1, height, z1), (x2, height, z2), (x2, 0, z2)])


def _hedge(canvas: Canvas, draws: Random, plan: Plan, side: int, z1: float, z2: float, scenery: Scenery) -> None:
    height = draws.between(0.8, 1.7)
    green = draws.vary(draws.among(things.LEAVES), 0.15)
    shade = (green[0] * 0.45, green[1] * 0.5, green[2] * 0.5)
    scenery.append((z1 - 0.1, partial(
        _screen, canvas, plan, side, z1, z2, height, "vegetation", Material.FOLIAGE, (green, shade),
        (-0.5, height, 0.0, 0.0), 0.1,
    )))  # fmt: skip


def _barrier(
    canvas: Canvas, draws: Random, layout: Layout, plan: Plan, side: int, z1: float, z2: float, scenery: Scenery
) -> None:
    """A wall, a fence or nothing."""
    if draws.chance(layout.walls):
        colour, height = draws.vary(draws.among(WALLS), 0.1), draws.between(0.9, 2.4)
        joint = (colour[0] * 0.7, colour[1] * 0.7, colour[2] * 0.7)
        scenery.append((z1 - 0.1, partial(
            _screen, canvas, plan, side, z1, z2, height, "wall", Material.MASONRY, (colour, joint),
            (0.9, 0.38, height, 0.0), 0.1,
        )))  # fmt: skip
    elif draws.chance(layout.fences):
        colour, height = draws.vary(draws.among(FENCES), 0.1), draws.between(0.9, 1.9)
        behind = (colour[0] * 0.35 + 34, colour[1] * 0.35 + 40, colour[2] * 0.35 + 28)
        scenery.append((z1 - 0.1, partial(
            _screen, canvas, plan, side, z1, z2, height, "fence", Material.RAILING, (colour, behind),
            (draws.between(0.25, 0.45), height, 0.0, 0.0), 0.1,
        )))  # fmt: skip
