"""Plots of runs and of sweeps, as PNG and SVG, drawn without state that outlives the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import bidirectional

import numpy as np
import pandas

from utils import atomic_path
from utils_values import query_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils_evaluation import Evaluation
    from utils_values import QueryValues

# One colour a method, in the order given (Okabe and Ito's set: told apart by colour-blind readers).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
PLOT_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "report",  # the same numbers give the same bytes
}
PNG_DPI = 200
CELLS_WITH_NUMBERS = 144  # a heat map with more cells than this is read by colour alone
BINS = 20
NAMED_BARS = 40  # with more groups than this, a bar has no room for its name


def write_plots(folder: Path, evaluations: list[Evaluation]) -> list[Path]:
    """Draw the histogram of the main measure, its mean by group and, of several methods, pairs.

    The measure is that of the task's first column, the groups are those of its outer tag (none are
    drawn of a task without one). Each plot is written as PNG, SVG and, with the numbers drawn (in
    percent), CSV: histogram, by_group, and by_query, in which the method of the best mean is drawn
    against each other method. Returns the paths; none where the ground truth is hidden.
    """
    folder = Path(folder)
    own = query_values(evaluations[0].task, evaluations[0].values)
    if own.main is None:
        return []
    labels = method_labels(evaluations)
    main = [query_values(evaluation.task, evaluation.values) for evaluation in evaluations]
    values = {label: 100 * each.values[own.main] for label, each in zip(labels, main, strict=True)}
    paths = _plot_histogram(folder / "histogram", own.main, values)
    if own.outer_tag:
        paths += _plot_groups(folder / "by_group", own, values)
    if len(evaluations) > 1:
        paths += _plot_pairs(folder / "by_query", own, values)
    return paths


def list_plots(own: QueryValues, methods: int) -> list[dict[str, str]]:
    """Name and caption of each plot that write_plots draws of so many methods."""
    by_query = f"{own.main} of each query, the best method against the others"
    plots = [
        ("histogram", f"Queries by {own.main}", own.main),
        ("by_group", f"Mean {own.main} by {own.outer_tag}, sorted", own.outer_tag),
        ("by_query", by_query, own.main and methods > 1),
    ]
    return [{"name": name, "caption": caption} for name, caption, is_drawn in plots if is_drawn]


def _plot_histogram(stem: Path, measure: str, values: dict[str, np.ndarray]) -> list[Path]:
    edges = np.linspace(0, 100, BINS + 1)
    counts = {label: np.histogram(own, edges)[0] for label, own in values.items()}
    bounds = {f"{measure} from": edges[:-1], f"{measure} to": edges[1:]}
    several = len(values) > 1
    with new_figure(stem, (max(3.6, 2.3 * len(values)), 2.6)) as figure:
        panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
        colors = _colors(len(values))
        for axes, color, (label, own) in zip(panels, colors, values.items(), strict=True):
            axes.stairs(counts[label], edges, fill=True, color=color, alpha=0.85)
            title = drawable(f"{_short(label)}, mean {own.mean():.2f}")
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_xlabel(drawable(f"{measure} (%)"))
            axes.set_xlim(0, 100)
            axes.set_xticks(range(0, 101, 50 if several else 25))
            _rule(axes)
        panels[0].set_ylabel("queries")
    table = pandas.DataFrame({**bounds, **counts})
    return [*_picture_paths(stem), write_numbers(stem, table)]


def _plot_groups(stem: Path, own: QueryValues, values: dict[str, np.ndarray]) -> list[Path]:
    tag = own.outer_tag
    frame = pandas.DataFrame({tag: list(own.tags[tag]), **values})
    table = frame.groupby(tag, sort=True).mean()
    table.insert(0, "queries", frame[tag].value_counts())
    first = next(iter(values))
    table = table.sort_values(first, ascending=False, kind="stable")
    with new_figure(stem, (6.4, 3.0)) as figure:
        axes = figure.subplots()
        if len(values) == 1:
            axes.bar(range(len(table)), table[first], width=0.86, color=COLORS[0])
        else:
            for color, label in zip(_colors(len(values)), values, strict=True):
                means = np.sort(table[label])[::-1]
                shown = drawable(_short(label))
                axes.plot(range(len(means)), means, color=color, linewidth=1.4, label=shown)
            axes.legend(fontsize=8)
        if len(values) == 1 and len(table) <= NAMED_BARS:
            names = [_short(name, 18, 0) for name in table.index]
            names = map(drawable, names)
            axes.set_xticks(range(len(table)), [*names], rotation=60, ha="right", fontsize=7)
        else:
            order = "each method in its own order" if len(values) > 1 else "sorted"
            axes.set_xlabel(drawable(f"by {tag}, {order}"))
        axes.set_ylabel(drawable(f"mean {own.main} (%)"))
        axes.set_ylim(0, 100)
        axes.margins(x=0.01)
        _rule(axes)
    return [*_picture_paths(stem), write_numbers(stem, table.reset_index())]


def _plot_pairs(stem: Path, own: QueryValues, values: dict[str, np.ndarray]) -> list[Path]:
    best = max(values, key=lambda label: values[label].mean())
    others = [label for label in values if label != best]
    with new_figure(stem, (max(3.6, 2.7 * len(others)), 3.1)) as figure:
        panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
        for axes, label in zip(panels, others, strict=True):
            draw_pair(axes, values[label], values[best], f"{own.main} of {_short(label)}")
        panels[0].set_ylabel(drawable(f"{own.main} of {_short(best)} (%)"))
    table = pandas.DataFrame({**own.labels, **values})
    return [*_picture_paths(stem), write_numbers(stem, table)]


def draw_pair(axes: Axes, across: np.ndarray, up: np.ndarray, label: str) -> None:
    """A point a query; the points above the diagonal are those that the upward method wins."""
    axes.plot([0, 100], [0, 100], color="#AAAAAA", linewidth=0.8, zorder=0)
    size, strength = (14, 0.6) if len(up) <= 300 else (6, 0.3)
    axes.scatter(across, up, s=size, color=COLORS[0], alpha=strength, linewidths=0, clip_on=False)
    won, lost = int((up > across).sum()), int((up < across).sum())
    axes.set_title(f"above {won}, below {lost}", fontsize=9, loc="left")
    axes.set_xlabel(drawable(f"{label} (%)"))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(0, 101, 25))
    axes.set_aspect("equal")


@cache
def _glyphs() -> frozenset[int]:
    """The characters of the plots' font, which comes with matplotlib."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())


def _short(name: str, most: int = 26, end: int = 8) -> str:
    """A name of at most so many characters, the last `end` of them those of its end."""
    if len(name) <= most:
        return name
    return f"{name[: most - end - 1]}\u2026{name[len(name) - end :]}"


def drawable(text: str) -> str:
    """A text as the plots' font draws it: letters that it lacks, and those that run from right to
    left, which it would put the wrong way round, by their numbers, as a poor console shows them.
    """
    return "".join(
        char
        if ord(char) in _glyphs() and bidirectional(char) not in ("R", "AL")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _rule(axes: Axes) -> None:
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def write_numbers(stem: Path, table: pandas.DataFrame) -> Path:
    """Write STEM.csv, the numbers that a plot or a page shows, and return its path."""
    path = stem.with_name(f"{stem.name}.csv")
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return path


def method_labels(evaluations: list[Evaluation]) -> list[str]:
    """The variant of each method, with its backbone where variants repeat."""
    variants = [evaluation.variant for evaluation in evaluations]
    if len(set(variants)) == len(variants):
        return variants
    return [f"{evaluation.variant} ({evaluation.backbone})" for evaluation in evaluations]


def plot_sweep(
    path_stem: Path,
    table: pandas.DataFrame,
    axes: list[str],
    ends: dict[str, float] | None,
    value: str,
) -> list[Path]:
    """Draw a sweep's figure (`value`) over its one or two axes and mark the best point.

    path_stem: where to write, without suffix; PATH_STEM.png and PATH_STEM.svg are written.
    table: a row a point of the sweep; a column for each axis (numbers, or words, which are
    placed in the order of their first row) and a column `value` in percent.
    axes: one name gives a line, two a heat map (first axis down, second across).
    ends: label -> figure in percent, drawn as horizontal reference lines (one axis only).
    Returns the two paths. Raises ValueError with another number of axes or an empty table.
    """
    if len(axes) not in (1, 2) or table.empty:
        raise ValueError(f"a sweep is drawn over one or two axes and some points, not over {axes}")
    size = (5.2, 3.4) if len(axes) == 1 else (5.6, 4.2)
    with new_figure(Path(path_stem), size) as figure:
        if len(axes) == 1:
            _draw_line(figure.subplots(), table, axes[0], ends or {}, value)
        else:
            _draw_heat_map(figure, table, axes[0], axes[1], value)
    return _picture_paths(Path(path_stem))


def _draw_line(
    axes: Axes, table: pandas.DataFrame, axis: str, ends: dict[str, float], value: str
) -> None:
    numeric = pandas.api.types.is_numeric_dtype(table[axis])
    table = table.sort_values(axis) if numeric else table
    labels = [str(value) for value in table[axis]]
    x = table[axis].to_numpy(float) if numeric else np.arange(len(table))
    y = table[value].to_numpy(float)
    best = int(np.nanargmax(y))
    for (label, end), dashes in zip(ends.items(), ((5, 2), (1, 1.5), (5, 2, 1, 2)), strict=False):
        axes.axhline(
            end,
            color="#777777",
            linewidth=0.9,
            dashes=dashes,
            label=drawable(f"{label}: {end:.2f}"),
        )
    axes.plot(x, y, color=COLORS[0], marker="o", markersize=3.5, linewidth=1.4)
    axes.plot(x[best], y[best], marker="o", markersize=8, color=COLORS[1], zorder=3)
    title = drawable(f"best: {value} {y[best]:.2f} at {axis} = {labels[best]}")
    axes.set_title(title, fontsize=9, loc="left")
    if not numeric:
        axes.set_xticks(x, labels, rotation=30, ha="right")
    if ends:
        axes.legend(fontsize=8, handlelength=3.2)
    axes.margins(y=0.12)
    axes.set_xlabel(axis)
    axes.set_ylabel(drawable(f"{value} (%)"))
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_heat_map(
    figure: Figure, table: pandas.DataFrame, down: str, across: str, value: str
) -> None:
    rows, columns = _axis_values(table[down]), _axis_values(table[across])
    grid = np.full((len(rows), len(columns)), np.nan)
    for row, column, found in zip(table[down], table[across], table[value], strict=True):
        grid[rows.index(row), columns.index(column)] = found
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    best_row, best_column = np.unravel_index(np.nanargmax(grid), grid.shape)
    if grid.size <= CELLS_WITH_NUMBERS:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), found in np.ndenumerate(grid):
            if not np.isnan(found):
                color = "white" if found < middle else "black"
                weight = "bold" if (row, column) == (best_row, best_column) else "normal"
                text = f"{found:.1f}"
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
    title = drawable(f"best: {value} {np.nanmax(grid):.2f} at {best}")
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, label=drawable(f"{value} (%)")).outline.set_visible(False)


def _axis_values(column: pandas.Series) -> list:
    """The distinct values of an axis: numbers sorted, words in the order of their first row."""
    values = list(dict.fromkeys(column))
    return sorted(values) if pandas.api.types.is_numeric_dtype(column) else values


def _rectangle(corner: tuple[float, float], **style):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, clip_on=False, **style)


@contextmanager
def new_figure(path_stem: Path, size: tuple[float, float]) -> Iterator[Figure]:
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
