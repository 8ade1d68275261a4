"""Random worlds with awkward labels, and average precision by the formulas of docs/DESIGN.md.

The oracle shares no code with what it judges: float64 numpy, one query at a time.
"""

from __future__ import annotations

import csv
import json
import pickle
import random
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
NEAR = 2e-6  # float32 similarities of unit vectors that lie so near may change places
METHODS = ("image", "text", "sum", "product")
EPSILON = 1e-5


@dataclass(frozen=True)
class World:
    """Labels are (path, text, instance); arrays float32 rows."""

    queries: list[tuple[str, str, str]]
    rows: list[tuple[str, str, str]]
    image: np.ndarray
    text: np.ndarray
    database: np.ndarray


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
    rng.shuffle(rows)

    def features(count: int, original: np.ndarray | None = None) -> np.ndarray:
        values = numbers.normal(size=(count, dim))
        copied = numbers.random(count) < rng.choice((0, 0.3))
        values[copied] = values[0]  # ties
        scale = 10.0 ** numbers.uniform(-rng.choice((0, 15)), rng.choice((0, 15)), (count, 1))
        return (values * scale).astype(np.float32)

    return World(queries, rows, features(len(queries)), features(len(queries)), features(len(rows)))


COLUMNS = ("image_path", "text", "instance")


def write_native(world: World, folder: Path) -> None:
    """The files that create_features writes."""
    folder.mkdir(parents=True)
    for split, labels in (("query", world.queries), ("database", world.rows)):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *labels])
    np.save(folder / "query_image.npy", world.image)
    np.save(folder / "query_text.npy", world.text)
    np.save(folder / "database_image.npy", world.database)
    (folder / "manifest.json").write_text(json.dumps({"model": {"model": "random"}}))


def write_pickles(world: World, folder: Path) -> None:
    """The files that the reference implementation writes."""
    folder.mkdir(parents=True)
    for split, labels, arrays in (
        ("query", world.queries, {"image_feats": world.image, "text_feats": world.text}),
        ("database", world.rows, {"image_feats": world.database}),
    ):
        names = dict(zip(("paths", "texts", "instances"), zip(*labels, strict=True), strict=True))
        content = {name: list(values) for name, values in names.items()} | arrays
        (folder / f"{split}_icir_features.pkl").write_bytes(pickle.dumps(content))


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def score(method: str, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Scores (n,) of a query from both its similarities (n,)."""
    if method == "sum":
        return image + text
    if method == "product":
        return np.maximum(image, 0) * np.maximum(text, 0)
    return image if method == "image" else text


def average_precision(ranks: np.ndarray) -> float:
    """AP-T of the ranks of n positives, from 0, ascending."""
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    after = (j + 1) / (ranks + 1)
    return float(((before + after) / 2).sum() / (len(ranks) + EPSILON))


def judge(world: World, method: str) -> list[tuple[float, float]]:
    """For each query the lowest and the highest AP that its ties and near ties admit."""
    database = unit(world.database)
    bounds = []
    for query, (_, text, instance) in enumerate(world.queries):
        pool = [n for n, row in enumerate(world.rows) if row[2] == instance]
        right = np.array([world.rows[n][1] == text for n in pool])
        image, said = (
            database[pool] @ unit(v[query : query + 1])[0] for v in (world.image, world.text)
        )
        scores = score(method, image, said)
        wrong, own = scores[~right], np.sort(scores[right])[::-1]
        lowest, highest = (
            average_precision(
                np.array([(wrong > value + near).sum() + j for j, value in enumerate(own)])
            )
            for near in (-NEAR, NEAR)
        )
        bounds.append((lowest, highest))
    return bounds
