"""Random worlds with awkward labels, in the files that the commands read: see oracle.py."""

from __future__ import annotations

import csv
import json
import pickle
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

AWKWARD = (
    *("7", "007", "7.0", "True", "true", "False", "inf", "-inf", "nan", "NaN", "NA", "N/A"),
    *("None", "null", "NULL", "1e5", "0x10", "12345678901234567890", "12345678901234567891"),
    *("-0", "0", " lead", "trail ", "a,b", 'a "b"', '"', "'", "$x$", "\\frac", "#", "é", "e\u0301"),
    *(
        "猫",
        "🐈",
        "line\nbreak",
        "tab\tin",
        "=1+1",
        "@x",
        "2020-01-01",
        "a::b",
        "../x",
        "%s",
        "{x}",
    ),
)
EPSILON = 1e-5
WORDS = ("mug", "7", "NA", "a, b", "猫", "hat", "null", "007")  # of the corpus of words


@dataclass(frozen=True)
class World:
    """Labels are (path, text, instance); arrays float32 rows."""

    queries: list[tuple[str, str, str]]
    rows: list[tuple[str, str, str]]
    image: np.ndarray
    text: np.ndarray
    database: np.ndarray
    assets: dict[str, np.ndarray]
    said: dict[str, np.ndarray]  # features of "word text"


def make_label(rng: random.Random) -> str:
    """An awkward label, or random Unicode."""
    if rng.random() < 0.6:
        return rng.choice(AWKWARD)
    letters = [
        chr(rng.choice((rng.randrange(33, 127), rng.randrange(0xA1, 0x2FFF)))) for _ in "abc"
    ]
    return "".join(letters)


def make_world(seed: int) -> World:
    """A world with duplicates, ties, and rows of very different lengths."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    instances = list(dict.fromkeys(make_label(rng) for _ in range(rng.randint(1, 6))))
    texts = list(dict.fromkeys(make_label(rng) for _ in range(rng.randint(1, 5))))
    dim = rng.choice((2, 3, 8, 33))
    queries = [
        (f"q/{make_label(rng)}.jpg", text, instance)
        for instance in instances
        for text in rng.sample(texts, rng.randint(1, len(texts)))
    ]
    rows = [
        (f"d/{number}.jpg", rng.choice(["", *texts]), instance)
        for instance in instances
        for number in range(rng.randint(1, 40))
    ]
    rows += [
        (f"d/p{number}.jpg", text, instance) for number, (_, text, instance) in enumerate(queries)
    ]
    for path, text, instance in queries[::2]:  # rows that show a query's own image
        rows.append((path, rng.choice(["", text]), instance))
    rng.shuffle(rows)

    def features(count: int, original: np.ndarray | None = None) -> np.ndarray:
        values = numbers.normal(size=(count, dim))
        copied = numbers.random(count) < rng.choice((0, 0.3))
        values[copied] = values[0]  # ties
        scale = 10.0 ** numbers.uniform(-rng.choice((0, 15)), rng.choice((0, 15)), (count, 1))
        return (values * scale).astype(np.float32)

    image, text, database = (features(len(own)) for own in (queries, queries, rows))
    assets = {
        "context_text": features(len(queries)),
        "generic_subjects": features(rng.randint(2, 40)),
        "generic_styles": features(rng.randint(2, 20)),
        "open_image_v7_class_names": numbers.normal(size=(len(WORDS), dim)).astype(np.float32),
        "mean": (numbers.normal(size=(1, dim)) * 0.2).astype(np.float32),
        "image_features": features(rng.randint(2, 30)),
        "text_features": features(rng.randint(2, 30)),
    }
    phrases = [f"{word} {text}" for word in WORDS for text in texts]
    said = dict(zip(phrases, features(len(phrases)), strict=True))
    return World(queries, rows, image, text, database, assets, said)


COLUMNS = ("image_path", "text", "instance")


def write_assets(world: World, folder: Path) -> None:
    """Corpora, mean, normalisation features and kept texts, below features/, data/, synthetic/."""
    manifest = {"model": {"model": "random"}}
    corpora = folder / "features/clip_features/corpus"
    texts = corpora.parent / "texts"
    for place in (corpora, texts, folder / "data/laion_mean", folder / "synthetic"):
        place.mkdir(parents=True)
    for name in ("generic_subjects", "generic_styles", "open_image_v7_class_names"):
        np.save(corpora / f"{name}.npy", world.assets[name])
        (corpora / f"{name}.json").write_text(json.dumps(manifest))
    _write_column(corpora / "open_image_v7_class_names.csv", "prompt", WORDS)
    note = {"manifest": json.dumps(manifest)}
    np.savez(folder / "data/laion_mean/mean_clip.npz", mean=world.assets["mean"], **note)
    pair = {name: world.assets[name] for name in ("image_features", "text_features")}
    np.savez(folder / "synthetic/synthetic_clip.npz", **pair, **note)
    _write_column(texts / "texts.csv", "text", world.said)
    np.save(texts / "texts.npy", np.stack(list(world.said.values())))
    (texts / "manifest.json").write_text(json.dumps(manifest))


def _write_column(path: Path, name: str, values: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[name], *([value] for value in values)])


def write_native(world: World, folder: Path) -> None:
    """The files that create_features writes."""
    folder.mkdir(parents=True)
    for split, labels in (("query", world.queries), ("database", world.rows)):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *labels])
    np.save(folder / "query_image.npy", world.image)
    np.save(folder / "query_text.npy", world.text)
    np.save(folder / "query_context_text.npy", world.assets["context_text"])
    np.save(folder / "database_image.npy", world.database)
    (folder / "manifest.json").write_text(json.dumps({"model": {"model": "random"}}))


def write_pickles(world: World, folder: Path) -> None:
    """The files that the reference implementation writes."""
    folder.mkdir(parents=True)
    for split, labels, arrays in (
        (
            "query",
            world.queries,
            {
                "image_feats": world.image,
                "text_feats": world.text,
                "context_text_feats": world.assets["context_text"],
            },
        ),
        ("database", world.rows, {"image_feats": world.database}),
    ):
        names = dict(zip(("paths", "texts", "instances"), zip(*labels, strict=True), strict=True))
        content = {name: list(values) for name, values in names.items()} | arrays
        (folder / f"{split}_icir_features.pkl").write_bytes(pickle.dumps(content))
