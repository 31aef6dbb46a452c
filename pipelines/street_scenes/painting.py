"""A picture in strokes of a brush, from coarse to fine (after Hertzmann 1998, "Painterly Rendering with Curved Brush Strokes of
Multiple Sizes", with straight strokes), in colours that are pushed apart."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipelines.street_scenes.draw import Random

# The brushes, in heights of the picture: width, and from where on a stroke is worth while, in grey levels of difference.
BRUSHES = ((0.05, 0.0), (0.024, 10.0), (0.011, 22.0))
LENGTH = 3.0  # of a stroke, in widths
SHADOW = np.array([70, 62, 120], np.float32)  # what dark colours lean to
LIGHT = np.array([255, 236, 176], np.float32)  # and bright ones


def painted(image_HWC: np.ndarray, draws: Random) -> np.ndarray:
    """The picture, uint8 (H, W, 3) RGB, as a painting of the same size."""
    height, width = image_HWC.shape[:2]
    wanted = _palette(image_HWC)
    canvas = Image.new("RGB", (width, height), (196, 172, 140))
    for share, least in BRUSHES:
        brush = max(2.0, share * height)
        soft = Image.fromarray(wanted).filter(ImageFilter.GaussianBlur(brush / 3))
        colours = np.asarray(soft).astype(np.float32)
        across_y, across_x = np.gradient(colours.mean(axis=2))
        missing = np.abs(np.asarray(canvas).astype(np.float32) - colours).mean(axis=2)
        pen = ImageDraw.Draw(canvas)
        for x, y in _places(width, height, brush, draws):
            if missing[y, x] < least:
                continue
            # Along an edge, where there is one.
            angle = (
                np.arctan2(across_x[y, x], -across_y[y, x]) if np.hypot(across_x[y, x], across_y[y, x]) > 1 else 0.35
            )
            angle += draws.between(-0.25, 0.25)
            reach = LENGTH * brush * draws.between(0.5, 1.0) / 2
            dx, dy = reach * np.cos(angle), reach * np.sin(angle)
            tint = draws.between(-14, 14)
            colour = tuple(int(np.clip(c + tint + draws.between(-7, 7), 0, 255)) for c in colours[y, x])
            pen.line((x - dx, y - dy, x + dx, y + dy), colour, max(2, round(brush * draws.between(0.7, 1.1))))
    return np.asarray(canvas)


def _places(width: int, height: int, brush: float, draws: Random) -> list[tuple[int, int]]:
    """Where strokes are laid: a place in each cell of a grid half as wide as the brush, in a random order."""
    columns, rows = int(2 * width / brush) + 1, int(2 * height / brush) + 1
    places = [
        (
            min(width - 1, int((column + draws.unit()) * brush / 2)),
            min(height - 1, int((row + draws.unit()) * brush / 2)),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    keys = [draws.unit() for _ in places]
    return [place for _, place in sorted(zip(keys, places, strict=True))]


def _palette(image_HWC: np.ndarray) -> np.ndarray:
    """Colours further from grey, dark ones bluer and bright ones warmer."""
    x = image_HWC.astype(np.float32)
    grey = x.mean(axis=2, keepdims=True)
    x = grey + 1.35 * (x - grey)
    level = grey / 255
    x += 0.30 * (1 - level) ** 2 * (SHADOW - x) + 0.22 * level**2 * (LIGHT - x)
    return x.clip(0, 255).astype(np.uint8)
