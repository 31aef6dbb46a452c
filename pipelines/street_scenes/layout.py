"""What a street is made of, as numbers: the layout statistics of a domain."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import UserError

NUMBERS = ("floors", "tree_height", "traffic", "pedestrians", "cyclists")  # every other field is a share or a chance


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout statistics of one domain. Shares and chances lie in [0, 1], lengths are metres.

    The mismatch between two layouts is the papers' problem: a translator that matches the target's statistics is
    tempted to paint vegetation where the source has sky.
    """

    open_lots: float  # share of the lots beside the street without a building: the sky comes down to the ground there
    floors: tuple[int, int]  # fewest and most floors of a building
    street_trees: float  # chance of a tree at each place of the kerb (one every 8 m on either side)
    lot_trees: float  # share of open lots planted with trees and bushes
    tree_height: tuple[float, float]  # smallest and largest height of a tree
    palms: float  # share of the street trees that are palms, which hide little sky
    hedges: float  # chance that a lot has a hedge in front
    wooded_horizon: float  # chance that the far end of the street is closed by woods instead of open hills
    green_verge: float  # chance of a strip of grass between road and sidewalk
    walls: float  # chance that an open lot has a wall in front
    fences: float  # chance that an open lot has a fence in front (if it has no wall)
    parked_cars: float  # share of the places along the kerb that a vehicle takes (one every 6.5 m)
    traffic: float  # expected number of moving vehicles
    heavy_vehicles: float  # share of trucks, and as many buses, among the moving vehicles
    trams: float  # chance of tram rails with a tram
    pedestrians: float  # expected number of people on foot
    cyclists: float  # expected number of two-wheelers, ridden or parked
    junctions: float  # chance of a crossing street, with zebra crossing and traffic lights
    signs: float  # chance of a traffic sign at each lamp post (one every 16 m or so)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low, high = value if isinstance(value, tuple) else (value, value)
            most = 1.0 if name not in NUMBERS else math.inf
            if not 0 <= low <= high <= most:
                wanted = "from 0 to 1" if most == 1 else "of 0 or more, the smaller one first"
                raise UserError(f"a street layout cannot have {name} = {value}: give numbers {wanted}")


# Both domains share everything that is not sky or vegetation; those two differ as GTA5 and Cityscapes do, but more.
SOURCE_LAYOUT = Layout(
    open_lots=0.52, floors=(1, 5), street_trees=0.12, lot_trees=0.25, tree_height=(4.0, 7.0), palms=0.6, hedges=0.08,
    wooded_horizon=0.1, green_verge=0.15, walls=0.35, fences=0.45, parked_cars=0.3, traffic=3.5, heavy_vehicles=0.13,
    trams=0.16, pedestrians=5.0, cyclists=2.6, junctions=0.45, signs=0.6,
)  # fmt: skip
TARGET_LAYOUT = Layout(
    open_lots=0.25, floors=(3, 7), street_trees=0.7, lot_trees=0.95, tree_height=(7.0, 13.0), palms=0.0, hedges=0.35,
    wooded_horizon=0.85, green_verge=0.3, walls=0.35, fences=0.45, parked_cars=0.3, traffic=3.5, heavy_vehicles=0.13,
    trams=0.16, pedestrians=5.0, cyclists=2.6, junctions=0.45, signs=0.6,
)  # fmt: skip


def between(a: Layout, b: Layout, share: float) -> Layout:
    """The layout that lies `share` of the way from a (0) to b (1), field by field; numbers of floors are rounded."""

    def mix(x: float, y: float) -> float:
        value = x + (y - x) * share
        return round(value) if isinstance(x, int) else round(value, 6)

    def field(x: Any, y: Any) -> Any:
        return tuple(map(mix, x, y)) if isinstance(x, tuple) else mix(x, y)

    return Layout(**{name: field(value, getattr(b, name)) for name, value in asdict(a).items()})
