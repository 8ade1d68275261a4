"""Results as tables: mAP_table.csv, APs.csv, top{K}.csv and the console. Columns are the task's."""

from __future__ import annotations

import csv
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils import UserError, locked, open_text, printable, write_csv, write_text
from utils_evaluation import Evaluation
from utils_metrics import breakdown
from utils_runs import Run
from utils_task import NO_POSITIVES, TABLE_COLUMNS, Breakdown, Task
from utils_values import query_values, write_values

OPTIONAL = (
    "gallery",
    "left_out",
    "notes",
)  # facts that have a column only where they say something


def result_row(evaluation: Evaluation, facts: dict[str, str], top_k: int = 0) -> dict[str, str]:
    """One run as a row of mAP_table.csv, every value as it is printed (columns in percent).

    facts: dataset, ties, features (hash of the manifest), version and other constants of the run;
    they follow the method's own parameters. top_k: the row has the means of P@K and R@K.
    """
    row = {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "dataset": facts["dataset"],
        "backbone": evaluation.backbone,
        "method": evaluation.method,
        "variant": evaluation.variant,
        **{name: show_percent(value) for name, value in evaluation.means().items()},
        **shares_at(evaluation, top_k),
        "queries": str(len(evaluation.task.queries)),
        **group_counts(evaluation.task),
        "seconds": f"{evaluation.seconds:.2f}",
        "total_seconds": f"{evaluation.total_seconds:.2f}",
        "tied_queries": str(int(evaluation.tied.sum())),
        **evaluation.config,
        **{name: value for name, value in facts.items() if name != "dataset"},
    }
    return {name: value for name, value in row.items() if value or name not in OPTIONAL}


def shares_at(evaluation: Evaluation, k: int) -> dict[str, str]:
    """The means over queries of P@k and R@k, in percent: hits among the k best, over k and over n.

    None where no ranking was asked for or the ground truth is hidden, nor in the place of a column
    of that name that the task has.
    """
    positives = evaluation.main.positives
    if not k or evaluation.task.views[evaluation.task.main_view].positives is None:
        return {}
    hits = np.bincount(positives.query[evaluation.main.ranks < k], minlength=len(positives.count))
    shares = {f"P@{k}": hits / k, f"R@{k}": hits / np.maximum(positives.count, 1)}
    taken = evaluation.means()
    means = {name: 100 * float(own.mean()) for name, own in shares.items() if name not in taken}
    return {name: show_percent(value) for name, value in means.items()}


def show_percent(value: float) -> str:
    """A figure with two decimals, "-" where there is none."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def group_counts(task: Task) -> dict[str, str]:
    """How many labels each tag has over which the task averages: {"instances": "202"}.

    A count is left out whose name another column of the table has.
    """
    taken = {*TABLE_COLUMNS, *(column.name for column in (*task.columns, *task.means))}
    tags = dict.fromkeys(g.tag for column in task.columns for g in column.groups if g.tag)
    counts = {_plural(tag): str(len(_labels(task.queries.tags[tag]))) for tag in tags}
    return {name: count for name, count in counts.items() if name not in taken}


def _plural(tag: str) -> str:
    return f"{tag[:-1]}ies" if tag.endswith("y") else f"{tag}s"


def _labels(tag: Sequence[str | tuple[str, ...]]) -> set[str]:
    return {label for own in tag for label in ((own,) if isinstance(own, str) else own)}


def console_columns(task: Task, top_k: int = 0) -> list[str]:
    """The columns of result_row that the console shows, in its order."""
    means = [column.name for column in (*task.columns, *task.means)]
    means += [name for name in (f"P@{top_k}", f"R@{top_k}") if top_k and name not in means]
    counts = ["queries", *group_counts(task)]
    return ["method", "variant", *means, *counts, "seconds", "total_seconds", "tied_queries"]


EXPORTS = ("run.*", "qrels.*", "ids.csv", "no_positives.txt")  # of external/export.py
TIMES = {"timestamp", "seconds", "total_seconds"}
TEXT_SHOWN = 60  # characters of a query's text in a message
LEFT_BEHIND = (".mAP_table.csv.*.part", ".APs.*.part", ".top[0-9]*.part")  # by a killed run


def write_results(
    folder: Path,
    evaluation: Evaluation,
    row: dict[str, str],
    top_k: int,
    submissions: Mapping[str, str] | None = None,
) -> None:
    """Write a run's folder: a row of mAP_table.csv, APs.csv and .json, top{K}.csv if K is not 0.

    The task's breakdowns are written as matrices beside them. submissions: file name -> text, of
    files for evaluation servers. What an earlier run left of rankings, or half-written when it was
    killed, is removed, of exported files where its rankings were others. One process writes at a
    time. Raises UserError, with nothing changed, if its table cannot be read.
    """
    with locked(folder):
        earlier = read_results(folder / "mAP_table.csv")
        write_values(folder, query_values(evaluation.task, evaluation.values))
        for pattern in ("top[0-9]*.csv", *LEFT_BEHIND):
            for path in folder.glob(pattern):
                path.unlink()
        if earlier and _differ(earlier[-1], row):
            _drop_exports(folder, evaluation.task)
        shutil.rmtree(folder / "report", ignore_errors=True)
        if top_k:
            write_csv(folder / f"top{top_k}.csv", *_top_rows(evaluation, top_k))
        for table in _measured_breakdowns(evaluation):
            write_csv(folder / table.file, *_matrix(evaluation, table))
        for name, text in (submissions or {}).items():
            write_text(folder / name, text)
        write_rows(folder / "mAP_table.csv", [*earlier, row])


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two rows of a table are of different rankings, by all but times that both have."""
    both = (name for name in one.keys() & other.keys() - TIMES if one[name] and other[name])
    return any(one[name] != other[name] for name in both)


def _drop_exports(folder: Path, task: Task) -> None:
    """Remove what an earlier run has exported: rankings that are not the table's any more."""
    names = (*EXPORTS, *(submission.file for submission in task.submissions))
    for path in (path for name in names for path in folder.glob(name)):
        path.unlink()


def _measured_breakdowns(evaluation: Evaluation) -> list[Breakdown]:
    """The task's breakdowns of columns whose measure there is."""
    measured = {c.name for c in evaluation.task.columns if (c.measure, c.view) in evaluation.values}
    return [table for table in evaluation.task.breakdowns if table.column in measured]


def _matrix(evaluation: Evaluation, table: Breakdown) -> tuple[list[str], Iterable[list[str]]]:
    """Header and rows of a breakdown's CSV; where no query has both labels a cell is empty."""
    (column,) = (c for c in evaluation.task.columns if c.name == table.column)
    values = evaluation.values[column.measure, column.view]
    tags = evaluation.task.queries.tags
    rows, columns, cells = breakdown(values, column.groups, tags, table.rows, table.columns)
    shown = [["" if np.isnan(cell) else f"{cell:.2f}" for cell in line] for line in cells]
    return ["", *columns], ([name, *line] for name, line in zip(rows, shown, strict=True))


def _top_rows(evaluation: Evaluation, k: int) -> tuple[list[str], Iterable[list]]:
    """The K best paths, whether they match, their scores; P@K = hits / K, R@K = hits / positives.

    A query with no positive has R@K 0; places past the end of a small gallery stay empty, and all
    that says what matches where the ground truth is hidden.
    """
    hidden = evaluation.task.views[evaluation.task.main_view].positives is None
    labels, paths = evaluation.task.queries.labels(), evaluation.task.gallery.path
    numbers, cell = range(1, k + 1), ("path", "match", "score")
    columns = [f"{name}_{number}" for number in numbers for name in cell]

    def rows() -> Iterable[list]:
        for query, label in enumerate(zip(*labels.values(), strict=True)):
            top, positives = evaluation.main.top_rows[query, :k], evaluation.positive_rows[query]
            matches = np.isin(top, positives)
            hits = int(matches.sum())
            scores = evaluation.main.top_scores[query, :k].tolist()
            cells = [
                cell
                for row, match, score in zip(top, matches, scores, strict=True)
                for cell in (
                    (paths[row], "" if hidden else int(match), repr(score))
                    if row >= 0
                    else ("", "", "")
                )
            ]
            cells += [""] * (3 * (k - len(top)))
            shares = (hits / k, hits / max(1, len(positives)))
            yield [*label, *("" if hidden else repr(share) for share in shares), *cells]

    return [*labels, f"P@{k}", f"R@{k}", *columns], rows()


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as CSV; a row without a value for a column leaves it empty.

    Each row's columns stand in its order: those that only later rows have come among the others.
    """
    columns: list[str] = []
    for row in rows:
        place = 0
        for name in row:
            if name not in columns:
                columns.insert(place, name)
            place = columns.index(name) + 1
    write_csv(path, columns, ([row.get(name, "") for name in columns] for row in rows))


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a table that write_rows wrote, none where there is no such file.

    Raises UserError if it is not such a table.
    """
    if not path.exists():
        return []
    try:
        with open_text(path) as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of UTF-8 ({error}); move it away") from None
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path}: a row has not as many values as its header; move it away")
    return rows


def format_table(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> str:
    """Rows for the console, numbers to the right; columns that no row fills are left out."""
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    cells = [[printable(row.get(name, "")) for name in columns] for row in rows]
    columns = list(map(printable, columns))
    table = pd.DataFrame(cells, columns=columns)
    words = [name for name in columns if not table[name].map(_is_number).all()]
    width = {name: max(len(name), *table[name].map(len)) for name in words}
    formatters = {name: f"{{:<{width[name]}}}".format for name in words}
    return table.to_string(index=False, formatters=formatters, justify="left")


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit()


def describe_task(task: Task) -> list[str]:
    """The lines that warn of queries without positives, and the task's own notes."""
    lines = [f"note: {note}" for note in task.notes]
    for name, view in task.views.items():
        empty = 0 if view.positives is None else int((view.positives < 0).sum())
        where = "" if name == task.main_view else f" in the view {name!r}"
        noted = any(f"{NO_POSITIVES}: {empty:,} of " in note for note in task.notes)
        if empty and not noted:
            lines.append(
                f"warning: {empty} of {len(task.queries)} queries have no positive{where}; each "
                f"scores 0, {_first_query(task, view.positives < 0)}"
            )
    return lines


def _first_query(task: Task, of: np.ndarray) -> str:
    """The first of some queries, bool (Q,), in words."""
    query = int(of.argmax())
    text = task.queries.text[query]
    shown = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + "..."
    return f"the first: query {task.queries.key[query]}, {shown!r}"


def describe_cautions(runs: Sequence[Run]) -> list[str]:
    """What the methods say of settings that rank otherwise than their user may mean."""
    said: dict[str, list[str]] = {}
    for run in runs:
        if words := run.method.caution(run.parameters):
            said.setdefault(words, []).append(run.variant)
    return [
        f"warning: {words} ({len(names)} of {len(runs)} runs, the first {names[0]})"
        for words, names in said.items()
    ]


def describe_ties(evaluations: Sequence[Evaluation], ties: str) -> list[str]:
    """The lines that say how ties were ranked."""
    lines = []
    for evaluation in evaluations:
        tied = int(evaluation.tied.sum())
        if tied:
            rule = {"row": "database order", "best": "positives first", "worst": "positives last"}
            lines.append(
                f"{evaluation.variant}: in {tied} queries a positive ties with a negative, "
                f"{_first_query(evaluation.task, evaluation.tied)}; ties rank by {rule[ties]}"
            )
    return lines
