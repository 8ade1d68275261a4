"""Files for evaluation servers: written, read, and checked by the rules of their task.

All are JSON: some constant entries, then a list of images for every query, best first.
A benchmark's Layout says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Layout, list_benchmarks
from benchmarks.annotations import load_json
from utils import UserError
from utils_metrics import measure, parse_measure, reduce
from utils_task import Submission, Task


def submission_files(
    task: Task, top_rows: Mapping[str, np.ndarray], submissions: Sequence[Submission]
) -> dict[str, str]:
    """Some of a task's submissions: file name -> text.

    top_rows: view -> rows (Q, K), best first, K >= k. Raises UserError if a list breaks the rules.
    """
    layouts = list_benchmarks()[task.name].submissions if submissions else {}
    return {
        s.file: format_submission(task, s, layouts[s.layout], top_rows[s.view][:, : s.k])
        for s in submissions
    }


def find_submission(task: Task, path: Path) -> tuple[Submission, Layout]:
    """Which of a task's submissions a file is, by its constant entries, and its form.

    Raises UserError if it is none of them, or the task has none.
    """
    if not task.submissions:
        raise UserError(f"{task.name} has no evaluation server: nothing is submitted")
    content = _read_object(path)
    layouts = list_benchmarks()[task.name].submissions
    found = [(s, layouts[s.layout]) for s in task.submissions]
    for submission, layout in found:
        if all(content.get(key) == value for key, value in layout.header.items()):
            return submission, layout
    forms = " or ".join(json.dumps(dict(layout.header)) for _, layout in found)
    raise UserError(f"{path} is none of {task.name}'s submissions: it has to begin with {forms}")


def _read_object(path: Path) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; see the server's example")
    return content


def format_submission(task: Task, submission: Submission, layout: Layout, rows: np.ndarray) -> str:
    """The text of a submission. rows: int (Q, k), gallery rows, best first.

    Raises UserError if the rows break the task's rules: see check_rows.
    """
    check_rows(task, submission, rows, [f"query {key}" for key in task.queries.key])
    names = {row: layout.name(task.gallery.path[row]) for row in np.unique(rows).tolist()}
    lists = zip(task.queries.key, rows.tolist(), strict=True)
    return json.dumps({**layout.header, **{key: [names[row] for row in own] for key, own in lists}})


def read_submission(task: Task, submission: Submission, layout: Layout, path: Path) -> np.ndarray:
    """The rows, int64 (Q, k), that a submission file lists for the task's queries, best first.

    Raises UserError, naming the file and the entry, unless it is what a server takes: its constant
    entries, every query once, and nothing that check_rows refuses.
    """
    content = _read_object(path)
    for key, value in layout.header.items():
        if content.pop(key, None) != value:
            raise UserError(f"{path}: {key!r} has to be {value!r}")
    _check_keys(path, content, task.queries.key)
    rows = {str(layout.name(image)): row for row, image in enumerate(task.gallery.path)}
    places = [f"{path}, query {key}" for key in task.queries.key]
    found = [
        _rows_of(content[key], submission.k, rows, place)
        for key, place in zip(task.queries.key, places, strict=True)
    ]
    listed = np.array(found, np.int64)
    check_rows(task, submission, listed, places)
    return listed


def _check_keys(path: Path, content: Mapping[str, Any], keys: Sequence[str]) -> None:
    for problem, those in (
        ("lacks the queries", [key for key in keys if key not in content]),
        ("has entries that are no queries:", sorted(content.keys() - set(keys))),
    ):
        if those:
            first = ", ".join(those[:3])
            raise UserError(
                f"{path} {problem} {first}{', ...' if len(those) > 3 else ''} ({len(those)})"
            )


def _rows_of(names: Any, k: int, rows: Mapping[str, int], place: str) -> list[int]:
    if not isinstance(names, list) or len(names) != k:
        raise UserError(f"{place}: a list of {k} images is needed, not {repr(names)[:60]}")
    for name in names:
        if not isinstance(name, (str, int)) or str(name) not in rows:
            raise UserError(f"{place}: {name!r} is no image of the gallery")
    return [rows[str(name)] for name in names]


def check_rows(task: Task, submission: Submission, rows: np.ndarray, places: Sequence[str]) -> None:
    """Raise UserError, naming the place, for a query whose list breaks the rules of its view.

    rows: int (Q, k). No row may be missing (-1), listed twice, excluded (the reference) or outside
    the candidates.
    """
    view = task.views[submission.view]
    for query, (own, place) in enumerate(zip(rows, places, strict=True)):
        excluded = task.rows_of(view.excluded, query)
        faults = {
            "only {n} images can be ranked, and {k} are needed": own < 0,
            "{image} is listed twice": _repeated(own),
            "{image} is the query's own and may not be listed": np.isin(own, excluded),
        }
        if view.candidates is not None:
            outside = ~np.isin(own, task.rows_of(view.candidates, query))
            faults["{image} is not among the candidates"] = outside
        for text, wrong in faults.items():
            if wrong.any():
                image = task.gallery.path[own[wrong.argmax()]]
                n = np.count_nonzero(own >= 0)
                raise UserError(f"{place}: {text.format(image=image, n=n, k=submission.k)}")


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which values stand before already, bool (k,)."""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


# ---------------------------------------------------------------------------------------------
# Scores of a submission
# ---------------------------------------------------------------------------------------------


def scored_views(task: Task, submission: Submission) -> list[str]:
    """The views with ground truth in which a submission's view ranks the rows."""
    own = task.views[submission.view]
    return [
        name
        for name, view in task.views.items()
        if view.positives is not None
        and np.array_equal(view.excluded, own.excluded)
        and np.array_equal(view.candidates, own.candidates)
    ]


def score_submission(task: Task, submission: Submission, rows: np.ndarray) -> dict[str, float]:
    """The columns that a list of the best k rows decides, by name, in percent.

    rows: int (Q, k). Columns without a cut-off, or with one beyond k, are left out.
    """
    values, views = {}, scored_views(task, submission)
    for column in task.columns:
        cut = parse_measure(column.measure)[1]
        if column.view in views and cut is not None and cut <= submission.k:
            ranks, query, n = listed_ranks(task, task.views[column.view].positives, rows)
            size = np.full(len(rows), len(task.gallery))
            own = measure(column.measure, ranks, query, n, size)
            values[column.name] = reduce(own, column.groups, task.queries.tags)
    for mean in task.means:
        if all(name in values for name in mean.of):
            values[mean.name] = sum(values[name] for name in mean.of) / len(mean.of)
    return values


def listed_ranks(
    task: Task, positives: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the positives stand in lists of rows (Q, k): ranks and queries (P,), n (Q,).

    A positive that is not listed has the rank N, beyond any.
    """
    ranks, query = [], []
    for number, own in enumerate(rows):
        wanted = task.rows_of(positives, number)
        hit = wanted[:, None] == own
        ranks.append(np.where(hit.any(1), hit.argmax(1), len(task.gallery)))
        query.append(np.full(len(wanted), number))
    return np.concatenate(ranks), np.concatenate(query), task.sets.sizes(positives)


# ---------------------------------------------------------------------------------------------
# --check_submission
# ---------------------------------------------------------------------------------------------


def check_file(task: Task, path: Path) -> list[str]:
    """The lines that say that a submission file is right and, with ground truth, what it scores.

    Raises UserError if it is not right.
    """
    submission, layout = find_submission(task, path)
    rows = read_submission(task, submission, layout, path)
    right = f"{path}: right for {task.name}, {submission.file}: {len(rows)} queries"
    values = score_submission(task, submission, rows)
    width = max(map(len, values), default=0)
    lines = [f"{name:<{width}}  {value:.2f}" for name, value in values.items()]
    return [f"{right} of {submission.k} images each", *lines]
