"""Helpers of the tests of distractors: a world's pool, and one gallery with the pool in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils_retrieval import Gallery, Method
from utils_storage import ArrayRows, Features
from utils_task import NO_SET, RowSets


def make_rows(features: Features, rows: int, seed: int = 0, copies: int = 6) -> np.ndarray:
    """Rows like a gallery's, some of them copies of positives, of any length: float32 (rows, D)."""
    random = np.random.default_rng(seed)
    database = features.database("image")
    gallery = database.read(slice(0, database.shape[0])).astype(np.float32)
    images, texts = (features.query(name).values for name in ("image", "text"))
    like = gallery[random.integers(len(gallery), size=rows)]
    own = random.integers(min(len(images), len(texts)), size=rows)
    weight = random.uniform(0, 1, (3, rows, 1)).astype(np.float32)
    made = weight[0] * like / np.linalg.norm(like, axis=1, keepdims=True)
    made += weight[1] * images[own] / np.linalg.norm(images[own], axis=1, keepdims=True)
    made += weight[2] * texts[own] / np.linalg.norm(texts[own], axis=1, keepdims=True)
    view = features.task.views[features.task.main_view]
    _, positives = features.task.sets.gather(view.positives)
    made[:copies] = gallery[random.choice(positives, copies)]
    return made.astype(np.float32)


def two_ways(
    features: Features, made: np.ndarray, more: dict[str, np.ndarray] | None = None
) -> tuple[Features, Features]:
    """The features alone, and those of one gallery with all these rows behind every query's own.

    In both, rows that are equal count as copies, so that they tie to the last bit. more: the rows'
    features of other kinds.
    """
    task, database = features.task, features.database("image")
    gallery = database.read(slice(0, database.shape[0])).astype(np.float32)
    whole = np.concatenate([gallery, made])
    _, first, of = np.unique(whole, axis=0, return_index=True, return_inverse=True)
    copy_of = first[of.reshape(-1)]
    extra = np.arange(len(gallery), len(whole))
    sets = [task.sets[number] for number in range(len(task.sets))]
    pools = {NO_SET: NO_SET}
    for number in dict.fromkeys(task.pool.tolist()):
        if number != NO_SET:
            pools[number] = len(sets)
            sets.append(np.concatenate([task.sets[number], extra]))
    alone = replace(task.gallery, copy_of=copy_of[: len(gallery)])
    images = replace(
        task.gallery,
        path=[*task.gallery.path, *(f"made/{row}.jpg" for row in range(len(made)))],
        note=None,
        box=None,
        copy_of=copy_of,
    )
    joined = replace(
        task,
        gallery=images,
        sets=RowSets.of(sets),
        pool=np.array([pools[number] for number in task.pool.tolist()], np.int64),
        related=None,
    )
    files = {"image": ArrayRows(Path("whole.npy"), whole)}
    for name, rows in (more or {}).items():
        own = features.database(name)
        files[name] = ArrayRows(own.path, np.concatenate([own.read(slice(0, own.shape[0])), rows]))
    return (
        replace(features, task=replace(task, gallery=alone)),
        replace(features, task=joined, database_files=files, inputs={}),
    )


def write_pool(folder: Path, made: np.ndarray, sizes: list[int], dtype=np.float32) -> Path:
    """A pool as clip-retrieval writes it: img_emb/img_emb_{n}.npy of these sizes, the rest last."""
    (folder / "img_emb").mkdir(parents=True)
    for number, part in enumerate(np.split(made, np.cumsum(sizes))):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", part.astype(dtype))
    return folder


@dataclass(frozen=True, eq=False)
class Double(Gallery):
    """A gallery that compares in float64."""

    def similarities(self, parts, of="image", few=()):
        rows = self.kinds[of]
        unit = rows.raw.double() / rows.raw.double().norm(dim=1, keepdim=True)
        found = {}
        for name, (vectors, mean) in parts.items():
            found[name] = (vectors.double()[:, None] * unit).sum(2)
            if mean is not None:
                found[name] -= (vectors.double() @ mean.double())[:, None]
        return found


def in_double(method: Method) -> Method:
    """The method with scores in float64, of which the evaluation sees the order, and what ties."""

    def scores(states, queries, gallery):
        double = Double(gallery.kinds, gallery.number)
        for own in method.scores(states, queries.anew(), double):
            value, order = own.sort(dim=1)
            step = value.diff(dim=1) > 1e-12 * value[:, 1:].abs().clamp(min=1)
            level = torch.nn.functional.pad(step.long(), (1, 0)).cumsum(1).float()
            yield torch.zeros_like(level).scatter_(1, order, level)

    return replace(method, scores=scores)
