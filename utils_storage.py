"""Feature files: reading what create_features or the reference implementation wrote.

Native files are plain .npy arrays and CSV; the reference's are pickles, which are read with an
unpickler that admits arrays, tensors and plain containers only. Formats: DESIGN section 2.
"""

from __future__ import annotations

import csv
import hashlib
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import icir
from utils import UserError, open_text, read_json, require_regular, sha256_file
from utils_backbones import backbone_folder
from utils_pickles import (
    UNREADABLE,
    load_pickle,
    one_line,
    open_feature_file,
    read_labels,
    read_npy_header,
    read_rows,
)
from utils_records import check_manifest, read_manifest
from utils_task import Task, load_task

LABELS = list(icir.LABELS)


# ---------------------------------------------------------------------------------------------
# Database features, read a block of rows at a time
# ---------------------------------------------------------------------------------------------


class MappedRows:
    """The rows of a 2-d .npy file of float32 or float16, mapped only while a block is in use.

    Each read maps the rows it needs and nothing else, so that memory is bounded by the largest
    blocks. shape is (rows, D).
    """

    def __init__(self, path: Path):
        """Read the header. Raises UserError if the file is absent, cut, or no 2-d float array."""
        self.path = path
        with open_feature_file(path) as file:
            try:
                self.shape, fortran, self.dtype = read_npy_header(file)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path} is not a .npy file ({one_line(error)}); extract it again"
                ) from None
            self._offset = file.tell()
        if len(self.shape) != 2 or fortran or self.dtype not in (np.float32, np.float16):
            order = ", column by column" if fortran else ""
            raise UserError(
                f"{path}: expected rows of float32 or float16, found {self.dtype} {self.shape}"
                f"{order}; extract it again"
            )
        if not self.shape[1]:
            raise UserError(f"{path}: rows of no numbers; extract it again")
        surplus = path.stat().st_size - self._offset - self._row_bytes * self.shape[0]
        if surplus:
            problem = "has bytes behind its last row" if surplus > 0 else "is cut short"
            raise UserError(f"{path} {problem}; extract it again")

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * self.shape[1]

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, without a copy, or of an index array that never falls, gathered.

        Raises UserError if the file has been cut since its header was read.
        """
        return self._map(rows.start, rows.stop) if isinstance(rows, slice) else self._gather(rows)

    def read_ahead(self, rows: slice) -> None:
        """Tell the system, where it can be told, that these rows will be read soon."""
        if hasattr(os, "posix_fadvise"):
            begin = self._offset + rows.start * self._row_bytes
            length = (rows.stop - rows.start) * self._row_bytes
            with open(self.path, "rb") as file:
                os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows that lie apart, every stretch of neighbours read at once: mapping costs more."""
        array = np.empty((len(rows), self.shape[1]), self.dtype)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        stops = [*starts[1:].tolist(), len(rows)]
        offsets = (self._offset + self._row_bytes * rows[starts]).tolist()
        with open(self.path, "rb", buffering=0) as file:
            for start, stop, offset in zip(starts.tolist(), stops, offsets, strict=True):
                file.seek(offset)
                wanted = memoryview(array[start:stop]).cast("B")
                while wanted:
                    count = file.readinto(wanted)
                    if not count:
                        raise UserError(f"{self.path} is cut short; extract it again")
                    wanted = wanted[count:]
        return array

    def _map(self, start: int, stop: int) -> np.ndarray:
        begin = self._offset + start * self._row_bytes
        aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
        length = begin - aligned + (stop - start) * self._row_bytes
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < aligned + length:
                raise UserError(f"{self.path} is cut short; extract it again")
            mapped = mmap.mmap(file.fileno(), length, offset=aligned, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        count = (stop - start) * self.shape[1]
        array = np.frombuffer(mapped, self.dtype, count, offset=begin - aligned)
        return array.reshape(stop - start, self.shape[1])


class ArrayRows:
    """Rows of an array in memory (a reference pickle), with the interface of MappedRows."""

    def __init__(self, path: Path, array: np.ndarray):
        self.path, self.shape, self.dtype = path, array.shape, array.dtype
        self._array = array

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, without a copy, or of an index array, gathered."""
        return self._array[rows]


# ---------------------------------------------------------------------------------------------
# A data set's features
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QueryRows:
    """One kind of query features: values float32 (d, D), not normalised, and whose they are.

    row: int64 (Q,), the row of values of each query; None: query i has row i. of: int64 (Q, m) of
    queries of several images or texts, -1 behind the last, or None. place: what an error names.
    is_unit: rows count as vectors of unit length; False: as they are.
    """

    values: np.ndarray
    place: str
    row: np.ndarray | None = None
    of: np.ndarray | None = None
    is_unit: bool = True

    def __len__(self) -> int:
        return len(self.values if self.row is None else self.row)


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one data set and backbone: arrays by name, and the task they are of.

    source: the file that says what these features are; manifest: its content, None for pickles.
    image_row, text_row: for each query the rows of its distinct images and texts, of which it may
    have several; None where each query has its own. image_row points into the database's images
    where there is no file of query images. composed_row: the same of a system's composed queries.
    as_they_are: query features that are not normalised.
    inputs: the manifests of methods' inputs, by the names of their arrays, "query_searle".
    """

    backbone: str
    dataset: str
    task: Task
    query_files: Mapping[str, MappedRows | ArrayRows]
    database_files: Mapping[str, MappedRows | ArrayRows]
    source: Path
    manifest: dict | None
    image_row: list[list[int]] | None = None
    text_row: list[list[int]] | None = None
    composed_row: list[list[int]] | None = None
    as_they_are: frozenset[str] = frozenset()
    inputs: Mapping[str, StoredInput] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        return self.database_files["image"].shape[1]

    @property
    def folder(self) -> Path:
        return self.source.parent

    @property
    def viewed(self) -> bool:
        """Whether images were encoded as a viewer shows them, see utils_pixels.Look."""
        return (self.manifest or {}).get("pixels") == "viewed"

    @property
    def spelled(self) -> dict[str, str]:
        """Gallery paths -> another path of the gallery's that names the same file."""
        return ((self.manifest or {}).get("repeated") or {}).get("spelled") or {}

    def has_query(self, name: str) -> bool:
        """Whether there are query features of that name."""
        return name in self.query_files or (name == "image" and self.image_row is not None)

    def query(self, name: str) -> QueryRows:
        """The query features of that name. Raises UserError if there are none, or they are cut."""
        if name not in self.query_files and name == "image" and self.image_row is not None:
            return self._images_of_the_gallery()
        if name not in self.query_files:
            raise UserError(self._how_to_make(name))
        file = self.query_files[name]
        self._check_input(f"query_{name}", file, len(self.task.queries))
        values = file.read(slice(0, file.shape[0])).astype(np.float32, copy=False)
        place = f"{self.folder}: {QUERY_WORDS.get(name, name)} features of the queries"
        rows = _query_rows(values, place, self.rows_of(name))
        return replace(rows, is_unit=name not in self.as_they_are)

    def rows_of(self, name: str) -> list[list[int]] | None:
        """image_row, text_row, composed_row, or None: whose rows the features of that name are."""
        if name.startswith(COMPOSED):
            return self.composed_row
        return {"image": self.image_row, "text": self.text_row, "context_text": self.text_row}.get(
            name
        )

    @property
    def is_composed(self) -> bool:
        """Whether these are features of a system of composed/: of pairs of image and text."""
        return "composed" in (self.manifest or {})

    def _images_of_the_gallery(self) -> QueryRows:
        """Query images that are gallery rows: those rows alone, read once each."""
        wanted = np.unique(np.concatenate([np.asarray(rows) for rows in self.image_row]))
        database = self.database_files["image"]
        values = database.read(wanted).astype(np.float32)
        rows = [np.searchsorted(wanted, own).tolist() for own in self.image_row]
        return _query_rows(values, f"{database.path}, rows of query images", rows)

    def _how_to_make(self, name: str) -> str:
        command = f"python3 create_features.py --dataset {self.dataset} --backbone {self.backbone}"
        if self.is_composed:
            return _how_to_compose(name, self.folder, command)
        if name.startswith(COMPOSED):
            return (
                f"{self.folder} has no composed queries: these come from systems with networks of "
                "their own, as --backbone magiclens:FILE"
            )
        if name == "context_text":
            return (
                f"{self.folder} has no contextualised query texts: extract them with {command} "
                "--overwrite, or add --no-contextualize"
            )
        if name in QUERY_WORDS:
            return f"{self.folder} has no {QUERY_WORDS[name]} features of the queries: {command}"
        return f"{self.folder} has no query_{name}.npy"

    def database(self, name: str) -> MappedRows | ArrayRows:
        """The database features of that name. Raises UserError if there are none."""
        if name not in self.database_files:
            raise UserError(f"{self.folder} has no database_{name}.npy")
        file = self.database_files[name]
        self._check_input(f"database_{name}", file, len(self.task.gallery))
        return file

    def _check_input(self, array: str, file: MappedRows | ArrayRows, rows: int) -> None:
        """Raise UserError if an input's array was made for other features than these."""
        made = self.inputs.get(array)
        if made is None:
            return
        if made.features != sha256_file(self.source) or file.shape != (rows, self.dim):
            raise UserError(
                f"{file.path} was made for other features than lie beside it now; make it again: "
                f"python3 create_features.py --dataset {self.dataset} --backbone {self.backbone} "
                f"--inputs {made.path.stem} --overwrite (with the flags it needs)"
            )


COMPOSED = ("composed", "tokens")  # what the names of a system's query arrays begin with


def _how_to_compose(name: str, folder: Path, command: str) -> str:
    if name.startswith(COMPOSED):
        return f"{folder} has no query_{name}.npy: make it with {command} --tokens --overwrite"
    return (
        f"{folder} holds the features of a system, whose queries are composed: --method composed "
        "reads them"
    )


QUERY_WORDS = {"image": "image", "text": "text", "context_text": "contextualised text"}


def _query_rows(values: np.ndarray, place: str, rows: list[list[int]] | None) -> QueryRows:
    """Query features by their rows of values; of several a query, padded with -1."""
    if rows is None:
        return QueryRows(values, place)
    most = max(map(len, rows), default=1)
    if most == 1:
        return QueryRows(values, place, np.array([own[0] for own in rows], np.int64))
    padded = np.full((len(rows), most), -1, np.int64)
    for query, own in enumerate(rows):
        padded[query, : len(own)] = own
    return QueryRows(values, place, of=padded)


def features_folder(features_dir: str | Path, backbone: str, dataset: str) -> Path:
    """features/{backbone}_features/{dataset}."""
    return Path(features_dir) / backbone_folder(backbone) / dataset


def is_native(features_dir: str | Path, backbone: str, dataset: str) -> bool:
    """Whether a data set's features lie there in native files."""
    return (features_folder(features_dir, backbone, dataset) / "manifest.json").exists()


def without_features(task: Task) -> Features:
    """A task with no features of our own, on which other systems' results are judged."""
    return Features("none", task.name, task, {}, {}, source=Path(task.name), manifest=None)


def load_features(features_dir: str | Path, backbone: str, dataset: str) -> Features:
    """Read a data set's features, native if there, else the reference's pickles.

    Raises UserError if neither is there, or if tables and arrays do not agree.
    """
    folder = features_folder(features_dir, backbone, dataset)
    pickles = [folder / f"{split}_{dataset}_features.pkl" for split in ("query", "database")]
    if (folder / "task.json").exists() and is_native(features_dir, backbone, dataset):
        features = _load_task_features(folder, backbone, dataset)
    elif is_native(features_dir, backbone, dataset):
        features = _load_labelled(folder, backbone, dataset)
    elif all(path.exists() for path in pickles):
        reference = read_reference(features_dir, backbone, dataset)
        return reference_features(reference, backbone, dataset)
    else:
        unfinished = folder.is_dir() and any(folder.iterdir())
        raise UserError(
            f"{folder} holds no {'finished ' if unfinished else ''}features (no manifest.json, no "
            f"{pickles[0].name} and {pickles[1].name}); "
            f"run: python3 create_features.py --dataset {dataset} --backbone {backbone}"
        )
    _check_agreement(features)
    return features


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference's two pickles of a data set, by split "query" and "database".

    tables: str columns image_path, text, instance; arrays: float32 (rows, D), by name and split.
    """

    paths: Mapping[str, Path]
    tables: Mapping[str, pd.DataFrame]
    arrays: Mapping[str, Mapping[str, np.ndarray]]


REFERENCE_KEYS = {
    "image": "image_feats",
    "text": "text_feats",
    "context_text": "context_text_feats",
}


def read_reference(features_dir: str | Path, backbone: str, dataset: str) -> Reference:
    """Read the reference's two pickles, also where native files lie beside them."""
    folder = features_folder(features_dir, backbone, dataset)
    paths = {split: folder / f"{split}_{dataset}_features.pkl" for split in ("query", "database")}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path} does not exist")
    contents = {split: load_pickle(path) for split, path in paths.items()}
    names = {"query": ["image", "text"], "database": ["image"]}
    if contents["query"].get(REFERENCE_KEYS["context_text"]) is not None:
        names["query"].append("context_text")
    return Reference(
        paths=paths,
        tables={
            split: pd.DataFrame(read_labels(contents[split], path), dtype=str)[LABELS]
            for split, path in paths.items()
        },
        arrays={
            split: {n: read_rows(contents[split], REFERENCE_KEYS[n], paths[split]) for n in own}
            for split, own in names.items()
        },
    )


def reference_features(reference: Reference, backbone: str, dataset: str) -> Features:
    """The features that the reference's pickles hold.

    Raises UserError if tables and arrays do not agree.
    """
    table = reference.tables["database"]
    labels = table[["text", "instance"]].astype("category")
    files = {
        split: {name: ArrayRows(reference.paths[split], rows) for name, rows in arrays.items()}
        for split, arrays in reference.arrays.items()
    }
    paths, notes = table["image_path"].tolist(), table["text"].tolist()
    features = Features(
        backbone=backbone,
        dataset=dataset,
        task=icir.task_of_labels(dataset, reference.tables["query"], labels, paths, notes),
        query_files=files["query"],
        database_files=files["database"],
        source=reference.paths["query"],
        manifest=None,
    )
    _check_agreement(features)
    return features


def _load_labelled(folder: Path, backbone: str, dataset: str) -> Features:
    """Features in i-CIR's form: query.csv and database.csv of image_path, text, instance."""
    queries = _read_table(folder / "query.csv", LABELS)
    labels = _read_categories(folder / "database.csv", ["text", "instance"])
    table = ReadLate(lambda: _read_table(folder / "database.csv", LABELS))
    paths, notes = (LateColumn(table, name, len(labels)) for name in ("image_path", "text"))
    return Features(
        backbone=backbone,
        dataset=dataset,
        task=icir.task_of_labels(dataset, queries, labels, paths, notes),
        query_files=_arrays(folder, "query"),
        database_files=_arrays(folder, "database"),
        source=folder / "manifest.json",
        manifest=read_manifest(folder / "manifest.json"),
        **_inputs(folder),
    )


def _load_task_features(folder: Path, backbone: str, dataset: str) -> Features:
    """Features with a task beside them: query.csv of key, image_row, text_row."""
    task = load_task(folder)
    arrays, manifest = _arrays(folder, "query"), read_manifest(folder / "manifest.json")
    columns = ("composed_row",) if "composed" in manifest else ("image_row", "text_row")
    table = read_csv_columns(folder / "query.csv", ("key", *columns))
    try:
        rows = {
            name: [[int(row) for row in rows.split()] for rows in table[name]] for name in columns
        }
    except ValueError as error:
        raise UserError(f"{folder / 'query.csv'}: {error}; extract it again") from None
    shared = folder.parent / task.gallery.shared if task.gallery.shared else folder
    return Features(
        backbone=backbone,
        dataset=dataset,
        task=task,
        query_files=arrays,
        database_files=_arrays(shared, "database") | _arrays(folder, "database"),
        source=folder / "manifest.json",
        manifest=manifest,
        **rows,
        **_inputs(folder),
    )


@dataclass(frozen=True)
class StoredInput:
    """The manifest of a method's input, and the hash of the features' manifest it was made with."""

    path: Path
    features: str


def _inputs(folder: Path) -> dict:
    """The fields of Features on the inputs of methods that lie beside a data set's features."""
    found: dict[str, StoredInput] = {}
    as_they_are: set[str] = set()
    for path in sorted({*folder.glob("*.json")} - {folder / "task.json"}):
        content = read_json(path)
        if content.get("kind") != "input" and path.name != "manifest.json":
            continue
        check_manifest(content, path)
        for array, facts in (content.get("arrays") or {}).items():
            if content.get("kind") == "input":
                made_for = (content.get("sources") or {}).get("features", "")
                found[array] = StoredInput(path, made_for)
            if facts.get("unit") is False:
                as_they_are.add(array.removeprefix("query_"))
    return {"inputs": found, "as_they_are": frozenset(as_they_are)}


def _arrays(folder: Path, split: str) -> dict[str, MappedRows]:
    """The arrays of a split by name: {split}_{name}.npy."""
    paths = sorted(folder.glob(f"{split}_*.npy"))
    return {path.stem.removeprefix(f"{split}_"): MappedRows(path) for path in paths}


class ReadLate:
    """A table that is read when a column of it is first used."""

    def __init__(self, read: Callable[[], pd.DataFrame]):
        self._read = read

    @cached_property
    def table(self) -> pd.DataFrame:
        return self._read()


class LateColumn(Sequence):
    """A column of a large table as a sequence of strings, whose length is known beforehand."""

    def __init__(self, table: ReadLate, name: str, rows: int):
        self._table, self._name, self._rows = table, name, rows

    @cached_property
    def _values(self) -> list[str]:
        return self._table.table[self._name].tolist()

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row):
        return self._values[row]


def read_csv_columns(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a CSV with a header, texts as they stand.

    Raises UserError if the file is absent, no UTF-8, or has other columns.
    """
    try:
        with open_text(path) as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {UNREADABLE}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; extract it again") from None
    if tuple(header) != tuple(columns):
        raise UserError(f"{path}: the columns are not {','.join(columns)}; extract it again")
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise UserError(f"{path}, row {number}: {len(row)} columns; extract it again")
    return {name: [row[i] for row in rows] for i, name in enumerate(columns)}


def _read_categories(path: Path, columns: list[str]) -> pd.DataFrame:
    """What _read_table reads, as categories of texts.

    Read as such at once, in half the time, pandas makes numbers of labels that are all numbers:
    those are read anew as they stand.
    """
    from pandas.api.types import is_string_dtype

    table = _read_table(path, columns, "category")
    if all(is_string_dtype(table[name].cat.categories) for name in columns):
        return table
    return _read_table(path, columns).astype("category")


def _read_table(path: Path, columns: list[str], kind: str = "str") -> pd.DataFrame:
    """Columns of a table written by create_features, texts as they stand ("NA", 007, True).

    All columns are read, for of a row that has more pandas says nothing where some are left out;
    the others as single bytes, which costs next to nothing.
    """
    types = {name: kind if name in columns else "S1" for name in LABELS}
    try:
        require_regular(path)
        table = pd.read_csv(path, dtype=types, keep_default_na=False, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {UNREADABLE}") from None
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; extract it again") from None
    if list(table.columns) != LABELS:
        raise UserError(f"{path}: the columns are not {','.join(LABELS)}; extract it again")
    if not isinstance(table.index, pd.RangeIndex):  # the first row's surplus was made the index
        raise UserError(f"{path}, row 2: more than {len(LABELS)} columns; extract it again")
    table = table[columns]
    cut = (table["instance"] == "") | table["instance"].isna()
    if cut.any():
        raise UserError(f"{path}, row {int(cut.argmax()) + 2}: no instance; extract it again")
    return table


def _check_agreement(features: Features) -> None:
    """Raise UserError if tables and arrays differ in rows, or arrays in dimension."""
    queries, rows = len(features.task.queries), len(features.task.gallery)
    wanted = {"image": ("database images", features.database("image"), rows)}
    composed = dict.fromkeys(features.query_files, "composed row") if features.is_composed else {}
    for name, words in (composed or QUERY_WORDS).items():
        if name in features.query_files:
            count = _distinct_rows(features, name) or queries
            wanted[f"query {name}"] = (f"query {words}s", features.query_files[name], count)
        elif name == "text" or (name == "image" and features.image_row is None):
            features.query(name)
    for key, (name, file, count) in wanted.items():
        if file.shape[0] != count:
            raise UserError(
                f"{features.folder}: {file.shape[0]} rows of {name} but {count} in its table; "
                "extract it again"
            )
        if file.shape[1] != features.dim and key != "query tokens":
            raise UserError(
                f"{features.folder}: {name} have {file.shape[1]} dimensions, not {features.dim}; "
                "extract it again"
            )
    if features.manifest is None:
        return
    counts = {"query": queries, "database": rows}
    if "model" not in features.manifest or features.manifest.get("counts", counts) != counts:
        raise UserError(
            f"{features.source} is not the manifest of the files beside it; extract them again"
        )


def _distinct_rows(features: Features, name: str) -> int:
    """How many distinct images or texts query.csv points to; 0 where each query has its own."""
    rows = features.rows_of(name)
    return 0 if rows is None else 1 + max((row for own in rows for row in own), default=-1)


def manifest_hash(features: Features) -> str:
    """The first 12 hex digits of the SHA-256 of the file that says what the features are.

    Of the reference's pickles that is the query's, together with the size of the database's; "none"
    where there are no features of our own.
    """
    if not features.source.is_file():
        return "none"
    digest = sha256_file(features.source)
    if features.manifest is None:
        size = features.database("image").path.stat().st_size
        digest = hashlib.sha256(f"{digest} {size}".encode()).hexdigest()
    return digest[:12]
