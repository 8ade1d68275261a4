"""The rankings of two runs side by side: one page, made of the pages that both runs have."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report.page import render_page
from report.thumbnails import link_thumbnail

PAGE = "rankings.html"
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def write_side_by_side(
    building: Path, folder: Path, runs: Sequence[Path], place: Sequence[int]
) -> dict | None:
    """Write rankings.html and its thumbnails; what is in it, None where a run has no page for it.

    building: the folder that is written, which will stand at `folder`. runs: the result folders A
    and B. place: for each query of A its number in B.
    """
    reports = [run / "report" for run in runs]
    pages = [_read_page(report) for report in reports]
    if None in pages or not _are_alike(*pages, place):
        return None
    moved = [_Moved(*own, folder) for own in zip(pages, reports, strict=True)]
    merged = _merge(*moved, place)
    (building / "thumbnails").mkdir()
    for report, page in zip(reports, pages, strict=True):
        for name in _thumbnails(page):
            if (report / "thumbnails" / name).is_file():
                link_thumbnail(report / "thumbnails" / name, building / "thumbnails" / name)
    (building / PAGE).write_text(render_page(merged.pop("head"), merged), encoding="utf-8")
    return merged


def _read_page(report: Path) -> dict | None:
    """The data of a report of one method, None where there is none that this version wrote."""
    try:
        found = DATA.search((report / "index.html").read_text(encoding="utf-8"))
        data = json.loads(found[1]) if found else {}
    except (OSError, ValueError):
        return None
    return data if "head" in data and len(data["methods"]) == 1 else None


def _are_alike(a: dict, b: dict, place: Sequence[int]) -> bool:
    """Whether two pages show the queries of one task."""
    counts = {len(place), len(a["queries"]), len(b["queries"])}
    return len(counts) == 1 and all(a[name] == b[name] for name in ("measures", "labels", "tags"))


def _thumbnails(page: dict) -> set[str]:
    items = [*page["rows"], *(item for query in page["queries"] for item in query["images"])]
    return {thumbnail for _, _, thumbnail, _ in items if thumbnail}


@dataclass(frozen=True, eq=False)
class _Moved:
    """The data of a page that is shown in another folder."""

    page: dict
    report: Path
    folder: Path

    def item(self, item: list) -> list:
        """An image whose file is found from the other folder."""
        path, note, thumbnail, way = item
        if way:
            whole = self.page["full"] + path if way == 1 else way
            start = Path(os.path.relpath(self.report, self.folder)).as_posix()
            way = posixpath.normpath(posixpath.join(start, whole))
        return [path, note, thumbnail, way]


def _merge(a: _Moved, b: _Moved, place: Sequence[int]) -> dict:
    """One page of both: the queries of A, each with its run in A and in B."""
    numbers: dict[
        tuple, int
    ] = {}  # path and thumbnail of a row -> its place among the rows of both
    rows: list[list] = []
    marks = list(dict.fromkeys((*a.page["marks"], *b.page["marks"])))

    def number(item: list) -> int:
        key = (item[0], item[2])
        if key not in numbers:
            numbers[key] = len(rows)
            rows.append(item)
        return numbers[key]

    at = {own: [number(own.item(item)) for item in own.page["rows"]] for own in (a, b)}

    def run(own: _Moved, query: int) -> dict:
        [found] = own.page["queries"][query]["runs"]
        moved = {name: [at[own][row] for row in found[name]] for name in ("rows", "missed", "near")}
        named = [[marks.index(own.page["marks"][n]) for n in some] for some in found["marks"]]
        return {**found, **moved, "marks": named}

    queries = [
        {
            **query,
            "images": [a.item(item) for item in query["images"]],
            "runs": [run(a, row), run(b, int(place[row]))],
            "leftOut": [at[a][left] for left in query["leftOut"]],
        }
        for row, query in enumerate(a.page["queries"])
    ]
    methods = [*a.page["methods"], *b.page["methods"]]
    head = {
        **a.page["head"],
        "title": " against ".join(method["label"] for method in methods),
        "methods": [*a.page["head"]["methods"], *b.page["head"]["methods"]],
        "marks": marks,
        "plots": [],
        "about": _about(a.page["head"]["about"], b.page["head"]["about"]),
    }
    both = {"methods": methods, "marks": marks, "full": "", "rows": rows, "queries": queries}
    return {**a.page, **both, "head": head}


def _about(a: dict, b: dict) -> dict:
    """The facts of both, those that differ once for each."""
    said = {}
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) == b.get(name):
            said[name] = a[name]
        else:
            said |= {
                f"{name} of {run}": own[name] for run, own in (("A", a), ("B", b)) if name in own
            }
    return said
