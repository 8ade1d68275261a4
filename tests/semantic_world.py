"""Real annotations and golden worlds of the semantic benchmarks, and a plain ranking of a task."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import list_benchmarks
from utils import write_csv, write_json
from utils_metrics import measure, reduce
from utils_task import NO_SET, Task, save_task

SHARED = Path(__file__).parents[1].parent / "shared"
ANNOTATIONS, GOLDEN = SHARED / "annotations", SHARED / "golden_benchmarks"

needs_annotations = pytest.mark.skipif(
    not ANNOTATIONS.is_dir(), reason="the published annotation files are not here"
)
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden worlds are not here")


def unpack(folder: Path, target: Path) -> Path:
    """The annotation files of one benchmark, as their publisher's repository has them."""
    for file in folder.rglob("*.gz"):
        path = target / file.relative_to(folder).with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(file.read_bytes()))
    return target


def plain_ranks(task: Task, view: str, query: int, scores: np.ndarray) -> tuple[list[int], int]:
    """0-based ranks of a query's positives by definition, and how many rows were ranked.

    scores: (N,) of all gallery rows.
    """
    own = task.views[view]
    whole = task.pool[query] == NO_SET
    rows = np.arange(len(task.gallery)) if whole else task.sets[task.pool[query]]
    if own.candidates is not None:
        rows = rows[np.isin(rows, task.sets[own.candidates[query]])]
    own_scores = scores[rows]
    own_scores[np.isin(rows, task.rows_of(own.excluded, query))] = -np.inf
    positives = np.searchsorted(rows, task.rows_of(own.positives, query))
    negative = np.ones(len(rows), bool)
    negative[positives] = False
    ranks = []
    for place in positives:
        equal = own_scores == own_scores[place]
        before = negative | (np.arange(len(rows)) < place)
        if task.ties == "row":
            before &= np.arange(len(rows)) < place
        ranks.append(np.count_nonzero(own_scores > own_scores[place]) + (equal & before).sum())
    return sorted(ranks), np.isfinite(own_scores).sum()


def plain_columns(task: Task, scores) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """Every column and mean of a task, by name, and each view's ranks; scores(query) -> (N,)."""
    ranks, sizes = {name: [] for name in task.views}, {name: [] for name in task.views}
    for query in range(len(task.queries)):
        own = scores(query)
        for view in task.views:
            found, size = plain_ranks(task, view, query, own)
            ranks[view].append(found)
            sizes[view].append(size)
    values = {}
    for column in task.columns:
        own = ranks[column.view]
        per_query = measure(
            column.measure,
            np.array([rank for found in own for rank in found]),
            np.repeat(np.arange(len(own)), [len(found) for found in own]),
            task.sets.sizes(task.views[column.view].positives),
            np.array(sizes[column.view]),
        )
        values[column.name] = reduce(per_query, column.groups, task.queries.tags)
    for mean in task.means:
        values[mean.name] = np.mean([values[name] for name in mean.of])
    return values, ranks


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def draw(seed: int, order: list, positives: list[list], references: list) -> tuple:
    """The recipe of the expected figures: gallery (N, 64) and query (Q, 64) features, float64.

    order: the gallery's ids; positives: each query's, as ids; references: an id of each, or None.
    """
    random, number = np.random.RandomState(seed), {name: i for i, name in enumerate(order)}
    gallery = unit(random.standard_normal((len(order), 64)))
    noise = unit(random.standard_normal((len(positives), 64)))
    target = unit(np.stack([gallery[[number[p] for p in own]].mean(0) for own in positives]))
    reference = gallery[[number[name] for name in references]]
    return gallery, unit(noise + 0.40 * target + 0.45 * reference)


# ---------------------------------------------------------------------------------------------
# Golden worlds
# ---------------------------------------------------------------------------------------------


def read_golden(name: str) -> Task:
    benchmark = list_benchmarks()[name]
    return benchmark.tasks[name](GOLDEN / benchmark.folder.get(name, name))


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "expected" / f"{name}.npz"))


def golden_figures(name: str) -> dict:
    return json.loads((GOLDEN / "expected" / f"{name}.json").read_text())


def save_features(
    folder: Path, task: Task, gallery: np.ndarray, images: np.ndarray, texts: np.ndarray
) -> None:
    """The features of a task, each query with an image and a text of its own, in native files."""
    folder.mkdir(parents=True)
    save_task(task, folder)
    rows = ((key, row, row) for row, key in enumerate(task.queries.key))
    write_csv(folder / "query.csv", ("key", "image_row", "text_row"), rows)
    arrays = {"database_image": gallery, "query_image": images, "query_text": texts}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values.astype(np.float32))
    counts = {"query": len(task.queries), "database": len(task.gallery)}
    write_json(folder / "manifest.json", {"model": {"model": "golden"}, "counts": counts})


def same_lists(ours: dict, theirs: dict, scores: np.ndarray, names: list[str]) -> None:
    """Lists of images are equal up to places whose scores differ by less than 1e-6."""
    assert ours.keys() == theirs.keys()
    queries = [key for key in theirs if key not in ("version", "metric")]
    for key, own in zip(queries, scores, strict=True):
        values = dict(zip(names, own, strict=True))
        for a, b in zip(map(str, ours[key]), map(str, theirs[key]), strict=True):
            assert a == b or abs(values[a] - values[b]) < 1e-6, key
