"""Composes a street: its plan is drawn at random from a layout, then painted from the far end to the camera."""

from functools import partial

from pipelines.street_scenes import things, vehicles
from pipelines.street_scenes.draw import Canvas, Drawn, Random
from pipelines.street_scenes.ground import ground, horizon, markings
from pipelines.street_scenes.layout import Layout
from pipelines.street_scenes.lots import lots, planted_tree
from pipelines.street_scenes.plan import JUNCTION_WIDTH, STREET_END, Plan, Scenery, draw_plan


def compose(draws: Random, layout: Layout, size: tuple[int, int]) -> Drawn:
    """Draw a whole scene for a picture of that size (width, height)."""
    plan = draw_plan(draws, layout)
    canvas = Canvas(
        size,
        camera_height=draws.between(1.35, 2.3),
        focal=draws.between(0.95, 1.3),
        horizon=draws.between(0.4, 0.5),
        vanish=draws.between(-0.16, 0.16),
    )
    if plan.sun[1] < -1:  # low and ahead: in view
        canvas.sun = canvas.project(plan.sun[0] / plan.sun[1], canvas.camera_height - 1 / plan.sun[1], 1.0)
    horizon(canvas, draws, layout, plan)
    ground(canvas, draws, plan)
    markings(canvas, draws, plan)
    scenery: Scenery = []
    for side in (-1, 1):
        scenery += lots(canvas, draws, layout, plan, side)
        scenery += _kerbside(canvas, draws, layout, plan, side)
    scenery += _traffic(canvas, draws, layout, plan)
    scenery += _people(canvas, draws, layout, plan)
    for _, paint in sorted(scenery, key=lambda item: -item[0]):
        paint()
    return canvas.drawn()


def _kerbside(canvas: Canvas, draws: Random, layout: Layout, plan: Plan, side: int) -> Scenery:
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
                scenery.append((z, partial(planted_tree, canvas, draws, plan, strip, z, height)))
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
        for z, chance in ((plan.junction - 0.5, 0.85), (plan.junction + JUNCTION_WIDTH + 0.5, 0.6)):
            if draws.chance(chance):
                reach = -side * draws.between(2.5, 4.5) if draws.chance(0.5) else 0.0
                light = partial(things.traffic_light, canvas, draws, plan.at(plan.kerb(side) + side * 0.5, z), z, reach)
                scenery.append((z, light))
    return scenery


# On the street


def _traffic(canvas: Canvas, draws: Random, layout: Layout, plan: Plan) -> Scenery:
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


def _people(canvas: Canvas, draws: Random, layout: Layout, plan: Plan) -> Scenery:
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


def _walker(canvas: Canvas, draws: Random, plan: Plan, lateral: float, z: float) -> None:
    x, (dx, dz) = plan.at(lateral, z), plan.sun
    things.person(canvas, draws, x, z)
    canvas.cast([(x - 0.2, z), (x + 0.2, z), (x + 0.15 + 1.7 * dx, z + 1.7 * dz), (x - 0.15 + 1.7 * dx, z + 1.7 * dz)])
