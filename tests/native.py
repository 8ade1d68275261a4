"""Helpers of the tests: a golden world in the toolkit's own file formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from utils import write_csv
from utils_assets import load_corpus, load_mean, load_synthetic, mean_path, synthetic_path
from utils_storage import LABELS, load_features

GOLDEN = Path(__file__).parent / "golden"
MODEL = {"model": "some-model", "pretrained": "some-tag", "activation": "GELU", "embed_dim": 96}


def write_native_world(folder: Path, world: str = "clip", dtype=np.float32, model=MODEL) -> Path:
    """Write a golden world's features and assets natively; returns the folder."""
    golden = GOLDEN / world
    manifest = {"model": model}
    features = load_features(golden / "features", world, "icir")
    data = folder / "features" / f"{world}_features" / "icir"
    data.mkdir(parents=True)
    labels, gallery = features.task.queries.labels(), features.task.gallery
    write_csv(data / "query.csv", LABELS, zip(*labels.values(), strict=True))
    instances = np.empty(len(gallery), object)
    for query, pool in enumerate(features.task.pool):
        instances[features.task.sets[pool]] = labels["Instance"][query]
    write_csv(
        data / "database.csv", LABELS, zip(gallery.path, gallery.note, instances, strict=True)
    )
    for name in ("image", "text", "context_text"):
        np.save(data / f"query_{name}.npy", features.query(name).values)
    database = features.database("image")
    rows = database.read(slice(0, database.shape[0]))
    np.save(data / "database_image.npy", rows.astype(dtype))
    (data / "manifest.json").write_text(json.dumps(manifest))

    corpora = data.parent / "corpus"
    corpora.mkdir()
    for name in ("generic_subjects", "generic_styles"):
        np.save(
            corpora / f"{name}.npy", load_corpus(golden / "features", world, name).arrays["feats"]
        )
        (corpora / f"{name}.json").write_text(json.dumps(manifest))
    mean = mean_path(folder / "data", world)
    synthetic = synthetic_path(folder / "synthetic_data", world)
    for path, asset in (
        (mean, load_mean(golden / "data", world)),
        (synthetic, load_synthetic(golden / "synthetic_data", world)),
    ):
        path.parent.mkdir(parents=True)
        np.savez(path, manifest=json.dumps(manifest), **asset.arrays)
    return folder


def world_arguments(folder: Path, world: str = "clip") -> list[str]:
    """The flags that point run_retrieval.py at such a world; results go beside it."""
    return [
        *("--features_dir", str(folder / "features"), "--data_dir", str(folder / "data")),
        *("--results_dir", str(folder / "results"), "--backbone", world, "--gpu", "-1"),
    ]


def copy_world(source: Path, target: Path) -> Path:
    """A copy of a world that a test may spoil."""
    shutil.copytree(source, target)
    return target
