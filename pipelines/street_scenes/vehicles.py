"""Cars, trucks, buses and trams: boxes in perspective, seen from behind or from the front."""

from collections.abc import Sequence

from pipelines.street_scenes.draw import Canvas, Colour, Material, Random
from pipelines.street_scenes.things import CHROME, GLASS, PAINTS, SKY_ON_GLASS, TYRE

BUS_PAINTS: tuple[Colour, ...] = ((214, 170, 40), (180, 40, 44), (210, 210, 206), (50, 110, 90), (60, 90, 160))
REAR_LAMP: Colour = (206, 34, 34)
HEAD_LAMP: Colour = (248, 244, 224)


class _Body:
    """A vehicle at X (its middle), from z (nearest end) to z + length; side: of it, the one that the camera sees."""

    def __init__(self, canvas: Canvas, name: str, x: float, z: float, length: float, width: float) -> None:
        self.canvas, self.name, self.x, self.z, self.far, self.half = canvas, name, x, z, z + length, width / 2
        self.side = -1 if x > 0 else 1
        edge = x + self.side * self.half
        self.shows_side = edge * self.side < -0.1  # not when the camera looks along it or stands before it
        self.flank_plane = canvas.receding_plane(edge, self.z, edge, self.far)

    def paint(self, colour: Colour, light: float = 1.0) -> int:
        return self.canvas.surface(self.name, colour, z=self.z, light=light)

    def glass(self, low: float, high: float) -> int:
        return self.canvas.surface(
            self.name, GLASS, SKY_ON_GLASS, z=self.z, material=Material.GRADIENT, params=(low, high, 0.0, 0.0)
        )

    def end(self, surface: int, outline: Sequence[tuple[float, float]]) -> None:
        """A polygon on the nearest end: (share of the half width, height)."""
        self.canvas.upright(surface, self.z, self.x, [(u * self.half, y) for u, y in outline])

    def flank(self, surface: int, outline: Sequence[tuple[float, float]], inset: float = 0.0) -> None:
        """A polygon on the visible flank: (share of the length from the nearest end, height)."""
        if self.shows_side:
            edge, length = self.x + self.side * (self.half - inset), self.far - self.z
            self.canvas.polygon(surface, [(edge, y, self.z + u * length) for u, y in outline])

    def top(self, surface: int, u1: float, u2: float, height: float, share: float = 1.0) -> None:
        """The lid between two shares of the length, where the camera looks down on it."""
        if height < self.canvas.camera_height:
            half, length = self.half * share, self.far - self.z
            z1, z2 = self.z + u1 * length, self.z + u2 * length
            corners = [(-half, z1), (half, z1), (half, z2), (-half, z2)]
            self.canvas.polygon(surface, [(self.x + dx, height, z) for dx, z in corners])

    def wheel(self, surface: int, hub: int, u: float, radius: float) -> None:
        if self.shows_side:
            edge, z = self.x + self.side * self.half, self.z + u * (self.far - self.z)
            # A disc in the plane of the flank: its width shrinks with the slant of the view.
            slant = abs(edge) / z
            self.canvas.disc(surface, edge, radius, z, radius * min(1.0, slant * 1.3) + 0.02, radius)
            self.canvas.disc(hub, edge, radius, z, 0.55 * radius * min(1.0, slant * 1.3), 0.55 * radius)

    def shadow(self, sun_shift: tuple[float, float], height: float) -> None:
        """On the ground: beneath, and where the sun throws it."""
        x1, x2, z1, z2 = self.x - self.half, self.x + self.half, self.z, self.far
        dx, dz = sun_shift[0] * height, sun_shift[1] * height
        corners = [(x1, z1), (x2, z1), (x2, z2), (x1, z2)]
        thrown = [(x + dx, z + dz) for x, z in corners]
        self.canvas.cast(corners)
        self.canvas.cast(thrown)
        for k in (0, 1):  # what lies between the two, swept by the diagonals
            self.canvas.cast([corners[k], thrown[k], thrown[k + 2], corners[k + 2]])


def car(canvas: Canvas, draws: Random, x: float, z: float, *, rear: bool, sun_shift: tuple[float, float]) -> None:
    """rear: seen from behind, else from the front."""
    tall = draws.chance(0.3)  # a van or off-roader
    body = _Body(canvas, "car", x, z, draws.between(3.8, 4.7), draws.between(1.7, 1.9))
    belt, roof, low = (1.05, draws.between(1.7, 1.95), 0.3) if tall else (0.9, draws.between(1.4, 1.52), 0.24)
    colour = draws.vary(draws.among(PAINTS), 0.12)
    shell, flank, lid = body.paint(colour), body.paint(colour, 0.8), body.paint(colour, 1.2)
    tyre, hub, trim = body.paint(TYRE), body.paint(CHROME, 0.8), body.paint((48, 50, 54))
    glass = body.glass(belt, roof + 0.3)
    first, last = (0.04, 0.74) if rear else (0.3, 0.96)  # where the cabin begins and ends along the car
    if tall:
        first, last = (0.0, 0.78) if rear else (0.24, 1.0)
    body.shadow(sun_shift, 1.2)
    for u in (0.18, 0.8):
        body.wheel(tyre, hub, u, 0.33)
    body.flank(flank, [(0, low), (1, low), (1, belt), (0, belt)])
    for u in (0.18, 0.8):
        body.wheel(tyre, hub, u, 0.32)
    body.top(lid, 0, 1, belt)
    body.flank(flank, [(first, belt), (last, belt), (last - 0.1, roof), (first + 0.1, roof)], 0.1)
    body.flank(glass, [(first + 0.07, belt + 0.03), (last - 0.07, belt + 0.03), (last - 0.13, roof - 0.08),
                       (first + 0.12, roof - 0.08)], 0.09)  # fmt: skip
    body.top(lid, first, last - 0.1, roof, 0.9)
    # The cabin's end stands back from the bumper by `first`; near enough to draw it in the plane of the bumper,
    # scaled by its distance.
    back = z / (z + first * (body.far - z))
    eye = canvas.camera_height

    def seen(outline: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        shift = -x * (1 - back) / body.half
        return [(u * back + shift, eye + (y - eye) * back) for u, y in outline]

    body.end(shell, seen([(-0.92, belt), (0.92, belt), (0.74, roof), (-0.74, roof)]))
    body.end(glass, seen([(-0.8, belt + 0.05), (0.8, belt + 0.05), (0.66, roof - 0.1), (-0.66, roof - 0.1)]))
    for side in (-1, 1):
        body.end(tyre, [(side * 0.95, 0), (side * 0.68, 0), (side * 0.68, 0.4), (side * 0.95, 0.4)])
    body.end(shell, [(-1, low), (1, low), (1, belt - 0.1), (0.95, belt), (-0.95, belt), (-1, belt - 0.1)])
    body.end(trim, [(-1, low), (1, low), (0.98, low + 0.16), (-0.98, low + 0.16)])
    lamp = body.paint(REAR_LAMP if rear else HEAD_LAMP)
    for side in (-1, 1):
        body.end(lamp, [(side * 0.96, belt - 0.12), (side * 0.66, belt - 0.14), (side * 0.68, belt - 0.28),
                        (side * 0.97, belt - 0.3)])  # fmt: skip
    plate = body.paint((232, 232, 222))
    if rear:
        body.end(plate, [(-0.28, 0.52), (0.28, 0.52), (0.28, 0.63), (-0.28, 0.63)])
    else:
        body.end(trim, [(-0.5, belt - 0.16), (0.5, belt - 0.16), (0.46, belt - 0.3), (-0.46, belt - 0.3)])
        body.end(plate, [(-0.26, 0.42), (0.26, 0.42), (0.26, 0.52), (-0.26, 0.52)])


def truck(canvas: Canvas, draws: Random, x: float, z: float, *, rear: bool, sun_shift: tuple[float, float]) -> None:
    body = _Body(canvas, "truck", x, z, draws.between(7.0, 9.0), 2.4)
    height = draws.between(3.1, 3.7)
    colour = draws.vary(draws.among((*PAINTS, (220, 218, 210), (212, 196, 160))), 0.1)
    cargo, flank = body.paint(colour), body.paint(colour, 0.78)
    tyre, trim, lamp = body.paint(TYRE), body.paint((60, 62, 66)), body.paint(REAR_LAMP if rear else HEAD_LAMP)
    body.shadow(sun_shift, height)
    body.flank(flank, [(0, 0.9), (1, 0.9), (1, height), (0, height)])
    body.flank(trim, [(0, 0.55), (1, 0.55), (1, 0.9), (0, 0.9)])
    for u in (0.14, 0.3, 0.86):
        body.wheel(tyre, trim, u, 0.48)
    for side in (-1, 1):
        body.end(tyre, [(side * 0.95, 0), (side * 0.6, 0), (side * 0.6, 0.6), (side * 0.95, 0.6)])
    body.end(trim, [(-1, 0.5), (1, 0.5), (1, 0.95), (-1, 0.95)])
    if rear:
        body.end(cargo, [(-1, 0.9), (1, 0.9), (1, height), (-1, height)])
        seam = body.paint(colour, 0.7)
        body.end(seam, [(-0.02, 0.95), (0.02, 0.95), (0.02, height - 0.1), (-0.02, height - 0.1)])
        body.end(seam, [(-0.94, height - 0.14), (0.94, height - 0.14), (0.94, height - 0.06), (-0.94, height - 0.06)])
    else:
        cab = body.paint(draws.vary(draws.among(PAINTS), 0.1))
        body.end(cargo, [(-1, 2.4), (1, 2.4), (1, height), (-1, height)])
        body.end(cab, [(-0.96, 0.6), (0.96, 0.6), (0.92, 2.65), (-0.92, 2.65)])
        body.end(body.glass(1.5, 3.0), [(-0.86, 1.6), (0.86, 1.6), (0.82, 2.4), (-0.82, 2.4)])
        body.end(trim, [(-0.6, 0.9), (0.6, 0.9), (0.6, 1.3), (-0.6, 1.3)])
    for side in (-1, 1):
        body.end(lamp, [(side * 0.95, 0.66), (side * 0.7, 0.66), (side * 0.7, 0.84), (side * 0.95, 0.84)])


def bus(canvas: Canvas, draws: Random, x: float, z: float, *, rear: bool, sun_shift: tuple[float, float]) -> None:
    _coach(canvas, draws, "bus", x, z, draws.between(9.0, 12.0), 2.5, 3.1, rear, sun_shift)


def tram(canvas: Canvas, draws: Random, x: float, z: float, *, rear: bool, sun_shift: tuple[float, float]) -> None:
    _coach(canvas, draws, "train", x, z, draws.between(20.0, 28.0), 2.4, 3.4, rear, sun_shift)


def _coach(
    canvas: Canvas, draws: Random, name: str, x: float, z: float, length: float, width: float, height: float,
    rear: bool, sun_shift: tuple[float, float],
) -> None:  # fmt: skip
    """A long box with a band of windows."""
    body = _Body(canvas, name, x, z, length, width)
    colour = draws.vary(draws.among(BUS_PAINTS), 0.08)
    shell, flank, skirt = body.paint(colour), body.paint(colour, 0.8), body.paint(draws.vary((120, 120, 122), 0.3))
    tyre, lamp, glass = body.paint(TYRE), body.paint(REAR_LAMP if rear else HEAD_LAMP), body.glass(1.0, 3.2)
    is_train = name == "train"
    low = 0.25 if is_train else 0.4
    body.shadow(sun_shift, height)
    body.flank(flank, [(0, low), (1, low), (1, height), (0, height)])
    body.flank(skirt, [(0, low), (1, low), (1, 0.8), (0, 0.8)])
    panes = 8 if is_train else 6
    for k in range(panes):
        u1, u2 = (k + 0.12) / panes, (k + 0.9) / panes
        body.flank(glass, [(u1, 1.35), (u2, 1.35), (u2, height - 0.55), (u1, height - 0.55)])
    if not is_train:
        for u in (0.24, 0.78):
            body.wheel(tyre, skirt, u, 0.48)
        for side in (-1, 1):
            body.end(tyre, [(side * 0.95, 0), (side * 0.66, 0), (side * 0.66, 0.5), (side * 0.95, 0.5)])
    body.end(shell, [(-1, low), (1, low), (1, height - 0.15), (0.9, height), (-0.9, height), (-1, height - 0.15)])
    body.end(skirt, [(-1, low), (1, low), (1, 0.75), (-1, 0.75)])
    body.end(glass, [(-0.88, 1.3), (0.88, 1.3), (0.86, height - 0.6), (-0.86, height - 0.6)])
    sign = body.paint((34, 36, 40)), body.paint((246, 190, 70))
    body.end(sign[0], [(-0.7, height - 0.5), (0.7, height - 0.5), (0.7, height - 0.16), (-0.7, height - 0.16)])
    body.end(sign[1], [(-0.5, height - 0.4), (0.3, height - 0.4), (0.3, height - 0.27), (-0.5, height - 0.27)])
    for side in (-1, 1):
        body.end(lamp, [(side * 0.94, 0.85), (side * 0.72, 0.85), (side * 0.72, 1.05), (side * 0.94, 1.05)])
    if is_train:  # the pantograph
        canvas.stroke(body.paint((50, 50, 54)), [(x, height, z + 4), (x + 0.5, height + 0.6, z + 4),
                                                  (x, height + 1.3, z + 4)], 0.06)  # fmt: skip
