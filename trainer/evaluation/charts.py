"""The flip matrix and the class distributions as pictures, uint8 (H, W, 3) RGB, 900 pixels wide."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

from trainer.evaluation.confusion import NONE
from trainer.evaluation.distribution import ClassDistributions
from trainer.evaluation.flips import Flips

DPI = 100
WIDTH = 9.0  # inches
TICKS = (-100, -30, -10, -3, 0, 3, 10, 30, 100)  # of the flip matrix's colours, in percent
SHOWN = 0.01  # entries of the flip matrix from here on are written into their cells

# Label and colour of each distribution, in the order of the bars from above.
BARS = {
    "source": ("source (true labels)", "#4477aa"),
    "translation": ("translation, as the segmenter sees it", "#ee7733"),
    "target": ("target (true labels)", "#228833"),
    "target_seen": ("real target, as the segmenter sees it", "#a8d5a2"),
}


def distribution_chart(distributions: ClassDistributions) -> np.ndarray:
    """Bars of the four distributions for each class that occurs in one of them, the source's most frequent first."""
    shares = np.stack([getattr(distributions, part) for part in BARS])
    order = [c for c in np.argsort(-distributions.source, kind="stable") if shares[:, c].any()]
    height = 1.6 + 0.52 * len(order)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(order))
    for place, (label, colour) in enumerate(BARS.values()):
        values = 100 * shares[place, order]
        bars = axes.barh(rows + 0.21 * (place - 1.5), values, 0.19, label=label, color=colour)
        axes.bar_label(bars, [f"{value:.1f}" if value else "" for value in values], padding=2, fontsize=7)
    axes.set_yticks(rows, [distributions.names[c] for c in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, 108 * shares.max())  # room for the number at the end of the longest bar
    axes.set_xlabel("% of the labelled pixels")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    axes.set_title("Class distributions of source, translation and target")
    return _drawn(figure)


def flip_chart(flips: Flips) -> np.ndarray:
    """The matrix of excesses: a row for each compared class; the same columns and those in which one of them is seen.

    Colours span -100 % to 100 % in every chart, spread out around 0, so that charts can be laid side by side.
    """
    compared = ~np.isnan(flips.matrix[:, 0])
    seen = np.append(compared, False) | (np.abs(flips.matrix[compared]) >= SHOWN).any(axis=0)
    matrix = 100 * flips.matrix[np.ix_(compared, seen)]
    figure = Figure(figsize=(WIDTH, 2.4 + 0.33 * len(matrix)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    norm = AsinhNorm(linear_width=5, vmin=-100, vmax=100)
    image = axes.imshow(matrix, cmap="RdBu_r", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        if abs(value) >= 100 * SHOWN:
            colour = "white" if abs(value) > 30 else "black"
            axes.text(column, row, f"{value:+.0f}", ha="center", va="center", fontsize=8, color=colour)
    names = np.array((*flips.classes, NONE))
    axes.set_yticks(range(len(matrix)), names[:-1][compared])
    axes.set_xticks(range(matrix.shape[1]), names[seen], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_ylabel("true class of the source")
    axes.set_xlabel("class seen by the segmenter")
    axes.set_title(
        f"Seen in translations more (red) or less (blue) often than in real images\nflip rate {100 * flips.rate:.1f} %"
    )
    colours = figure.colorbar(image, ax=axes, ticks=TICKS, format="%d", pad=0.01)
    colours.set_label("difference, % of the true class's pixels")
    colours.minorticks_off()
    return _drawn(figure)


def score_chart(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, title: str) -> np.ndarray:
    """A table in colours. values: (rows, columns) fractions, NaN where there is none; written as percent."""
    figure = Figure(figsize=(WIDTH, 1.6 + 0.33 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(100 * values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{100 * value:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right", rotation_mode="anchor")
    axes.set_title(title)
    return _drawn(figure)


def _drawn(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()
