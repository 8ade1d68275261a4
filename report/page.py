"""The page of ranked images: what it shows of every query and method, and its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from report.plots import list_plots, method_labels, write_plots
from report.render import render
from report.thumbnails import Crop, Picture, make_thumbnails, say_what_is_missing
from utils import whole_folder
from utils_values import QueryValues, query_values

if TYPE_CHECKING:
    from utils_datasets import ImageStore
    from utils_evaluation import Evaluation
    from utils_task import Task

MISSED_SHOWN = 6  # of the positives below the ranks shown, and of the rows that are left out


def write_report(
    folder: Path,
    evaluations: list[Evaluation],
    images: ImageStore,
    top_k: int,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> Path:
    """Write a page of every query's ranked images, one method or several side by side.

    folder: takes index.html, thumbnails/ and plots/, and nothing outside it is needed to read them.
    It is written whole or not at all; a report that is there is replaced.
    evaluations: one for each method, all over the same task, in columns' order, with the best rows
    of its main view.
    images: `.read(split, image_path)` gives an image's bytes or raises FileNotFoundError.
    top_k: images shown for each query (fewer where the evaluations hold fewer).
    cache: folder of thumbnails that outlives the report and that several reports share (files are
    linked from it, or copied); `thumbnails` beside the report's folder by default.
    workers: threads that make thumbnails (Pillow lets go of the interpreter lock); by default one a
    core, at most 16.
    Returns the path of index.html. An image that cannot be read is shown as a box with its name;
    how many there are is said on stderr.
    """
    folder = Path(folder)
    cache = folder.parent / "thumbnails" if cache is None else Path(cache)
    with whole_folder(folder) as building:
        shown = collect_report(evaluations, top_k)
        pictures = make_thumbnails(images, shown.wanted(), cache, building / "thumbnails", workers)
        say_what_is_missing(pictures)
        write_plots(building / "plots", evaluations)
        page = _render_report(shown, pictures, evaluations, top_k)
        (building / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


@dataclass(frozen=True, eq=False)
class Shown:
    """What the page shows of a task, before any picture is made.

    methods: a distinct name for each method.
    rows: the database rows that are shown anywhere; `rows`, `missed` and left_out point into it.
    positives: the number of positives of each query in the main view.
    runs: for each query a list with one dict for each method (see `_collect_run`).
    left_out: for each query the first rows that the main view does not rank.
    marks: what a row may be marked as, beside its kind (see `_find_marks`).
    """

    task: Task
    methods: list[str]
    rows: list[int]
    positives: list[int]
    runs: list[list[dict]]
    left_out: list[list[int]]
    marks: list[str]

    def query_crops(self, query: int) -> list[Crop]:
        """The images of a query."""
        queries = self.task.queries
        return [Crop("query", path, _box(queries.box, query)) for path in queries.images[query]]

    def row_crop(self, row: int) -> Crop:
        """The image of a database row."""
        gallery = self.task.gallery
        return Crop("database", gallery.path[row], _box(gallery.box, row))

    def wanted(self) -> list[Crop]:
        """The distinct images whose thumbnails the page shows, in a fixed order."""
        queries = (crop for query in range(len(self.runs)) for crop in self.query_crops(query))
        crops = {*queries, *map(self.row_crop, self.rows)}
        return sorted(crops, key=lambda crop: (crop.split, crop.path, crop.box or ()))


def _box(boxes: np.ndarray | None, row: int) -> tuple[int, int, int, int] | None:
    return None if boxes is None else tuple(boxes[row].tolist())


def collect_report(evaluations: list[Evaluation], top_k: int) -> Shown:
    """Choose what a report shows: for each query and method the best rows and missed positives.

    A row's kind is "p", positive in the task's main view; "s", related: in the task's related set,
    and not positive; "o", other: the rest.
    """
    task = evaluations[0].task
    view = task.views[task.main_view]
    marks = _find_marks(task)
    numbers: dict[int, int] = {}  # database row -> its place in Shown.rows

    def place(rows: Sequence[int]) -> list[int]:
        return [numbers.setdefault(int(row), len(numbers)) for row in rows]

    runs, left_out = [], []
    for query in range(len(task.queries)):
        sets = {
            "p": task.rows_of(view.positives, query),
            "s": task.rows_of(task.related, query),
            "marks": [task.rows_of(marked, query) for marked in marks.values()],
        }
        runs.append([_collect_run(own, query, top_k, sets, place) for own in evaluations])
        left_out.append(place(task.rows_of(view.excluded, query)[:MISSED_SHOWN]))
    return Shown(
        task=task,
        methods=method_labels(evaluations),
        rows=list(numbers),
        positives=[len(ranks) for ranks in evaluations[0].positive_ranks],
        runs=runs,
        left_out=left_out,
        marks=list(marks),
    )


def _find_marks(task: Task) -> dict[str, np.ndarray]:
    """What the views beside the main one do with rows: words -> (Q,) set numbers."""
    marks = {}
    for name, view in task.views.items():
        if name != task.main_view and view.excluded is not None:
            marks[f"left out of {name}"] = view.excluded
        if name != task.main_view and view.candidates is not None:
            marks[f"candidate of {name}"] = view.candidates
    return marks


def _collect_run(evaluation: Evaluation, query: int, top_k: int, sets: dict, place) -> dict:
    """One method on one query: its values, the rank of its first positive, best and missed rows.

    Ranks are 1-based here, as people count. `kinds` is a string with a letter for each of `rows`,
    `marks` their marks by number; `missedRanks` holds the ranks of all missed positives, `missed`
    the first few of their rows.
    """
    best, scores = (own[query] for own in (evaluation.main.top_rows, evaluation.main.top_scores))
    rows = best[:top_k][best[:top_k] >= 0]
    ranks, positives = evaluation.positive_ranks[query], evaluation.positive_rows[query]
    missed = np.flatnonzero(ranks >= len(rows))
    kinds = np.where(np.isin(rows, sets["s"]), "s", "o")
    kinds[np.isin(rows, sets["p"])] = "p"
    return {
        "values": [round(float(own[query]), 9) for own in evaluation.values.values()],
        "first": int(ranks[0]) + 1 if len(ranks) else None,
        "found": len(ranks) - len(missed),
        "tied": bool(evaluation.main.tied[query]),
        "rows": place(rows),
        "scores": [float(f"{score:.5g}") for score in scores[: len(rows)]],
        "kinds": "".join(kinds),
        "marks": [[n for n, own in enumerate(sets["marks"]) if row in own] for row in rows],
        "missed": place(positives[missed[:MISSED_SHOWN]]),
        "missedRanks": [int(ranks[j]) + 1 for j in missed],
    }


def _render_report(
    shown: Shown, pictures: dict[Crop, Picture], evaluations: list[Evaluation], top_k: int
) -> str:
    task = shown.task
    own = query_values(task, evaluations[0].values)
    tags = [{"name": name, "labels": _labels_of(tag)} for name, tag in task.queries.tags.items()]
    methods = [
        {
            "label": label,
            "backbone": evaluation.backbone,
            "means": evaluation.means(),
            "seconds": evaluation.seconds,
            "config": evaluation.config,
        }
        for label, evaluation in zip(shown.methods, evaluations, strict=True)
    ]
    return render(
        "page.html",
        script="page.js",
        title=f"{task.name}: {', '.join(shown.methods)}",
        data=_page_data(shown, pictures, own, tags),
        measure=own.main,
        methods=methods,
        plots=list_plots(own, len(evaluations)),
        query_count=len(task.queries),
        database_count=len(task.gallery),
        tags=tags,
        top_k=top_k,
        related=task.related is not None,
        noted=task.gallery.note is not None,
        marks=shown.marks,
        notes=task.notes,
    )


def _labels_of(tag: Sequence[str | tuple[str, ...]]) -> list[str]:
    return sorted({label for labels in tag for label in _each(labels)})


def _each(label: str | tuple[str, ...]) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _page_data(
    shown: Shown, pictures: dict[Crop, Picture], own: QueryValues, tags: list[dict]
) -> dict:
    """What the page's script reads; images are [path, note, thumbnail]."""
    task = shown.task
    notes = task.gallery.note
    numbers = [{label: n for n, label in enumerate(tag["labels"])} for tag in tags]
    others = [own.labels[header] for header in own.others]

    def image(crop: Crop, note: str = "") -> list:
        return [crop.path, note, pictures[crop].name]

    def query(number: int) -> dict:
        labels = [task.queries.tags[tag["name"]][number] for tag in tags]
        return {
            "text": task.queries.text[number],
            "labels": [str(column[number]) for column in others],
            "tags": [
                [known[label] for label in _each(label)]
                for known, label in zip(numbers, labels, strict=True)
            ],
            "images": [image(crop) for crop in shown.query_crops(number)],
            "positives": shown.positives[number],
            "runs": shown.runs[number],
            "leftOut": shown.left_out[number],
        }

    return {
        "methods": [{"label": label} for label in shown.methods],
        "measures": list(own.values),
        "labels": own.others,
        "tags": tags,
        "marks": shown.marks,
        "rows": [
            image(shown.row_crop(row), "" if notes is None else notes[row]) for row in shown.rows
        ],
        "queries": [query(number) for number in range(len(shown.runs))],
    }
