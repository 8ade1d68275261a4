"""Embeddings that somebody else has made as features of a data set; encodes nothing.

A folder with three parts, each a .npy file, or the folder of a clip-retrieval or LAION download:

    database_image.npy  database_image_ids.txt   or  database_image/img_emb/img_emb_0.npy
    query_image.npy     query_image_ids.txt          database_image/metadata/metadata_0.parquet
    query_text.npy      query_text_ids.txt

An ids file has an id a line, or the first column of a CSV: image paths, of texts the queries' ids;
without one, rows are in the order of the data set. Parquet metadata has them in a column
image_path. Without query_image, all query images are in the gallery.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import find_dataset
from external.arrays import refuse_not_finite
from external.ids import first_three, match_ids, query_ids, read_ids, refuse_repeated
from external.lists import read_parquet
from extraction.dataset import distinct_values, rows_in
from extraction.manifest import list_versions
from utils import UserError, publishing, sha256_file, write_csv, write_json
from utils_backbones import backbone_folder
from utils_pickles import open_feature_file, parse_array
from utils_task import Task, save_task

IMAGES = "query_image"  # the part that need not be there


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Rows of vectors (n, D) float32, and what each is of; ids None: in the data set's order."""

    rows: np.ndarray
    ids: list[str] | None
    place: Path
    files: tuple[Path, ...]


def convert_embeddings(
    source: Path,
    dataset: str,
    data_dir: Path,
    features_dir: Path,
    backbone: str,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a data set's features of the embeddings in a folder; the features' folder.

    dtype: of the gallery on disk. Raises UserError for what does not fit the data set, and for
    features that are there already unless overwrite says so.
    """
    found = find_dataset(dataset, data_dir)
    task = found.read(found.root)
    folder = features_dir / backbone_folder(backbone) / task.name
    if (folder / "manifest.json").exists() and not overwrite:
        raise UserError(f"{folder} holds finished features; --overwrite replaces them")
    gallery, texts = (_require(source, name) for name in ("database_image", "query_text"))
    given = {"database_image": gallery, "query_text": texts, "query_image": _read(source, IMAGES)}
    given = {name: part for name, part in given.items() if part is not None}
    _check_parts(task, given)
    arrays = {
        "database_image": _by_name(gallery, list(task.gallery.path), "gallery").astype(dtype),
        "query_text": _by_name(texts, query_ids(task), "query"),
    }
    asked = distinct_values(task.queries.images)
    if IMAGES in given:
        arrays[IMAGES] = _by_name(given[IMAGES], asked, "query image")
    else:
        _refuse_absent(asked, task, source)
    shown = rows_in(asked if IMAGES in given else task.gallery.path, task.queries.images)
    files = sorted({file for part in given.values() for file in part.files})
    model = {
        "model": "embeddings",
        "embed_dim": gallery.rows.shape[1],
        "files": {str(file.relative_to(source)): sha256_file(file) for file in files},
    }
    facts = {"backbone": backbone, "model": model, "save_dtype": dtype}
    shutil.rmtree(folder, ignore_errors=True)
    _write(folder, task, arrays, shown, facts)
    return folder


def _check_parts(task: Task, given: Mapping[str, Embeddings]) -> None:
    """Raise UserError for parts of different models, and for ids of parts of images."""
    gallery = given["database_image"]
    for part in given.values():
        if part.rows.shape[1] != gallery.rows.shape[1]:
            raise UserError(
                f"{part.place} has rows of {part.rows.shape[1]} numbers, {gallery.place} of "
                f"{gallery.rows.shape[1]}: they come from different models"
            )
    if task.gallery.box is not None and gallery.ids is not None:
        raise UserError(
            f"{task.name} shows parts of images, which ids do not tell apart: bring the rows in "
            f"the data set's order, without the ids of {gallery.place.name}"
        )


def _write(folder: Path, task: Task, arrays: Mapping, shown: Sequence[str], facts: Mapping) -> None:
    """Write arrays, tables, the task and, last, the manifest."""
    manifest = {
        "kind": "dataset",
        "name": task.name,
        **facts,
        "versions": list_versions(),
        "limit": None,
        "sources": dict(task.sources),
        "counts": {"query": len(task.queries), "database": len(task.gallery)},
        "skipped": [],
    }
    with publishing(folder / ".parts" / "finished", folder, last="manifest.json") as staging:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
        write_csv(staging / "database.csv", ["image_path"], ((p,) for p in task.gallery.path))
        rows = zip(task.queries.key, shown, range(len(shown)), strict=True)
        write_csv(staging / "query.csv", ["key", "image_row", "text_row"], rows)
        save_task(task, staging)
        write_json(staging / "manifest.json", manifest)
    shutil.rmtree(folder / ".parts", ignore_errors=True)


def _refuse_absent(asked: Sequence[str], task: Task, source: Path) -> None:
    """Raise UserError if there are no query images, and not all of them are in the gallery."""
    known = set(task.gallery.path)
    lost = [path for path in asked if path not in known]
    if lost or task.queries.box is not None:
        raise UserError(
            f"{source} has no query_image, and {len(lost)} query images are not in the gallery"
            f"{', ' + first_three(lost) if lost else ''}; bring query_image.npy"
        )


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def _require(source: Path, name: str) -> Embeddings:
    found = _read(source, name)
    if found is None:
        raise UserError(f"--from_embeddings {source} has neither {name}.npy nor a folder {name}")
    return found


def _read(source: Path, name: str) -> Embeddings | None:
    """A part of the folder, None where it is not there."""
    file, folder = source / f"{name}.npy", source / name
    if file.is_file():
        ids = next((p for p in source.glob(f"{name}_ids.*") if p.suffix in (".txt", ".csv")), None)
        names = None if ids is None else read_ids(ids)
        return _joined([file], names, file, () if ids is None else (ids,))
    if folder.is_dir():
        return _clip_retrieval(folder, "text_emb" if name == "query_text" else "img_emb")
    return None


def _clip_retrieval(folder: Path, kind: str) -> Embeddings:
    """The parts of a clip-retrieval folder in the order of their numbers."""
    parts = sorted((folder / kind).glob(f"{kind}_*.npy"), key=_number)
    tables = sorted((folder / "metadata").glob("metadata_*.parquet"), key=_number)
    if not parts or [_number(part) for part in parts] != [_number(table) for table in tables]:
        raise UserError(
            f"{folder}: {len(parts)} files {kind}/{kind}_N.npy and {len(tables)} files "
            "metadata/metadata_N.parquet; one of each number is expected"
        )
    names = [name for table in tables for name in _metadata(table)]
    return _joined(parts, names, folder, tuple(tables))


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _metadata(path: Path) -> list[str]:
    table = read_parquet(path)
    if "image_path" not in table:
        raise UserError(f"{path} has no column image_path: {', '.join(map(str, table.columns))}")
    return [str(name) for name in table["image_path"]]


def _joined(
    parts: Sequence[Path], ids: list[str] | None, place: Path, more: tuple[Path, ...]
) -> Embeddings:
    arrays = [_array(part) for part in parts]
    if len({array.shape[1:] for array in arrays}) > 1:
        raise UserError(f"{place}: parts of different widths")
    rows = np.concatenate(arrays)
    if ids is not None and len(ids) != len(rows):
        raise UserError(f"{place}: {len(rows)} rows, but {len(ids)} ids")
    return Embeddings(rows, ids, place, (*parts, *more))


def _array(path: Path) -> np.ndarray:
    """Rows of floats of any width, as float32, which is said where they were float64."""
    with open_feature_file(path) as file:
        try:
            array = parse_array(file, path.stat().st_size)
        except (ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"{path} is not a .npy file ({error})") from None
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"{path}: rows of floats are expected, not {array.dtype} {array.shape}")
    if array.dtype == np.float64:
        print(f"{path}: float64, converted to float32")
    refuse_not_finite(array, path)
    rows = array.astype(np.float32)
    zero = np.flatnonzero(~rows.any(axis=1))
    if len(zero):
        raise UserError(f"{path}: row {zero[0] + 1} is zero; it has no direction")
    return rows


def _by_name(given: Embeddings, known: Sequence[str], what: str) -> np.ndarray:
    """Rows of what is known, in its order; embeddings of anything else are left out, and counted.

    Raises UserError for a wrong number of rows, for repeated ids and for ids without a row.
    """
    if given.ids is None:
        if len(given.rows) != len(known):
            raise UserError(
                f"{given.place}: {len(given.rows)} rows, but the data set has {len(known)} {what} "
                "rows; name their ids"
            )
        return given.rows
    refuse_repeated(given.ids, given.place)
    distinct = list(dict.fromkeys(known))
    matched = match_ids(given.ids, distinct)
    row_of = np.full(len(distinct), -1, np.int64)
    found = matched.rows >= 0
    row_of[matched.rows[found]] = np.flatnonzero(found)
    lost = [distinct[row] for row in np.flatnonzero(row_of < 0)]
    if lost:
        raise UserError(f"{given.place}: {len(lost)} {what} ids have no row, {first_three(lost)}")
    if not found.all():
        print(f"{given.place}: {int((~found).sum())} embeddings are of no {what}; left out")
    print(f"{given.place}: {what} ids {matched.rule}")
    number = dict(zip(distinct, row_of.tolist(), strict=True))
    return given.rows[[number[name] for name in known]]
