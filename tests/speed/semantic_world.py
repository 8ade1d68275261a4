"""Make a feature world of CIRCO's or CIRR's size: annotation files, features and assets.

Annotations are in the publishers' layout and are read by the toolkit's own readers; features are
those of make_world.py. A query's positives show its reference's object in the style of its text.

    python3 tests/speed/semantic_world.py FOLDER circo
    cd FOLDER && python3 /path/to/run_retrieval.py --dataset circo --method all --use_preset
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from make_world import (
    BLOCK_ROWS,
    CONTEXT_TEXT,
    CORPORA,
    DISTINCT_TEXTS,
    IMAGE,
    TEXT,
    Generator,
    WorldSpec,
    make_corpus,
    make_mean,
    make_synthetic,
    manifest_of,
    query_texts,
    text_of,
    write_csv,
    write_manifest,
    write_native_assets,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import read_task
from utils_task import Task, save_task

# queries and gallery images of the real ones: CIRCO's val and test together, CIRR's val
SIZES = {"circo": (1020, 123_403), "cirr": (4181, 2297)}
GROUP = 6
FRACTION = 20  # of the sizes, for a trial


def write_circo(folder: Path, queries: int, images: int, rng: np.random.Generator) -> None:
    """1 to 8 positives a query, 4.5 on average, and one of nine aspects or two."""
    ids = rng.permutation(np.arange(1, 5 * images))[:images].tolist()
    entries = []
    for number in range(queries):
        reference, *positives = rng.choice(ids, 2 + int(rng.integers(0, 8)), replace=False).tolist()
        entries.append(
            {
                "reference_img_id": reference,
                "target_img_id": positives[0],
                "relative_caption": text_of(number % DISTINCT_TEXTS),
                "shared_concept": "an object",
                "gt_img_ids": positives,
                "id": number,
                "semantic_aspects": [f"aspect {number % 9}", f"aspect {number // 9 % 9}"],
            }
        )
    info = {"images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in ids]}
    write_json(folder / "annotations/val.json", entries)
    write_json(folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", info)


def write_cirr(folder: Path, queries: int, images: int, rng: np.random.Generator) -> None:
    """Groups of six; a query's target is another member of its reference's group."""
    names = [f"dev-{number}-img0" for number in range(images)]
    groups = [names[i : i + GROUP] for i in range(0, images - GROUP + 1, GROUP)]
    entries = []
    for number in range(queries):
        group = int(rng.integers(len(groups)))
        reference, target = rng.choice(groups[group], 2, replace=False).tolist()
        entries.append(
            {
                "pairid": number,
                "reference": reference,
                "target_hard": target,
                "caption": text_of(number % DISTINCT_TEXTS),
                "img_set": {"id": group, "members": groups[group]},
            }
        )
    write_json(folder / "cirr/captions/cap.rc2.val.json", entries)
    split = {name: f"./dev/{name}.png" for name in names}
    write_json(folder / "cirr/image_splits/split.rc2.val.json", split)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


WRITERS = {"circo": write_circo, "cirr": write_cirr}


# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


def make_gallery(generator: Generator, task: Task) -> np.ndarray:
    """The gallery's features, raw, (N, dim) float32, positives and references made to fit."""
    rng, count = generator.rng(2), len(task.gallery)
    gallery = np.empty((count, generator.dim), np.float32)
    for start in range(0, count, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, count - start)
        objects = generator.object_codes(rng, None, rows)
        styles = generator.style_codes(rng, np.full(rows, -1))
        gallery[start : start + rows] = generator.features(
            rng, IMAGE, generator.image_mean, objects, styles
        )
    row_of = {path: row for row, path in enumerate(task.gallery.path)}
    for query, images in enumerate(task.queries.images):
        positives = task.rows_of(task.views["all"].positives, query)
        shown = np.append(positives, row_of[images[0]])
        objects = generator.object_codes(rng, None, 1).repeat(len(shown), axis=0)
        texts = np.append(np.full(len(positives), query % DISTINCT_TEXTS), -1)
        styles = generator.style_codes(rng, texts)
        gallery[shown] = generator.features(rng, IMAGE, generator.image_mean, objects, styles)
    return gallery


def write_features(spec: WorldSpec, generator: Generator, task: Task, folder: Path) -> None:
    """A task's features as create_features.py leaves them: query images are gallery rows."""
    folder.mkdir(parents=True)
    save_task(task, folder)
    np.save(folder / "database_image.npy", make_gallery(generator, task))
    row_of = {path: row for row, path in enumerate(task.gallery.path)}
    texts = list(dict.fromkeys(task.queries.text))
    text_row = {text: row for row, text in enumerate(texts)}
    images = (row_of[own[0]] for own in task.queries.images)
    rows = zip(task.queries.key, images, map(text_row.get, task.queries.text), strict=True)
    write_csv(folder / "query.csv", ["key", "image_row", "text_row"], rows)
    for name, strength, key in (("text", TEXT, 4), ("context_text", CONTEXT_TEXT, 5)):
        np.save(folder / f"query_{name}.npy", query_texts(generator, strength, key)[: len(texts)])
    counts = {"query": len(task.queries), "database": len(task.gallery)}
    write_manifest(folder / "manifest.json", manifest_of(spec, "dataset", task.name, counts))


def make_semantic_world(folder: Path, name: str, dim: int, fraction: int = 1) -> None:
    """Write annotations, features and assets of a world, 1/fraction of the real one's size."""
    spec = WorldSpec(folder, dim=dim)
    generator = Generator(spec.seed, dim)
    queries, images = (size // fraction for size in SIZES[name])
    WRITERS[name](folder / "data" / name, queries, images, generator.rng(1))
    features = folder / "features" / f"{spec.backbone}_features"
    write_features(spec, generator, read_task(name, folder / "data"), features / name)
    for part in (features / "corpus", folder / "data/laion_mean", folder / "synthetic_data"):
        part.mkdir(parents=True)
    assets = {
        "corpora": {corpus: make_corpus(generator, corpus) for corpus in CORPORA},
        "mean": make_mean(generator),
        "synthetic": make_synthetic(generator),
    }
    write_native_assets(spec, features / "corpus", assets)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=SIZES)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--fraction", type=int, default=1)
    options = parser.parse_args(argv)
    make_semantic_world(options.folder, options.name, options.dim, options.fraction)


if __name__ == "__main__":
    main()
