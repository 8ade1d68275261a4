"""Feature files: reading what create_features or the reference implementation wrote.

Native files are plain .npy arrays and CSV; the reference's are pickles, which are read with an
unpickler that admits arrays, tensors and plain containers only. Formats: DESIGN section 2.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils import UserError, read_json, sha256_file
from utils_features import BACKBONES, Backbone, backbone_folder

LABELS = ["image_path", "text", "instance"]
UNREADABLE = "make it readable, or extract the features again"


# ---------------------------------------------------------------------------------------------
# Pickles of the reference implementation
# ---------------------------------------------------------------------------------------------


def _load_storage(data: bytes):
    """torch.storage._load_from_bytes without its power to run code."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds numpy arrays, torch tensors and plain containers; refuses every other global."""

    ADMITTED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("torch._utils", "_rebuild_tensor_v2"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _load_storage(data)
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        found = super().find_class(module, name)
        if isinstance(found, type):
            return found
        return lambda *values: found(*values)  # whose attributes a pickle may set: not the real one


def load_pickle(path: str | Path) -> dict:
    """Read one of the reference's pickles: a dict, or a .npy of a 0-d object array that holds one.

    Raises UserError if the file holds anything but arrays, tensors and plain containers; nothing
    in it is run.
    """
    path = Path(path)
    with open_feature_file(path) as file:
        try:
            if path.suffix == ".npy":
                _read_npy_header(file)
            content = _RestrictedUnpickler(file).load()
        except Exception as error:  # a hostile or cut file may raise anything
            raise UserError(
                f"{path} is refused: {error}; only arrays, tensors, strings, lists and dicts are "
                "read from pickles. Fetch the file again, or extract the features anew"
            ) from None
    if isinstance(content, np.ndarray) and content.dtype == object and content.ndim == 0:
        content = content.item()
    if not isinstance(content, (dict, OrderedDict)):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of features")
    return content


def _read_npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an open .npy file, left at its first data byte."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"npy format {version} is not known")
    return read(file)


def read_rows(content: dict, key: str, path: Path) -> np.ndarray:
    """One 2-d array of a reference pickle, from numpy or torch, as float32."""
    value = content.get(key)
    if value is None:
        raise UserError(f"{path} has no {key!r}; it holds {', '.join(map(str, content))}")
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    return _two_dimensional(array, f"{path}, {key!r}")


def _two_dimensional(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind != "f":
        raise UserError(f"{name}: expected rows of features, found {array.dtype} {array.shape}")
    return array.astype(np.float32, copy=False)


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
                self.shape, fortran, self.dtype = _read_npy_header(file)
            except ValueError as error:
                raise UserError(f"{path} is not a .npy file ({error}); extract it again") from None
            self._offset = file.tell()
        if len(self.shape) != 2 or fortran or self.dtype not in (np.float32, np.float16):
            order = ", column by column" if fortran else ""
            raise UserError(
                f"{path}: expected rows of float32 or float16, found {self.dtype} {self.shape}"
                f"{order}; extract it again"
            )
        surplus = path.stat().st_size - self._offset - self._row_bytes * self.shape[0]
        if surplus:
            problem = "has bytes behind its last row" if surplus > 0 else "is cut short"
            raise UserError(f"{path} {problem}; extract it again")

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * self.shape[1]

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, without a copy, or of an increasing index array, gathered.

        Raises UserError if the file has been cut since its header was read.
        """
        return self._map(rows.start, rows.stop) if isinstance(rows, slice) else self._gather(rows)

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
    """Rows of an array in memory (a reference pickle), with the interface of MappedRows.

    image_paths: those of the rows, as the pickle has them.
    """

    def __init__(self, path: Path, array: np.ndarray, image_paths: pd.Series):
        self.path, self.shape, self.dtype = path, array.shape, array.dtype
        self.image_paths = image_paths
        self._array = array

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, without a copy, or of an index array, gathered."""
        return self._array[rows]


def open_feature_file(path: Path):
    """Open a feature file for reading; UserError if it is absent."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {UNREADABLE}") from None


# ---------------------------------------------------------------------------------------------
# A data set's features
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """The features of one data set and backbone, rows in annotation order, not normalised.

    queries: DataFrame of Q rows, str columns image_path, text, instance.
    labels: DataFrame of N database rows, categorical columns text and instance.
    query_image, query_text: float32 (Q, D); query_context_text: the same, or None if absent.
    database: MappedRows or ArrayRows of shape (N, D).
    source: the file that says what these features are; manifest: its content, None for pickles.
    """

    backbone: str
    dataset: str
    queries: pd.DataFrame
    labels: pd.DataFrame
    query_image: np.ndarray
    query_text: np.ndarray
    query_context_text: np.ndarray | None
    database: MappedRows | ArrayRows
    source: Path
    manifest: dict | None

    @property
    def dim(self) -> int:
        return self.query_image.shape[1]


def features_folder(features_dir: str | Path, backbone: str, dataset: str) -> Path:
    """features/{backbone}_features/{dataset}."""
    return Path(features_dir) / backbone_folder(backbone) / dataset


def is_native(features_dir: str | Path, backbone: str, dataset: str) -> bool:
    """Whether a data set's features lie there in native files."""
    return (features_folder(features_dir, backbone, dataset) / "manifest.json").exists()


def load_features(features_dir: str | Path, backbone: str, dataset: str) -> Features:
    """Read a data set's features, native if there, else the reference's pickles.

    Raises UserError if neither is there, or if tables and arrays do not agree.
    """
    folder = features_folder(features_dir, backbone, dataset)
    pickles = [folder / f"{split}_{dataset}_features.pkl" for split in ("query", "database")]
    if is_native(features_dir, backbone, dataset):
        features = Features(backbone, dataset, **_load_native(folder))
    elif all(path.exists() for path in pickles):
        return load_reference_features(features_dir, backbone, dataset)
    else:
        unfinished = folder.is_dir() and any(folder.iterdir())
        raise UserError(
            f"{folder} holds no {'finished ' if unfinished else ''}features (no manifest.json, no "
            f"{pickles[0].name} and {pickles[1].name}); "
            f"run: python3 create_features.py --dataset {dataset} --backbone {backbone}"
        )
    _check_agreement(features)
    return features


def load_reference_features(features_dir: str | Path, backbone: str, dataset: str) -> Features:
    """Read the reference's two pickles of a data set, also where native files lie beside them."""
    folder = features_folder(features_dir, backbone, dataset)
    pickles = [folder / f"{split}_{dataset}_features.pkl" for split in ("query", "database")]
    for path in pickles:
        if not path.is_file():
            raise UserError(f"{path} does not exist")
    features = Features(backbone, dataset, **_load_reference(*pickles))
    _check_agreement(features)
    return features


def _load_native(folder: Path) -> dict:
    context = folder / "query_context_text.npy"
    return {
        "queries": _read_table(folder / "query.csv", LABELS, "str"),
        "labels": _read_table(folder / "database.csv", ["text", "instance"], "category"),
        "query_image": _read_array(folder / "query_image.npy"),
        "query_text": _read_array(folder / "query_text.npy"),
        "query_context_text": _read_array(context) if context.exists() else None,
        "database": MappedRows(folder / "database_image.npy"),
        "source": folder / "manifest.json",
        "manifest": read_json(folder / "manifest.json"),
    }


def _load_reference(query_path: Path, database_path: Path) -> dict:
    query, database = load_pickle(query_path), load_pickle(database_path)
    has_context = query.get("context_text_feats") is not None
    table = _pickled_table(database, database_path)
    rows = read_rows(database, "image_feats", database_path)
    return {
        "queries": _pickled_table(query, query_path),
        "labels": table[["text", "instance"]].astype("category"),
        "query_image": read_rows(query, "image_feats", query_path),
        "query_text": read_rows(query, "text_feats", query_path),
        "query_context_text": (
            read_rows(query, "context_text_feats", query_path) if has_context else None
        ),
        "database": ArrayRows(database_path, rows, table["image_path"]),
        "source": query_path,
        "manifest": None,
    }


def _pickled_table(content: dict, path: Path) -> pd.DataFrame:
    """The table of a reference pickle: str columns image_path, text, instance."""
    try:
        columns = {
            name: ["" if value is None else value for value in content[f"{name}s"]]
            for name in ("text", "instance")
        }
        return pd.DataFrame({"image_path": list(content["paths"]), **columns}, dtype=str)[LABELS]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no paths, texts and instances of one length ({error})") from None


def _read_table(path: Path, columns: list[str], dtype: str) -> pd.DataFrame:
    """Columns of a table written by create_features, texts as they stand ("NA" is a text).

    All columns are read, for of a row that has more pandas says nothing where some are left out;
    the others as single bytes, which costs next to nothing.
    """
    types = {name: dtype if name in columns else "S1" for name in LABELS}
    try:
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


def read_database_table(features: Features) -> pd.DataFrame:
    """The database's str columns image_path, text, instance: large, so read only when asked for."""
    if isinstance(features.database, ArrayRows):
        labels = features.labels.astype("str").assign(image_path=features.database.image_paths)
        return labels[LABELS]
    return _read_table(features.database.path.with_name("database.csv"), LABELS, "str")


def _read_array(path: Path) -> np.ndarray:
    """A whole .npy file of rows, as float32."""
    with open_feature_file(path) as file:
        try:
            array = np.load(file, allow_pickle=False)
        except (EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a .npy file ({error}); extract it again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is not a .npy file but an archive; extract it again")
    return _two_dimensional(array, str(path))


def _check_agreement(features: Features) -> None:
    """Raise UserError if tables and arrays differ in rows, or arrays in dimension."""
    folder = features.source.parent
    arrays = {
        "query images": (features.query_image.shape, len(features.queries)),
        "query texts": (features.query_text.shape, len(features.queries)),
        "database images": (features.database.shape, len(features.labels)),
    }
    if features.query_context_text is not None:
        shape = features.query_context_text.shape
        arrays["contextualised query texts"] = (shape, len(features.queries))
    for name, (shape, rows) in arrays.items():
        if shape[0] != rows:
            raise UserError(
                f"{folder}: {shape[0]} rows of {name} but {rows} in its table; extract it again"
            )
        if shape[1] != features.dim:
            raise UserError(
                f"{folder}: {name} have {shape[1]} dimensions, not {features.dim}; extract it again"
            )
    if features.manifest is None:
        return
    counts = {"query": len(features.queries), "database": len(features.labels)}
    if "model" not in features.manifest or features.manifest.get("counts", counts) != counts:
        raise UserError(
            f"{features.source} is not the manifest of the files beside it; extract them again"
        )


# ---------------------------------------------------------------------------------------------
# Assets: corpora, image mean, normalisation features
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asset:
    """Features beside a data set's own: arrays by name, float32 (rows, D), and their origin."""

    arrays: dict[str, np.ndarray]
    source: Path
    manifest: dict | None


def _backbone_entry(backbone: str) -> Backbone:
    return BACKBONES.get(backbone, Backbone(backbone))


def _short_name(backbone: str) -> str:
    return backbone_folder(backbone).removesuffix("_features")


def mean_path(data_dir: str | Path, backbone: str) -> Path:
    """Where the image mean of a backbone is written and looked for."""
    folder = Path(data_dir) / _backbone_entry(backbone).mean_dir
    return folder / f"mean_{_short_name(backbone)}.npz"


def synthetic_path(synthetic_dir: str | Path | None, backbone: str) -> Path:
    """Where the normalisation features of a backbone are written and looked for."""
    folder = Path(synthetic_dir or _backbone_entry(backbone).synthetic_dir)
    return folder / f"synthetic_{_short_name(backbone)}.npz"


def load_corpus(features_dir: str | Path, backbone: str, corpus: str) -> Asset:
    """The features of a text corpus, array "feats" (rows, D).

    Raises UserError if there are none; the line names the corpora there are.
    """
    folder = features_folder(features_dir, backbone, "corpus")
    native, reference = folder / f"{corpus}.npy", folder / f"{corpus}.pkl"
    manifest = folder / f"{corpus}.json"
    if native.exists() and manifest.exists():
        return Asset({"feats": _read_array(native)}, manifest, read_json(manifest))
    if reference.exists():
        return Asset(
            {"feats": read_rows(load_pickle(reference), "feats", reference)}, reference, None
        )
    known = {path.stem for path in folder.glob("*.pkl")} | {p.stem for p in folder.glob("*.json")}
    raise UserError(
        f"no features of the corpus {corpus!r} in {folder} (there: "
        f"{', '.join(sorted(known)) or 'none'}); write {corpus}.csv and run: "
        f"python3 create_features.py --dataset corpus --backbone {backbone}"
    )


def load_mean(data_dir: str | Path, backbone: str) -> Asset:
    """The image mean of a backbone, array "mean" (1, D). Raises UserError if there is none."""
    native = mean_path(data_dir, backbone)
    reference = Path(data_dir) / "laion_mean" / f"laion_1m_mean_{_short_name(backbone)}.pkl"
    if native.exists():
        return _load_npz(native, ["mean"])
    if reference.exists():
        mean = read_rows(load_pickle(reference), "laion_1m_mean", reference)
        return Asset({"mean": mean}, reference, None)
    raise UserError(
        f"no image mean for {backbone}: neither {native} nor {reference}; fetch it with "
        "python3 data/download.py laion_mean, or make one of your own images with "
        f"python3 create_features.py --dataset mean --backbone {backbone} --images PATH"
    )


def load_synthetic(synthetic_dir: str | Path | None, backbone: str) -> Asset:
    """Normalisation features, arrays "image_features" and "text_features" (rows, D).

    Raises UserError if there are none for this backbone.
    """
    native = synthetic_path(synthetic_dir, backbone)
    reference = native.with_name(f"dataset_1_sd_{_short_name(backbone)}.pkl.npy")
    names = ["image_features", "text_features"]
    if native.exists():
        return _load_npz(native, names)
    if reference.exists():
        content = load_pickle(reference)
        return Asset({n: read_rows(content, n, reference) for n in names}, reference, None)
    raise UserError(
        f"no normalisation features for {backbone}: neither {native} nor {reference}; fetch them "
        "with python3 data/download.py synthetic_data, or make your own with python3 "
        f"create_features.py --dataset synthetic --backbone {backbone} --images DIR --captions FILE"
    )


def _load_npz(path: Path, names: list[str]) -> Asset:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: np.atleast_2d(content[name]) for name in names}
            manifest = json.loads(str(content["manifest"]))
    except (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again") from None
    arrays = {name: _two_dimensional(array, f"{path}, {name}") for name, array in arrays.items()}
    return Asset(arrays, path, manifest)


def _model_of(manifest: dict | None) -> dict:
    """What a manifest says of the model, {} if nothing."""
    model = (manifest or {}).get("model")
    return model if isinstance(model, dict) else {"model": model} if model else {}


def check_same_model(features: Features, assets: list[Asset]) -> None:
    """Raise UserError if an asset was made by another model than the features, naming both.

    Models are compared by their manifests; files without one (the reference's) by dimension only.
    """
    model = _model_of(features.manifest)
    for asset in assets:
        for array in asset.arrays.values():
            if array.shape[1] != features.dim:
                raise UserError(
                    f"{asset.source} has {array.shape[1]} dimensions but {features.source} has "
                    f"{features.dim}: they come from different models; extract one of them again"
                )
        other = _model_of(asset.manifest)
        if model and other and model != other:
            key = next(k for k in {**model, **other} if model.get(k) != other.get(k))
            raise UserError(
                f"{asset.source} and {features.source} come from different models: {key} is "
                f"{other.get(key)!r} and {model.get(key)!r}; extract one of them again"
            )


def manifest_hash(features: Features) -> str:
    """The first 12 hex digits of the SHA-256 of the file that says what the features are.

    Of the reference's pickles that is the query's, together with the size of the database's.
    """
    digest = sha256_file(features.source)
    if features.manifest is None:
        size = features.database.path.stat().st_size
        digest = hashlib.sha256(f"{digest} {size}".encode()).hexdigest()
    return digest[:12]
