"""What people look at: pages of ranked images, plots, and the comparison of two runs.

Pillow, matplotlib and jinja2 are imported inside the functions that need them; torch is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas

from utils import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour a method, in the order given (Okabe and Ito's set: told apart by colour-blind readers).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
PLOT_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.hashsalt": "report",  # the same numbers give the same bytes
}
PNG_DPI = 200
CELLS_WITH_NUMBERS = 144  # a heat map with more cells than this is read by colour alone


# ---------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------


def plot_sweep(
    path_stem: Path,
    table: pandas.DataFrame,
    axes: list[str],
    ends: dict[str, float] | None = None,
) -> list[Path]:
    """Draw a sweep's mAP over its one or two axes and mark the best point.

    path_stem: where to write, without suffix; PATH_STEM.png and PATH_STEM.svg are written.
    table: a row a point of the sweep; a column for each axis (numbers, or words, which are
    placed in the order of their first row) and a column `mAP` in percent.
    axes: one name gives a line, two a heat map (first axis down, second across).
    ends: label -> mAP in percent, drawn as horizontal reference lines (one axis only). Where it is
    None and the axis is `fusion_weight`, the points at 0 and at 1 are the two ends.
    Returns the two paths. Raises ValueError with another number of axes or an empty table.
    """
    if len(axes) not in (1, 2) or table.empty:
        raise ValueError(f"a sweep is drawn over one or two axes and some points, not over {axes}")
    size = (5.2, 3.4) if len(axes) == 1 else (5.6, 4.2)
    with _figure(Path(path_stem), size) as figure:
        if len(axes) == 1:
            _draw_line(figure.subplots(), table, axes[0], _sweep_ends(table, axes[0], ends))
        else:
            _draw_heat_map(figure, table, axes[0], axes[1])
    return _picture_paths(Path(path_stem))


def _sweep_ends(
    table: pandas.DataFrame, axis: str, ends: dict[str, float] | None
) -> dict[str, float]:
    if ends is not None or axis != "fusion_weight":
        return ends or {}
    weights = table[axis].astype(float)
    at = {end: table.loc[weights == end, "mAP"] for end in (0, 1)}
    return {f"{axis} = {end}": float(rows.iloc[0]) for end, rows in at.items() if len(rows)}


def _draw_line(axes: Axes, table: pandas.DataFrame, axis: str, ends: dict[str, float]) -> None:
    numeric = pandas.api.types.is_numeric_dtype(table[axis])
    table = table.sort_values(axis) if numeric else table
    labels = [str(value) for value in table[axis]]
    x = table[axis].to_numpy(float) if numeric else np.arange(len(table))
    y = table["mAP"].to_numpy(float)
    best = int(np.nanargmax(y))
    for (label, value), dashes in zip(ends.items(), ((5, 2), (1, 1.5), (5, 2, 1, 2)), strict=False):
        axes.axhline(
            value, color="#777777", linewidth=0.9, dashes=dashes, label=f"{label}: {value:.2f}"
        )
    axes.plot(x, y, color=COLORS[0], marker="o", markersize=3.5, linewidth=1.4)
    axes.plot(x[best], y[best], marker="o", markersize=8, color=COLORS[1], zorder=3)
    axes.set_title(f"best: mAP {y[best]:.2f} at {axis} = {labels[best]}", fontsize=9, loc="left")
    if not numeric:
        axes.set_xticks(x, labels, rotation=30, ha="right")
    if ends:
        axes.legend(fontsize=8, handlelength=3.2)
    axes.margins(y=0.12)
    axes.set_xlabel(axis)
    axes.set_ylabel("mAP (%)")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_heat_map(figure: Figure, table: pandas.DataFrame, down: str, across: str) -> None:
    rows, columns = _axis_values(table[down]), _axis_values(table[across])
    grid = np.full((len(rows), len(columns)), np.nan)
    for row, column, value in zip(table[down], table[across], table["mAP"], strict=True):
        grid[rows.index(row), columns.index(column)] = value
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    best_row, best_column = np.unravel_index(np.nanargmax(grid), grid.shape)
    if grid.size <= CELLS_WITH_NUMBERS:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value < middle else "black"
                weight = "bold" if (row, column) == (best_row, best_column) else "normal"
                text = f"{value:.1f}"
                axes.text(
                    column, row, text, ha="center", va="center", color=color, size=7, weight=weight
                )
    # Drawn white under red, so that the mark shows on either end of the colour scale.
    for color, width in (("white", 4.5), ("#D00000", 2.2)):
        corner = (best_column - 0.5, best_row - 0.5)
        axes.add_patch(_rectangle(corner, edgecolor=color, linewidth=width))
    axes.set_xticks(range(len(columns)), [str(value) for value in columns])
    axes.set_yticks(range(len(rows)), [str(value) for value in rows])
    if max(len(str(value)) for value in columns) * len(columns) > 60:
        axes.tick_params(axis="x", rotation=45)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    best = f"{down} = {rows[best_row]}, {across} = {columns[best_column]}"
    axes.set_title(f"best: mAP {np.nanmax(grid):.2f} at {best}", fontsize=9, loc="left")
    figure.colorbar(image, label="mAP (%)").outline.set_visible(False)


def _axis_values(column: pandas.Series) -> list:
    """The distinct values of an axis: numbers sorted, words in the order of their first row."""
    values = list(dict.fromkeys(column))
    return sorted(values) if pandas.api.types.is_numeric_dtype(column) else values


def _rectangle(corner: tuple[float, float], **style):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, clip_on=False, **style)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


@contextmanager
def _figure(path_stem: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Give an empty figure (inches) to draw on; write it as PNG and SVG, whole or not at all."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)  # its own canvas: no pyplot, no state that outlives the call
        yield figure
        for path in _picture_paths(path_stem):
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else None
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


def _picture_paths(path_stem: Path) -> list[Path]:
    return [path_stem.with_name(f"{path_stem.name}.{kind}") for kind in ("png", "svg")]
