"""i-CIR (NeurIPS 2025, arXiv 2510.25387), and data sets of one's own in its two-CSV form.

    ROOT/query_files.csv                      the folder layout: rows image_path,text,instance
    ROOT/database_files.csv
    ROOT/annotations/{query,database}_files.csv            the same files, beside shards
    ROOT/webdataset/{query,database}/{split}-NNNNNN.tar    the shards

Every instance has a database of its own. A row of it is positive for a query of the instance if
its text is the query's; rows with another text that is asked of the instance are related.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import Benchmark
from utils import UserError, last_part, read_csv, sha256_file
from utils_datasets import SPLITS, Dataset, find_image, find_spellings, is_header, slashed
from utils_startup import Late
from utils_task import NO_SET, Column, Group, Images, QueryTable, RowSets, Task, View

if TYPE_CHECKING:
    import pandas as pd

np = Late("numpy")

LABELS = ("image_path", "text", "instance")  # the columns of the annotation files

# Where the annotations may lie under a data set's root, by source, the usual place first.
ANNOTATION_PLACES = {
    "folder": ("", "annotations"),
    "wds": ("annotations", "webdataset/annotations", ""),
}
HOW_TO_GET = (
    "get i-CIR with `python3 data/download.py icir`, the tiny world with `python3 "
    "data/tiny/make_split.py`; a data set of your own is a folder with query_files.csv and "
    "database_files.csv (see docs/data.md)"
)

COLUMNS = (
    Column("mAP", "AP-T"),
    Column("mmAP", "AP-T", groups=(Group("instance"),)),
    Column("minmAP", "AP-T", groups=(Group("instance", "min"),)),
)


# ---------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotation:
    """The rows of one split in annotation order: image_paths[i], texts[i], instances[i] are row i.

    lines[i] is the line of the file at which row i begins, from 1; path, sha256: the file. A text
    may be empty in the database (a negative without one); an image path may occur in several rows.
    """

    split: str
    path: Path
    sha256: str
    image_paths: list[str]
    texts: list[str]
    instances: list[str]
    lines: list[int]

    def columns(self) -> dict[str, list[str]]:
        """The columns by name."""
        return {name: getattr(self, f"{name}s") for name in LABELS}

    def select(self, rows: Sequence[int]) -> Annotation:
        """Those rows, by number from 0."""
        columns = ("image_paths", "texts", "instances", "lines")
        return replace(self, **{c: [getattr(self, c)[row] for row in rows] for c in columns})


def read_annotation(root: Path, split: str, source: str) -> Annotation:
    """Read the annotation of one split ("query" or "database") for a source, "folder" or "wds".

    Raises UserError, naming file and row, if the file is absent, empty, not UTF-8, or has a row
    that is not image_path,text,instance.
    """
    path = _find_annotation(root, split, source)
    lines, rows = [], []
    for line, row in read_csv(path):
        _check_row(row, f"{path}, row {line}", split)
        lines.append(line)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: rows {','.join(LABELS)} are expected")
    if is_header(rows[:2]):
        raise UserError(
            f"{path}, row {lines[0]}: {','.join(rows[0])!r} names no image: the file takes no "
            "header line; remove it"
        )
    image_paths, texts, instances = (list(column) for column in zip(*rows, strict=True))
    image_paths = [slashed(path) for path in image_paths]
    return Annotation(split, path, sha256_file(path), image_paths, texts, instances, lines)


def find_listed_again(annotations: Mapping[str, Annotation], dataset: Dataset) -> dict[str, dict]:
    """What a manifest says of images that are listed more than once, under any spelling of a path.

    repeated: of gallery rows that list an image of their instance again; own_images: of queries
    whose own image is a gallery row of their instance.
    """
    query, database = (annotations[split] for split in SPLITS)
    spelled = find_spellings([*database.image_paths, *query.image_paths], dataset)
    return {
        "repeated": _find_repeated(database, spelled),
        "own_images": _find_own_images(query, database, spelled),
    }


def _find_repeated(database: Annotation, spelled: Mapping[str, str]) -> dict:
    """{"count", "row", "first" (its path), "of" (the row that lists it), "spelled"}; {} for none.

    Rows by their lines; spelled: a path of the gallery -> the first one that names its file, where
    they differ.
    """
    seen: dict[tuple[str, str], int] = {}
    again = []
    for row, (path, instance) in enumerate(
        zip(database.image_paths, database.instances, strict=True)
    ):
        known = seen.setdefault((instance, spelled.get(path, path)), row)
        if known != row:
            again.append((row, known))
    own = {path: spelled[path] for path in database.image_paths if path in spelled}
    found: dict = {"spelled": own} if own else {}
    if again:
        row, known = again[0]
        first = {"row": database.lines[row], "first": database.image_paths[row]}
        found |= {"count": len(again), **first, "of": database.lines[known]}
    return found


def _find_own_images(query: Annotation, database: Annotation, spelled: Mapping[str, str]) -> dict:
    """{"count", "row", "first" (its path), "of" (the gallery row)}, rows by lines; {} for none."""

    def shown(own: Annotation) -> list[tuple[str, str]]:
        paths = (spelled.get(path, path) for path in own.image_paths)
        return list(zip(paths, own.instances, strict=True))

    line = dict(zip(reversed(shown(database)), reversed(database.lines), strict=True))
    asked = shown(query)
    found = [row for row, own in enumerate(asked) if own in line]
    if not found:
        return {}
    first = {"row": query.lines[found[0]], "first": query.image_paths[found[0]]}
    return {"count": len(found), **first, "of": line[asked[found[0]]]}


def _find_annotation(root: Path, split: str, source: str) -> Path:
    places = [root / place for place in ANNOTATION_PLACES[source]]
    for place in places:
        if (place / f"{split}_files.csv").is_file():
            return place / f"{split}_files.csv"
    looked = " or ".join(str(place) for place in places)
    raise UserError(f"no {split}_files.csv in {looked}; {HOW_TO_GET}")


ADVICE = "put double quotes around a value that holds a comma"


def _check_row(row: list[str], where: str, split: str) -> None:
    columns = ",".join(LABELS)
    if len(row) != len(LABELS):
        other = [mark for mark in ("\t", ";") if mark in "".join(row) and len(row) == 1]
        advice = f"put commas in the place of {other[0]!r}" if other else ADVICE
        raise UserError(
            f"{where}: {len(row)} columns where {len(LABELS)} are expected ({columns}); {advice}"
        )
    if tuple(row) == LABELS:
        raise UserError(f"{where}: the file takes no header line; remove it")
    if "\r" in "".join(row):
        raise UserError(f"{where}: a carriage return inside a value; remove it")
    if "\0" in "".join(row):
        raise UserError(f"{where}: a zero byte inside a value; remove it")
    image_path, text, instance = row
    if not image_path or not instance:
        raise UserError(f"{where}: the image path and the instance must not be empty ({columns})")
    if split == "query" and not text.strip():
        raise UserError(f"{where}: a query needs a text ({columns})")


def has_annotations(root: Path) -> bool:
    """Whether a folder is a data set in this form."""
    places = {place for source in ANNOTATION_PLACES.values() for place in source}
    return any((root / place / "query_files.csv").is_file() for place in places)


def locate(root: Path, path: str) -> Path:
    """The file of an image, relative to the data set's folder or to the folder's parent."""
    try:
        return find_image(Dataset(last_part(root), root), path)
    except FileNotFoundError:
        return root / path


# ---------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------


def read(root: Path) -> Task:
    """The task of the annotations, wherever they lie. Raises UserError as read_annotation does."""
    import pandas as pd

    source = "wds" if (root / "webdataset").is_dir() else "folder"
    splits = {split: read_annotation(root, split, source) for split in SPLITS}
    query, database = (pd.DataFrame(splits[split].columns(), dtype="str") for split in SPLITS)
    labels = database[["text", "instance"]].astype("category")
    paths, notes = splits["database"].image_paths, splits["database"].texts
    task = task_of_labels(last_part(root), query, labels, paths, notes)
    return replace(task, sources={own.path.name: own.sha256 for own in splits.values()})


def task_of_labels(
    name: str, queries: pd.DataFrame, labels: pd.DataFrame, paths: Sequence[str], notes: Sequence
) -> Task:
    """The task of labelled rows.

    queries: str columns image_path, text, instance. labels: categorical columns text and instance,
    a row a database image; paths: those of the images, notes: their texts (both may be read late).
    Raises UserError for an instance that has queries but no database rows.
    """
    texts, instances = labels["text"].cat, labels["instance"].cat
    row_instance, row_text = (c.codes.to_numpy().astype(np.int64) for c in (instances, texts))
    instance = instances.categories.get_indexer(queries["instance"])
    text = texts.categories.get_indexer(queries["text"])  # -1: a text that no row has
    pools = RowSets.grouped(row_instance, len(instances.categories))
    _check_pools(queries, np.where(instance >= 0, pools.sizes(instance), 0))

    width = len(texts.categories) + 1
    asked, number = np.unique(instance * width + text + 1, return_inverse=True)
    pair = row_instance * width + row_text + 1
    place = np.searchsorted(asked, pair)
    is_asked = np.append(asked, -1)[place] == pair
    positives = RowSets.grouped(np.where(is_asked, place, -1), len(asked))
    related = RowSets.grouped(np.where(is_asked, row_instance, -1), len(instances.categories))
    sets = RowSets.joined([pools, positives, related])
    has_positives = (positives.sizes(number) > 0) & (text >= 0)
    strings = {column: queries[column].tolist() for column in queries}
    return Task(
        name=name,
        gallery=Images(path=paths, note=notes),
        queries=QueryTable(
            key=[str(row) for row in range(1, len(queries) + 1)],
            images=[(path,) for path in strings["image_path"]],
            text=strings["text"],
            tags={"instance": strings["instance"]},
            shown={
                "Image Query": strings["image_path"],
                "Text Query": strings["text"],
                "Instance": strings["instance"],
            },
        ),
        sets=sets,
        pool=instance.astype(np.int64),
        views={"all": View(np.where(has_positives, len(pools) + number, NO_SET))},
        columns=COLUMNS,
        related=len(pools) + len(positives) + instance,
    )


def _check_pools(queries: pd.DataFrame, sizes: np.ndarray) -> None:
    """Raise UserError for the first query whose instance has no database row."""
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        name = queries["instance"].iloc[empty[0]]
        raise UserError(
            f"query row {empty[0] + 1}: the instance {name!r} has queries but no database "
            "rows; add rows to database_files.csv or remove its queries, and extract again"
        )


BENCHMARK = Benchmark(
    tasks={"icir": read, "tiny": read},
    how_to_get=HOW_TO_GET,
    locate=locate,
    fits=has_annotations,
    read=read,
    labelled=True,
)
