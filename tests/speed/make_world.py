"""Make a feature world of i-CIR's size: synthetic features with the structure BASIC relies on.

An image is an object, a style, clutter and noise on top of the mean of its modality; a text is a
style on top of the mean of the other one. Per instance there are positives and visual, textual and
composed hard negatives, so that no method ranks perfectly or at random. Rows are written as they
are made, in native format, in the reference's pickles, or both; no more than a block of features
is held in memory.

    python3 tests/speed/make_world.py FOLDER --format both
    cd FOLDER && python3 /path/to/run_retrieval.py --method basic --use_preset --gpu -1
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import pickle
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

QUERIES_PER_INSTANCE = 1883 / 202  # i-CIR: 1,883 composed queries of 202 instances
MAX_QUERY_IMAGES, MAX_QUERY_TEXTS = 46, 5
MAX_POSITIVES = 127  # of one composed query
DISTINCT_TEXTS = 1010
CORPORA = {"generic_subjects": 1841, "generic_styles": 999}
SYNTHETIC_ROWS = 1000  # images, and as many texts
BLOCK_ROWS = 4096  # rows made at a time
LIST_BATCH = 1000  # strings per APPENDS, as the pickle module does it
REFERENCE_PREFIX = "./data/icir/"

POSITIVE, VISUAL, TEXTUAL, COMPOSED = range(4)
NEGATIVE_SHARES = {VISUAL: 0.4, TEXTUAL: 0.4, COMPOSED: 0.2}


@dataclass(frozen=True)
class WorldSpec:
    """What to make.

    rows: database rows of the smallest and of the largest instance. scale multiplies the
    instances (grow="instances": each as large as before) or the rows of each (grow="rows").
    """

    folder: Path
    instances: int = 202
    rows: tuple[int, int] = (951, 10045)
    scale: int = 1
    grow: str = "instances"
    dim: int = 768
    dtype: str = "float32"
    format: str = "native"
    seed: int = 0
    shuffle: bool = False
    backbone: str = "clip"


@dataclass(frozen=True)
class Plan:
    """Per instance: database rows, query images, and the numbers of its query texts."""

    rows: np.ndarray  # (instances,) int64
    images: np.ndarray  # (instances,) int64
    texts: list[np.ndarray]  # indices into the distinct texts


@dataclass(frozen=True)
class Strength:
    """How much of each part a feature holds, relative to a unit-length mean of its modality."""

    object: float
    style: float
    clutter: float
    noise: float


IMAGE = Strength(object=0.50, style=0.28, clutter=0.40, noise=0.40)
TEXT = Strength(object=0.0, style=0.45, clutter=0.25, noise=0.35)
CONTEXT_TEXT = Strength(object=0.08, style=0.40, clutter=0.12, noise=0.12)
SUBJECT = Strength(object=0.50, style=0.05, clutter=0.20, noise=0.25)
CATEGORY_SHARE = 0.85  # of an object's direction; the rest tells it from others of its category
STYLE_SHARE = 0.75  # of an image's style; the rest is the image's own


# ---------------------------------------------------------------------------------------------
# How much of everything
# ---------------------------------------------------------------------------------------------


def spread(smallest: int, largest: int, count: int, mean_share: float) -> np.ndarray:
    """`count` sizes from smallest to largest, their mean at that share of the way between."""
    grid = np.linspace(0.0, 1.0, count) ** (1.0 / mean_share - 1.0)
    return np.rint(smallest + (largest - smallest) * grid).astype(np.int64)


def plan_world(spec: WorldSpec) -> Plan:
    """Sizes of every instance; a scaled world repeats those of scale 1."""
    rng = np.random.default_rng([spec.seed, 1])
    # i-CIR's instances hold 3.7 K rows on average, 30.4 % of the way from 951 to 10,045
    rows = rng.permutation(spread(*spec.rows, spec.instances, mean_share=0.304))
    text_counts = rng.permutation(np.arange(spec.instances) % MAX_QUERY_TEXTS + 1)
    images = share_out_images(text_counts, rng)
    repeat = spec.scale if spec.grow == "instances" else 1
    rows = np.tile(rows, repeat) * (1 if spec.grow == "instances" else spec.scale)
    counts = np.tile(text_counts, repeat)
    texts = [rng.choice(DISTINCT_TEXTS, size=count, replace=False) for count in counts]
    return Plan(rows, np.tile(images, repeat), texts)


def share_out_images(text_counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Query images per instance, few for most, so that images x texts add up to i-CIR's share."""
    images = np.ones_like(text_counts)
    target = max(round(QUERIES_PER_INSTANCE * len(text_counts)), int(text_counts.sum()))
    single = int(np.flatnonzero(text_counts == 1)[0])
    images[single] += min(MAX_QUERY_IMAGES - 1, target - int(text_counts.sum()))
    weights = rng.pareto(1.5, size=len(text_counts)) + 0.1
    while (missing := target - int(images @ text_counts)) > 0:
        able = weights * (text_counts <= missing) * (images < MAX_QUERY_IMAGES)
        if not able.any():
            break
        images[rng.choice(len(images), p=able / able.sum())] += 1
    return images


def text_of(number: int) -> str:
    """A query text; some hold a comma or quotes, as real ones do."""
    if number < 0:
        return ""
    patterns = ("in style {}", "as a {} sketch", "in the snow, seen from {}", 'with "{}" on it')
    return patterns[(number % 10) // 3].format(number)


# ---------------------------------------------------------------------------------------------
# The model behind the features
# ---------------------------------------------------------------------------------------------


class Generator:
    """Draws features of objects and styles; every draw depends on the seed and on `key` alone."""

    def __init__(self, seed: int, dim: int) -> None:
        rng = np.random.default_rng([seed, 0])
        self.seed, self.dim = seed, dim
        self.ranks = {"object": dim // 5, "style": dim // 12, "clutter": dim // 8}
        basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0].T.astype(np.float32)
        self.image_mean, text_part = basis[0], basis[1]
        self.text_mean = unit(0.2 * self.image_mean + text_part)  # the gap between modalities
        self.frames, start = {}, 2
        for name, rank in self.ranks.items():
            self.frames[name], start = basis[start : start + rank], start + rank
        self.styles = unit(self.normal(rng, DISTINCT_TEXTS, self.ranks["style"]))
        self.spectrum = np.linspace(1.6, 0.4, self.ranks["clutter"], dtype=np.float32)

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    @staticmethod
    def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def object_codes(self, rng: np.random.Generator, category: np.ndarray | None, count: int):
        """Directions (count, rank) of objects, of one category or each of its own."""
        own = unit(self.normal(rng, count, self.ranks["object"]))
        if category is None:
            return own
        return unit(CATEGORY_SHARE**0.5 * category + (1 - CATEGORY_SHARE) ** 0.5 * own)

    def style_codes(self, rng: np.random.Generator, texts: np.ndarray) -> np.ndarray:
        """Directions (count, rank) of the styles of images; -1 asks for a style of their own."""
        own = unit(self.normal(rng, len(texts), self.ranks["style"]))
        named = unit(STYLE_SHARE * self.styles[texts] + (1 - STYLE_SHARE**2) ** 0.5 * own)
        return np.where((texts >= 0)[:, None], named, own)

    def features(
        self, rng: np.random.Generator, strength: Strength, mean: np.ndarray, objects, styles
    ) -> np.ndarray:
        """Features (count, dim) float32 with norms around 10, not of unit length."""
        count = len(styles)
        clutter = self.normal(rng, count, self.ranks["clutter"]) * self.spectrum
        clutter *= strength.clutter / self.ranks["clutter"] ** 0.5
        rows = self.normal(rng, count, self.dim)
        rows *= np.float32(strength.noise / self.dim**0.5)
        rows += mean
        rows += clutter @ self.frames["clutter"]
        rows += (np.float32(strength.style) * styles) @ self.frames["style"]
        if strength.object:
            rows += (np.float32(strength.object) * objects) @ self.frames["object"]
        norms = 10.0 + self.normal(rng, count, 1)
        rows *= np.clip(norms, 6.0, 14.0) / np.linalg.norm(rows, axis=1, keepdims=True)
        return rows


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (or one vector) scaled to length 1."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Instance:
    """One instance: its category and object directions, its queries and its database rows."""

    name: str
    category: np.ndarray  # (rank,)
    object: np.ndarray  # (rank,)
    kinds: np.ndarray  # (rows,) POSITIVE, VISUAL, TEXTUAL or COMPOSED
    styles: np.ndarray  # (rows,) text shown by the image, -1 for none of them
    texts: np.ndarray  # (rows,) text in the annotation, -1 for none


def make_instance(generator: Generator, plan: Plan, index: int) -> Instance:
    """What every database row of the instance shows, in an order that says nothing about it."""
    rng = generator.rng(2, index)
    category = generator.object_codes(rng, None, 1)[0]
    rows, query_texts = int(plan.rows[index]), plan.texts[index]
    # between 1 and 127 positives, few for most texts, and never the larger part of the rows
    limit = min(MAX_POSITIVES, max(1, rows // (4 * len(query_texts))))
    positives = np.floor(np.exp(rng.uniform(0.0, np.log(limit + 1), len(query_texts)))).astype(int)
    negatives = rows - int(positives.sum())
    kinds = rng.choice(list(NEGATIVE_SHARES), size=negatives, p=list(NEGATIVE_SHARES.values()))
    styles = rng.choice(query_texts, size=negatives)
    styles[kinds == VISUAL] = -1
    # a negative is annotated with a text of its own, or with none
    own = rng.integers(DISTINCT_TEXTS, 2 * DISTINCT_TEXTS, size=negatives)
    texts = np.where(rng.random(negatives) < 0.3, own, -1)
    shown = np.repeat(query_texts, positives)
    order = rng.permutation(rows)
    return Instance(
        name=f"instance_{index:04d}",
        category=category,
        object=generator.object_codes(rng, category, 1)[0],
        kinds=np.concatenate([np.full(len(shown), POSITIVE), kinds])[order],
        styles=np.concatenate([shown, styles])[order],
        texts=np.concatenate([shown, texts])[order],
    )


def database_blocks(generator: Generator, instance: Instance, index: int) -> Iterator[np.ndarray]:
    """Features of the instance's database rows, (up to 4096, dim) float32 at a time."""
    rng = generator.rng(3, index)
    for start in range(0, len(instance.kinds), BLOCK_ROWS):
        kinds = instance.kinds[start : start + BLOCK_ROWS]
        objects = generator.object_codes(rng, None, len(kinds))
        alike = generator.object_codes(rng, instance.category, len(kinds))
        objects[kinds == COMPOSED] = alike[kinds == COMPOSED]
        objects[(kinds == POSITIVE) | (kinds == VISUAL)] = instance.object
        styles = generator.style_codes(rng, instance.styles[start : start + BLOCK_ROWS])
        yield generator.features(rng, IMAGE, generator.image_mean, objects, styles)


def make_queries(generator: Generator, plan: Plan, instances: list[Instance]) -> dict:
    """The composed queries: three columns of strings and three (queries, dim) float32 arrays."""
    columns = {"image_path": [], "text": [], "instance": []}
    parts = {"image": [], "text": [], "context_text": []}
    text_features = query_texts(generator, TEXT, 4)
    context_features = query_texts(generator, CONTEXT_TEXT, 5)
    # the mean of 200 vectors of unit length is shorter than they are
    context_features *= 0.85 / np.linalg.norm(context_features, axis=1, keepdims=True)
    for index, instance in enumerate(instances):
        rng, count = generator.rng(6, index), int(plan.images[index])
        objects = np.repeat(instance.object[None], count, axis=0)
        styles = generator.style_codes(rng, np.full(count, -1))
        images = generator.features(rng, IMAGE, generator.image_mean, objects, styles)
        for image in range(count):
            for text in plan.texts[index]:
                columns["image_path"].append(f"query/{instance.name}/{image}.jpg")
                columns["text"].append(text_of(int(text)))
                columns["instance"].append(instance.name)
        texts = np.tile(plan.texts[index], count)
        parts["image"].append(np.repeat(images, len(plan.texts[index]), axis=0))
        parts["text"].append(text_features[texts])
        parts["context_text"].append(context_features[texts])
    features = {name: np.concatenate(part) for name, part in parts.items()}
    return {"columns": columns, "features": features}


def query_texts(generator: Generator, strength: Strength, key: int) -> np.ndarray:
    """One feature (dim,) per distinct text; `key` tells one kind of text feature from another."""
    rng = generator.rng(key)
    # a contextualised text holds the same average of subjects whatever it says
    subject = generator.object_codes(rng, None, 1).repeat(DISTINCT_TEXTS, axis=0)
    return generator.features(rng, strength, generator.text_mean, subject, generator.styles)


def make_corpus(generator: Generator, name: str) -> np.ndarray:
    """Features (prompts, dim) float32 of a corpus of subjects or of styles."""
    rng, count = generator.rng(7, len(name)), CORPORA[name]
    if name == "generic_subjects":
        objects = generator.object_codes(rng, None, count)
        styles = generator.style_codes(rng, np.full(count, -1))
        return generator.features(rng, SUBJECT, generator.text_mean, objects, styles)
    styles = generator.style_codes(rng, np.arange(count) % DISTINCT_TEXTS)
    return generator.features(rng, TEXT, generator.text_mean, None, styles)


def make_synthetic(generator: Generator) -> dict[str, np.ndarray]:
    """Features of images and texts that belong to no instance, for the scores' normalisation."""
    rng = generator.rng(8)
    objects = generator.object_codes(rng, None, SYNTHETIC_ROWS)
    styles = generator.style_codes(rng, rng.integers(0, DISTINCT_TEXTS, SYNTHETIC_ROWS))
    images = generator.features(rng, IMAGE, generator.image_mean, objects, styles)
    texts = generator.features(rng, TEXT, generator.text_mean, None, styles)
    return {"image_features": images, "text_features": texts}


def make_mean(generator: Generator) -> np.ndarray:
    """The mean (dim,) float32 of many unit-length images of no instance."""
    rng, count = generator.rng(9), 4 * BLOCK_ROWS
    objects = generator.object_codes(rng, None, count)
    styles = generator.style_codes(rng, np.full(count, -1))
    rows = generator.features(rng, IMAGE, generator.image_mean, objects, styles)
    return unit(rows).mean(axis=0)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


class RowFile:
    """A file of fixed-size rows between a head and a tail, written in any order of the rows."""

    def __init__(self, path: Path, head: bytes, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.file = open(path, "wb")  # noqa: SIM115 - closed by finish()
        self.file.write(head)
        self.start, self.dtype = len(head), dtype
        self.row_bytes = shape[1] * dtype.itemsize
        self.end = self.start + shape[0] * self.row_bytes

    def put(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Write rows (n, dim) to these places of the file, in one piece where they follow."""
        rows = np.ascontiguousarray(rows, dtype=self.dtype)
        if positions[-1] - positions[0] == len(positions) - 1 and (np.diff(positions) == 1).all():
            self.file.seek(self.start + int(positions[0]) * self.row_bytes)
            self.file.write(rows.data)
            return
        for position, row in zip(positions.tolist(), rows, strict=True):
            self.file.seek(self.start + position * self.row_bytes)
            self.file.write(row.data)

    def finish(self, tail: Iterable[bytes] = ()) -> None:
        """Write what follows the rows, and close."""
        self.file.seek(self.end)
        self.file.writelines(tail)
        self.file.truncate()
        self.file.close()


def npy_head(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """The bytes before the rows of a .npy file."""
    head = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()


def pickled(value: object) -> bytes:
    """A value's pickle without its first (protocol) and last (stop) opcode, to be joined."""
    return pickle.dumps(value, protocol=3)[2:-1]


def pickle_array_head(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """Opcodes of a numpy array as numpy pickles it, up to the bytes of its rows."""
    return b"".join(
        [
            pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n",
            pickled((np.ndarray, (0,), b"b")) + pickle.REDUCE + pickle.MARK,
            pickled(1) + pickled(shape) + pickled(dtype) + pickled(False),
            pickle.BINBYTES8 + struct.pack("<Q", shape[0] * shape[1] * dtype.itemsize),
        ]
    )


def pickle_strings(strings: Iterable[str]) -> Iterator[bytes]:
    """Opcodes of a list of str, a batch at a time."""
    yield pickle.EMPTY_LIST + pickle.MARK
    for number, string in enumerate(strings, start=1):
        content = string.encode()
        yield pickle.BINUNICODE + struct.pack("<I", len(content)) + content
        if number % LIST_BATCH == 0:
            yield pickle.APPENDS + pickle.MARK
    yield pickle.APPENDS


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable[str]]) -> None:
    """A CSV file with a header, quoted where needed."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def manifest_of(spec: WorldSpec, kind: str, name: str, counts: dict[str, int]) -> dict:
    """A manifest that names the same made-up model for every file of the world."""
    model = {
        "model": f"made-up-{spec.dim}",
        "pretrained": f"seed-{spec.seed}",
        "activation": None,
        "embed_dim": spec.dim,
        "context_length": 77,
        "image_size": 224,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "weights_sha256": None,
    }
    return {
        "kind": kind,
        "name": name,
        "backbone": spec.backbone,
        "model": model,
        "precision": "fp32",
        "save_dtype": spec.dtype if kind == "dataset" else "float32",
        "versions": {"toolkit": None, "numpy": np.__version__},
        "counts": counts,
        "sources": {},
        "skipped": [],
    }


def write_manifest(path: Path, manifest: dict) -> None:
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Worlds
# ---------------------------------------------------------------------------------------------


def make_world(spec: WorldSpec) -> None:
    """Write the whole world: features, corpora, mean and synthetic features."""
    generator, plan = Generator(spec.seed, spec.dim), plan_world(spec)
    instances = [make_instance(generator, plan, index) for index in range(len(plan.rows))]
    features = spec.folder / "features" / f"{spec.backbone}_features"
    for folder in (features / "icir", features / "corpus"):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in ("data/laion_mean", "synthetic_data"):
        (spec.folder / folder).mkdir(parents=True, exist_ok=True)

    queries = make_queries(generator, plan, instances)
    assets = {
        "corpora": {name: make_corpus(generator, name) for name in CORPORA},
        "mean": make_mean(generator),
        "synthetic": make_synthetic(generator),
    }
    if spec.format in ("native", "both"):
        write_native_queries(spec, features / "icir", queries, int(plan.rows.sum()))
        write_native_assets(spec, features / "corpus", assets)
    if spec.format in ("reference", "both"):
        write_reference_queries(features / "icir", queries)
        write_reference_assets(spec, features / "corpus", assets)
    write_database(spec, features / "icir", generator, instances)


def write_database(
    spec: WorldSpec, folder: Path, generator: Generator, instances: list[Instance]
) -> None:
    """The database's rows, made once and written to the file of each format."""
    sizes = [len(instance.kinds) for instance in instances]
    total, starts = sum(sizes), np.cumsum([0, *sizes])
    places = np.arange(total)
    if spec.shuffle:
        places = np.random.default_rng([spec.seed, 10]).permutation(total)
    files = open_database(spec, folder, (total, spec.dim))
    for index, instance in enumerate(instances):
        start = int(starts[index])
        for rows in database_blocks(generator, instance, index):
            for file in files.values():
                file.put(places[start : start + len(rows)], rows)
            start += len(rows)

    made = np.argsort(places)  # the row made for each place
    owners = np.repeat(np.arange(len(instances)), sizes)[made]
    numbers = made - starts[owners]
    texts = np.concatenate([instance.texts for instance in instances])[made]
    paths = [f"database/{instance.name}/" for instance in instances]
    names = [instance.name for instance in instances]

    def annotation() -> Iterator[tuple[str, str, str]]:
        for owner, number, text in zip(owners, numbers, texts, strict=True):
            yield f"{paths[owner]}{number:05d}.jpg", text_of(text), names[owner]

    if "native" in files:
        files["native"].finish()
        write_csv(folder / "database.csv", ["image_path", "text", "instance"], annotation())
    if "reference" in files:
        files["reference"].finish(reference_tail(annotation))


def open_database(spec: WorldSpec, folder: Path, shape: tuple[int, int]) -> dict[str, RowFile]:
    """The database's feature file of each format that was asked for."""
    files = {}
    if spec.format in ("native", "both"):
        dtype = np.dtype(spec.dtype)
        path = folder / "database_image.npy"
        files["native"] = RowFile(path, npy_head(shape, dtype), shape, dtype)
    if spec.format in ("reference", "both"):
        dtype = np.dtype(np.float32)  # the only one the reference writes
        head = pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK + pickled("image_feats")
        head += pickle_array_head(shape, dtype)
        files["reference"] = RowFile(folder / "database_icir_features.pkl", head, shape, dtype)
    return files


def reference_tail(annotation) -> Iterator[bytes]:
    """What follows the rows in the reference's database pickle: the strings, and no texts."""
    yield pickle.TUPLE + pickle.BUILD
    yield pickled("paths")
    yield from pickle_strings(REFERENCE_PREFIX + path for path, _, _ in annotation())
    yield pickled("instances")
    yield from pickle_strings(instance for _, _, instance in annotation())
    yield pickled("texts")
    yield from pickle_strings(text for _, text, _ in annotation())
    yield pickled("text_feats") + pickled(None) + pickle.SETITEMS + pickle.STOP


def write_native_queries(spec: WorldSpec, folder: Path, queries: dict, rows: int) -> None:
    columns = queries["columns"]
    write_csv(folder / "query.csv", list(columns), zip(*columns.values(), strict=True))
    for part, features in queries["features"].items():  # few: float32 whatever --dtype says
        np.save(folder / f"query_{part}.npy", features)
    counts = {"query": len(columns["text"]), "database": rows}
    write_manifest(folder / "manifest.json", manifest_of(spec, "dataset", "icir", counts))


def write_native_assets(spec: WorldSpec, corpus_folder: Path, assets: dict) -> None:
    for name, features in assets["corpora"].items():
        prompts = ([f"{name} {number}"] for number in range(len(features)))
        write_csv(corpus_folder / f"{name}.csv", ["prompt"], prompts)
        np.save(corpus_folder / f"{name}.npy", features)
        manifest = manifest_of(spec, "corpus", name, {"prompts": len(features)})
        write_manifest(corpus_folder / f"{name}.json", manifest)
    mean = manifest_of(spec, "mean", "laion_mean", {"images": 4 * BLOCK_ROWS})
    np.savez(
        spec.folder / "data/laion_mean" / f"mean_{spec.backbone}.npz",
        mean=assets["mean"],
        manifest=np.array(json.dumps(mean)),
    )
    synthetic = manifest_of(spec, "synthetic", "synthetic", {"images": SYNTHETIC_ROWS})
    np.savez(
        spec.folder / "synthetic_data" / f"synthetic_{spec.backbone}.npz",
        manifest=np.array(json.dumps(synthetic)),
        **assets["synthetic"],
    )


def write_reference_queries(folder: Path, queries: dict) -> None:
    columns, features = queries["columns"], queries["features"]
    content = {
        "image_feats": features["image"],
        "text_feats": features["text"],
        "context_text_feats": features["context_text"],
        "paths": [REFERENCE_PREFIX + path for path in columns["image_path"]],
        "instances": columns["instance"],
        "texts": columns["text"],
    }
    (folder / "query_icir_features.pkl").write_bytes(pickle.dumps(content, protocol=4))


def write_reference_assets(spec: WorldSpec, corpus_folder: Path, assets: dict) -> None:
    import torch  # the reference's mean is a tensor

    for name, features in assets["corpora"].items():
        prompts = [f"{name} {number}" for number in range(len(features))]
        content = pickle.dumps({"feats": features, "prompts": prompts}, protocol=4)
        (corpus_folder / f"{name}.pkl").write_bytes(content)
    mean = {"laion_1m_mean": torch.from_numpy(assets["mean"][None].copy())}
    path = spec.folder / "data/laion_mean" / f"laion_1m_mean_{spec.backbone}.pkl"
    path.write_bytes(pickle.dumps(mean, protocol=4))
    path = spec.folder / "synthetic_data" / f"dataset_1_sd_{spec.backbone}.pkl.npy"
    np.save(path, np.array(assets["synthetic"], dtype=object), allow_pickle=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=["native", "reference", "both"], default="native")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--scale", type=int, choices=[1, 2, 4], default=1)
    parser.add_argument("--grow", choices=["instances", "rows"], default="instances")
    parser.add_argument("--instances", type=int, default=202)
    parser.add_argument("--rows", type=int, nargs=2, default=(951, 10045), metavar=("MIN", "MAX"))
    parser.add_argument("--shuffle", action="store_true", help="scatter the rows of an instance")
    parser.add_argument("--seed", type=int, default=0)
    make_world(WorldSpec(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
