"""The ground of a street and what closes the view: hills, road, sidewalks, lane markings."""

from pipelines.street_scenes.draw import NEAREST, Canvas, Colour, Material, Random
from pipelines.street_scenes.layout import Layout
from pipelines.street_scenes.plan import JUNCTION_WIDTH, STREET_END, Plan, band

ROAD: Colour = (98, 98, 102)
PAVEMENT: Colour = (158, 150, 142)
KERB: Colour = (188, 184, 178)
GRASS: Colour = (112, 140, 66)
PAINT: Colour = (232, 232, 226)


def horizon(canvas: Canvas, draws: Random, layout: Layout, plan: Plan) -> None:
    """Hills or woods along the horizon and the houses far off, as ridges of raster points."""
    wooded = draws.chance(layout.wooded_horizon)
    width, height, y0 = canvas.width, canvas.height, canvas.y0
    rise = draws.between(0.03, 0.09)
    for layer, z in ((1.0, 900.0), (0.55, 450.0)):
        if wooded:
            ridge = canvas.surface(
                "vegetation",
                draws.vary((84, 112, 56)),
                (44, 62, 40),
                z=z,
                material=Material.FOLIAGE,
                params=(-9, 60, 0, 0),
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


def ground(canvas: Canvas, draws: Random, plan: Plan) -> None:
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
    gutter = canvas.surface(
        "road", (grey[0] * 0.72, grey[1] * 0.72, grey[2] * 0.72), plane=plane, material=Material.ASPHALT
    )
    for side in (-1, 1):
        outer = plan.front(side)
        band(canvas, plan, slabs, outer, plan.kerb(side))
        if plan.verge:
            verge = canvas.surface(
                "terrain", draws.vary(GRASS, 0.15), (88, 98, 52), plane=plane, material=Material.GRASS
            )
            band(canvas, plan, verge, plan.kerb(side), plan.kerb(side) + side * plan.verge)
    band(canvas, plan, asphalt, plan.kerb(-1), plan.kerb(1))
    for side in (-1, 1):
        band(canvas, plan, gutter, plan.kerb(side) - side * 0.3, plan.kerb(side))
        band(canvas, plan, kerb, plan.kerb(side), plan.kerb(side) + side * 0.22)
    if plan.junction is not None:
        z1, z2 = plan.junction + 2.5, plan.junction + JUNCTION_WIDTH - 2.5
        x = plan.at(plan.middle, plan.junction)
        canvas.ground(slabs, [(x - 90, z1 - 2.5), (x + 90, z1 - 2.5), (x + 90, z2 + 2.5), (x - 90, z2 + 2.5)])
        canvas.ground(asphalt, [(x - 90, z1), (x + 90, z1), (x + 90, z2), (x - 90, z2)])
        band(canvas, plan, asphalt, plan.kerb(-1), plan.kerb(1), plan.junction - 0.1, z2 + 2.6)
    for _ in range(draws.whole(0, 4)):  # mends of darker or lighter asphalt
        patch = canvas.surface("road", draws.vary(grey, 0.2), plane=plane, material=Material.ASPHALT)
        x, z = plan.middle + draws.between(-0.8, 0.8) * plan.half, draws.between(3, 25)
        band(canvas, plan, patch, x - draws.between(0.3, 1.1), x + draws.between(0.3, 1.1), z, z + draws.between(1, 9))
    if plan.tram:
        rail = canvas.surface("road", (70, 68, 68), plane=plane, material=Material.ASPHALT)
        bed = canvas.surface("road", draws.vary((122, 112, 104)), plane=plane, material=Material.ASPHALT)
        band(canvas, plan, bed, plan.middle - 1.3, plan.middle + 1.3)
        for dx in (-0.72, 0.72):
            band(canvas, plan, rail, plan.middle + dx - 0.06, plan.middle + dx + 0.06)


def markings(canvas: Canvas, draws: Random, plan: Plan) -> None:
    plane = canvas.ground_plane()
    white = canvas.surface("road", draws.vary(PAINT), plane=plane, material=Material.ASPHALT)
    yellow = canvas.surface("road", (226, 178, 60), plane=plane, material=Material.ASPHALT)
    stop = STREET_END if plan.junction is None else plan.junction - 3.4
    start = STREET_END if plan.junction is None else plan.junction + JUNCTION_WIDTH + 3
    centre = yellow if draws.chance(0.35) else white
    phase, solid, edge = draws.between(0, 6), draws.chance(0.25), draws.chance(0.45)
    driven = plan.half - 1.4
    for k in range(1, plan.lanes):
        x = plan.middle + driven * (2 * k / plan.lanes - 1)
        middle = 2 * k == plan.lanes
        if plan.tram and middle:
            continue
        colour = centre if middle else white
        if middle and solid:
            for near, far in ((NEAREST, stop), (start, STREET_END)):
                band(canvas, plan, colour, x - 0.07, x + 0.07, near, far)
            continue
        z = 1.0 + phase
        while z < 80:
            if z + 3 < stop or z > start:
                band(canvas, plan, colour, x - 0.08, x + 0.08, z, z + 3)
            z += 7.0
    if edge:
        for side in (-1, 1):
            x = plan.middle + side * driven
            band(canvas, plan, white, x - 0.06, x + 0.06, NEAREST, stop)
            band(canvas, plan, white, x - 0.06, x + 0.06, start, STREET_END)
    if plan.junction is not None:
        band(canvas, plan, white, plan.middle + 0.1, plan.kerb(1) - 0.5, stop - 0.3, stop + 0.2)
        x = plan.kerb(-1) + 0.5
        while x < plan.kerb(1) - 0.5:  # zebra crossing
            band(canvas, plan, white, x, x + 0.5, stop + 0.9, stop + 3.3)
            x += 1.0
