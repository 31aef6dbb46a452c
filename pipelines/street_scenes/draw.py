"""The drawing board: one raster of surface ids, and beside it a table that says what each surface is.

A scene is drawn once, by the painter's algorithm, as ids. The label map and the picture in every look are then
lookups in the table (deferred shading), so labels are exact and the looks share their geometry by construction.

World: metres, X to the right of the camera, Y up from the ground, Z forward. Raster: pixels of the id image, which is
OVERSAMPLE times larger than the picture. 1/Z of any plane is linear in the raster's x and y, which is how the table
keeps the depth of a surface.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from pipelines.labels import CLASSES

T = TypeVar("T")

OVERSAMPLE = 2
NEAREST = 0.6  # metres: nothing is drawn nearer to the camera

CLASS_ID = {name: trainid for trainid, name in enumerate(CLASSES)}
Colour = tuple[float, float, float]  # RGB, 0..255, in neutral light


class Material(IntEnum):
    """How the two colours of a surface mix; see materials.py, which has one function for each."""

    PLAIN = 0
    SKY = 1
    ASPHALT = 2
    PAVING = 3
    GRASS = 4
    FACADE = 5
    MASONRY = 6
    RAILING = 7
    FOLIAGE = 8
    GRADIENT = 9


GROUND = (Material.ASPHALT, Material.PAVING, Material.GRASS)  # the materials that receive shadows

# Columns of the surface table.
COLUMNS = (
    "trainid", "material", "red", "green", "blue", "red2", "green2", "blue2",
    "inverse_z", "inverse_z_x", "inverse_z_y", "light", "p0", "p1", "p2", "p3",
)  # fmt: skip
COLUMN = {name: k for k, name in enumerate(COLUMNS)}


class Random:
    """A stream of uniform numbers, keyed by (seed, index, stream) and nothing else (counter-based Philox)."""

    def __init__(self, seed: int, index: int, stream: int) -> None:
        self.generator = np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]))
        self._block: list[float] = []

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        if not self._block:
            self._block = self.generator.random(1024).tolist()
        return self._block.pop()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def whole(self, low: int, high: int) -> int:
        """Uniform in {low, …, high}."""
        return low + int(self.unit() * (high - low + 1))

    def among(self, options: Sequence[T]) -> T:
        return options[int(self.unit() * len(options))]

    def count(self, expected: float) -> int:
        """A whole number of that mean: uniform in 0..2·expected, rounded at random."""
        return int(2 * expected * self.unit() + self.unit())

    def vary(self, colour: Colour, amount: float = 0.08) -> Colour:
        """The colour, lighter or darker by up to that share."""
        factor = self.between(1 - amount, 1 + amount)
        return colour[0] * factor, colour[1] * factor, colour[2] * factor


class Canvas:
    """Draws surfaces in perspective.

    width, height: of the picture, pixels. camera_height: metres. focal, horizon, vanish: in image heights: the focal
    length, the horizon's distance from the top, the vanishing point's distance to the right of the centre.
    """

    def __init__(
        self, size: tuple[int, int], *, camera_height: float, focal: float, horizon: float, vanish: float
    ) -> None:
        self.width, self.height = size[0] * OVERSAMPLE, size[1] * OVERSAMPLE
        self.camera_height = camera_height
        self.scale = focal * self.height
        self.x0 = self.width / 2 + vanish * self.height
        self.y0 = horizon * self.height
        self.sun: tuple[float, float] | None = None  # in the raster, where it is in view
        self._cells = array("f")
        self._ids = Image.new("I", (self.width, self.height), 0)
        self._shadow = Image.new("L", (self.width, self.height), 0)
        self._pen = ImageDraw.Draw(self._ids)
        self._shadow_pen = ImageDraw.Draw(self._shadow)
        self.surface("sky", (0, 0, 0), material=Material.SKY, z=1e6)  # id 0 fills the canvas; the look colours it

    def drawn(self) -> "Drawn":
        cells = np.frombuffer(self._cells, np.float32).reshape(-1, len(COLUMNS))
        return Drawn(self, np.asarray(self._ids).astype(np.intp), cells.T.copy(), np.asarray(self._shadow))

    # Surfaces

    def surface(
        self, name: str, colour: Colour, colour2: Colour | None = None, *, z: float = 0.0,
        plane: tuple[float, float, float] | None = None, material: Material = Material.PLAIN, light: float = 1.0,
        params: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    ) -> int:  # fmt: skip
        """A new row of the table: class name, colours, depth (upright at z metres, or a plane), and what its material
        wants to know. Returns its id."""
        self._cells.extend(
            (CLASS_ID[name], material, *colour, *(colour2 or colour), *(plane or (1 / z, 0.0, 0.0)), light, *params)
        )
        return len(self._cells) // len(COLUMNS) - 1

    def ground_plane(self) -> tuple[float, float, float]:
        slope = 1 / (self.scale * self.camera_height)
        return -self.y0 * slope, 0.0, slope

    def receding_plane(self, x1: float, z1: float, x2: float, z2: float) -> tuple[float, float, float]:
        """The upright plane through (X, Z) = (x1, z1) and (x2, z2)."""
        left, right = self.x0 + self.scale * x1 / z1, self.x0 + self.scale * x2 / z2
        if abs(right - left) < 1.0:  # seen edge on: too thin to have a slope
            return 2 / (z1 + z2), 0.0, 0.0
        slope = (1 / z2 - 1 / z1) / (right - left)
        return 1 / z1 - slope * left, slope, 0.0

    # Shapes

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """World to raster."""
        unit = self.scale / z
        return self.x0 + unit * x, self.y0 + unit * (self.camera_height - y)

    def polygon(self, surface: int, points: Iterable[tuple[float, float, float]]) -> None:
        """World points (X, Y, Z)."""
        x0, y0, scale, eye = self.x0, self.y0, self.scale, self.camera_height
        self._pen.polygon([(x0 + scale * x / z, y0 + scale * (eye - y) / z) for x, y, z in points], surface)

    def raster_polygon(self, surface: int, points: Sequence[tuple[float, float]] | list[float]) -> None:
        self._pen.polygon(points, surface)

    def rectangle(self, surface: int, x1: float, x2: float, y1: float, y2: float, z: float) -> None:
        """Upright, facing the camera."""
        left, bottom = self.project(x1, y1, z)
        right, top = self.project(x2, y2, z)
        self._pen.rectangle((left, top, right, bottom), surface)

    def upright(self, surface: int, z: float, x: float, points: Iterable[tuple[float, float]]) -> None:
        """A shape facing the camera at depth z: points (to the right of x, above the ground)."""
        unit = self.scale / z
        left, bottom = self.x0 + unit * x, self.y0 + unit * self.camera_height
        self._pen.polygon([(left + unit * dx, bottom - unit * y) for dx, y in points], surface)

    def disc(self, surface: int, x: float, y: float, z: float, rx: float, ry: float) -> None:
        """An ellipse facing the camera, half axes in metres."""
        cx, cy = self.project(x, y, z)
        unit = self.scale / z
        self._pen.ellipse((cx - rx * unit, cy - ry * unit, cx + rx * unit, cy + ry * unit), surface)

    def ring(self, surface: int, x: float, y: float, z: float, rx: float, ry: float, width: float) -> None:
        cx, cy = self.project(x, y, z)
        unit = self.scale / z
        box = (cx - rx * unit, cy - ry * unit, cx + rx * unit, cy + ry * unit)
        self._pen.ellipse(box, outline=surface, width=max(1, round(width * unit)))

    def stroke(self, surface: int, points: Iterable[tuple[float, float, float]], width: float) -> None:
        """A line through world points, width in metres at the first point's depth."""
        points = list(points)
        thick = max(1, round(width * self.scale / points[0][2]))
        self._pen.line([self.project(*point) for point in points], surface, thick)

    def ground(self, surface: int, points: Iterable[tuple[float, float]]) -> None:
        """A shape lying on the ground: points (X, Z)."""
        self._pen.polygon(self._on_ground(points), surface)

    def cast(self, points: Iterable[tuple[float, float]]) -> None:
        """A shadow lying on the ground: points (X, Z)."""
        self._shadow_pen.polygon(self._on_ground(points), 255)

    def _on_ground(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        x0, scale = self.x0, self.scale
        eye = scale * self.camera_height
        return [
            (x0 + scale * x / z, self.y0 + eye / z) for x, z in ((x, z if z > NEAREST else NEAREST) for x, z in points)
        ]


@dataclass(frozen=True)
class Drawn:
    """A finished canvas. ids: intp (H, W) of rows of the table, at raster resolution. table: float32 (columns,
    surfaces), see COLUMNS. shadow: uint8 (H, W), 255 where something keeps the sun from the ground."""

    canvas: Canvas
    ids: np.ndarray
    table: np.ndarray
    shadow: np.ndarray

    def labels(self) -> np.ndarray:
        """uint8 (H, W) of trainIds at the picture's resolution."""
        return self.table[COLUMN["trainid"]].astype(np.uint8)[self.ids[::OVERSAMPLE, ::OVERSAMPLE]]
