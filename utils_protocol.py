"""What a command may change of a task's protocol, and what of it may surprise: said with counts.

Another gallery, the query's own image left out, further measures; rows that no query ranks, images
that extraction left out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import UserError
from utils_datasets import Dataset, plain_path
from utils_metrics import parse_measure
from utils_runs import Protocol, Run, shown_parameters
from utils_task import (
    NO_SET,
    TABLE_COLUMNS,
    Column,
    RowSets,
    SetBuilder,
    Task,
    View,
    whole_gallery,
)

if TYPE_CHECKING:
    from utils_retrieval import Assets

# Names of measures that people use, and the measure that each is.
MEANT = {"mAP": "AP-S"}


def apply_protocol(task: Task, protocol: Protocol) -> Task:
    """The task under a command's protocol. Raises UserError where a part of it changes nothing."""
    if protocol.whole_gallery:
        task = search_everything(task)
    if protocol.exclude_query_image:
        task = exclude_query_images(task)
    return add_measures(task, protocol.metrics) if protocol.metrics else task


def search_everything(task: Task) -> Task:
    """Every query searches the whole gallery."""
    if (task.pool == NO_SET).all():
        raise UserError("--gallery all has no effect: every query searches the whole gallery")
    note = "every query is ranked against the whole gallery (--gallery all)"
    return replace(task, pool=whole_gallery(len(task.queries)), notes=(*task.notes, note))


def exclude_query_images(task: Task) -> Task:
    """The gallery rows that show a query's own image are left out of its ranking.

    Raises UserError if there is none.
    """
    own = query_image_rows(task)
    touched = [query for query, rows in enumerate(own) if len(rows)]
    if not touched:
        raise UserError("--exclude_query_image has no effect: no query image is a gallery row")
    builder, first = SetBuilder(), len(task.sets)

    def numbered(rows: np.ndarray) -> int:
        number = builder(rows)
        return number if number == NO_SET else first + number

    views = {}
    for name, view in task.views.items():
        excluded = whole_gallery(len(own)) if view.excluded is None else view.excluded.copy()
        positives = None if view.positives is None else view.positives.copy()
        for query in touched:
            union = np.union1d(task.rows_of(view.excluded, query), own[query])
            excluded[query] = numbered(union)
            if positives is not None:
                rest = np.setdiff1d(task.rows_of(positives, query), own[query])
                positives[query] = numbered(rest)
        views[name] = View(positives, excluded, view.candidates)
    note = f"the query's own image is left out of the rankings of {len(touched)} queries"
    sets = RowSets.joined([task.sets, builder.done()])
    return replace(task, sets=sets, views=views, notes=(*task.notes, note))


def query_image_rows(task: Task) -> list[np.ndarray]:
    """For each query the gallery rows that show one of its images, int64, increasing.

    Of rows with labels, whose paths may be spelled in several ways, also such a one.
    """
    wanted = {path for images in task.queries.images for path in images}
    rows = _rows_of(task.gallery.path, wanted)
    if task.gallery.note is not None:
        dataset = Dataset(task.name, Path(task.name))
        plain = {path: plain_path(dataset, path) for path in wanted - rows.keys()}
        spelled = (plain_path(dataset, path) for path in task.gallery.path) if plain else ()
        alike = _rows_of(spelled, {*plain.values()})
        rows |= {path: alike.get(own, []) for path, own in plain.items()}
    found = ([row for path in set(i) for row in rows.get(path, ())] for i in task.queries.images)
    return [np.array(sorted(own), np.int64) for own in found]


def _rows_of(paths: Iterable[str], wanted: Collection[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        if path in wanted:
            rows.setdefault(path, []).append(row)
    return rows


def add_measures(task: Task, names: Sequence[str]) -> Task:
    """The task with a column for each further measure, in its main view.

    names: as utils_metrics has them; mAP and mAP@k stand for AP-S. Raises UserError for an unknown
    one, for a column that is there already, and where the ground truth is hidden.
    """
    if task.views[task.main_view].positives is None:
        raise UserError(
            f"--metrics {names[0]}: the ground truth of {task.name} is hidden; leave it, and send "
            "the run's files to the evaluation server"
        )
    columns = list(task.columns)
    for name in names:
        kind, at, cut = name.partition("@")
        measure = MEANT.get(kind, kind) + at + cut
        parse_measure(measure)
        if name in (column.name for column in columns):
            raise UserError(f"--metrics {name}: the table has that column already; leave it")
        columns.append(Column(name, measure, task.main_view))
    return replace(task, columns=tuple(columns))


def refuse_clashes(task: Task, runs: Sequence[Run]) -> None:
    """Raise UserError for a column of the task's that is called like another of its table."""
    parameters = {name for run in runs for name in shown_parameters(run.parameters)}
    for column in (*task.columns, *task.means):
        if column.name in {*TABLE_COLUMNS, *parameters}:
            raise UserError(
                f"{task.name}: the column {column.name!r} is called like another of the result "
                "table, which would replace it; give it another name in benchmark.json"
            )


# ---------------------------------------------------------------------------------------------
# What may surprise
# ---------------------------------------------------------------------------------------------


def describe_odd(task: Task, manifest: dict[str, Any] | None, protocol: Protocol) -> list[str]:
    """A line on each thing of a task and its features that may not be meant."""
    own = [] if protocol.exclude_query_image else describe_own_images(manifest)
    return [
        *own,
        *describe_unranked(task),
        *describe_asked_again(task),
        *describe_near_texts(task),
        *describe_left_out(manifest),
        *describe_repeated(manifest),
        *describe_texts(manifest),
    ]


def describe_unranked(task: Task) -> list[str]:
    """The line on gallery rows that no query ranks, if there are any that the protocol ranks."""
    if task.spares_rows or (task.pool == NO_SET).any():
        return []
    ranked = np.zeros(len(task.gallery), bool)
    for pool in np.unique(task.pool):
        ranked[task.sets[pool]] = True
    lost = np.flatnonzero(~ranked)
    if not len(lost):
        return []
    return [
        f"warning: {len(lost)} of {len(task.gallery)} gallery rows are in no query's gallery and "
        f"never ranked, the first {task.gallery.path[int(lost[0])]!r} (row {lost[0] + 1}); "
        "--gallery all ranks every query against all rows"
    ]


def describe_asked_again(task: Task) -> list[str]:
    """The line on queries that ask what an earlier one asks, if there are any."""
    queries, view, first, again = task.queries, task.views[task.main_view], {}, []
    for query, key in enumerate(queries.key):
        asked = (
            queries.images[query],
            None if queries.box is None else tuple(queries.box[query]),
            queries.texts[query] if queries.texts else queries.text[query],
            int(task.pool[query]),
            *(None if own is None else int(own[query]) for own in (view.positives, view.excluded)),
        )
        if first.setdefault(asked, key) is not key:
            again.append((key, first[asked]))
    if not again:
        return []
    return [
        f"warning: {len(again)} of {len(queries)} queries ask the same as an earlier one, and all "
        f"count; the first: query {again[0][0]}, as query {again[0][1]}"
    ]


def describe_short(task: Task, runs: Sequence[Run], assets: Assets, more: int = 0) -> list[str]:
    """A note on each flag that asks for more of something than there is: all of it is taken.

    more: rows that methods see behind every gallery.
    """
    rows, short = task.pool_sizes + more, {}
    for run in runs:
        for flag, wanted, there, what in run.method.takes(run.parameters, assets):
            if there is None:
                said = _search_fewer(task, rows, wanted)
            else:
                said = f"{there} {what}" if there < wanted else ""
            if said:
                words = f"note: --{flag} {wanted} takes all there are: {said}"
                short.setdefault(flag, []).append((words, run.variant))
    return [
        words + (f" ({len(some)} of {len(runs)} runs, the first {first})" if len(runs) > 1 else "")
        for some in short.values()
        for words, first in some[:1]
    ]


def _search_fewer(task: Task, rows: np.ndarray, wanted: int) -> str:
    """How many queries search fewer rows than are wanted, in words, "" for none. rows: (Q,)."""
    few = np.flatnonzero(rows < wanted)
    if not len(few):
        return ""
    first = int(few[0])
    return (
        f"{len(few)} of {len(rows)} queries search fewer images, the first, "
        f"{task.queries.key[first]!r}, {rows[first]} of them"
    )


def left_out(manifest: dict[str, Any] | None) -> str:
    """How many rows extraction skipped, of how many: "2 of 40 query rows"; "" for none."""
    skipped = (manifest or {}).get("skipped") or []
    counts = (manifest or {}).get("counts") or {}
    parts = []
    for split, kept in counts.items():
        lost = sum(1 for entry in skipped if entry.get("split") == split)
        if lost:
            parts.append(f"{lost} of {lost + kept} {split} rows")
    return ", ".join(parts)


def describe_near_texts(task: Task) -> list[str]:
    """The line on queries without a positive that a gallery row's text nearly asks for.

    That is one that differs in case, blanks or Unicode form alone, and so is another text.
    """
    positives, notes = task.views[task.main_view].positives, task.gallery.note
    lost = [] if positives is None else np.flatnonzero(positives == NO_SET)
    if notes is None or not len(lost):
        return []
    forms: dict[int, dict[str, int]] = {}  # pool -> the first row of each form
    for pool in set(task.pool[lost].tolist()):
        rows = range(len(task.gallery)) if pool == NO_SET else task.sets[pool].tolist()
        forms[pool] = {loose_form(notes[row]): row for row in reversed(rows)}
    asked = [(query, loose_form(task.queries.text[query])) for query in lost.tolist()]
    rows = [(query, forms[int(task.pool[query])].get(form)) for query, form in asked]
    texts = (
        task.queries.text
    )  # an equal one, whose row --exclude_query_image leaves out, is not near
    near = [(query, row) for query, row in rows if row is not None and notes[row] != texts[query]]
    if not near:
        return []
    query, row = near[0]
    return [
        f"warning: {len(near)} queries have no positive, though a row of their gallery has their "
        "text but for case, blanks or the Unicode form of accents; the first: query "
        f"{task.queries.key[query]}, {task.queries.text[query]!a}, and row {row + 1}, "
        f"{notes[row]!a}; write them alike and extract again"
    ]


def loose_form(text: str) -> str:
    """A text without its case, its blanks at the ends and between words, its Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


# What a manifest says of texts -> what is said of them; see extraction/remarks.py.
TEXT_REMARKS = {
    "cut": "longer than the backbone's {context_length} tokens: what is behind them was not read",
    "cut_in_context": "too long for the words that contextualise them, which were cut",
    "empty": "empty",
}
SHOWN = 60  # characters of a text in a message


def describe_texts(manifest: dict[str, Any] | None) -> list[str]:
    """The lines on texts that were encoded otherwise than they read."""
    lines = []
    for name, remarks in ((manifest or {}).get("texts") or {}).items():
        for kind, words in TEXT_REMARKS.items():
            if kind in remarks:
                own = remarks[kind]
                text = own["first"] if len(own["first"]) <= SHOWN else own["first"][:SHOWN] + "..."
                lines.append(
                    f"warning: {own['count']} of {remarks['count']} distinct {name} texts are "
                    f"{words.format(**remarks)}; the first, row {own['row']}: {text!r}"
                )
        if "alike" in remarks:
            count, rows = remarks["alike"]["count"], remarks["alike"]["rows"]
            lines.append(
                f"warning: {count} {name} texts are cut to what another one of the same image is "
                f"cut to, and encoded alike; the first, rows {rows[0]} and {rows[1]}"
            )
    return lines


def describe_repeated(manifest: dict[str, Any] | None) -> list[str]:
    """The line on gallery rows that list an image again, if there are any."""
    found = (manifest or {}).get("repeated") or {}
    if not found.get("count"):
        return []
    return [
        f"warning: {found['count']} gallery rows list an image that their instance has already, "
        f"and count twice; the first, row {found['row']}: {found['first']!r}, that of row "
        f"{found['of']}"
    ]


def describe_own_images(manifest: dict[str, Any] | None) -> list[str]:
    """The line on queries whose own image is a gallery row, if there are any."""
    found = (manifest or {}).get("own_images")
    if not found:
        return []
    return [
        f"warning: {found['count']} queries search a gallery that lists their own image, which is "
        f"ranked as any other; the first, row {found['row']}: {found['first']!r}, gallery row "
        f"{found['of']}; --exclude_query_image leaves it out"
    ]


def describe_left_out(manifest: dict[str, Any] | None) -> list[str]:
    """The line on images that extraction could not read, if there are any."""
    words = left_out(manifest)
    if not words:
        return []
    first = manifest["skipped"][0]
    return [
        f"warning: extraction left out {words}, the first {first.get('image_path')!r} "
        f"({first.get('cause')}); the figures are of the rest"
    ]
