"""The distributions of a data set as a picture."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipelines.distributions import GREY_NAMES, Distribution, distributions, training_mismatch
from pipelines.manifest import DOMAINS, SPLITS, Manifest

DPI = 100
PANEL = (6.4, 6.2)  # inches
COLOURS = {"source": "#4477aa", "target": "#228833", "matched target": "#ccbb44"}


def distribution_chart(manifest: Manifest) -> Image.Image | None:
    """Training sources against training targets, and beside them the test images; None if nothing was counted.

    RGB, 620 pixels high, 640 wide for each split. Classes are bars, the source's most frequent first; grey levels are
    columns.
    """
    found = distributions(manifest)
    splits = [split for split in SPLITS if any(f"{split}/{domain}" in found for domain in DOMAINS)]
    if not splits:
        return None
    figure = Figure(figsize=(PANEL[0] * len(splits), PANEL[1]), dpi=DPI)
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        shown = {domain: found[f"{split}/{domain}"] for domain in DOMAINS if f"{split}/{domain}" in found}
        labels = {domain: f"{domain}, {manifest.splits[f'{split}/{domain}'].samples:,} images" for domain in shown}
        grey = next(iter(shown.values())).names == GREY_NAMES
        (_columns if grey else bars)(axes, shown, labels)
        axes.set_title({"train": "training", "test": "test"}[split])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left" if grey else "lower right")
    mismatch = training_mismatch(found)
    if mismatch is not None:
        figure.suptitle(f"Training sources and targets differ in {mismatch:.1%} of their pixels (total variation)")
    figure.subplots_adjust(0.15 / len(splits), 0.09, 0.97, 0.89, wspace=0.3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def bars(axes: Axes, shown: dict[str, Distribution], labels: dict[str, str]) -> None:
    """Every class that occurs, the first domain's most frequent on top."""
    shares = np.stack([each.shares for each in shown.values()])
    order = [c for c in np.argsort(-shares[0], kind="stable") if shares[:, c].any()]
    names = next(iter(shown.values())).names
    rows, thickness = np.arange(len(order)), 0.8 / len(shown)
    for place, domain in enumerate(shown):
        values = 100 * shares[place, order]
        bars = axes.barh(
            rows + thickness * (place + 0.5) - 0.4, values, thickness, color=COLOURS[domain], label=labels[domain]
        )
        axes.bar_label(bars, [f"{value:.1f}" if value else "" for value in values], padding=2, fontsize=7)
    axes.set_yticks(rows, [names[c] for c in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, 112 * max(shares.max(), 0.01))  # room for the number at the end of the longest bar
    axes.set_xlabel("% of the labelled pixels")


def _columns(axes: Axes, shown: dict[str, Distribution], labels: dict[str, str]) -> None:
    """The domains' columns side by side in each bin of grey levels, from the first bin that can be seen."""
    bins, thickness = np.arange(len(GREY_NAMES)), 0.84 / len(shown)
    for place, (domain, each) in enumerate(shown.items()):
        left = bins + 0.08 + thickness * place
        axes.bar(left, 100 * each.shares, thickness, align="edge", color=COLOURS[domain], label=labels[domain])
    visible = np.stack([each.shares for each in shown.values()]).max(axis=0) >= 0.001
    first = int(np.argmax(visible))
    axes.set_xlim(first, len(GREY_NAMES))
    step = 1 + (len(GREY_NAMES) - first) // 12
    axes.set_xticks(bins[first::step], [str(5 * number) for number in bins[first::step]])
    axes.set_xlabel("grey level of the maps, in bins of five")
    axes.set_ylabel("% of the pixels")
