"""The values of every query, APs.csv, and what its columns are averaged to, APs.json beside it.

The two together say of any task what a comparison of runs needs: no benchmark's files are read.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError, open_text, read_json, write_csv, write_json
from utils_records import misfit
from utils_task import GROUP_FORM, Group

if TYPE_CHECKING:
    from utils_task import Task

FORMAT = 1  # of APs.json
WORDS = {  # of APs.json
    "labels": [str],
    "image": (str, None),
    "text": (str, None),
    "averages": [
        {
            "name": str,
            "values": (str, None),
            "of": [str],
            "groups": [GROUP_FORM],
        }
    ],
    "tags": {str: [(str, [str])]},
}
AGAIN = "run run_retrieval.py again"


@dataclass(frozen=True)
class Average:
    """A number of the result table: the average of a column of APs.csv, or the mean of others.

    values: the header of the column, and groups: how it is averaged (utils_metrics.reduce); of: the
    names of the averages that it is the mean of, where it is of no column.
    """

    name: str
    values: str | None
    groups: tuple[Group, ...] = ()
    of: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class QueryValues:
    """What a run scores on every query.

    labels: header -> Q texts that name the queries. values: header -> float64 (Q,), fractions.
    averages: what is made of the values. tags: those that the averages group
    by, name -> Q labels (or tuples of labels). image, text: the headers of the labels that are the
    query's image path and text, or None.
    """

    labels: Mapping[str, Sequence[str]]
    values: Mapping[str, np.ndarray]
    averages: tuple[Average, ...]
    tags: Mapping[str, Sequence[str | tuple[str, ...]]]
    image: str | None
    text: str | None

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    @property
    def others(self) -> list[str]:
        """The headers of the labels beside image and text."""
        return [header for header in self.labels if header not in (self.image, self.text)]

    @property
    def named_by(self) -> list[str]:
        """The headers that name a query to a reader: its text first, then the others; no image."""
        return [self.text, *self.others] if self.text else self.others

    @property
    def main(self) -> str | None:
        """The header of the first values, None where there are none (hidden ground truth)."""
        return next(iter(self.values), None)

    @property
    def outer_tag(self) -> str | None:
        """The outermost tag of the first average that groups by one, each query having one label.

        None where there is none; a group of one label alone does not count.
        """
        groups = [group for average in self.averages for group in reversed(average.groups)]
        tags = [group.tag for group in groups if group.tag is not None and group.only is None]
        parting = (
            tag for tag in tags if not any(isinstance(label, tuple) for label in self.tags[tag])
        )
        return next(parting, None)


def query_values(task: Task, values: Mapping[tuple[str, str], np.ndarray]) -> QueryValues:
    """The values of a run on a task's queries.

    values: (measure, view) -> float64 (Q,); columns whose measure is not there are left out, and
    the means of them.
    """
    headers = {pair: measure_header(task, *pair) for pair in values}
    columns = [
        Average(column.name, headers[column.measure, column.view], tuple(column.groups))
        for column in task.columns
        if (column.measure, column.view) in headers
    ]
    names = {column.name for column in columns}
    means = [Average(m.name, None, of=tuple(m.of)) for m in task.means if names.issuperset(m.of)]
    averages = (*columns, *means)
    grouping = {group.tag for average in averages for group in average.groups} - {None}
    labels = task.queries.labels()
    first = [images[0] for images in task.queries.images]
    return QueryValues(
        labels=labels,
        values={headers[pair]: own for pair, own in values.items()},
        averages=averages,
        tags={name: task.queries.tags[name] for name in task.queries.tags if name in grouping},
        image=_holder(labels, first),
        text=_holder(labels, task.queries.text),
    )


def measure_header(task: Task, measure: str, view: str) -> str:
    """A column of APs.csv: AP for AP-T and AP-S@, the view named unless it is the main one."""
    name = measure.replace("AP-T", "AP").replace("AP-S@", "AP@")
    return name if view == task.main_view else f"{name} ({view})"


def _holder(labels: Mapping[str, Sequence[str]], wanted: Sequence[str]) -> str | None:
    """The header of the labels that are the wanted ones."""
    return next((header for header, own in labels.items() if list(own) == list(wanted)), None)


def write_values(folder: Path, content: QueryValues) -> None:
    """Write APs.csv, full precision, and APs.json, each whole or not at all."""
    words = {
        "format": FORMAT,
        "labels": list(content.labels),
        "image": content.image,
        "text": content.text,
        "averages": [dataclasses.asdict(average) for average in content.averages],
        "tags": {name: list(labels) for name, labels in content.tags.items()},
    }
    values = [map(repr, own.tolist()) for own in content.values.values()]
    rows = zip(*content.labels.values(), *values, strict=True)
    write_csv(folder / "APs.csv", [*content.labels, *content.values], rows)
    write_json(folder / "APs.json", words)


def read_values(folder: Path) -> QueryValues:
    """Read what write_values wrote.

    Raises UserError, naming file and line, if a file is absent or not what it should be.
    """
    table, words = folder / "APs.csv", folder / "APs.json"
    if not table.is_file():
        raise UserError(f"{table} does not exist; give a result folder of run_retrieval.py")
    if not words.is_file():
        raise UserError(f"{words} does not exist, {table.name} is of another version; {AGAIN}")
    described = read_json(words)
    wrong = misfit(described, WORDS)
    if wrong:
        raise UserError(f"{words} does not describe APs.csv ({wrong}); {AGAIN}")
    names, averages = described["labels"], tuple(map(_average, described["averages"]))
    tags = {name: list(map(_label, labels)) for name, labels in described["tags"].items()}
    image, text = described["image"], described["text"]
    headers = list(dict.fromkeys(average.values for average in averages if average.values))
    rows = list(_read_rows_of_numbers(table, names, headers))
    if not rows:
        raise UserError(f"{table} has no queries; {AGAIN}")
    if not names or len({*names}) < len(names) or not {image, text} <= {None, *names}:
        raise UserError(f"{words} does not name the labels of APs.csv; {AGAIN}")
    if any(len(labels) != len(rows) for labels in tags.values()):
        raise UserError(f"{table} and {words.name} are of different runs; {AGAIN}")
    labels, values = zip(*rows, strict=True)
    return QueryValues(
        labels=dict(zip(names, map(list, zip(*labels, strict=True)), strict=True)),
        values=dict(zip(headers, np.array(values).T, strict=True)),
        averages=averages,
        tags=tags,
        image=image,
        text=text,
    )


def _average(words: dict) -> Average:
    groups = tuple(
        Group(**{part: group.get(part) for part in GROUP_FORM}) for group in words["groups"]
    )
    return Average(words["name"], words["values"], groups, tuple(words["of"]))


def _label(label: str | list[str]) -> str | tuple[str, ...]:
    return tuple(label) if isinstance(label, list) else label


def _read_rows_of_numbers(
    path: Path, names: Sequence[str], headers: Sequence[str]
) -> Iterator[tuple[list[str], list[float]]]:
    """The labels and the values of every row of APs.csv."""
    columns = [*names, *headers]
    with open_text(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            if next(reader, None) != columns:
                raise UserError(f"{path} has not the columns {','.join(columns)}; {AGAIN}")
            for row in reader:
                yield row[: len(names)], _fractions(row, columns, len(names))
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{path}, line {reader.line_num}: {error}; {AGAIN}") from None


def _fractions(row: Sequence[str], columns: Sequence[str], first: int) -> list[float]:
    """The numbers of a row from a column on. Raises ValueError if they are no fractions."""
    if len(row) != len(columns):
        raise ValueError(f"{len(row)} values where {len(columns)} are expected")
    for name, value in zip(columns[first:], row[first:], strict=True):
        if not 0 <= float(value) <= 1:
            raise ValueError(f"{name} is not from 0 to 1")
    return [float(value) for value in row[first:]]
