"""The reference implementation's pickles: written beside native files, and turned into them."""

from __future__ import annotations

import pickle
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.icir import LABELS
from extraction.manifest import is_finished
from utils import (
    UserError,
    atomic_path,
    code_version,
    last_part,
    publishing,
    sha256_file,
    write_csv,
    write_json,
)
from utils_datasets import SPLITS, Dataset, relative_image_path
from utils_pickles import load_pickle, read_array, read_rows
from utils_storage import (
    features_folder,
    read_csv_columns,
    read_reference,
    reference_features,
)

if TYPE_CHECKING:
    from utils_labels import Matched

# ---------------------------------------------------------------------------------------------
# From native files
# ---------------------------------------------------------------------------------------------


def write_pickle(path: Path, content: dict) -> None:
    """Pickle a dict, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file, protocol=4)


def write_reference_dataset(
    folder: Path, name: str, dataset: str, matched: Matched | None = None
) -> list[Path]:
    """Write the reference's two pickles of a data set from the native files beside them.

    name: what the features go by; dataset: the folder of the images. matched: the annotation that
    is there now and the rows of its features, None: those that the features were made with.
    """
    written = []
    for split in SPLITS:
        if matched:
            columns, rows, texts = (
                matched.kept[split].columns(),
                matched.images[split],
                matched.texts,
            )
        else:
            columns = read_csv_columns(folder / f"{split}.csv", LABELS)
            rows = texts = slice(None)
        content = {"image_feats": read_array(folder / f"{split}_image.npy")[rows]}
        if split == "query":
            content["text_feats"] = read_array(folder / "query_text.npy")[texts]
            content["context_text_feats"] = read_array(folder / "query_context_text.npy")[texts]
        image_paths, texts, instances = (columns[name] for name in LABELS)
        paths = [reference_path(dataset, path) for path in image_paths]
        content |= {"paths": paths, "instances": instances, "texts": texts}
        if split == "database":
            content["text_feats"] = None
        written.append(folder / f"{split}_{name}_features.pkl")
        write_pickle(written[-1], content)
    return written


def write_reference_corpus(folder: Path, name: str) -> Path:
    """Write the reference's pickle of a corpus from the native files beside it."""
    prompts = read_csv_columns(folder / f"{name}.csv", ("prompt",))["prompt"]
    path = folder / f"{name}.pkl"
    write_pickle(path, {"feats": read_array(folder / f"{name}.npy"), "prompts": prompts})
    return path


def reference_path(name: str, image_path: str) -> str:
    """An image path as the reference keeps it: ./data/icir/query/mug.jpg."""
    return f"./data/{name}/{native_path(name, image_path)}"


def native_path(name: str, image_path: str) -> str:
    """An image path of the reference's, relative to the data set's folder."""
    return relative_image_path(Dataset(name, Path(name)), image_path)


# ---------------------------------------------------------------------------------------------
# To native files
# ---------------------------------------------------------------------------------------------


def _describe(backbone: str, kind: str, name: str, paths: list[Path]) -> dict:
    """The manifest of features whose model is unknown, made of these pickles."""
    return {
        "kind": kind,
        "name": name,
        "backbone": backbone,
        "model": None,
        "precision": None,
        "save_dtype": "float32",
        "versions": {"toolkit": code_version(), "python": platform.python_version()},
        "limit": None,
        "sources": {path.name: sha256_file(path) for path in paths},
        "skipped": [],
    }


def convert_dataset(
    pickles_dir: Path, features_dir: Path, backbone: str, dataset: str, overwrite: bool
) -> None:
    """Turn the reference's two pickles of a data set under pickles_dir into native files."""
    name = last_part(dataset)
    source = features_folder(pickles_dir, backbone, name)
    pickles = [source / f"{split}_{name}_features.pkl" for split in SPLITS]
    for path in pickles:
        if not path.is_file():
            raise UserError(f"--from_pkl {pickles_dir}: no {path}")
    manifest = _describe(backbone, "dataset", name, pickles)
    folder = features_folder(features_dir, backbone, name)
    if is_finished(folder / "manifest.json", manifest, overwrite, skip_bad=False):
        return
    reference = read_reference(pickles_dir, backbone, name)
    reference_features(reference, backbone, name)  # raises where they do not fit together
    manifest["counts"] = {split: len(table) for split, table in reference.tables.items()}
    with publishing(folder / ".from_pkl", folder, "manifest.json") as staging:
        for split, table in reference.tables.items():
            paths = [native_path(name, path) for path in table["image_path"]]
            rows = zip(paths, table["text"], table["instance"], strict=True)
            write_csv(staging / f"{split}.csv", LABELS, rows)
            for key, array in reference.arrays[split].items():
                np.save(staging / f"{split}_{key}.npy", array)
        if "context_text" not in reference.arrays["query"]:
            (folder / "manifest.json").unlink(missing_ok=True)
            (folder / "query_context_text.npy").unlink(missing_ok=True)
        write_json(staging / "manifest.json", manifest)
    counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
    print(f"{name}: {counts} rows turned into native files: {folder}")


def convert_corpora(pickles_dir: Path, features_dir: Path, backbone: str, overwrite: bool) -> None:
    """Turn the reference's pickles of corpora under pickles_dir into native files."""
    source = features_folder(pickles_dir, backbone, "corpus")
    paths = sorted(source.glob("*.pkl"))
    if not paths:
        raise UserError(f"--from_pkl {pickles_dir}: no corpora (*.pkl) in {source}")
    folder = features_folder(features_dir, backbone, "corpus")
    for path in paths:
        manifest = _describe(backbone, "corpus", path.stem, [path])
        stored = folder / f"{path.stem}.json"
        if is_finished(stored, manifest, overwrite, skip_bad=False):
            continue
        content = load_pickle(path)
        prompts, features = content.get("prompts"), read_rows(content, "feats", path)
        if not isinstance(prompts, (list, tuple)) or len(prompts) != len(features):
            raise UserError(f"{path}: no prompt for each of its {len(features)} rows of features")
        manifest["counts"] = {"prompts": len(prompts)}
        with publishing(folder / ".from_pkl", folder, stored.name) as staging:
            write_csv(staging / f"{path.stem}.csv", ["prompt"], ([p] for p in prompts))
            np.save(staging / f"{path.stem}.npy", features)
            write_json(staging / stored.name, manifest)
        print(f"{path.stem}: {len(prompts)} prompts turned into native files: {folder}")
