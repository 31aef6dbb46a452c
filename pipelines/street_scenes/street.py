"""Composes a street: its plan is drawn at random from a layout, then painted from the far end to the camera."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pipelines.street_scenes import things, vehicles
from pipelines.street_scenes.buildings import building
from pipelines.street_scenes.draw import NEAREST, Canvas, Colour, Drawn, Draws, Material
from pipelines.street_scenes.layout import Layout

STREET_END = 130.0  # metres: beyond it only the horizon
ROAD: Colour = (98, 98, 102)
PAVEMENT: Colour = (158, 150, 142)
KERB: Colour = (188, 184, 178)
GRASS: Colour = (112, 140, 66)
PAINT: Colour = (232, 232, 226)
FENCES: tuple[Colour, ...] = ((84, 92, 84), (150, 118, 84), (60, 62, 66), (196, 192, 182))
WALLS: tuple[Colour, ...] = ((168, 140, 116), (176, 170, 158), (150, 96, 78), (190, 180, 160))


@dataclass(frozen=True)
class Plan:
    """The street itself. X of its lines are lateral metres from the camera at Z = 0; `at` bends them."""

    middle: float  # centre line of the road
    half: float  # half the road's width
    verge: float  # width of the grass strip beside the kerb, 0 for none
    walk: float  # width of the sidewalk
    bend: float  # metres sideways per square metre ahead
    sun: tuple[float, float]  # where the shadow of 1 m of height falls: (dX, dZ)
    junction: float | None  # Z where a crossing street begins
    tram: bool

    JUNCTION_WIDTH = 12.0

    def at(self, lateral: float, z: float) -> float:
        return lateral + self.bend * z * z

    def kerb(self, side: int) -> float:
        return self.middle + side * self.half

    def front(self, side: int) -> float:
        """Where the lots begin."""
        return self.middle + side * (self.half + self.verge + self.walk)

    def in_junction(self, z: float, margin: float = 0.0) -> bool:
        return self.junction is not None and -margin < z - self.junction < self.JUNCTION_WIDTH + margin


def compose(draws: Draws, layout: Layout, size: tuple[int, int]) -> Drawn:
    """Draw a whole scene for a picture of that size (width, height)."""
    lanes = draws.among((2, 2, 3, 4))
    half = lanes * draws.between(1.6, 1.85) + draws.between(0.9, 2.0)
    offset = draws.between(0.9, 1.9) if lanes < 4 else draws.between(2.0, 5.0)
    plan = Plan(
        middle=-offset,
        half=half,
        verge=draws.between(1.2, 2.6) if draws.chance(layout.green_verge) else 0.0,
        walk=draws.between(2.4, 4.2),
        bend=draws.between(-1, 1) ** 3 * 0.002,
        sun=_sun(draws),
        junction=draws.between(16, 45) if draws.chance(layout.junctions) else None,
        tram=draws.chance(layout.trams),
    )
    canvas = Canvas(
        size,
        camera_height=draws.between(1.35, 2.3),
        focal=draws.between(0.95, 1.3),
        horizon=draws.between(0.4, 0.5),
        vanish=draws.between(-0.16, 0.16),
    )
    if plan.sun[1] < -1:  # low and ahead: in view
        canvas.sun = canvas.project(plan.sun[0] / plan.sun[1], canvas.camera_height - 1 / plan.sun[1], 1.0)
    _horizon(canvas, draws, layout, plan)
    _ground(canvas, draws, plan)
    _markings(canvas, draws, plan, lanes)
    scenery: list[tuple[float, Callable[[], None]]] = []
    for side in (-1, 1):
        scenery += _lots(canvas, draws, layout, plan, side)
        scenery += _kerbside(canvas, draws, layout, plan, side)
    scenery += _traffic(canvas, draws, layout, plan)
    scenery += _people(canvas, draws, layout, plan)
    for _, paint in sorted(scenery, key=lambda item: -item[0]):
        paint()
    return canvas.drawn()


def _sun(draws: Draws) -> tuple[float, float]:
    """Plan.sun: mostly high and from a side, now and then low ahead."""
    sideways = draws.among((-1, 1))
    if draws.chance(0.15):
        return sideways * draws.between(0.4, 2.0), -draws.between(2.6, 3.6)
    return sideways * draws.between(0.4, 1.3), draws.between(-0.5, 0.7)


# The ground and what closes the view


def _horizon(canvas: Canvas, draws: Draws, layout: Layout, plan: Plan) -> None:
    """Hills or woods along the horizon and the houses far off, as ridges of raster points."""
    wooded = draws.chance(layout.wooded_horizon)
    width, height, y0 = canvas.width, canvas.height, canvas.y0
    rise = draws.between(0.03, 0.09)
    for layer, z in ((1.0, 900.0), (0.55, 450.0)):
        if wooded:
            ridge = canvas.surface(
                "vegetation", draws.vary((84, 112, 56)), (44, 62, 40), z=z, material=Material.FOLIAGE, params=(-9, 60, 0, 0)
            )
        else:
            ridge = canvas.surface("terrain", draws.vary((142, 138, 92), 0.12), z=z)
        steps = 24
        level = draws.unit()
        points = [(width * 1.0, y0 + 2.0), (0.0, y0 + 2.0)]
        for k in range(steps + 1):
            level = 0.72 * level + 0.28 * draws.unit() * 1.6
            points.append((width * k / steps, y0 - height * rise * layer * (0.35 + level)))
        canvas.raster_polygon(ridge, points)
    if draws.chance(0.5):
        for _ in range(draws.whole(3, 9)):  # towers of the far town
            tower = canvas.surface("building", draws.vary((150, 150, 150), 0.2), z=draws.between(300, 500))
            x = canvas.x0 + draws.between(-0.7, 0.7) * height
            w, h = draws.between(0.008, 0.03) * height, draws.between(0.02, 0.09) * height
            canvas.raster_polygon(tower, [(x - w, y0 + 1), (x + w, y0 + 1), (x + w, y0 - h), (x - w, y0 - h)])


_STATIONS = (NEAREST, 2.0, 5.0, 9.0, 14.0, 21.0, 30.0, 42.0, 60.0, 85.0, STREET_END)


def _band(canvas: Canvas, plan: Plan, surface: int, left: float, right: float, near: float = 0.0, far: float = 1e9) -> None:
    """A strip of ground along the street between two laterals."""
    stations = [near, *(z for z in _STATIONS if near < z < far), min(far, STREET_END)]
    stations[0] = max(stations[0], NEAREST)
    points = [(plan.at(left, z), z) for z in stations] + [(plan.at(right, z), z) for z in reversed(stations)]
    canvas.ground(surface, points)


def _ground(canvas: Canvas, draws: Draws, plan: Plan) -> None:
    plane = canvas.ground_plane()
    land = canvas.surface("terrain", draws.vary(GRASS, 0.15), (88, 98, 52), plane=plane, material=Material.GRASS)
    canvas.raster_polygon(
        land, [(0, canvas.y0), (canvas.width, canvas.y0), (canvas.width, canvas.height), (0, canvas.height)]
    )
    grey = draws.vary(ROAD, 0.12)
    asphalt = canvas.surface("road", grey, plane=plane, material=Material.ASPHALT)
    slabs = canvas.surface(
        "sidewalk", draws.vary(PAVEMENT), (112, 106, 102), plane=plane, material=Material.PAVING,
        params=(draws.between(0.8, 1.6), draws.between(0.8, 1.6), 0, 0),
    )  # fmt: skip
    kerb = canvas.surface("sidewalk", draws.vary(KERB), plane=plane, material=Material.ASPHALT)
    gutter = canvas.surface("road", (grey[0] * 0.72, grey[1] * 0.72, grey[2] * 0.72), plane=plane, material=Material.ASPHALT)
    for side in (-1, 1):
        outer = plan.front(side)
        _band(canvas, plan, slabs, outer, plan.kerb(side))
        if plan.verge:
            verge = canvas.surface("terrain", draws.vary(GRASS, 0.15), (88, 98, 52), plane=plane, material=Material.GRASS)
            _band(canvas, plan, verge, plan.kerb(side), plan.kerb(side) + side * plan.verge)
    _band(canvas, plan, asphalt, plan.kerb(-1), plan.kerb(1))
    for side in (-1, 1):
        _band(canvas, plan, gutter, plan.kerb(side) - side * 0.3, plan.kerb(side))
        _band(canvas, plan, kerb, plan.kerb(side), plan.kerb(side) + side * 0.22)
    if plan.junction is not None:
        z1, z2 = plan.junction + 2.5, plan.junction + plan.JUNCTION_WIDTH - 2.5
        x = plan.at(plan.middle, plan.junction)
        canvas.ground(slabs, [(x - 90, z1 - 2.5), (x + 90, z1 - 2.5), (x + 90, z2 + 2.5), (x - 90, z2 + 2.5)])
        canvas.ground(asphalt, [(x - 90, z1), (x + 90, z1), (x + 90, z2), (x - 90, z2)])
        _band(canvas, plan, asphalt, plan.kerb(-1), plan.kerb(1), plan.junction - 0.1, z2 + 2.6)
    for _ in range(draws.whole(0, 4)):  # mends of darker or lighter asphalt
        patch = canvas.surface("road", draws.vary(grey, 0.2), plane=plane, material=Material.ASPHALT)
        x, z = plan.middle + draws.between(-0.8, 0.8) * plan.half, draws.between(3, 25)
        _band(canvas, plan, patch, x - draws.between(0.3, 1.1), x + draws.between(0.3, 1.1), z, z + draws.between(1, 9))
    if plan.tram:
        rail = canvas.surface("road", (70, 68, 68), plane=plane, material=Material.ASPHALT)
        bed = canvas.surface("road", draws.vary((122, 112, 104)), plane=plane, material=Material.ASPHALT)
        _band(canvas, plan, bed, plan.middle - 1.3, plan.middle + 1.3)
        for dx in (-0.72, 0.72):
            _band(canvas, plan, rail, plan.middle + dx - 0.06, plan.middle + dx + 0.06)


def _markings(canvas: Canvas, draws: Draws, plan: Plan, lanes: int) -> None:
    plane = canvas.ground_plane()
    white = canvas.surface("road", draws.vary(PAINT), plane=plane, material=Material.ASPHALT)
    yellow = canvas.surface("road", (226, 178, 60), plane=plane, material=Material.ASPHALT)
    stop = STREET_END if plan.junction is None else plan.junction - 3.4
    start = STREET_END if plan.junction is None else plan.junction + plan.JUNCTION_WIDTH + 3
    centre = yellow if draws.chance(0.35) else white
    phase, solid, edge = draws.between(0, 6), draws.chance(0.25), draws.chance(0.45)
    driven = plan.half - 1.4
    for k in range(1, lanes):
        x = plan.middle + driven * (2 * k / lanes - 1)
        middle = 2 * k == lanes
        if plan.tram and middle:
            continue
        colour = centre if middle else white
        if middle and solid:
            for near, far in ((NEAREST, stop), (start, STREET_END)):
                _band(canvas, plan, colour, x - 0.07, x + 0.07, near, far)
            continue
        z = 1.0 + phase
        while z < 80:
            if z + 3 < stop or z > start:
                _band(canvas, plan, colour, x - 0.08, x + 0.08, z, z + 3)
            z += 7.0
    if edge:
        for side in (-1, 1):
            x = plan.middle + side * driven
            _band(canvas, plan, white, x - 0.06, x + 0.06, NEAREST, stop)
            _band(canvas, plan, white, x - 0.06, x + 0.06, start, STREET_END)
    if plan.junction is not None:
        _band(canvas, plan, white, plan.middle + 0.1, plan.kerb(1) - 0.5, stop - 0.3, stop + 0.2)
        x = plan.kerb(-1) + 0.5
        while x < plan.kerb(1) - 0.5:  # zebra crossing
            _band(canvas, plan, white, x, x + 0.5, stop + 0.9, stop + 3.3)
            x += 1.0


# Beside the street

Scenery = list[tuple[float, Callable[[], None]]]


def _lots(canvas: Canvas, draws: Draws, layout: Layout, plan: Plan, side: int) -> Scenery:
    """Buildings and open ground along one side, as (Z, paint)."""
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
            fill(canvas, draws, layout, plan, side, z, length, style, scenery)
        z += length + (draws.between(0.5, 4.0) if draws.chance(0.3) else 0.0)
    return scenery


def _built_lot(
    canvas: Canvas, draws: Draws, layout: Layout, plan: Plan, side: int, z: float, length: float, style: float,
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
    canvas: Canvas, draws: Draws, layout: Layout, plan: Plan, side: int, z: float, length: float, style: float,
    scenery: Scenery,
) -> None:  # fmt: skip
    front = plan.front(side)
    if draws.chance(0.4):  # paved, not grown
        plane = canvas.ground_plane()
        yard = canvas.surface("sidewalk", draws.vary(PAVEMENT, 0.2), plane=plane, material=Material.ASPHALT)
        scenery.append((1e3 + z, partial(_band, canvas, plan, yard, front, front + side * 40, z, z + length)))
    if draws.chance(layout.lot_trees):
        for k in range(draws.whole(2, 5)):
            tz, tx = z + draws.between(0.1, 0.9) * length, front + side * draws.between(2.5, 14)
            height = draws.between(*layout.tree_height)
            if tz > 4:
                scenery.append((tz + 0.5, partial(_tree, canvas, draws, plan, tx, tz, height)))
            if k < 2:
                bush = partial(things.bush, canvas, draws, plan.at(front + side * draws.between(1.5, 8), tz), tz,
                               draws.between(0.8, 2.2))  # fmt: skip
                scenery.append((tz + 0.4, bush))
    if draws.chance(layout.hedges):
        _hedge(canvas, draws, plan, side, z, z + length, scenery)
    else:
        _barrier(canvas, draws, layout, plan, side, z, z + length, scenery)


def _tree(canvas: Canvas, draws: Draws, plan: Plan, lateral: float, z: float, height: float) -> None:
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


def _hedge(canvas: Canvas, draws: Draws, plan: Plan, side: int, z1: float, z2: float, scenery: Scenery) -> None:
    height = draws.between(0.8, 1.7)
    green = draws.vary(draws.among(things.LEAVES), 0.15)
    shade = (green[0] * 0.45, green[1] * 0.5, green[2] * 0.5)
    scenery.append((z1 - 0.1, partial(
        _screen, canvas, plan, side, z1, z2, height, "vegetation", Material.FOLIAGE, (green, shade),
        (-0.5, height, 0.0, 0.0), 0.1,
    )))  # fmt: skip


def _barrier(
    canvas: Canvas, draws: Draws, layout: Layout, plan: Plan, side: int, z1: float, z2: float, scenery: Scenery
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


def _kerbside(canvas: Canvas, draws: Draws, layout: Layout, plan: Plan, side: int) -> Scenery:
    """Trees, lamps, lights, signs and parked vehicles along one kerb."""
    scenery: Scenery = []
    strip = plan.kerb(side) + side * (plan.verge / 2 if plan.verge else 0.7)
    z = draws.between(4, 10)
    while z < STREET_END - 10:
        if draws.chance(layout.street_trees) and not plan.in_junction(z, 2):
            height = draws.between(*layout.tree_height)
            if draws.chance(layout.palms):
                scenery.append((z, partial(things.palm, canvas, draws, plan.at(strip, z), z, height + 1)))
            else:
                scenery.append((z, partial(_tree, canvas, draws, plan, strip, z, height)))
        z += draws.between(7, 9)
    z = draws.between(6, 18)
    while z < 95:
        if not plan.in_junction(z, 1):
            scenery.append((z, partial(things.lamp_post, canvas, draws, plan.at(strip, z), z, -side * 1.7)))
            if draws.chance(layout.signs):
                sign_z = z + draws.between(2, 7)
                scenery.append((sign_z, partial(things.traffic_sign, canvas, draws, plan.at(strip, sign_z), sign_z)))
        z += draws.between(13, 22)
    z = draws.between(2.5, 9)
    while z < 80:
        if draws.chance(layout.parked_cars) and not plan.in_junction(z, 7):
            x = plan.at(plan.kerb(side) - side * 1.2, z)
            kind = vehicles.truck if draws.chance(0.06) else vehicles.car
            rear = draws.chance(0.9 if side > 0 else 0.1)
            if z > 3.5:
                scenery.append((z, partial(kind, canvas, draws, x, z, rear=rear, sun_shift=plan.sun)))
        z += 6.5
    if plan.junction is not None:
        for z, chance in ((plan.junction - 0.5, 0.85), (plan.junction + plan.JUNCTION_WIDTH + 0.5, 0.6)):
            if draws.chance(chance):
                reach = -side * draws.between(2.5, 4.5) if draws.chance(0.5) else 0.0
                light = partial(things.traffic_light, canvas, draws, plan.at(plan.kerb(side) + side * 0.5, z), z, reach)
                scenery.append((z, light))
    return scenery


# On the street


def _traffic(canvas: Canvas, draws: Draws, layout: Layout, plan: Plan) -> Scenery:
    scenery: Scenery = []
    taken: list[tuple[int, float]] = []
    if plan.tram:
        z = draws.between(14, 55)
        scenery.append((z, partial(vehicles.tram, canvas, draws, plan.at(plan.middle, z), z, rear=draws.chance(0.5),
                                   sun_shift=plan.sun)))  # fmt: skip
    for _ in range(draws.count(layout.traffic)):
        side, z = draws.among((-1, 1)), 5.0 + 60 * draws.unit() ** 1.4
        if side > 0 and z < 9:
            z += 6  # room ahead of the camera
        if any(other == side and abs(z - there) < 14 for other, there in taken):
            continue
        taken.append((side, z))
        share = draws.unit() / layout.heavy_vehicles if layout.heavy_vehicles else 3.0
        kind = vehicles.truck if share < 1 else vehicles.bus if share < 2 else vehicles.car
        lane = side * (plan.half - 1.4) * draws.between(0.4, 0.56) + (side * 0.9 if plan.tram else 0.0)
        x = plan.at(plan.middle + lane, z)
        scenery.append((z, partial(kind, canvas, draws, x, z, rear=side > 0, sun_shift=plan.sun)))
    return scenery


def _people(canvas: Canvas, draws: Draws, layout: Layout, plan: Plan) -> Scenery:
    scenery: Scenery = []
    for _ in range(draws.count(layout.pedestrians)):
        side, z = draws.among((-1, 1)), 4.5 + 45 * draws.unit() ** 1.3
        lateral = plan.kerb(side) + side * (plan.verge + draws.between(0.5, plan.walk - 0.3))
        if plan.junction is not None and draws.chance(0.2):  # on the zebra crossing
            z, lateral = plan.junction - 1.3, plan.middle + draws.between(-1, 1) * plan.half
        scenery.append((z, partial(_walker, canvas, draws, plan, lateral, z)))
    for _ in range(draws.count(layout.cyclists)):
        side, z = draws.among((-1, 1)), 6 + 26 * draws.unit()
        kind, edge = draws.unit(), plan.kerb(side)
        if kind < 0.4:  # parked on the sidewalk
            x = plan.at(edge + side * (plan.verge + 0.6), z)
            paint = partial(things.bicycle, canvas, draws, x, z, sideways=draws.chance(0.7), ridden=False)
        elif kind < 0.7:
            x = plan.at(edge - side * draws.between(2.4, 3.0), z)
            paint = partial(things.bicycle, canvas, draws, x, z, sideways=draws.chance(0.25), ridden=True)
        else:
            x = plan.at(edge - side * draws.between(2.6, 3.2), z)
            paint = partial(things.motorcycle, canvas, draws, x, z, ridden=draws.chance(0.6))
        scenery.append((z, paint))
    return scenery


def _walker(canvas: Canvas, draws: Draws, plan: Plan, lateral: float, z: float) -> None:
    x, (dx, dz) = plan.at(lateral, z), plan.sun
    things.person(canvas, draws, x, z)
    canvas.cast([(x - 0.2, z), (x + 0.2, z), (x + 0.15 + 1.7 * dx, z + 1.7 * dz), (x - 0.15 + 1.7 * dx, z + 1.7 * dz)])
