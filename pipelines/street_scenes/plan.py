"""The plan of a street: its lines on the ground, drawn at random from a layout."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.street_scenes.draw import NEAREST, Canvas, Random
from pipelines.street_scenes.layout import Layout

STREET_END = 130.0  # metres: beyond it only the horizon
JUNCTION_WIDTH = 12.0

Scenery = list[tuple[float, Callable[[], None]]]  # (Z, what paints it): the larger Z is painted first


@dataclass(frozen=True)
class Plan:
    """The street itself. X of its lines are lateral metres from the camera at Z = 0; `at` bends them."""

    middle: float  # centre line of the road
    half: float  # half the road's width
    verge: float  # width of the grass strip beside the kerb, 0 for none
    walk: float  # width of the sidewalk
    bend: float  # metres sideways per square metre ahead
    sun: tuple[float, float]  # where the shadow of 1 m of height falls: (dX, dZ)
    lanes: int
    junction: float | None  # Z where a crossing street begins
    tram: bool

    def at(self, lateral: float, z: float) -> float:
        return lateral + self.bend * z * z

    def kerb(self, side: int) -> float:
        return self.middle + side * self.half

    def front(self, side: int) -> float:
        """Where the lots begin."""
        return self.middle + side * (self.half + self.verge + self.walk)

    def in_junction(self, z: float, margin: float = 0.0) -> bool:
        return self.junction is not None and -margin < z - self.junction < JUNCTION_WIDTH + margin


def draw_plan(draws: Random, layout: Layout) -> Plan:
    lanes = draws.among((2, 2, 3, 4))
    half = lanes * draws.between(1.6, 1.85) + draws.between(0.9, 2.0)
    offset = draws.between(0.9, 1.9) if lanes < 4 else draws.between(2.0, 5.0)
    return Plan(
        middle=-offset,
        half=half,
        verge=draws.between(1.2, 2.6) if draws.chance(layout.green_verge) else 0.0,
        walk=draws.between(2.4, 4.2),
        bend=draws.between(-1, 1) ** 3 * 0.002,
        sun=_sun(draws),
        lanes=lanes,
        junction=draws.between(16, 45) if draws.chance(layout.junctions) else None,
        tram=draws.chance(layout.trams),
    )


def _sun(draws: Random) -> tuple[float, float]:
    """Plan.sun: mostly high and from a side, now and then low ahead."""
    sideways = draws.among((-1, 1))
    if draws.chance(0.15):
        return sideways * draws.between(0.4, 2.0), -draws.between(2.6, 3.6)
    return sideways * draws.between(0.4, 1.3), draws.between(-0.5, 0.7)


_STATIONS = (2.0, 5.0, 9.0, 14.0, 21.0, 30.0, 42.0, 60.0, 85.0)  # Z where a bent line has corners


def band(
    canvas: Canvas, plan: Plan, surface: int, left: float, right: float, near: float = NEAREST, far: float = STREET_END
) -> None:
    """A strip of ground along the street between two laterals."""
    stations = [near, *(z for z in _STATIONS if near < z < far), far]
    points = [(plan.at(left, z), z) for z in stations] + [(plan.at(right, z), z) for z in reversed(stations)]
    canvas.ground(surface, points)
