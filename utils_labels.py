"""Features whose annotation has changed since they were made: their labels are read anew.

That needs no image and no text to be encoded again, where all that the annotation names has its
feature already. Otherwise it is an error that names the first that has none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import Found, NoDataset, find_dataset, icir
from utils import UserError, sha256_file
from utils_datasets import SPLITS, Dataset
from utils_storage import ArrayRows, Features, MappedRows
from utils_task import UNREADABLE, Task, without_images

CONTEXT_FILE = "generic_subjects.csv"  # a source of features that is no annotation
PLACES = ("", "annotations", "webdataset/annotations")  # of annotation files below a data set


def with_current_labels(
    features: Features, dataset: str, data_dir: Path
) -> tuple[Features, list[str]]:
    """The features under the annotation that is there now, and what is to be said of that.

    dataset: its name or folder. They are as they were where the data set is not on this machine,
    where nothing has changed, and of features that know no annotation (the reference's, --limit).
    Raises UserError if an image or a text has no feature, or if the annotation is wrong.
    """
    manifest = features.manifest or {}
    if not manifest.get("sources") or manifest.get("limit"):
        return features, []
    try:
        found = find_dataset(dataset, data_dir)
    except NoDataset:  # it need not be here
        return features, []
    changed = find_changed(found, manifest["sources"]) if found.name == features.dataset else []
    if not changed:
        return features, []
    line = (
        f"{', '.join(changed)} changed since the features were made: the labels were read anew; "
        "every image and text has its feature, and none was encoded again"
    )
    return relabel(features, found), [line]


def find_changed(found: Found, sources: dict[str, str]) -> list[str]:
    """The annotation files that are others now. sources: name -> SHA-256 of what they were."""
    changed = []
    for name, digest in sources.items():
        paths = [path for place in PLACES if (path := found.root / place / name).is_file()]
        if name != CONTEXT_FILE and paths and digest not in map(sha256_file, paths):
            changed.append(name)
    if found.is_published or found.benchmark.labelled:
        return changed
    now = found.read(found.root).sources  # which may list the images below the folder
    return [*changed, *(n for n in now if n not in changed and sources.get(n) != now[n])]


def relabel(features: Features, found: Found) -> Features:
    """The features for the task that the annotation makes now.

    Raises UserError for the first image or text without a feature.
    """
    if found.benchmark.labelled:
        return _relabel_rows(features, found)
    if found.is_published:
        raise UserError(
            f"{features.source} is of another annotation than {found.root} holds now; "
            + _how_to_make(features)
        )
    return relabel_task(features, found.read(found.root))


@dataclass(frozen=True)
class PickedRows:
    """Some rows of a file of features, with the interface of MappedRows. row: int64 (n,)."""

    file: MappedRows | ArrayRows
    row: np.ndarray

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row), self.file.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.file.dtype

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice or of an index array, gathered."""
        return self.file.read(self.row[rows])


@dataclass(frozen=True)
class Known:
    """What has features, by what it is: an image's path (and box), a text. what: a word for it."""

    what: str
    rows: dict[Hashable, int]
    features: Features

    @classmethod
    def of(cls, what: str, values: Iterable[Hashable], features: Features) -> Known:
        rows: dict[Hashable, int] = {}
        for row, value in enumerate(values):
            rows.setdefault(value, row)
        return cls(what, rows, features)

    def find(self, value: Hashable, where: str) -> int:
        """Its row. Raises UserError, saying what to do, if it has none."""
        if value not in self.rows:
            shown = value[0] if isinstance(value, tuple) else value
            raise UserError(
                f"{where}: the {self.what} {shown!r} has no feature in {self.features.folder}, "
                f"whose annotation was another one; {_how_to_make(self.features)}"
            )
        return self.rows[value]


def _how_to_make(features: Features) -> str:
    return (
        f"python3 create_features.py --dataset {features.dataset} --backbone {features.backbone} "
        "--overwrite makes them anew"
    )


def _without_inputs(features: Features, files: dict, split: str) -> dict:
    """The files but those of methods' inputs, which are of the task as it was."""
    return {name: file for name, file in files.items() if f"{split}_{name}" not in features.inputs}


# ---------------------------------------------------------------------------------------------
# Rows with labels
# ---------------------------------------------------------------------------------------------


def _relabel_rows(features: Features, found: Found) -> Features:
    source = "wds" if (found.root / "webdataset").is_dir() else "folder"
    now = {split: icir.read_annotation(found.root, split, source) for split in SPLITS}
    matched = match_rows(features, now)
    manifest = features.manifest or {}
    query = now["query"]
    renewed = {
        "texts": _still_asked(manifest, query.texts, query.lines),
        **icir.find_listed_again(now, Dataset(found.name, found.root)),
        "skipped": _still_skipped(manifest, now),
        "counts": {split: len(own.lines) for split, own in matched.kept.items()},
    }
    return replace(relabel_rows(features, matched), manifest=manifest | renewed)


def _still_asked(manifest: dict, texts: Sequence[str], lines: Sequence[int]) -> dict:
    """What a manifest says of query texts, of those that are asked now; lines: of each of these."""
    known = (manifest.get("texts") or {}).get("query") or {}
    line = dict(zip(reversed(texts), reversed(lines), strict=True))
    said = {}
    for kind, own in known.items():
        named = own.get("all") or [own.get("first")] if isinstance(own, dict) else []
        if asked := [text for text in named if text in line]:
            first = min(asked, key=line.__getitem__)
            said[kind] = {"count": len(asked), "first": first, "row": line[first], "all": asked}
    length = {"context_length": known.get("context_length"), "count": len(line)}
    return {"query": {**length, **said}} if said else {}


def _still_skipped(manifest: dict, now: Mapping[str, icir.Annotation]) -> list[dict]:
    """The rows of annotations whose images extraction left out, as a manifest lists them."""
    causes = {(e["split"], e["image_path"]): e["cause"] for e in manifest.get("skipped") or ()}
    return [
        {"split": split, "row": line, "image_path": path, "cause": causes[split, path]}
        for split, own in now.items()
        for path, line in zip(own.image_paths, own.lines, strict=True)
        if (split, path) in causes
    ]


@dataclass(frozen=True)
class Matched:
    """The rows of annotations that have features, by split; and the rows of these features.

    images: by split, for each row the row of its image's feature; texts: of the queries' texts.
    """

    kept: dict[str, icir.Annotation]
    images: dict[str, list[int]]
    texts: list[int]


def match_rows(features: Features, annotations: Mapping[str, icir.Annotation]) -> Matched:
    """Which labelled features belong to other annotations. Raises UserError as relabel does."""
    old = features.task
    known = {
        "query": Known.of("query image", (paths[0] for paths in old.queries.images), features),
        "database": Known.of("database image", old.gallery.path, features),
    }
    left_out = {(e["split"], e["image_path"]) for e in (features.manifest or {}).get("skipped", ())}
    kept, rows = {}, {}
    for split, own in annotations.items():
        numbers = [
            number
            for number, path in enumerate(own.image_paths)
            if path in known[split].rows or (split, path) not in left_out
        ]
        kept[split] = own.select(numbers)
        rows[split] = _find_all(known[split], kept[split], kept[split].image_paths)
    texts = _find_all(
        Known.of("query text", old.queries.text, features), kept["query"], kept["query"].texts
    )
    return Matched(kept, rows, texts)


def relabel_rows(features: Features, found: Matched) -> Features:
    """Labelled features for the annotations that they were matched with."""
    query, database = (pd.DataFrame(found.kept[split].columns(), dtype="str") for split in SPLITS)
    labels = database[["text", "instance"]].astype("category")
    paths, notes = found.kept["database"].image_paths, found.kept["database"].texts
    task = icir.task_of_labels(features.dataset, query, labels, paths, notes)
    images, texts = ([[row] for row in rows] for rows in (found.images["query"], found.texts))
    return _with_rows(features, task, images, texts, found.images)


def _find_all(known: Known, own: icir.Annotation, values: Sequence[str]) -> list[int]:
    places = (f"{own.path}, row {line}" for line in own.lines)
    return [known.find(value, where) for value, where in zip(values, places, strict=True)]


def _with_rows(
    features: Features,
    task: Task,
    images: list[list[int]],
    texts: list[list[int]],
    rows: dict[str, list[int]],
) -> Features:
    picked = np.array(rows["database"], np.int64)
    files = _without_inputs(features, dict(features.database_files), "database")
    if not np.array_equal(picked, np.arange(files["image"].shape[0])):
        files = {name: PickedRows(file, picked) for name, file in files.items()}
    return replace(
        features,
        task=task,
        query_files=_without_inputs(features, dict(features.query_files), "query"),
        database_files=files,
        image_row=images,
        text_row=texts,
    )


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


def relabel_task(features: Features, task: Task) -> Features:
    """The features of a task for another one of the same folder. Raises UserError as relabel."""
    manifest, asked = features.manifest or {}, task.queries.phrases()
    texts = [text for own in asked for text in own]
    numbers = [number for number, own in enumerate(asked, 1) for _ in own]
    named = {*task.gallery.path, *(path for own in task.queries.images for path in own)}
    skipped = [e for e in manifest.get("skipped") or () if e["image_path"] in named]
    lost = {entry["image_path"] for entry in skipped}
    task = without_images(task, lost, UNREADABLE) if lost & {*task.gallery.path} else task
    renewed = {
        "texts": _still_asked(manifest, texts, numbers),
        "skipped": skipped,
        "counts": {"query": len(task.queries), "database": len(task.gallery)},
    }
    old, in_gallery = features.task, "image" not in features.query_files
    gallery = Known.of("gallery image", old.gallery.path, features)
    rows = [gallery.find(path, f"{features.dataset}, the gallery") for path in task.gallery.path]
    asked = (
        Known.of("query image", task.gallery.path, features)
        if in_gallery
        else _asked(features, "query image", old.queries.images, features.image_row)
    )
    said = _asked(features, "query text", old.queries.phrases(), features.text_row)
    images = _find_each(asked, task, task.queries.images)
    texts = _find_each(said, task, task.queries.phrases())
    features = replace(features, manifest=manifest | renewed)
    return _with_rows(features, task, images, texts, {"database": rows})


def _find_each(known: Known, task: Task, values: Sequence[Sequence[str]]) -> list[list[int]]:
    """The rows of each query's images or texts."""
    return [
        [known.find(value, f"{task.name}, query {key}") for value in own]
        for key, own in zip(task.queries.key, values, strict=True)
    ]


def _asked(
    features: Features, what: str, values: Sequence[Sequence[str]], rows: list[list[int]]
) -> Known:
    """What the queries' images or texts are, by the rows that query.csv gives them."""
    pairs = zip(values, rows, strict=True)
    known = {value: row for own, at in pairs for value, row in zip(own, at, strict=True)}
    return Known(what, known, features)
