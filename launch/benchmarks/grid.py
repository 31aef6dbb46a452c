"""A wide table for a terminal: a row for each thing measured, a column for each quantity."""

from collections.abc import Mapping, Sequence

from launch.benchmarks.measuring import Figure


def by_row(figures: Sequence[Figure]) -> dict[str, dict[str, Figure]]:
    """Figures named ROW/QUANTITY as {row: {quantity: figure}}, rows in the order of their first figures."""
    rows: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        row, _, quantity = figure.name.rpartition("/")
        rows.setdefault(row, {})[quantity] = figure
    return rows


def grid(rows: Mapping[str, Mapping[str, Figure]], columns: Mapping[str, str]) -> str:
    """columns: quantity -> heading. Medians; with the least and the most in the first column; shares in percent."""
    first = next(iter(columns))
    lines = [("", *columns.values())]
    lines += [
        (row, *(_cell(found.get(quantity), quantity == first) for quantity in columns)) for row, found in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )  # fmt: skip


def _cell(figure: Figure | None, spread: bool) -> str:
    if figure is None:
        return "-"
    if spread:
        return f"{figure.median:.3g} ({min(figure.values):.3g} to {max(figure.values):.3g})"
    return f"{figure.median:.0%}" if "share" in figure.name else f"{figure.median:.3g}"
