"""The page of ranked images: what it shows of every query and method, and its folder."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from report.plots import list_plots, method_labels, write_plots
from report.render import render
from report.thumbnails import Crop, Picture, make_thumbnails, say_what_is_missing
from utils import whole_folder
from utils_protocol import query_image_rows
from utils_task import NO_SET
from utils_values import QueryValues, query_values

if TYPE_CHECKING:
    from utils_datasets import ImageStore
    from utils_evaluation import Evaluation
    from utils_explained import Explained
    from utils_task import Task

# Pictures of the positives below the ranks shown, of rows left out, and of neighbours.
MISSED_SHOWN = 6
OWN_IMAGE = "query image"
NEIGHBOUR = "neighbour that query expansion took"
LEVELS = 255  # of the points of a scatter plot, which are bytes


def write_report(
    folder: Path,
    evaluations: list[Evaluation],
    images: ImageStore,
    top_k: int,
    *,
    about: Mapping[str, str | Sequence[str]] | None = None,
    cache: Path | None = None,
    viewed: bool = False,
) -> Path:
    """Write a page of every query's ranked images, one method or several side by side.

    folder: takes index.html, thumbnails/ and plots/, and nothing outside it is needed to read them
    (a click on a picture shows the data set's own file, where it lies where it lay).
    It is written whole or not at all; a report that is there is replaced.
    evaluations: one for each method, all over the same task, in columns' order, with the best rows
    of its main view.
    images: `.read(split, image_path)` gives an image's bytes or raises FileNotFoundError.
    top_k: images shown for each query (fewer where the evaluations hold fewer).
    about: facts of the run, by name: a text, or lines.
    cache: folder of thumbnails that outlives the report and that several reports share (files are
    linked from it, or copied); `thumbnails` beside the report's folder by default.
    viewed: the images were encoded as a viewer shows them, and are shown so.
    Returns the path of index.html. An image that cannot be read is shown as a box with its name;
    how many there are is said on stderr.
    """
    folder = Path(folder)
    cache = folder.parent / "thumbnails" if cache is None else Path(cache)
    with whole_folder(folder) as building:
        shown = collect_report(evaluations, top_k)
        place = building / "thumbnails"
        pictures = make_thumbnails(images, shown.wanted(), cache, place, viewed)
        say_what_is_missing(pictures)
        write_plots(building / "plots", evaluations)
        wanted = {crop.path: images.file(crop.path) for crop in pictures}
        full = FullSize.of({path: file for path, file in wanted.items() if file}, folder)
        page = _render_report(shown, pictures, full, evaluations, top_k, about or {})
        (building / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


@dataclass(frozen=True)
class FullSize:
    """Where the files of images lie, seen from a page: most at prefix + path, others at `apart`."""

    prefix: str
    apart: Mapping[str, str]
    usual: frozenset[str]

    @classmethod
    def of(cls, files: Mapping[str, Path], folder: Path) -> FullSize:
        """Of the files of images by path; folder: that of the page."""
        start = os.path.abspath(folder)
        ways = {path: _way(os.path.abspath(file), start) for path, file in files.items()}
        ends = (way.removesuffix(path) for path, way in ways.items() if way.endswith(path))
        prefix = next(ends, "")
        usual = frozenset(path for path, way in ways.items() if way == prefix + path)
        return cls(prefix, {p: way for p, way in ways.items() if p not in usual and way}, usual)

    def way(self, path: str) -> int | str:
        """1: at prefix + path; a text: there; 0: nowhere."""
        return 1 if path in self.usual else self.apart.get(path, 0)


def _way(path: str, start: str) -> str:
    """The way to a file as in an address, "" if there is none (another drive)."""
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return ""


@dataclass(frozen=True, eq=False)
class Shown:
    """What the page shows of a task, before any picture is made.

    methods: a distinct name for each method.
    rows: the database rows that are shown anywhere; `rows`, `missed` and left_out point into it.
    positives: the number of positives of each query in the main view.
    runs: for each query a list with one dict for each method (see `_collect_run`).
    left_out: for each query the first rows that the main view does not rank.
    marks: what a row may be marked as, beside its kind (see `_find_marks`, `_find_own_images`).
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
    marks = {
        words: [task.rows_of(marked, query) for query in range(len(task.queries))]
        for words, marked in _find_marks(task).items()
    }
    own_images = _find_own_images(task)
    if any(map(len, own_images)) and not any(_agree(own_images, rows) for rows in marks.values()):
        marks[OWN_IMAGE] = own_images
    expands = any(own.explained and own.explained.neighbours.shape[1] for own in evaluations)
    numbers: dict[int, int] = {}  # database row -> its place in Shown.rows

    def place(rows: Sequence[int]) -> list[int]:
        return [numbers.setdefault(int(row), len(numbers)) for row in rows]

    runs, left_out = [], []
    for query in range(len(task.queries)):
        sets = {
            "p": task.rows_of(view.positives, query),
            "s": task.rows_of(task.related, query),
            "marks": [marked[query] for marked in marks.values()],
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
        marks=[*marks, *([NEIGHBOUR] if expands else [])],
    )


def _find_marks(task: Task) -> dict[str, np.ndarray]:
    """What the views beside the main one do otherwise with rows: words -> (Q,) set numbers."""
    marks, main = {}, task.views[task.main_view]
    for name, view in task.views.items():
        words = name.replace("_", " ")
        for what, own, usual in (
            ("left out of", view.excluded, main.excluded),
            ("candidate of", view.candidates, main.candidates),
            ("positive of", view.positives, main.positives),
        ):
            if own is not None and not np.array_equal(own, usual):
                marks[f"{what} {words}"] = own
    return marks


def _find_own_images(task: Task) -> list[np.ndarray]:
    """For each query the rows that its main view ranks and that show its own image."""
    excluded, found = task.views[task.main_view].excluded, query_image_rows(task)
    for query, rows in enumerate(found):
        if len(rows):
            box = _box(task.queries.box, query)
            rows = np.array([row for row in rows if _box(task.gallery.box, row) == box], np.int64)
            pool = task.pool[query]
            rows = rows if pool == NO_SET else np.intersect1d(rows, task.sets[pool])
            found[query] = np.setdiff1d(rows, task.rows_of(excluded, query))
    return found


def _agree(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return all(map(np.array_equal, some, others))


def _collect_run(evaluation: Evaluation, query: int, top_k: int, sets: dict, place) -> dict:
    """One method on one query: its values, the rank of its first positive, best and missed rows.

    Ranks are 1-based here, as people count. `kinds` is a string with a letter for each of `rows`,
    `marks` their marks by number; `missedRanks` holds the ranks of all missed positives, `missed`
    the first few of their rows, `missedMarks` the marks of these. What the method tells of its
    scores: see `_collect_parts`.
    """
    best, scores = (own[query] for own in (evaluation.main.top_rows, evaluation.main.top_scores))
    rows = best[:top_k][best[:top_k] >= 0]
    ranks, positives = evaluation.positive_ranks[query], evaluation.positive_rows[query]
    missed = np.flatnonzero(ranks >= len(rows))
    told = evaluation.explained
    neighbours = [] if told is None else told.neighbours[query][told.neighbours[query] >= 0]
    marked = [*sets["marks"], neighbours]
    few = positives[missed[:MISSED_SHOWN]]
    return {
        "values": [round(float(own[query]), 9) for own in evaluation.values.values()],
        "first": int(ranks[0]) + 1 if len(ranks) else None,
        "found": len(ranks) - len(missed),
        "tied": bool(evaluation.main.tied[query]),
        "rows": place(rows),
        "scores": [float(f"{score:.5g}") for score in scores[: len(rows)]],
        "kinds": _kinds(rows, sets),
        "marks": _marks(rows, marked),
        "missed": place(few),
        "missedMarks": _marks(few, marked),
        "missedRanks": [int(ranks[j]) + 1 for j in missed],
        "near": place(neighbours[:MISSED_SHOWN]),
        "nearKinds": _kinds(neighbours[:MISSED_SHOWN], sets),
        "nearCount": len(neighbours),
        **({} if told is None else _collect_parts(told, query, len(rows), missed)),
    }


def _marks(rows: Sequence[int], marked: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[n for n, own in enumerate(marked) if row in own] for row in rows]


def _kinds(rows: Sequence[int], sets: dict) -> str:
    kinds = np.where(np.isin(rows, sets["s"]), "s", "o")
    kinds[np.isin(rows, sets["p"])] = "p"
    return "".join(kinds)


def _collect_parts(told: Explained, query: int, shown: int, missed: np.ndarray) -> dict:
    """The two parts of a query's scores: of the rows shown, of the best positive, of missed ones.

    `cloud`: a sample of its gallery, `more`: the positives that are missed and have no picture,
    both as bytes x, y between the ends `box` [x, x, y, y], in base64.
    """
    box = np.stack([told.low[query], told.high[query]], axis=1)
    best, positives = told.positives[query][:1], told.positives[query]
    missed, more = missed[:MISSED_SHOWN], missed[MISSED_SHOWN:]
    return {
        "parts": _pairs(told.top[query][:shown]),
        "best": _pairs(best)[0] if len(best) and np.isfinite(best).all() else None,
        "missedParts": _pairs(positives[missed]),
        "box": [_short(end) for end in box.ravel()],
        "cloud": _as_bytes(told.sample[query], box),
        "more": _as_bytes(positives[more[more < len(positives)]], box),
    }


def _as_bytes(points: np.ndarray, box: np.ndarray) -> str:
    """Points (n, 2) between the ends of a box [[x, x], [y, y]] as 2 n bytes in base64."""
    points = points[np.isfinite(points).all(1)]
    width = np.maximum(box[:, 1] - box[:, 0], 1e-12)
    levels = np.rint(LEVELS * (points - box[:, 0]) / width).clip(0, LEVELS)
    return base64.b64encode(levels.astype(np.uint8).tobytes()).decode()


def _pairs(values: np.ndarray) -> list[list[float]]:
    return [[_short(value) for value in pair] for pair in values]


def _short(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def _render_report(
    shown: Shown,
    pictures: dict[Crop, Picture],
    full: FullSize,
    evaluations: list[Evaluation],
    top_k: int,
    about: Mapping[str, str | Sequence[str]],
) -> str:
    task = shown.task
    own = query_values(task, evaluations[0].values)
    tags = [{"name": name, "labels": _labels_of(tag)} for name, tag in task.queries.tags.items()]
    methods = [
        {
            "label": label,
            "backbone": evaluation.backbone,
            "means": {n: None if math.isnan(v) else v for n, v in evaluation.means().items()},
            "seconds": evaluation.seconds,
            "config": evaluation.config,
        }
        for label, evaluation in zip(shown.methods, evaluations, strict=True)
    ]
    head = {
        "title": f"{task.name}: {', '.join(shown.methods)}",
        "measure": own.main,
        "methods": methods,
        "plots": list_plots(own, len(evaluations)),
        "query_count": len(task.queries),
        "database_count": len(task.gallery),
        "tags": [{"name": tag["name"], "count": len(tag["labels"])} for tag in tags],
        "top_k": top_k,
        "hidden": task.views[task.main_view].positives is None,
        "submissions": [submission.file for submission in task.submissions],
        "related": task.related is not None,
        "noted": task.gallery.note is not None,
        "marks": shown.marks,
        "notes": list(task.notes),
        "about": {name: [own] if isinstance(own, str) else [*own] for name, own in about.items()},
    }
    told = [evaluation.explained for evaluation in evaluations]
    return render_page(head, _page_data(shown, pictures, full, own, tags, told))


def render_page(head: dict, data: dict) -> str:
    """The page. head: what stands above the table, see page.html; data: what the script reads."""
    return render("page.html", script="page.js", data={**data, "head": head}, **head)


def _labels_of(tag: Sequence[str | tuple[str, ...]]) -> list[str]:
    return sorted({label for labels in tag for label in _each(labels)})


def _each(label: str | tuple[str, ...]) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _page_data(
    shown: Shown,
    pictures: dict[Crop, Picture],
    full: FullSize,
    own: QueryValues,
    tags: list[dict],
    told: Iterable[Explained | None],
) -> dict:
    """What the page's script reads; images are [path, note, thumbnail, way to the file]."""
    task = shown.task
    notes = task.gallery.note
    numbers = [{label: n for n, label in enumerate(tag["labels"])} for tag in tags]
    others = [own.labels[header] for header in own.others]

    def image(crop: Crop, note: str = "") -> list:
        return [crop.path, note, pictures[crop].name, full.way(crop.path)]

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
        "methods": [
            {"label": label}
            | ({"parts": own.names, "fusion": own.fusion and astuple(own.fusion)} if own else {})
            for label, own in zip(shown.methods, told, strict=True)
        ],
        "full": full.prefix,
        "measures": list(own.values),
        "labels": own.others,
        "tags": tags,
        "marks": shown.marks,
        "rows": [
            image(shown.row_crop(row), "" if notes is None else notes[row]) for row in shown.rows
        ],
        "queries": [query(number) for number in range(len(shown.runs))],
    }
