"""Helpers of the tests: a golden world in the toolkit's own file formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from utils_storage import (
    load_corpus,
    load_features,
    load_mean,
    load_synthetic,
    mean_path,
    read_database_table,
    synthetic_path,
)

GOLDEN = Path(__file__).parent / "golden"
MODEL = {"model": "some-model", "pretrained": "some-tag", "activation": "GELU", "embed_dim": 96}


def write_native_world(folder: Path, world: str = "clip", dtype=np.float32, model=MODEL) -> Path:
    """Write a golden world's features and assets natively; returns the folder."""
    golden = GOLDEN / world
    manifest = {"model": model}
    features = load_features(golden / "features", world, "icir")
    data = folder / "features" / f"{world}_features" / "icir"
    data.mkdir(parents=True)
    features.queries.to_csv(data / "query.csv", index=False)
    read_database_table(features).to_csv(data / "database.csv", index=False)
    np.save(data / "query_image.npy", features.query_image)
    np.save(data / "query_text.npy", features.query_text)
    np.save(data / "query_context_text.npy", features.query_context_text)
    rows = features.database.read(slice(0, features.database.shape[0]))
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
