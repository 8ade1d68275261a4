"""Ranked lists of other systems: JSON, TREC runs, CSV, parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from external.ids import (
    first_three,
    gallery_ids,
    match_ids,
    query_ids,
    refuse_unknown,
)
from utils import UserError, open_regular, read_bytes
from utils_pickles import one_line
from utils_task import NO_SET, Task

if TYPE_CHECKING:
    import pandas as pd

HEADERS = ("version", "metric")  # of CIRR's files, beside the queries


@dataclass(frozen=True, eq=False)
class RankedLists:
    """For each query, Q of them, its rows best first, int64, and scores that fall with the rank.

    shortest: rows of the shortest list. lines: what to say of them.
    """

    rows: list[np.ndarray]
    scores: list[np.ndarray]
    shortest: int
    lines: tuple[str, ...]


def read_rankings(paths: Sequence[Path], task: Task, allow_missing: bool) -> RankedLists:
    """Read ranked lists of a task's queries.

    With scores, scores decide and equal ones keep the file's order; without, the order does.
    Raises UserError for what is not such a file, for unknown, repeated and missing ids, and for
    scores that are no numbers.
    """
    lists: dict[str, list[tuple[str, float | None]]] = {}
    for path in paths:
        for query, entries in _read_file(path).items():
            if query in lists:
                raise UserError(f"{path}: the query {query!r} has a list already")
            lists[query] = entries
    given, where = list(lists), paths[0]
    matched = match_ids(given, query_ids(task))
    refuse_unknown(matched, given, "query", where)
    named = [query for query, own in zip(matched.rows, lists.values(), strict=True) if own]
    _refuse_missing(named, task, where, allow_missing)
    every = [name for entries in lists.values() for name, _ in entries]
    distinct = list(dict.fromkeys(every))
    gallery = match_ids(distinct, gallery_ids(task))
    refuse_unknown(gallery, distinct, "gallery", where)
    row_of = dict(zip(distinct, gallery.rows.tolist(), strict=True))
    rows = [np.empty(0, np.int64)] * len(task.queries)
    scores = [np.empty(0)] * len(task.queries)
    for query, entries in zip(matched.rows, lists.values(), strict=True):
        rows[query], scores[query] = _ordered(entries, row_of, where, task.queries.key[query])
    _refuse_unranked(rows, task, where)
    lines = (
        f"ranked lists of {len(given)} queries, {min(map(len, lists.values()))} to "
        f"{max(map(len, lists.values()))} rows each; query ids {matched.rule}, gallery ids "
        f"{gallery.rule}",
    )
    return RankedLists(rows, scores, min(map(len, rows)), lines)


def _refuse_missing(found: Iterable[int], task: Task, path: Path, allow_missing: bool) -> None:
    lost = sorted(set(range(len(task.queries))).difference(found))
    if lost and not allow_missing:
        keys = [query_ids(task)[query] for query in lost]
        raise UserError(
            f"{path}: {len(lost)} of {len(task.queries)} queries have no list, "
            f"{first_three(keys)}; complete the file, or let them score 0 with --allow_missing"
        )


def _refuse_unranked(rows: Sequence[np.ndarray], task: Task, path: Path) -> None:
    """Raise UserError for lists that name what is not ranked for their query.

    That is its own image, or a row of another query's gallery.
    """
    excluded = task.views[task.main_view].excluded
    wrong = []
    for query, own in enumerate(rows):
        unranked = np.isin(own, task.rows_of(excluded, query))
        if task.pool[query] != NO_SET:
            unranked |= ~np.isin(own, task.rows_of(task.pool, query))
        wrong += [f"{task.queries.key[query]}: {task.gallery.path[row]}" for row in own[unranked]]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} listed images are not ranked for their query, "
            f"{first_three(wrong)}; leave them out"
        )


def _ordered(
    entries: Sequence[tuple[str, float | None]], row_of: dict[str, int], path: Path, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one list, best first, and falling scores: the file's own, or minus the rank."""
    rows = np.array([row_of[name] for name, _ in entries], np.int64)
    if len(np.unique(rows)) < len(rows):
        twice = [name for i, (name, _) in enumerate(entries) if row_of[name] in rows[:i]]
        raise UserError(
            f"{path}, query {key}: {len(twice)} images are listed twice, {first_three(twice)}"
        )
    if not entries or entries[0][1] is None:
        return rows, -np.arange(len(rows), dtype=np.float64)
    values = np.array([np.nan if score is None else score for _, score in entries], np.float64)
    if not np.isfinite(values).all():
        bad = entries[int(np.argmin(np.isfinite(values)))]
        raise UserError(f"{path}, query {key}: the score of {bad[0]!r} is no finite number")
    order = np.argsort(-values, kind="stable")
    return rows[order], values[order]


# ---------------------------------------------------------------------------------------------
# The forms of file
# ---------------------------------------------------------------------------------------------


def _read_file(path: Path) -> dict[str, list[tuple[str, float | None]]]:
    """The lists of a file: query id -> (gallery id, score or None), in the file's order."""
    if not path.is_file():
        raise UserError(f"--rankings {path} is no file")
    try:
        if path.suffix == ".parquet":
            lists = _collect(_parquet_rows(path), path)
        else:
            text = read_bytes(path).decode("utf-8-sig")
            if text.lstrip().startswith("{"):
                lists = _json_lists(text, path)
            elif path.suffix == ".csv":
                lists = _collect(_csv_rows(text, path), path)
            else:
                lists = _collect(_trec_rows(text, path), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error})") from None
    if not lists:
        raise UserError(f"{path} holds no ranked list")
    return lists


def _json_lists(text: str, path: Path) -> dict[str, list[tuple[str, float | None]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)})") from None
    lists = {}
    for query, entries in content.items():
        if query in HEADERS:
            continue
        if isinstance(entries, dict):
            lists[query] = [(str(name), _as_number(s, path, query)) for name, s in entries.items()]
        elif isinstance(entries, list) and all(isinstance(e, (str, int)) for e in entries):
            lists[query] = [(str(name), None) for name in entries]
        else:
            raise UserError(
                f"{path}, query {query!r}: a list of ids, or an object of scores by id, is expected"
            )
    return lists


def _as_number(value: object, path: Path, query: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{path}, query {query!r}: the score {value!r} is no number") from None


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, str, float | None]]:
    rows = list(csv.reader(text.splitlines()))
    header = [name.strip() for name in rows[0]] if rows else []
    if header[:2] != ["query_id", "gallery_id"] or header[2:] not in ([], ["score"]):
        raise UserError(
            f"{path}: its first line is not the header query_id,gallery_id or "
            "query_id,gallery_id,score"
        )
    for number, row in enumerate(rows[1:], 2):
        if row and len(row) != len(header):
            raise UserError(f"{path}, line {number}: {len(row)} columns, not {len(header)}")
        if row:
            score = _as_number(row[2], path, row[0]) if len(row) == 3 else None
            yield row[0], row[1], score


def _trec_rows(text: str, path: Path) -> Iterator[tuple[str, str, float | None]]:
    """qid Q0 docid rank score tag; rank has to agree with the scores."""
    last: dict[str, tuple[int, float]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 6 or not fields[3].lstrip("-").isdigit():
            raise UserError(f"{path}, line {number}: qid Q0 docid rank score tag is expected")
        query, rank, score = fields[0], int(fields[3]), _as_number(fields[4], path, fields[0])
        before = last.get(query)
        if before and rank > before[0] and score > before[1]:
            raise UserError(f"{path}, line {number}: the score rises while the rank falls behind")
        last[query] = rank, score
        yield query, fields[2], score


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, float | None]]:
    table = read_parquet(path)
    if not {"query_id", "gallery_id"} <= set(table.columns):
        raise UserError(f"{path}: the columns query_id and gallery_id (and score) are expected")
    scores = table["score"].tolist() if "score" in table else [None] * len(table)
    yield from zip(
        table["query_id"].astype(str), table["gallery_id"].astype(str), scores, strict=True
    )


def read_parquet(path: Path) -> pd.DataFrame:
    """A table in parquet. Raises UserError if it cannot be read, or pyarrow is not there."""
    try:
        import pandas as pd

        with open_regular(path) as file:
            return pd.read_parquet(file)
    except ImportError:
        raise UserError(f"{path}: to read parquet, pip install pyarrow") from None
    except Exception as error:  # pyarrow raises its own kinds
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None


def _collect(
    rows: Iterable[tuple[str, str, float | None]], path: Path
) -> dict[str, list[tuple[str, float | None]]]:
    lists: dict[str, list[tuple[str, float | None]]] = {}
    for query, name, score in rows:
        lists.setdefault(query, []).append((name, score))
    return lists
