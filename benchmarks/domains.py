"""Domain conversion (FREEDOM, WACV 2025): ImageNet-R, NICO++, MiniDomainNet and LTLL.

A query image and the name of another domain ask for images of its class in that domain. Layout, as
FREEDOM's users have it: DATA/{imagenet_r,nico,minidn,ltll}/ with space separated annotation files
`path domain class`, whose paths start with the data set's name; of ImageNet-R the two lists that
full_files.csv is built from are enough. Protocol, layouts and sources: docs/domains.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import Benchmark
from utils import UserError, open_text, sha256_file
from utils_startup import Late
from utils_task import (
    NO_SET,
    Breakdown,
    Column,
    Group,
    Images,
    QueryTable,
    RowSets,
    Task,
    View,
    whole_gallery,
)

np = Late("numpy")


@dataclass(frozen=True)
class DataSet:
    """What sets the four apart.

    texts: domain in the files -> its text, which also names it in results; in the order of the
    queries. queries, gallery: their files, which may be one. at: the cut-offs k of recall and
    precision.
    """

    texts: Mapping[str, str]
    queries: str
    gallery: str
    at: tuple[int, int]


DATA_SETS = {
    "imagenet_r": DataSet(
        {"real": "photo"} | {name: name for name in ("cartoon", "origami", "toy", "sculpture")},
        *("full_files.csv", "full_files.csv", (10, 50)),
    ),
    "nico": DataSet(
        {"autumn": "autumn", "dim": "dimlight"}
        | {name: name for name in ("grass", "outdoor", "rock", "water")},
        *("query_files.csv", "database_files.csv", (50, 100)),
    ),
    "minidn": DataSet(
        {"clipart": "clipart", "painting": "painting", "real": "photo", "sketch": "sketch"},
        *("query_files.csv", "database_files.csv", (50, 100)),
    ),
    "ltll": DataSet(
        {"New": "Today", "Old": "Archive"}, *("full_files.csv", "full_files.csv", (5, 10))
    ),
}

CUTS = {"R": "Recall", "P": "P"}  # columns at k and their measures

# What ImageNet-R's full_files.csv is built from: images with a code each, and the classes' names.
TARGETS, CLASS_NAMES = "imgnet_targets.txt", "label_names.csv"
# The domain of a code is the first whose bound lies above it, else it is real.
CODE_BOUNDS = {"cartoon": 1000, "origami": 2000, "toy": 3000, "sculpture": 4000}

HOW_TO_GET = (
    "`python3 data/download.py NAME` (imagenet_r, nico, minidn, ltll) fetches its lists and says "
    "where its images come from"
)


# ---------------------------------------------------------------------------------------------
# Annotation files
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of an annotation file: images[i] of domains[i] and classes[i], at lines[i] of file.

    sources: the files they come from. notes: what in them may not be meant.
    """

    file: Path
    images: Sequence[str]
    domains: Sequence[str]
    classes: Sequence[str]
    lines: Sequence[int]
    sources: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def where(self, row: int) -> str:
        return f"{self.file}, line {self.lines[row]}"


def read_rows(path: Path, domains: Mapping[str, str]) -> Rows:
    """The rows `path domain class` of an annotation file, of these domains.

    Raises UserError, naming file and line, for a row that is none, and for an unknown domain.
    """
    rows, longer = [], []
    for line, fields in _read_fields(path):
        if len(fields) < 3:
            raise UserError(
                f"{path}, line {line}: {len(fields)} fields, and `path domain class` are expected, "
                "separated by single blanks"
            )
        if fields[1] not in domains:
            raise UserError(
                f"{path}, line {line}: {fields[1]!r} is no domain here (there are "
                f"{', '.join(domains)}); no path may hold a blank"
            )
        longer += [line] if len(fields) > 3 else []
        rows.append((*fields[:3], line))
    notes = ()
    if longer:
        notes = (
            f"{path.name}: {len(longer)} lines have more than three fields (the first is line "
            f"{longer[0]}); the first three count, as in the published code",
        )
    return Rows(path, *zip(*rows, strict=True), sources=(path,), notes=notes)


def build_imagenet_r(root: Path, domains: Mapping[str, str]) -> Rows:
    """ImageNet-R's rows as the published setup builds them from the two lists of its users.

    Raises UserError, naming file and line, for a row without a code or of an unknown class.
    """
    targets, names = root / TARGETS, dict(_read_class_names(root / CLASS_NAMES))
    rows = []
    for line, fields in _read_fields(targets):
        if len(fields) < 2 or not fields[1].isdecimal():
            raise UserError(f"{targets}, line {line}: `path code` is expected, code a number")
        path, code = "/".join(["imagenet_r", *fields[0].split("/")[1:]]), int(fields[1])
        folder = Path(path).parent.name
        if folder not in names:
            raise UserError(f"{targets}, line {line}: {CLASS_NAMES} has no class {folder!r}")
        domain = next((name for name, bound in CODE_BOUNDS.items() if code < bound), "real")
        rows.append((path, domain, names[folder], line))
    return Rows(targets, *zip(*rows, strict=True), sources=(targets, root / CLASS_NAMES))


def _read_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of every line of a space separated file that is not blank.

    Raises UserError if the file is absent, empty or not UTF-8.
    """
    count = 0
    for line, text in enumerate(_read_lines(path), 1):
        if text.strip():
            count += 1
            yield line, text.strip().split(" ")
    if not count:
        raise UserError(f"{path} is empty; {HOW_TO_GET}")


def _read_class_names(path: Path) -> Iterator[tuple[str, str]]:
    for line, row in enumerate(csv.reader(_read_lines(path)), 1):
        if len(row) not in (0, 2):
            raise UserError(f"{path}, line {line}: `folder,class` is expected")
        if row:
            yield row[0], row[1]


def _read_lines(path: Path) -> list[str]:
    try:
        with open_text(path, "utf-8-sig", newline=None) as file:
            return file.read().split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {HOW_TO_GET}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None


# ---------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------


def read(root: Path, name: str) -> Task:
    """The task of a data set: every query image asks for every other domain.

    Raises UserError for annotation files that are absent or faulty, for a class or a domain that
    the gallery has no image of, and for a domain without a query.
    """
    data_set = DATA_SETS[name]
    queries = _rows_of(root, data_set, data_set.queries)
    same = data_set.queries == data_set.gallery
    gallery = queries if same else _rows_of(root, data_set, data_set.gallery)
    _check_cells(queries, gallery, data_set)
    return _task(name, data_set, queries, gallery)


def _rows_of(root: Path, data_set: DataSet, file: str) -> Rows:
    if not (root / file).is_file() and (root / TARGETS).is_file():
        return build_imagenet_r(root, data_set.texts)
    return read_rows(root / file, data_set.texts)


def _check_cells(queries: Rows, gallery: Rows, data_set: DataSet) -> None:
    classes = set(gallery.classes)
    for row, label in enumerate(queries.classes):
        if label not in classes:
            raise UserError(
                f"{queries.where(row)}: {gallery.file.name} has no image of the class {label!r}; "
                "add some, or remove its queries"
            )
    for rows in (queries, gallery):
        absent = [domain for domain in data_set.texts if domain not in set(rows.domains)]
        if absent:
            raise UserError(f"{rows.file} has no image of the domain {absent[0]!r}; {HOW_TO_GET}")


def _task(name: str, data_set: DataSet, queries: Rows, gallery: Rows) -> Task:
    texts = list(data_set.texts.values())
    classes = sorted(set(gallery.classes))
    label, domain = _numbers(queries.classes, classes), _numbers(queries.domains, data_set.texts)
    row_label = _numbers(gallery.classes, classes)
    row_domain = _numbers(gallery.domains, data_set.texts)
    cells = RowSets.grouped(row_label * len(texts) + row_domain, len(classes) * len(texts))
    same_class = RowSets.grouped(row_label, len(classes))

    row, target = _compose(domain, len(texts))
    cell = label[row] * len(texts) + target
    asked, given = [texts[t] for t in target], [texts[d] for d in domain[row]]
    images = [queries.images[r] for r in row]
    kind = [queries.classes[r] for r in row]
    columns = _columns(data_set.at)
    return Task(
        name=name,
        gallery=Images(
            gallery.images,
            note=[f"{c}, {texts[d]}" for c, d in zip(gallery.classes, row_domain, strict=True)],
            own_mode=True,
        ),
        queries=QueryTable(
            key=[f"{r + 1}-{text}" for r, text in zip(row, asked, strict=True)],
            images=[(path,) for path in images],
            text=asked,
            tags={
                "source": given,
                "target": asked,
                "pair": [f"{s} to {t}" for s, t in zip(given, asked, strict=True)],
                "class": kind,
            },
            shown={"Image Query": images, "Text Query": asked, "Source": given, "Class": kind},
        ),
        sets=RowSets.joined([cells, same_class]),
        pool=whole_gallery(len(row)),
        views={"all": View(np.where(cells.sizes(cell) > 0, cell, NO_SET))},
        columns=columns,
        breakdowns=tuple(
            Breakdown(f"{column.name}_matrix.csv", column.name, "source", "target")
            for column in columns
        ),
        related=len(cells) + label[row],
        sources={p.name: sha256_file(p) for p in dict.fromkeys(queries.sources + gallery.sources)},
        notes=tuple(dict.fromkeys(queries.notes + gallery.notes)),
        prompts="domains",
    )


def _numbers(labels: Sequence[str], known: Sequence[str] | Mapping[str, str]) -> np.ndarray:
    number = {label: i for i, label in enumerate(known)}
    return np.array([number[label] for label in labels], np.int64)


def _compose(domain: np.ndarray, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """The query row and the target of every composed query: by source, target, then row.

    domain: int64 (rows,), of each query row. Returns int64 (Q,) both.
    """
    rows, targets = [], []
    for source in range(domains):
        own = np.flatnonzero(domain == source)
        for target in range(domains):
            if target != source:
                rows.append(own)
                targets.append(np.full(len(own), target))
    return np.concatenate(rows), np.concatenate(targets)


def _columns(at: tuple[int, int]) -> tuple[Column, ...]:
    """mAP, then recall and precision at k, rounded a pair and at the end as FREEDOM's code does."""

    def groups(rounding: str) -> tuple[Group, ...]:
        return Group("pair", digits=2, rounding=rounding), Group("source"), Group(None, digits=2)

    mean = Column("mAP", "AP-T", groups=groups("numpy"))
    names = [(f"{short}@{k}", f"{measure}@{k}") for short, measure in CUTS.items() for k in at]
    return mean, *(Column(name, measure, groups=groups("python")) for name, measure in names)


def locate(root: Path, path: str) -> Path:
    """The file of an image: published paths begin with the data set's own folder."""
    return root.joinpath(*path.split("/")[1:])


BENCHMARK = Benchmark(
    {name: partial(read, name=name) for name in DATA_SETS}, HOW_TO_GET, locate=locate
)
