"""A benchmark without code: a folder of images with a file queries.jsonl (docs/own.md).

    queries.jsonl   a query a line: {"image": "q.jpg", "text": "at night", "positives": ["a.jpg"]},
                    where needed with id, images, excluded, related, gallery, tags
    gallery.csv     the gallery's image paths, one a line, no header; absent: every image below the
                    folder
    benchmark.json  name, columns, groups, lists; absent: the folder's name and COLUMNS

Image paths are relative to the folder. Blanks around a value do not count, null is absent, a
backslash is a slash, and a name in two Unicode forms is one name.
"""

from __future__ import annotations

import difflib
import hashlib
import mimetypes
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import Benchmark
from utils import UserError, last_part, read_csv, sha256_file
from utils_datasets import IMAGE_SUFFIXES, RESERVED_NAMES
from utils_metrics import parse_measure, plan_steps
from utils_records import (
    Where,
    check_keys,
    fail,
    guess,
    read_object,
    read_objects,
    require,
    require_label,
    require_text,
)
from utils_startup import Late
from utils_task import (
    NO_POSITIVES,
    NO_SET,
    TABLE_COLUMNS,
    Column,
    Group,
    Images,
    QueryTable,
    SetBuilder,
    Task,
    View,
)

np = Late("numpy")

QUERIES, GALLERY, SETTINGS = "queries.jsonl", "gallery.csv", "benchmark.json"
COLUMNS = (Column("mAP", "AP-T"), *(Column(f"R@{k}", f"Hit@{k}") for k in (1, 5, 10)))

ROW_KEYS = ("positives", "excluded", "related")
QUERY_KEYS = ("id", "image", "images", "text", *ROW_KEYS, "gallery", "tags")
SETTING_KEYS = ("name", "columns", "groups", "lists")
STEP_KEYS = ("tag", "how", "digits")
OTHER_NAMES = {  # what the keys are called in other files of the field
    **{"reference": "image", "candidate": "image", "query": "image", "caption": "text"},
    **{"target": "positives", "targets": "positives", "ground_truth": "positives"},
}

RESULTS = {"mAP_table.csv", "index.html"}  # a folder with one of them is no part of the gallery
THUMBNAILS = "thumbnails"  # nor is one of this name
OUTSIDE = re.compile(r"/|\.\.?(/|$)|[A-Za-z]:/")  # how a path that leads out of the folder begins
NAMES_COMPARED = 10_000  # names of the gallery that one it does not hold is compared with


def is_own(root: Path) -> bool:
    """Whether a folder is a benchmark of this kind."""
    return (root / QUERIES).is_file()


def name_of(root: Path) -> str:
    """The name that features and results of such a folder go by.

    Raises UserError as read does for benchmark.json.
    """
    return _read_settings(root).name


def read(root: Path) -> Task:
    """The task of such a folder.

    Raises UserError, naming file and line, for the first mistake in its files.
    """
    settings, gallery, sets = _read_settings(root), _read_gallery(root), SetBuilder()
    queries = list(_open_queries(root, settings, gallery, sets).read_all())
    if not queries:
        raise UserError(f"{root / QUERIES} is empty; write a query a line")
    _check_ids(queries)
    table = _query_table(queries)
    _check_groups(settings, len(queries), table.tags)
    numbers = {key: sets.each(query.rows[key] for query in queries) for key in ROW_KEYS}
    some = {key: found if (found != NO_SET).any() else None for key, found in numbers.items()}
    return Task(
        name=settings.name,
        gallery=Images(gallery.path),
        queries=table,
        sets=sets.done(),
        pool=np.array([query.pool.number for query in queries]),
        views={"all": View(numbers["positives"], some["excluded"])},
        columns=settings.columns,
        related=some["related"],
        sources=_hash_files(root, settings, gallery),
        notes=(*gallery.notes, *_count_odd(queries)),
    )


def place_of(root: Path, path: str) -> str | None:
    """The file and line that name an image of the task first; None for one that was found."""
    settings, gallery = _read_settings(root), _read_gallery(root)
    if gallery.listing is None and gallery.find(path) is not None:
        return next(where for listed, where in _read_paths(root / GALLERY, root) if listed == path)
    queries = _open_queries(root, settings, gallery, SetBuilder()).read_all()
    return next((query.where for query in queries if path in query.images), None)


# ---------------------------------------------------------------------------------------------
# benchmark.json
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What benchmark.json says.

    lists: name -> paths, or the path of the file that lists them, below the folder. place: where
    a value of the file stands.
    """

    name: str
    columns: tuple[Column, ...] = COLUMNS
    lists: Mapping[str, list | str] = field(default_factory=dict)
    place: Callable[[str], Where] = str


def _read_settings(root: Path) -> Settings:
    path = root / SETTINGS
    if not path.is_file():
        return Settings(_check_name(last_part(root), str(root)))
    values, place = read_object(path)
    values = check_keys(values, SETTING_KEYS, place)
    name = require_text(values.get("name", last_part(root)), '"name"', place("name"))
    return Settings(
        _check_name(name, place("name")),
        _read_columns(values, place),
        _read_lists(values.get("lists", {}), root, place),
        place,
    )


def _check_name(name: str, where: Where) -> str:
    if name in RESERVED_NAMES or name.startswith(".") or re.search(r"[/\\]", name):
        fail(where, f"a data set cannot be called {name!r}; choose another name")
    return name


def _read_lists(value: Any, root: Path, place: Callable[[str], Where]) -> dict[str, list | str]:
    lists = {}
    for key, entry in require(dict, value, '"lists"', place("lists")).items():
        what = f"the list {key!r}"
        if type(entry) is str:
            entry = _plain_path(entry, root, f"the file of {what}", place(entry))
            if not (root / entry).is_file():
                fail(place(key), f"{what}: there is no file {root / entry}")
        else:
            require(list, entry, f"{what} (or the name of its file)", place(key))
        lists[require_text(key, "the name of a list", place(key))] = entry
    return lists


def _read_columns(values: dict, place: Callable[[str], Where]) -> tuple[Column, ...]:
    where, columns = place("columns"), COLUMNS
    if "columns" in values:
        listed = require(list, values["columns"], '"columns"', where)
        columns = tuple(_read_column(text, where, place) for text in listed)
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            fail(where, f"two columns are called {name!r}")
        if name in TABLE_COLUMNS:
            problem = f"a column cannot be called {name!r}, as one of every result table is"
            fail(where, f'{problem}; write another name in front of the "="')
    if not names:
        fail(where, f'"columns" is empty; leave it out for {", ".join(c.name for c in COLUMNS)}')
    groups = require(dict, values.get("groups", {}), '"groups"', place("groups"))
    for name in groups:
        if name not in names:
            fail(place(name), f'"groups": there is no column {name!r}; {guess(name, names)}')
    steps = {name: _read_groups(value, name, place(name)) for name, value in groups.items()}
    return tuple(replace(column, groups=steps.get(column.name, ())) for column in columns)


def _read_column(value: Any, where: Where, place: Callable[[str], Where]) -> Column:
    """A column of "NAME = MEASURE", or of "MEASURE", which is its name too."""
    name, _, measure = require_text(value, "a column", where).rpartition("=")
    measure = measure.strip()
    try:
        parse_measure(measure)
    except UserError as error:
        fail(place(value), f"the column {value!r}: {error}")
    return Column(name.strip() or measure, measure)


def _read_groups(value: Any, column: str, where: Where) -> tuple[Group, ...]:
    """Steps of averaging, innermost first: the name of a tag, or {"tag", "how", "digits"}."""
    what = f'"groups" of {column!r}'
    steps = value if type(value) is list else [value]
    return tuple(_read_step(step, what, where) for step in steps)


def _read_step(value: Any, what: str, where: Where) -> Group:
    if type(value) is str:
        return Group(require_text(value, what, where))
    step = check_keys(require(dict, value, f"a step of {what}", where), STEP_KEYS, lambda _: where)
    tag = require_text(step["tag"], f'"tag" in {what}', where) if "tag" in step else None
    how = require_text(step.get("how", "mean"), f'"how" in {what}', where)
    digits = step.get("digits")
    if digits is not None and not 0 <= require(int, digits, f'"digits" in {what}', where) <= 15:
        fail(where, f'"digits" in {what} has to be from 0 to 15, not {digits}')
    return Group(tag, how, digits)


def _check_groups(settings: Settings, queries: int, tags: Mapping) -> None:
    """Raise UserError for a column whose groups the queries' tags do not bear."""
    for column in settings.columns:
        try:
            plan_steps(queries, column.groups, tags)
        except UserError as error:
            fail(settings.place(column.name), f'"groups" of {column.name!r}: {error}')


# ---------------------------------------------------------------------------------------------
# The gallery
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """The gallery's image paths in row order, and rows found by path.

    listing: the hash of the paths where no file lists them.
    """

    root: Path
    path: list[str]
    notes: tuple[str, ...]
    listing: str | None = None

    @cached_property
    def _row(self) -> dict[str, int]:
        return {_one_form(path): row for row, path in enumerate(self.path)}

    def find(self, path: str) -> int | None:
        """The row of an image, None if it is not in the gallery."""
        return self._row.get(_one_form(path))

    def rows(self, listed: Iterable[tuple[Any, Where]], what: str) -> frozenset[int]:
        """The rows of images that are listed as (path, where it stands).

        Raises UserError for what is no path, is listed twice or is not in the gallery.
        """
        rows = set()
        for value, where in listed:
            path = _plain_path(value, self.root, f"a path of {what}", where)
            row = self.find(path)
            if row is None:
                fail(where, f"{what}: {path!r} is not in the gallery; {self._advice(path)}")
            if row in rows:
                fail(where, f"{what}: {path!r} is listed twice")
            rows.add(row)
        return frozenset(rows)

    def _advice(self, path: str) -> str:
        name = posixpath.basename(path).casefold()
        close = [known for known in self.path if posixpath.basename(known).casefold() == name]
        some = islice(self.path, NAMES_COMPARED)
        close = close or difflib.get_close_matches(path, some, n=1)
        if close:
            return f"did you mean {close[0]!r}?"
        if self.listing:
            return f"there is no such {'/'.join(IMAGE_SUFFIXES)} file below {self.root}"
        return f"add it to {self.root / GALLERY}"


def _one_form(path: str) -> str:
    """A path with its accents in one of the ways that Unicode has for them."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


@cache
def _absolute(root: Path) -> str:
    return os.path.abspath(root).replace("\\", "/") + "/"


def _plain_path(value: Any, root: Path, what: str, where: Where) -> str:
    """A path relative to the folder, with slashes. Raises UserError for one outside it."""
    path = require_text(value, what, where).replace("\\", "/").removeprefix(_absolute(root))
    plain = posixpath.normpath(path)
    if OUTSIDE.match(plain):
        problem = f"{what}, {path!r}, is not below {root}, to which paths are relative"
        fail(where, f"{problem}; put or link the image there")
    return plain


def _read_gallery(root: Path) -> Gallery:
    gallery = _read_listed(root) if (root / GALLERY).is_file() else _find_images(root)
    if not gallery.path and gallery.listing:
        raise UserError(f"there is no {'/'.join(IMAGE_SUFFIXES)} file below {root}")
    if not gallery.path:
        raise UserError(f"{root / GALLERY} is empty; write an image path a line, or remove it")
    return gallery


def _read_listed(root: Path) -> Gallery:
    """The gallery of gallery.csv. An image counts once, further lines of it are counted."""
    first: dict[str, str] = {}
    repeated = []
    for path, where in _read_paths(root / GALLERY, root):
        if _one_form(path) in first:
            repeated.append(f"{path!r}, {where.rpartition(', ')[2]}")
        first.setdefault(_one_form(path), path)
    repeats = f"{len(repeated):,}, the first {repeated[0]}" if repeated else ""
    notes = [f"{GALLERY}: lines that repeat an image, which counts once: {repeats}"][: len(repeats)]
    return Gallery(root, list(first.values()), tuple(notes))


def _read_paths(file: Path, root: Path) -> Iterator[tuple[str, str]]:
    """The paths of a CSV of one column, and where each stands."""
    rows = ((line, row) for line, row in read_csv(file) if any(cell.strip() for cell in row))
    for number, (line, row) in enumerate(rows):
        where = f"{file}, line {line}"
        if len(row) > 1:
            problem = f"{len(row)} columns where one is expected, an image's path"
            fail(where, f"{problem}; put double quotes around a path with a comma")
        path = _plain_path(row[0], root, "the path", where)
        if number == 0 and not posixpath.splitext(path)[1] and not (root / path).is_file():
            fail(where, f"there is no image {path!r}; the file takes no header line")
        yield path, where


def _find_images(root: Path) -> Gallery:
    """The gallery of every image below the folder, in the order of their paths."""
    images, passed = [], []
    for name in _walk(root, passed):
        if name.lower().endswith(IMAGE_SUFFIXES) and not posixpath.basename(name).startswith("."):
            images.append(name)
        elif (mimetypes.guess_type(name)[0] or "").startswith("image/"):
            passed.append(name)
    for name in images:
        if _plain_path(name, root, "an image", str(root)) != name:
            fail(str(root), f"rename the image {name!r}: it has a backslash, or a blank in front")
    images.sort()
    notes = [f"gallery: the {len(images):,} images below the folder, as there is no {GALLERY}"]
    if passed:
        kinds = f"hidden, linked again, {THUMBNAILS}, results, or no {'/'.join(IMAGE_SUFFIXES)}"
        count = f"{len(passed):,}, the first {min(passed)!r}"
        notes.append(f"files and folders left out of the gallery ({kinds}): {count}")
    listing = hashlib.sha256("\n".join(images).encode()).hexdigest()
    return Gallery(root, images, tuple(notes), listing)


def _walk(root: Path, passed: list[str]) -> Iterator[str]:
    """The files below a folder, relative to it, also those in folders that are linked there.

    Adds the folders that are not looked into to `passed`: hidden ones, what the commands made, and
    links that lead to what has its own place below the folder or was seen.
    """
    real, seen = os.path.realpath(root), set()
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        place = Path(folder).relative_to(root)
        if RESULTS.intersection(files) and folder != str(root):
            passed.append(place.as_posix())
            folders.clear()
            continue
        for name in sorted(folders):
            path = os.path.join(folder, name)
            target = os.path.realpath(path)
            known = target in seen or f"{target}/".startswith(f"{real}/")
            if name.startswith(".") or name == THUMBNAILS or (known and os.path.islink(path)):
                passed.append((place / name).as_posix())
                folders.remove(name)
            seen.add(target)
        folders.sort()
        yield from ((place / name).as_posix() for name in files)


def _refuse(error: OSError) -> NoReturn:
    raise error


# ---------------------------------------------------------------------------------------------
# Queries
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The rows that a query searches, and the number of their set."""

    number: int
    rows: Collection[int]

    def within(self, rows: frozenset[int]) -> frozenset[int]:
        """Those of the rows that the query searches."""
        return frozenset(row for row in rows if row in self.rows)


@dataclass(frozen=True)
class Query:
    """A line of queries.jsonl.

    named: it has an id. own: the rows of its own images. rows: by ROW_KEYS.
    """

    where: str
    named: bool
    key: str
    images: tuple[str, ...]
    own: frozenset[int]
    text: str
    rows: Mapping[str, frozenset[int]]
    pool: Pool
    tags: Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Reader:
    """What the lines of queries.jsonl are read against. pools: the named lists."""

    path: Path
    gallery: Gallery
    pools: Mapping[str, Pool]
    sets: SetBuilder

    def read_all(self) -> Iterator[Query]:
        """The queries, line by line; blank lines are passed over."""
        for values, line in read_objects(self.path):
            yield self._read(values, line)

    def _read(self, values: dict, line: int) -> Query:
        where = f"{self.path}, line {line}"
        values = check_keys(values, QUERY_KEYS, lambda _: where, OTHER_NAMES)
        for key in ("text", "positives"):
            if key not in values:
                advice = "" if key == "text" else "; write [] for a query that has none"
                fail(where, f'"{key}" is missing{advice}')
        images, own = self._read_images(values, where)
        pool = self._read_pool(values.get("gallery"), where)
        rows = {key: self._read_rows(values.get(key, []), key, where) for key in ROW_KEYS}
        self._check_rows(rows, pool, where)
        return Query(
            where=where,
            named="id" in values,
            key=require_label(values.get("id", line), '"id"', where),
            images=images,
            own=own,
            text=require_text(values["text"], '"text"', where),
            rows=rows,
            pool=pool,
            tags=_read_tags(values.get("tags", {}), where),
        )

    def _read_images(self, values: dict, where: str) -> tuple[tuple[str, ...], frozenset[int]]:
        """A query's images, as the gallery spells them if it holds them, and their rows in it."""
        if ("image" in values) == ("images" in values):
            fail(where, 'a query has either "image", a path, or "images", a list of paths')
        listed = require(list, values.get("images", [values.get("image")]), '"images"', where)
        root, what = self.gallery.root, '"image"' if "image" in values else 'a path of "images"'
        names = [_plain_path(value, root, what, where) for value in listed]
        if not names or len(set(names)) < len(names):
            fail(where, '"images" names an image twice' if names else '"images" is empty')
        rows = [self.gallery.find(name) for name in names]
        paths = self.gallery.path
        spelled = (n if row is None else paths[row] for n, row in zip(names, rows, strict=True))
        return tuple(spelled), frozenset(row for row in rows if row is not None)

    def _read_rows(self, value: Any, key: str, where: str) -> frozenset[int]:
        listed = require(list, value, f'"{key}"', where)
        return self.gallery.rows(zip(listed, repeat(where)), f'"{key}"')

    def _read_pool(self, value: Any, where: str) -> Pool:
        if value is None:
            return Pool(NO_SET, range(len(self.gallery.path)))
        if type(value) is str:
            name = require_text(value, '"gallery"', where)
            if name not in self.pools:
                problem = f'"gallery": {SETTINGS} has no list {name!r} under "lists"'
                fail(where, f"{problem}; {guess(name, self.pools)}")
            return self.pools[name]
        rows = self._read_rows(value, "gallery", where)
        if not rows:
            fail(where, '"gallery" is empty; leave it out for the whole gallery')
        return Pool(self.sets(rows), rows)

    def _check_rows(self, rows: Mapping[str, frozenset[int]], pool: Pool, where: str) -> None:
        path = self.gallery.path
        for row in sorted(rows["positives"] & rows["excluded"]):
            fail(where, f'{path[row]!r} is in "positives" and in "excluded"; take it out of one')
        for row in sorted(rows["positives"] - pool.within(rows["positives"])):
            fail(where, f'{path[row]!r} is in "positives", but not in the query\'s "gallery"')
        if len(pool.within(rows["excluded"])) == len(pool.rows):
            fail(where, '"excluded" leaves nothing of the gallery that the query searches')


def _open_queries(root: Path, settings: Settings, gallery: Gallery, sets: SetBuilder) -> Reader:
    return Reader(root / QUERIES, gallery, _read_pools(settings, gallery, sets), sets)


def _read_tags(value: Any, where: str) -> dict[str, str | tuple[str, ...]]:
    tags = {}
    for name, label in require(dict, value, '"tags"', where).items():
        what = f"the tag {name!r}"
        if type(label) is list:
            labels = [require_label(one, f"a label of {what}", where) for one in label]
            if len(set(labels)) < len(labels):
                fail(where, f"{what} has a label twice")
            label = tuple(labels)
        elif label is not None:
            label = require_label(label, what, where)
        if label is not None:
            tags[require_text(name, "the name of a tag", where)] = label
    return tags


def _read_pools(settings: Settings, gallery: Gallery, sets: SetBuilder) -> dict[str, Pool]:
    """The named lists of gallery images."""
    pools = {}
    for name, entry in settings.lists.items():
        if type(entry) is list:
            listed = ((path, settings.place(path)) for path in entry)
        else:
            listed = _read_paths(gallery.root / entry, gallery.root)
        rows = gallery.rows(listed, f"the list {name!r}")
        if not rows:
            fail(settings.place(name), f"the list {name!r} is empty")
        pools[name] = Pool(sets(rows), rows)
    return pools


def _check_ids(queries: Sequence[Query]) -> None:
    """Raise UserError for queries of which some have an id and some have none, or with one id."""
    first: dict[str, Query] = {}
    for query in queries:
        if query.named != queries[0].named:
            with_id, without = sorted((queries[0], query), key=lambda q: not q.named)
            fail(without.where, f'"id" is missing, which {_line(with_id)} has; give all or none')
        if first.setdefault(query.key, query) is not query:
            fail(query.where, f"the id {query.key!r} is {_line(first[query.key])}'s too")


def _line(query: Query) -> str:
    return query.where.rpartition(", ")[2]


def _collect_tags(queries: Sequence[Query]) -> dict[str, list[str | tuple[str, ...]]]:
    """Labels by tag. Raises UserError for a tag that only some queries have."""
    names = dict.fromkeys(name for query in queries for name in query.tags)
    for query in queries:
        for name in names:
            if name not in query.tags:
                has = next(other for other in queries if name in other.tags)
                problem = f"the tag {name!r} is missing, which {_line(has)} has"
                fail(query.where, f"{problem}; write [] where no label fits")
    return {name: [query.tags[name] for query in queries] for name in names}


# ---------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------


def _query_table(queries: Sequence[Query]) -> QueryTable:
    """The queries; in result tables one of several images is named by all of them."""
    table = QueryTable(
        key=[query.key for query in queries],
        images=[query.images for query in queries],
        text=[query.text for query in queries],
        tags=_collect_tags(queries),
    )
    if all(len(images) == 1 for images in table.images):
        return table
    joined = {"Image Query": [" + ".join(images) for images in table.images]}
    return replace(table, shown=table.labels() | joined)


def _hash_files(root: Path, settings: Settings, gallery: Gallery) -> dict[str, str]:
    """SHA-256 of every file that was read, by its path below the folder."""
    lists = (entry for entry in settings.lists.values() if type(entry) is str)
    names = dict.fromkeys((QUERIES, GALLERY, SETTINGS, *lists))
    found = {name: sha256_file(root / name) for name in names if (root / name).is_file()}
    return found | ({"images below the folder": gallery.listing} if gallery.listing else {})


# What may not be meant, though it is allowed: what is said of the queries, and of which.
ODD = {
    NO_POSITIVES: lambda q: not q.rows["positives"],
    'whose own image is in the gallery as a negative, unless "excluded" or --exclude_query_image '
    "leaves it out": (lambda q: q.pool.within(q.own) - q.rows["positives"] - q.rows["excluded"]),
    "whose own image is among their positives": lambda q: q.own & q.rows["positives"],
    'that exclude images which are not in their "gallery" anyway': (
        lambda q: q.rows["excluded"] - q.pool.within(q.rows["excluded"])
    ),
    "with a tag without labels, counted in no average over it": lambda q: () in q.tags.values(),
}


def _count_odd(queries: Sequence[Query]) -> Iterator[str]:
    """A sentence, with a count and the first case, on each thing that may not be meant."""
    for what, test in ODD.items():
        found = [query for query in queries if test(query)]
        if found:
            first = f"the first {found[0].key!r} ({QUERIES}, {_line(found[0])})"
            yield f"queries {what}: {len(found):,} of {len(queries):,}, {first}"


BENCHMARK = Benchmark(
    tasks={},
    how_to_get="a folder of your own holds queries.jsonl (see docs/own.md)",
    fits=is_own,
    read=read,
    name_of=name_of,
    place_of=place_of,
)
