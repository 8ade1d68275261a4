"""The page of ranked images: what it shows of every query and method, and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas

from report.plots import list_plots, method_labels, write_plots
from report.render import render
from report.thumbnails import Picture, make_thumbnails, say_what_is_missing
from utils import whole_folder

if TYPE_CHECKING:
    from utils_datasets import ImageStore
    from utils_evaluation import Evaluation

MISSED_SHOWN = 6


def write_report(
    folder: Path,
    evaluations: list[Evaluation],
    queries: pandas.DataFrame,
    database: pandas.DataFrame,
    images: ImageStore,
    dataset: str,
    top_k: int,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> Path:
    """Write a page of every query's ranked images, one method or several side by side.

    folder: takes index.html, thumbnails/ and plots/, and nothing outside it is needed to read them.
    It is written whole or not at all; a report that is there is replaced.
    evaluations: one for each method, all over the same queries and database, in columns' order.
    queries, database: columns image_path, text, instance (str), row i = row i of the features.
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
        shown = collect_report(evaluations, queries, database, top_k)
        pictures = make_thumbnails(images, shown.wanted(), cache, building / "thumbnails", workers)
        say_what_is_missing(pictures)
        write_plots(building / "plots", evaluations, queries)
        page = _render_report(shown, pictures, evaluations, dataset, len(database), top_k)
        (building / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


@dataclass(frozen=True)
class Shown:
    """What the page shows, before any picture is made.

    labels: a distinct name for each method.
    query_items: (image path, text, instance) of each query.
    row_items: (image path, text) of each database row that is shown anywhere.
    runs: for each query a list with one dict for each method (see `_collect_run`), whose `rows`
    and `missed` point into row_items.
    positives: the number of positives of each query.
    """

    labels: list[str]
    query_items: list[tuple[str, str, str]]
    row_items: list[tuple[str, str]]
    runs: list[list[dict]]
    positives: list[int]

    def wanted(self) -> list[tuple[str, str]]:
        """The distinct (split, image path) whose thumbnails the page shows, in a fixed order."""
        paths = {("query", path) for path, _, _ in self.query_items}
        return sorted(paths | {("database", path) for path, _ in self.row_items})


def collect_report(
    evaluations: list[Evaluation],
    queries: pandas.DataFrame,
    database: pandas.DataFrame,
    top_k: int,
) -> Shown:
    """Choose what a report shows: for each query and method the best rows and missed positives.

    A row's kind is "p", positive: instance and text equal the query's; "s", same instance, other
    text: the row's instance is the query's and its text is another text asked of that instance, so
    that it shows the object in another condition; "o", other: the rest. A database row names the
    instance to whose database it belongs, also where it is a negative that does not show the
    object: that "s" rows show it is inferred from their text.
    """
    instances, texts = _strings(queries["instance"]), _strings(queries["text"])
    row_instances, row_texts = _strings(database["instance"]), _strings(database["text"])
    row_paths = _strings(database["image_path"])
    asked = set(zip(instances, texts, strict=True))

    def kind(query: int, row: int) -> str:
        if row_instances[row] != instances[query]:
            return "o"
        if row_texts[row] == texts[query]:
            return "p"
        return "s" if (row_instances[row], row_texts[row]) in asked else "o"

    numbers: dict[int, int] = {}  # database row -> its place in row_items

    def place(row: int) -> int:
        return numbers.setdefault(row, len(numbers))

    runs = [
        [_collect_run(evaluation, query, top_k, kind, place) for evaluation in evaluations]
        for query in range(len(queries))
    ]
    return Shown(
        labels=method_labels(evaluations),
        query_items=list(zip(_strings(queries["image_path"]), texts, instances, strict=True)),
        row_items=[(row_paths[row], row_texts[row]) for row in numbers],
        runs=runs,
        positives=[len(ranks) for ranks in evaluations[0].positive_ranks],
    )


def _collect_run(evaluation: Evaluation, query: int, top_k: int, kind, place) -> dict:
    """One method on one query: its AP, the rank of its first positive, best rows, missed rows.

    Ranks are 1-based here, as people count. `kinds` is a string with a letter for each of `rows`;
    `missedRanks` holds the ranks of all missed positives, `missed` the first few of their rows.
    """
    rows = [int(row) for row in evaluation.top_rows[query][:top_k] if row >= 0]
    ranks, positives = evaluation.positive_ranks[query], evaluation.positive_rows[query]
    missed = np.flatnonzero(ranks >= len(rows))
    return {
        "ap": round(float(evaluation.ap[query]), 9),
        "first": int(ranks[0]) + 1 if len(ranks) else None,
        "found": len(ranks) - len(missed),
        "tied": bool(evaluation.tied[query]),
        "rows": [place(row) for row in rows],
        "scores": [float(f"{s:.5g}") for s in evaluation.top_scores[query][: len(rows)]],
        "kinds": "".join(kind(query, row) for row in rows),
        "missed": [place(int(positives[j])) for j in missed[:MISSED_SHOWN]],
        "missedRanks": [int(ranks[j]) + 1 for j in missed],
    }


def _strings(column: pandas.Series) -> list[str]:
    return column.fillna("").astype(str).tolist()


def _render_report(
    shown: Shown,
    pictures: dict[tuple[str, str], Picture],
    evaluations: list[Evaluation],
    dataset: str,
    database_count: int,
    top_k: int,
) -> str:
    instances = sorted({instance for _, _, instance in shown.query_items})
    data = {
        "methods": [{"label": label} for label in shown.labels],
        "instances": instances,
        "rows": [[path, text, pictures["database", path].name] for path, text in shown.row_items],
        "queries": [
            {
                "text": text,
                "instance": instance,
                "positives": shown.positives[i],
                "item": [path, text, pictures["query", path].name],
                "runs": shown.runs[i],
            }
            for i, (path, text, instance) in enumerate(shown.query_items)
        ],
    }
    methods = [
        {
            "label": label,
            "backbone": evaluation.backbone,
            "means": evaluation.means(),
            "seconds": evaluation.seconds,
            "config": evaluation.config,
        }
        for label, evaluation in zip(shown.labels, evaluations, strict=True)
    ]
    return render(
        "page.html",
        script="page.js",
        title=f"{dataset}: {', '.join(shown.labels)}",
        data=data,
        methods=methods,
        plots=list_plots(len(evaluations)),
        query_count=len(shown.query_items),
        instance_count=len(instances),
        database_count=database_count,
        top_k=top_k,
    )
