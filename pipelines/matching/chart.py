"""What a match changes, as a picture."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipelines.distribution_chart import DPI, bars
from pipelines.distributions import Distribution
from pipelines.labels import CLASSES
from pipelines.matching.match import SHARES, Facts

SIZE = (7.2, 8.4)  # inches
WHOSE = {"labels": "true classes", "segmenter": "classes that the segmenter sees"}


def match_chart(name: str, facts: Facts) -> Image.Image:
    """Shares of the classes in source crops, target crops and the target crops that are drawn for the source's: RGB, 720 x 840
    pixels. facts: with `shares`."""
    shown = {label: Distribution(CLASSES, np.array(facts.shares[label])) for label in SHARES}
    figure = Figure(figsize=SIZE, dpi=DPI)
    axes = figure.subplots()
    bars(axes, shown, {label: label for label in shown})
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel(f"% of the pixels of crops, {WHOSE[str(facts.classes)]}")
    before, after = facts.mismatch()
    figure.suptitle(f"Match {name}, from {facts.used:.0%} of the target images.\n"
                    f"Differs from the source in {after:.1%} of pixels, unmatched {before:.1%} (total variation)")  # fmt: skip
    figure.subplots_adjust(0.16, 0.08, 0.97, 0.89)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
