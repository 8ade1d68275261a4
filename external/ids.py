"""Which query or gallery row an id of somebody else's file means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import UserError, open_text
from utils_task import NO_SET, Task

ROW_NUMBER = re.compile(r"(?:query_|gallery_|q|d)(\d{6,})")


def query_ids(task: Task) -> list[str]:
    """The ids of the queries: their key; of i-CIR the image path, a tab and the text."""
    if task.queries.shown is None:
        return list(task.queries.key)
    return [
        f"{images[0]}\t{text}"
        for images, text in zip(task.queries.images, task.queries.text, strict=True)
    ]


def gallery_ids(task: Task) -> list[str]:
    """The ids of the gallery rows: the image path, where it repeats with the row's text."""
    paths = list(task.gallery.path)
    if len(set(paths)) == len(paths) or task.gallery.note is None:
        return paths
    count: dict[str, int] = {}
    for path in paths:
        count[path] = count.get(path, 0) + 1
    notes = task.gallery.note
    return [path if count[path] == 1 else f"{path}\t{notes[r]}" for r, path in enumerate(paths)]


def gallery_blocks(task: Task) -> list[str]:
    """The instance of each gallery row, of tasks that have instances; of others nothing."""
    if "instance" not in task.queries.tags or (task.pool == NO_SET).any():
        return []
    names = [""] * len(task.gallery)
    for name, pool in dict(zip(task.queries.tags["instance"], task.pool, strict=True)).items():
        for row in task.sets[pool]:
            names[row] = name
    return names


def _plain(text: str) -> str:
    """Without a leading ./ and without an image's suffix."""
    return re.sub(r"\.(jpe?g|png|webp)(?=\t|$)", "", text.removeprefix("./"), flags=re.IGNORECASE)


def _file_name(text: str) -> str:
    path, tab, rest = _plain(text).partition("\t")
    return f"{path.rpartition('/')[2]}{tab}{rest}"


def _number(text: str) -> str:
    name = _file_name(text)
    return name.lstrip("0") or "0" if name.isdigit() else name


# How two spellings of an id are made one, tried in turn.
RULES: dict[str, Callable[[str], str]] = {
    "as they are": str,
    "without ./ and image suffix": _plain,
    "by file name, without folders and image suffix": _file_name,
    "by number, without leading zeros": _number,
}


@dataclass(frozen=True)
class Matched:
    """Rows of the ids that were given, int64 (n,), -1 for an unknown one; and the rule used."""

    rows: np.ndarray
    rule: str


def match_ids(given: Sequence[str], known: Sequence[str]) -> Matched:
    """The rows that ids mean: by the first rule under which all are known, or by the best one.

    A rule counts only where it keeps all known ids apart. Ids of the form query_000012 are row
    numbers, from 0, where nothing else fits.
    """
    found = [Matched(_by_row_number(given, len(known)), "as row numbers, from 0")]
    for rule, plain in RULES.items():
        rows = {plain(text): row for row, text in enumerate(known)}
        if len(rows) == len(known):
            matched = np.array([rows.get(plain(text), -1) for text in given], np.int64)
            found.append(Matched(matched, rule))
            if (matched >= 0).all():
                return found[-1]
    return max(found, key=lambda matched: int((matched.rows >= 0).sum()))


def _by_row_number(given: Sequence[str], count: int) -> np.ndarray:
    numbers = [ROW_NUMBER.fullmatch(text) for text in given]
    rows = [int(number[1]) if number else -1 for number in numbers]
    return np.array([row if row < count else -1 for row in rows], np.int64)


def refuse_unknown(matched: Matched, given: Sequence[str], what: str, path: Path) -> None:
    """Raise UserError, with the first three, if an id is unknown."""
    lost = [given[i] for i in np.flatnonzero(matched.rows < 0)]
    if lost:
        raise UserError(
            f"{path}: {len(lost)} of {len(given)} {what} ids are unknown to the data set, "
            f"{first_three(lost)}"
        )


def first_three(items: Sequence[object]) -> str:
    """The first three of a list, as an error names them."""
    shown = ", ".join(repr(item) for item in items[:3])
    return f"the first {shown}" if len(items) > 1 else shown


def read_ids(path: Path) -> list[str]:
    """Ids of a file, one a line or in the first column of a CSV whose header names an id or path.

    Raises UserError if the file is absent, empty or no UTF-8.
    """
    import csv

    try:
        with open_text(path, "utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not UTF-8 text, an id a line ({error})") from None
    if rows and rows[0][0].lower() in ("id", "query_id", "gallery_id", "image_path", "path", "key"):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path} holds no id; one a line is expected")
    return [row[0] for row in rows]


def refuse_repeated(ids: Sequence[str], path: Path) -> None:
    """Raise UserError if an id is given twice."""
    seen: set[str] = set()
    twice = [text for text in ids if text in seen or seen.add(text)]
    if twice:
        raise UserError(f"{path}: {len(twice)} ids are given twice, {first_three(twice)}")
