"""Task: what a benchmark asks and how its answers are judged, as pure data.

A benchmark (benchmarks/*.py) reads its files into a Task; extraction, evaluation, tables and
reports know tasks alone. Rows of the gallery are the unit everywhere (an image may be listed
twice). Sets of rows are numbered and stored once, and per-query arrays hold their numbers: NICO++
has 43,615 composed queries, but 360 sets of positives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError, atomic_path, read_json, sha256_file, write_json
from utils_records import misfit
from utils_startup import Late

np = Late("numpy")

WHOLE = (0, 0, 0, 0)  # the box of a whole image
NO_SET = -1  # as a pool: the whole gallery; as positives, excluded or related: none
NO_POSITIVES = "without positives, which score 0"  # queries, in a note of their task
UNREADABLE = "unreadable"  # images that extraction left out, missing ones among them
FORMAT = 1  # of task.json and task.npz


def unique_in_order(values: Iterable[Hashable]) -> tuple[list, np.ndarray]:
    """The distinct values in order of first appearance, and for each value (n,) int64 which."""
    numbers: dict[Hashable, int] = {}
    which = [numbers.setdefault(value, len(numbers)) for value in values]
    return list(numbers), np.array(which, np.int64)


# ---------------------------------------------------------------------------------------------
# Sets of gallery rows
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowSets:
    """Numbered sets of gallery rows: set i is row[start[i]:start[i + 1]], increasing and distinct.

    start: int64 (S + 1,); row: int64 (entries,).
    """

    start: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[np.ndarray]) -> RowSets:
        """Sets given as increasing arrays of distinct rows."""
        start = np.cumsum([0, *map(len, sets)], dtype=np.int64)
        rows = [np.asarray(rows, np.int64) for rows in sets]
        return cls(start, np.concatenate([np.empty(0, np.int64), *rows]))

    @classmethod
    def grouped(cls, group: np.ndarray, count: int) -> RowSets:
        """Set i holds the rows whose group, int (N,), is i; negative groups are in no set."""
        order = np.argsort(group, kind="stable").astype(np.int64)
        order = order[np.count_nonzero(group < 0) :]
        sizes = np.bincount(group[group >= 0], minlength=count)
        return cls(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), order)

    @classmethod
    def joined(cls, parts: Sequence[RowSets]) -> RowSets:
        """The sets of several collections, numbered on: those of the second follow the first's."""
        entries = np.cumsum([0, *(len(part.row) for part in parts)])
        starts = [part.start[1:] + first for part, first in zip(parts, entries, strict=False)]
        start = np.concatenate([np.zeros(1, np.int64), *starts])
        return cls(start, np.concatenate([np.empty(0, np.int64), *(part.row for part in parts)]))

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.row[self.start[number] : self.start[number + 1]]

    def gather(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of several sets, int (k,): which of the k each row is of, and the rows.

        int64 (entries,) both, in the order of the numbers; NO_SET has none.
        """
        sizes = self.sizes(numbers)
        which = np.repeat(np.arange(len(numbers)), sizes)
        place = np.repeat(self.start[numbers] - (np.cumsum(sizes) - sizes), sizes)
        place += np.arange(len(place))
        return which, self.row[place]

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """How many rows each numbered set has, int64; 0 for NO_SET."""
        sizes = np.append(np.diff(self.start), 0)
        return sizes[numbers]


class SetBuilder:
    """Gives equal sets of rows one number: number = sets(rows), at the end sets.done()."""

    def __init__(self):
        self._numbers: dict[bytes, int] = {}
        self._sets: list[np.ndarray] = []

    def __call__(self, rows: Iterable[int]) -> int:
        """The number of the set of these rows, in any order; NO_SET of none."""
        rows = np.unique(np.fromiter(rows, np.int64))
        if not len(rows):
            return NO_SET
        number = self._numbers.setdefault(rows.tobytes(), len(self._sets))
        if number == len(self._sets):
            self._sets.append(rows)
        return number

    def each(self, sets: Iterable[Iterable[int]]) -> np.ndarray:
        """The numbers of several sets, int64 (n,)."""
        return np.fromiter(map(self, sets), np.int64)

    def done(self) -> RowSets:
        return RowSets.of(self._sets)


# ---------------------------------------------------------------------------------------------
# Images and queries
# ---------------------------------------------------------------------------------------------

Picture = tuple[str, tuple[int, ...]]  # an image's path, and the box of it that is shown


@dataclass(frozen=True, eq=False)
class Images:
    """The gallery: image paths relative to the data set's folder, and what of each is shown.

    path: N of them (a sequence that may be read when first used). box: int (N, 4), left, upper,
    right, lower in pixels, or None: whole images. A box is cut to the image, cropped out and
    centred on a black square; one of zeros is the whole image, as it is. note: N texts a report
    writes beside the images (i-CIR: the text of the row), or None. shared: the features folder
    that several tasks of one gallery share, or None. own_mode: images are preprocessed in their
    file's own mode and made RGB after the crop, as most published programs do; False: they are
    made RGB first. copy_of: int64 (N,), the first row with the same picture, where a query's
    gallery lists one twice (the two score the same, to the last bit), or None.
    """

    path: Sequence[str]
    box: np.ndarray | None = None
    note: Sequence[str] | None = None
    shared: str | None = None
    own_mode: bool = False
    copy_of: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.path)

    def pictures(self) -> list[Picture]:
        """What each row shows; whole images have the box WHOLE."""
        return list(zip(self.path, _boxes(self.box, len(self)), strict=True))


@dataclass(frozen=True, eq=False)
class QueryTable:
    """The composed queries of a task, Q of each.

    key: unique names. images: the image paths of each query, one or several (whose unit features
    are averaged). text: the phrase that is encoded. texts: the phrases that are encoded instead,
    where a query has several (their unit features are averaged; FashionIQ: both orders of its two
    captions), or None. box: int (Q, 4), as in Images, or None. fields: further texts by name, as
    methods' prompts need them. tags: labels by name that group queries in metrics; a
    tag of several labels is a tuple of them. shown: the columns that name a query in result tables,
    by header; None: key, image and text.
    """

    key: Sequence[str]
    images: Sequence[tuple[str, ...]]
    text: Sequence[str]
    texts: Sequence[tuple[str, ...]] | None = None
    box: np.ndarray | None = None
    fields: Mapping[str, Sequence] = field(default_factory=dict)
    tags: Mapping[str, Sequence[str | tuple[str, ...]]] = field(default_factory=dict)
    shown: Mapping[str, Sequence[str]] | None = None

    def __len__(self) -> int:
        return len(self.key)

    def pictures(self) -> list[list[Picture]]:
        """What the images of each query show; whole ones have the box WHOLE."""
        boxes = _boxes(self.box, len(self))
        return [
            [(path, box) for path in paths] for paths, box in zip(self.images, boxes, strict=True)
        ]

    def phrases(self) -> Sequence[Sequence[str]]:
        """The texts of each query that are encoded."""
        return self.texts or [(text,) for text in self.text]

    def labels(self) -> dict[str, Sequence[str]]:
        """The columns that name the queries in tables: header -> Q texts."""
        if self.shown is not None:
            return dict(self.shown)
        first = [images[0] for images in self.images]
        return {"Query": self.key, "Image Query": first, "Text Query": self.text}


def _boxes(boxes: np.ndarray | None, count: int) -> Iterable[tuple[int, ...]]:
    return [WHOLE] * count if boxes is None else map(tuple, boxes.tolist())


# ---------------------------------------------------------------------------------------------
# How answers are judged
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """One protocol over a method's scores: (Q,) set numbers.

    positives: NO_SET where a query has none (it scores 0, and is counted in a warning); None: the
    ground truth is hidden, only submissions are written. excluded: rows that are not ranked, None
    for none. candidates: the rows that alone are ranked, None for the whole pool; the method sees
    the whole pool in either case.
    """

    positives: np.ndarray | None
    excluded: np.ndarray | None = None
    candidates: np.ndarray | None = None


@dataclass(frozen=True)
class Group:
    """A step of averaging: the mean (or lowest, "min") over each label of a tag, then rounded.

    tag None: over all there is. only: this one label of the tag, what has another is left out (the
    row of one category). digits: of percent; None: not rounded. rounding: "numpy" (half to even, of
    float64) or "python" (the mean taken as float32, then rounded as Python's round does, the way
    FREEDOM rounds recall and precision). Tags of outer groups are constant within inner ones.
    """

    tag: str | None
    how: str = "mean"
    digits: int | None = None
    only: str | None = None
    rounding: str = "numpy"


@dataclass(frozen=True)
class Column:
    """One number of the result table, in percent: a measure of utils_metrics, over groups.

    measure: its name, with the cut-off behind an @: "AP-T", "AP-S@10", "Hit@5", "Recall@50".
    groups: innermost first; what is left after them is averaged.
    """

    name: str
    measure: str
    view: str = "all"
    groups: tuple[Group, ...] = ()


# The columns of every result table, which no column of a task may be called like.
TABLE_COLUMNS = (
    *("timestamp", "dataset", "backbone", "method", "variant", "queries", "seconds"),
    *("tied_queries", "ties", "gallery", "left_out", "notes", "features", "version"),
    *("distractors", "pool", "neighbours", "products"),
)


@dataclass(frozen=True)
class Mean:
    """A further number of the result table: the mean of some columns, by their names."""

    name: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """A file for an evaluation server: each query's best k rows of a view.

    It is written where the view's positives are hidden; `--check_submission` reads it for any
    split. layout: its form, one of the benchmark's `submissions` (benchmarks.Layout).
    """

    file: str
    view: str
    k: int
    layout: str


@dataclass(frozen=True)
class Breakdown:
    """A matrix of a column's values, written as CSV: the tags of its rows and of its columns."""

    file: str
    column: str
    rows: str
    columns: str


@dataclass(frozen=True, eq=False)
class Task:
    """A benchmark's question: queries against a gallery, and how the rankings are judged.

    pool: int64 (Q,) set of the rows that a method sees for a query, NO_SET for the whole gallery.
    views: by name, the first is the main one. means: shown after the columns. ties: how equal
    scores rank unless --ties says otherwise (see utils_metrics.positive_ranks). related: int64 (Q,)
    set shown as "related" in reports (i-CIR: the same instance, another text), or None. sources:
    annotation file -> SHA-256. notes: sentences on the protocol that tables and reports repeat
    (left-out rows and the like). prompts: the name under which methods look up their published
    prompts ("cirr"), "" for none. spares_rows: by the protocol, rows of the gallery are in no pool.
    """

    name: str
    gallery: Images
    queries: QueryTable
    sets: RowSets
    pool: np.ndarray
    views: Mapping[str, View]
    columns: tuple[Column, ...]
    means: tuple[Mean, ...] = ()
    submissions: tuple[Submission, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    ties: str = "row"
    related: np.ndarray | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    prompts: str = ""
    spares_rows: bool = False

    @property
    def main_view(self) -> str:
        """The name of the view whose positives reports show."""
        return next(iter(self.views))

    @property
    def submitted(self) -> list[Submission]:
        """The files to write for an evaluation server: those of views with hidden positives."""
        return [s for s in self.submissions if self.views[s.view].positives is None]

    @property
    def pool_sizes(self) -> np.ndarray:
        """How many rows each query searches, int64 (Q,)."""
        return np.where(self.pool == NO_SET, len(self.gallery), self.sets.sizes(self.pool))

    def rows_of(self, numbers: np.ndarray | None, query: int) -> np.ndarray:
        """The rows of a query's set in a per-query array of set numbers, int64; none for NO_SET."""
        if numbers is None or numbers[query] == NO_SET:
            return np.empty(0, np.int64)
        return self.sets[numbers[query]]


def whole_gallery(queries: int) -> np.ndarray:
    """The pool of queries that all search the whole gallery, int64 (Q,)."""
    return np.full(queries, NO_SET, np.int64)


# ---------------------------------------------------------------------------------------------
# Images that are not there
# ---------------------------------------------------------------------------------------------


def without_images(task: Task, missing: Collection[str], why: str) -> Task:
    """The task without these image paths, with a note on what that leaves out.

    why: what they are, "missing" or UNREADABLE. Gallery rows of them are in no set; queries are
    left out if one of their images is, or all of their positives in a view. Raises UserError if
    that leaves no row or no query.
    """
    missing = set(missing)
    keep_row = np.array([path not in missing for path in task.gallery.path], bool)
    _, left = _without_rows(task.sets, keep_row)
    keep = np.array([missing.isdisjoint(images) for images in task.queries.images], bool)
    for view in task.views.values():
        if view.positives is not None:
            keep &= (view.positives == NO_SET) | (left[view.positives] != NO_SET)
    if not keep.any() or not keep_row.any():
        raise UserError(f"{task.name}: {len(missing)} images are {why}, and no query is left")

    rows, queries = np.flatnonzero(~keep_row), np.flatnonzero(~keep)
    note = (
        f"{len(missing)} {why} images left out: {len(rows)} of {len(keep_row)} gallery rows and "
        f"{len(queries)} of {len(keep)} queries"
    )
    return _restrict(task, keep_row, keep, note)


def first_rows(task: Task, count: int) -> Task:
    """A small task for trials: the first queries, the first gallery rows and those queries' own.

    Those are the rows of their positives, and of what a view leaves out or alone ranks. The
    features of its gallery are shared with no other task.
    """
    keep = np.arange(len(task.queries)) < count
    keep_row = np.arange(len(task.gallery)) < count
    for view in task.views.values():
        for numbers in vars(view).values():
            for number in np.unique(numbers[keep]) if numbers is not None else ():
                if number != NO_SET:
                    keep_row[task.sets[number]] = True
    if task.gallery.copy_of is not None:
        keep_row[task.gallery.copy_of[keep_row]] = True
    note = f"the first {keep.sum()} queries and {keep_row.sum()} gallery rows of {task.name}"
    small = _restrict(task, keep_row, keep, note)
    gallery = dataclasses.replace(small.gallery, shared=None)
    return dataclasses.replace(small, name=f"{task.name}_first{count}", gallery=gallery)


def _restrict(task: Task, keep_row: np.ndarray, keep: np.ndarray, note: str) -> Task:
    """The task of some gallery rows, bool (N,), and some queries, bool (Q,), with a note on it."""
    sets, left = _without_rows(task.sets, keep_row)

    def numbers(old: np.ndarray | None) -> np.ndarray | None:
        return None if old is None else left[old[keep]]

    gallery = _select(task.gallery, keep_row)
    if gallery.copy_of is not None:  # copies are of one path: what one is of is kept with it
        gallery = dataclasses.replace(gallery, copy_of=(np.cumsum(keep_row) - 1)[gallery.copy_of])
    return dataclasses.replace(
        task,
        gallery=gallery,
        queries=_select(task.queries, keep),
        sets=sets,
        pool=numbers(task.pool),
        views={
            name: View(**{part: numbers(value) for part, value in vars(view).items()})
            for name, view in task.views.items()
        },
        related=numbers(task.related),
        notes=(*task.notes, note),
    )


def _without_rows(sets: RowSets, keep: np.ndarray) -> tuple[RowSets, np.ndarray]:
    """The sets of the rows to keep, bool (N,), which are numbered anew; and what set became which.

    The second is int64 (S + 1,): by old number, of NO_SET too; a set of no row is NO_SET.
    """
    kept = keep[sets.row]
    start = np.concatenate([[0], np.cumsum(kept)])[sets.start]
    row = (np.cumsum(keep) - 1)[sets.row[kept]]
    filled = np.diff(start) > 0
    return RowSets(start, row), np.append(np.where(filled, np.arange(len(sets)), NO_SET), NO_SET)


def _select(table: Images | QueryTable, keep: np.ndarray):
    """A table of the rows to keep, bool (rows,)."""
    rows = np.flatnonzero(keep).tolist()

    def select(values):
        if isinstance(values, Mapping):
            return {name: select(column) for name, column in values.items()}
        if isinstance(values, np.ndarray):
            return values[rows]
        is_column = isinstance(values, Sequence) and not isinstance(values, str)
        return [values[row] for row in rows] if is_column else values

    columns = {part.name: getattr(table, part.name) for part in dataclasses.fields(table)}
    return dataclasses.replace(table, **{name: select(values) for name, values in columns.items()})


# ---------------------------------------------------------------------------------------------
# On disk: task.json and task.npz
# ---------------------------------------------------------------------------------------------


def save_task(task: Task, folder: Path) -> None:
    """Write a task as task.json (words) and task.npz (numbers), each whole or not at all."""
    arrays = {"start": task.sets.start, "row": task.sets.row, "pool": task.pool}
    optional = {
        "related": task.related,
        "query_box": task.queries.box,
        "gallery_box": task.gallery.box,
        "copy_of": task.gallery.copy_of,
    }
    for name, view in task.views.items():
        optional |= {f"{name}/{part}": value for part, value in vars(view).items()}
    arrays |= {name: value for name, value in optional.items() if value is not None}
    words = {
        "format": FORMAT,
        "name": task.name,
        "gallery": {
            "path": list(task.gallery.path),
            "note": None if task.gallery.note is None else list(task.gallery.note),
            "shared": task.gallery.shared,
            "own_mode": task.gallery.own_mode,
        },
        "queries": {
            "key": list(task.queries.key),
            "images": list(task.queries.images),
            "text": list(task.queries.text),
            "texts": task.queries.texts and list(task.queries.texts),
            "fields": dict(task.queries.fields),
            "tags": dict(task.queries.tags),
            "shown": task.queries.shown and dict(task.queries.shown),
        },
        "views": list(task.views),
        "columns": [dataclasses.asdict(column) for column in task.columns],
        "means": [dataclasses.asdict(mean) for mean in task.means],
        "submissions": [dataclasses.asdict(submission) for submission in task.submissions],
        "breakdowns": [dataclasses.asdict(breakdown) for breakdown in task.breakdowns],
        "ties": task.ties,
        "sources": dict(task.sources),
        "notes": list(task.notes),
        "prompts": task.prompts,
        "spares_rows": task.spares_rows,
    }
    with atomic_path(folder / "task.npz") as path:
        with open(path, "wb") as file:
            np.savez(file, **arrays)
        words["numbers"] = sha256_file(path)
    write_json(folder / "task.json", words)


GROUP_FORM = {
    **{"tag": (str, None), "how": str, "digits": (int, None), "only": (str, None)},
    "rounding": str,
}
COLUMN = {"name": str, "measure": str, "view": str}
WORDS = {  # of task.json
    "name": str,
    "gallery": {"path": [str], "note": ([str], None), "shared": (str, None), "own_mode": bool},
    "queries": {
        **{"key": [str], "images": [[str]], "text": [str], "texts": ([[str]], None)},
        **{
            "fields": {str: [(str, None)]},
            "tags": {str: [(str, [str])]},
            "shown": ({str: [str]}, None),
        },
    },
    "views": [str],
    "columns": [{**COLUMN, "groups": [GROUP_FORM]}],
    "means": [{"name": str, "of": [str]}],
    "submissions": [{"file": str, "view": str, "k": int, "layout": str}],
    "breakdowns": [dict.fromkeys(("file", "column", "rows", "columns"), str)],
    **{"ties": str, "sources": {str: str}, "notes": [str], "prompts": str, "numbers": str},
}


def load_task(folder: Path) -> Task:
    """Read what save_task wrote.

    Raises UserError if the files are absent, damaged, of two tasks, or of another version of the
    format.
    """
    from utils_pickles import one_line, read_archive  # with numpy, which --help does not wait for

    words = read_json(folder / "task.json")
    if words.get("format") != FORMAT:
        raise UserError(f"{folder / 'task.json'} is of another version; extract the features again")
    try:
        if wrong := misfit(words, WORDS):
            raise ValueError(f"{wrong} of task.json is damaged")
        if sha256_file(folder / "task.npz") != words["numbers"]:
            raise ValueError("task.npz is damaged or of another task")
        return _build_task(words, read_archive(folder / "task.npz"))
    except FileNotFoundError:
        raise UserError(
            f"{folder / 'task.npz'} does not exist; extract the features again"
        ) from None
    except Exception as error:  # zip, header, missing keys: a damaged pair
        problem = f"{folder}: task.json and task.npz do not fit ({one_line(error)})"
        raise UserError(f"{problem}; extract the features again") from None


def _build_task(words: dict, arrays: dict[str, np.ndarray]) -> Task:
    gallery, queries = words["gallery"], words["queries"]
    columns = [queries[name] for name in ("key", "images", "text", "texts")]
    columns += [
        own for part in ("fields", "tags", "shown") for own in (queries[part] or {}).values()
    ]
    if {len(own) for own in columns if own is not None} != {len(arrays["pool"])}:
        raise ValueError("the columns of the queries are not of one length")
    if len(gallery["note"] or gallery["path"]) != len(gallery["path"]):
        raise ValueError("the gallery has not as many notes as images")
    tags = {
        name: [tuple(label) if isinstance(label, list) else label for label in labels]
        for name, labels in queries["tags"].items()
    }
    views = {
        name: View(*(arrays.get(f"{name}/{part.name}") for part in dataclasses.fields(View)))
        for name in words["views"]
    }
    return Task(
        name=words["name"],
        gallery=Images(
            gallery["path"],
            arrays.get("gallery_box"),
            gallery["note"],
            gallery["shared"],
            gallery["own_mode"],
            arrays.get("copy_of"),
        ),
        queries=QueryTable(
            key=queries["key"],
            images=[tuple(images) for images in queries["images"]],
            text=queries["text"],
            texts=queries["texts"] and [tuple(texts) for texts in queries["texts"]],
            box=arrays.get("query_box"),
            fields=queries["fields"],
            tags=tags,
            shown=queries["shown"],
        ),
        sets=RowSets(arrays["start"], arrays["row"]),
        pool=arrays["pool"],
        views=views,
        columns=tuple(
            Column(**{**c, "groups": tuple(Group(**g) for g in c["groups"])})
            for c in words["columns"]
        ),
        means=tuple(Mean(m["name"], tuple(m["of"])) for m in words["means"]),
        submissions=tuple(Submission(**s) for s in words["submissions"]),
        breakdowns=tuple(Breakdown(**b) for b in words["breakdowns"]),
        ties=words["ties"],
        related=arrays.get("related"),
        sources=words["sources"],
        notes=tuple(words["notes"]),
        prompts=words["prompts"],
        spares_rows=words.get("spares_rows", False),
    )
