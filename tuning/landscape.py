"""The picture of a search: the metric over the options that were varied."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.evaluation.config import BETTER
from tuning.results import Record, best_record, text
from tuning.spaces import Dimension

DPI = 110
LABEL = np.array((24.0, 10.0))  # points that a written value takes
AROUND = ((0, 14), (0, -14), (20, 0), (-20, 0))  # points from its dot: above it at best
RING: dict[str, Any] = {"s": 320, "facecolors": "none", "edgecolors": "red"}  # around the best


def landscape(records: Sequence[Record], space: Sequence[Dimension], metric: str) -> np.ndarray:
    """uint8 (H, W, 3) RGB: two options span one plane, coloured by the metric; any other number has a panel for each.

    Finished trials are dots, others crosses at their last value. The best has a ring.
    """
    measured = [record for record in records if metric in record.metrics]
    draw = _plane if len(space) == 2 else _panels
    figure = draw(measured, best_record(measured, metric), space, metric)
    figure.suptitle(f"{metric} of {len(measured)} trials, {BETTER[metric]} is better")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()


def _plane(measured: Sequence[Record], best: Record | None, space: Sequence[Dimension], metric: str) -> Figure:
    figure = Figure(figsize=(6.4, 5.0), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    across, up = space
    if best:
        axes.scatter(across.place(best.params[across.field]), up.place(best.params[up.field]), **RING)
    values = [record.metrics[metric] for record in measured]
    for marker, group in _marked(measured):
        dots = axes.scatter(
            _places(across, group), _places(up, group), c=[record.metrics[metric] for record in group], marker=marker,
            s=110, edgecolors="#444444", linewidths=0.6, cmap="viridis_r" if BETTER[metric] == "less" else "viridis",
            vmin=min(values, default=0.0), vmax=max(values, default=1.0),
        )  # fmt: skip
    figure.colorbar(dots, label=metric)
    _label(axes, "x", across)
    _label(axes, "y", up)
    _annotate(axes, _places(across, measured), _places(up, measured), [f"{value:.3g}" for value in values])
    return figure


def _annotate(axes: Axes, across: Sequence[float], up: Sequence[float], labels: Sequence[str]) -> None:
    """A label beside each dot, clear of those written before as far as that can be."""
    written: list[np.ndarray] = []

    def clearance(place: np.ndarray) -> float:
        """From the nearest label, in sizes of a label; more than 1 is no better than 1, where they do not touch."""
        return min([1.0, *(float(np.max(np.abs(place - other) / LABEL)) for other in written)])

    for x, y, label in zip(across, up, labels, strict=True):
        dot = axes.transData.transform((x, y)) * 72 / DPI  # from pixels to points
        offset = max(AROUND, key=lambda offset: clearance(dot + offset))
        written.append(dot + offset)
        axes.annotate(label, (x, y), xytext=offset, textcoords="offset points", ha="center", va="center", fontsize=8)


def _panels(measured: Sequence[Record], best: Record | None, space: Sequence[Dimension], metric: str) -> Figure:
    figure = Figure(figsize=(max(6.0, 4.5 * len(space)), 4.2), dpi=DPI, layout="constrained")
    for axes, dimension in zip(figure.subplots(1, len(space), sharey=True, squeeze=False)[0], space, strict=True):
        if best:
            axes.scatter(dimension.place(best.params[dimension.field]), best.metrics[metric], **RING)
        for marker, group in _marked(measured):
            heights = [record.metrics[metric] for record in group]
            axes.scatter(_places(dimension, group), heights, marker=marker, s=70, color="#4477aa")
        axes.grid(alpha=0.3)
        axes.set_ylabel(metric)
        _label(axes, "x", dimension)
    return figure


def _marked(measured: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    finished = [record for record in measured if record.status == "finished"]
    return [("X", [record for record in measured if record.status != "finished"]), ("o", finished)]


def _places(dimension: Dimension, records: Sequence[Record]) -> list[float]:
    """Where trials stand on a dimension's axis: a choice's values at 0, 1, …"""
    return [dimension.place(record.params[dimension.field]) for record in records]


def _label(axes: Axes, side: Literal["x", "y"], dimension: Dimension) -> None:
    if dimension.kind == "loguniform":
        axes.set(**{f"{side}scale": "log"})
    if dimension.is_range:
        low, high = dimension.values
        margin = (high / low) ** 0.08 if dimension.kind == "loguniform" else 0.08 * (high - low)
        ends = (low / margin, high * margin) if dimension.kind == "loguniform" else (low - margin, high + margin)
        axes.set(**{f"{side}lim": ends})
    else:
        axes.set(**{f"{side}ticks": range(len(dimension.values))})
        axes.set(**{f"{side}ticklabels": [text(value) for value in dimension.values]})
        axes.tick_params(side, labelsize=8, rotation=20)
    axes.set(**{f"{side}label": dimension.field})
