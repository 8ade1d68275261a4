"""One table of what a results folder holds: methods x data sets, beside the published figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, atomic_path, write_csv
from utils_backbones import DEFAULT_BACKBONE, split_composed
from utils_runs import backbone_suffix
from utils_tables import format_table, read_results

PUBLISHED = Path(__file__).parent / "data" / "published.csv"


@dataclass(frozen=True)
class Figure:
    """A figure, in percent as printed: of a variant (the backbone not named), data set, column."""

    variant: str
    dataset: str
    backbone: str
    column: str
    value: str


@dataclass(frozen=True)
class Table:
    """The table: header, and rows of as many texts, "" where there is nothing."""

    header: list[str]
    rows: list[list[str]]


def read_published(path: Path = PUBLISHED) -> list[Figure]:
    """The published figures, in their order. Raises UserError if the file is no such table."""
    try:
        rows = read_results(path)
        for row in rows:
            _check_number(row["value"], path)
        return [Figure(*(row[name] for name in Figure.__annotations__)) for row in rows]
    except KeyError as error:
        raise UserError(f"{path} has no column {error}") from None


def read_latest(folder: Path) -> list[Figure]:
    """The figures of the last run of every variant below a results folder.

    A run whose ground truth is hidden has one without column and value. Tables of sweeps, of
    ablations and of all methods hold runs that have folders of their own, or none: they are passed
    over. Raises UserError if there is no result, or a table is unreadable.
    """
    found = []
    for path in sorted(folder.glob("*/*/mAP_table.csv")):
        last = next(reversed(read_results(path)), {})
        if last.get("variant") != path.parent.name:
            continue
        _check_row(path, last)
        suffix = backbone_suffix(last["backbone"])
        run = (last["variant"].removesuffix(suffix), last["dataset"], last["backbone"])
        figures = [Figure(*run, name, last[name]) for name in _columns_of(last) if last[name]]
        found += figures or [Figure(*run, "", "")]
    if not found:
        raise UserError(f"no results in {folder}; run a method first, or name its --results_dir")
    return found


def _columns_of(row: dict[str, str]) -> list[str]:
    """The columns of a task in a row of its table, which may be none: hidden ground truth."""
    names = list(row)[list(row).index("variant") + 1 :]
    return list(itertools.takewhile(lambda name: name != "queries", names))


def _check_row(path: Path, row: dict[str, str]) -> None:
    """Raise UserError if a row is not of a run, or holds what is no figure."""
    if not {"backbone", "dataset"} <= row.keys():
        raise UserError(f"{path} is not a table of results; move it away")
    for name in _columns_of(row):
        _check_number(row[name], path)


def _check_number(text: str, path: Path) -> None:
    """Raise UserError unless a cell is a figure, or none ("" or "-")."""
    try:
        if text not in ("", "-"):
            float(text)
    except ValueError:
        raise UserError(f"{path}: {text!r} is no figure; move the file away") from None


def tabulate(ours: Sequence[Figure], published: Sequence[Figure]) -> Table:
    """A row a variant and backbone; of each column ours, the published figure, the difference.

    Results that another system brought (external_NAME), or that the system NAME composes, stand
    beside those published of NAME. Data sets and variants come in the order of the published
    figures, then by name.
    """
    runs = sorted({(f.variant, f.backbone) for f in ours})
    runs = _ordered(runs, [(p.variant, p.backbone) for p in published])
    columns = _columns_shown(ours, published, runs)
    reference = {(p.variant, p.backbone, p.dataset, p.column): p.value for p in published}
    value = {(f.variant, f.backbone, f.dataset, f.column): f.value for f in ours}
    header = ["method"]
    for name, column in columns:
        header += [f"{name} {column}", f"{name} {column} published", f"{name} {column} difference"]
    rows = [
        [
            f"{variant}{backbone_suffix(backbone)}",
            *(
                cell
                for at in columns
                for cell in _cells(
                    value.get((variant, backbone, *at)),
                    reference.get((*published_as(variant, backbone), *at)),
                )
            ),
        ]
        for variant, backbone in runs
    ]
    return Table(header, rows)


def _columns_shown(
    ours: Sequence[Figure], published: Sequence[Figure], runs: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Data sets and columns: each one's first, and those in which a run has published figures."""
    columns: dict[str, dict[str, None]] = {}
    for figure in ours:
        columns.setdefault(figure.dataset, {figure.column: None} if figure.column else {})
    systems = {published_as(variant, backbone) for variant, backbone in runs}
    for figure in published:
        if figure.dataset in columns and (figure.variant, figure.backbone) in systems:
            columns[figure.dataset].setdefault(figure.column)
    datasets = _ordered(sorted(columns), (p.dataset for p in published))
    return [(name, column) for name in datasets for column in columns[name]]


def published_as(variant: str, backbone: str) -> tuple[str, str]:
    """The variant and backbone under which the figures are published that a run stands beside.

    Of results that were brought the system's name; of a system of composed/ its name, NAME_base
    where its checkpoint says so, with the backbone of the tables they stand in.
    """
    system = split_composed(backbone)
    if system is None or not variant.startswith("composed"):
        return variant.removeprefix("external_"), backbone
    name, place = system
    is_base = "base" in Path(place).stem
    return f"{name}_base" if is_base else name, DEFAULT_BACKBONE


def _ordered(items: Iterable, usual: Iterable) -> list:
    """The items in their usual order, then those that have none, as they come."""
    place = {item: number for number, item in reversed(list(enumerate(usual)))}
    return sorted(items, key=lambda item: place.get(item, math.inf))


def _cells(value: str | None, published: str | None) -> list[str]:
    if value in (None, "-") or published is None:
        return [value or "", published or "", ""]
    return [value, published, f"{float(value) - float(published):+.2f}"]


# ---------------------------------------------------------------------------------------------
# Console and files
# ---------------------------------------------------------------------------------------------


def write_table(folder: Path, table: Table) -> list[Path]:
    """Write table.csv, table.md and table.tex; their paths."""
    paths = [folder / f"table.{kind}" for kind in ("csv", "md", "tex")]
    write_csv(paths[0], table.header, table.rows)
    for path, lines in zip(paths[1:], (_markdown(table), _latex(table)), strict=True):
        with atomic_path(path) as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def show_table(table: Table) -> str:
    """The table for the console."""
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    return format_table(rows, table.header)


def _markdown(table: Table) -> Iterator[str]:
    yield _between(table.header, "| ", " | ", " |")
    yield _between([":--", *("--:" for _ in table.header[1:])], "|", "|", "|")
    for row in table.rows:
        yield _between([cell.replace("|", r"\|") for cell in row], "| ", " | ", " |")


def _latex(table: Table) -> Iterator[str]:
    yield rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}"
    yield r"\hline"
    yield _between(map(_escape, table.header), "", " & ", r" \\")
    yield r"\hline"
    for row in table.rows:
        yield _between(map(_escape, row), "", " & ", r" \\")
    yield r"\hline"
    yield r"\end{tabular}"


def _between(cells: Iterable[str], first: str, middle: str, last: str) -> str:
    return first + middle.join(cells) + last


SPECIAL = str.maketrans({c: rf"\{c}" for c in "_%&#$"})


def _escape(text: str) -> str:
    return text.translate(SPECIAL)
