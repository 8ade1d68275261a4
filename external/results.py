"""Results of other systems as a method whose scores are looked up, not computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from external.arrays import in_task_order, is_unit, read_embeddings
from external.ids import gallery_blocks, gallery_ids, query_ids
from external.lists import RankedLists, read_rankings
from utils import UserError, sha256_file
from utils_pickles import map_array, one_line
from utils_retrieval import Gallery, Method, NoParameters, Queries, late_interaction
from utils_storage import ArrayRows, Features
from utils_task import NO_SET, Task

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SCORE = 1e38  # of a matrix: what float32 still holds
LATE = ("max", "maxsim", "mean")


@dataclass(frozen=True)
class ExternalFiles:
    """What the command names: one of embeddings, scores and rankings, and how to read them.

    query_embeddings: a file, or one a draw of a system that draws. normalise: None where it was not
    said. late: how embeddings of several tokens are compared. distances: lower is better.
    """

    name: str
    query_embeddings: tuple[Path, ...] = ()
    gallery_embeddings: tuple[Path, ...] = ()
    scores: Path | None = None
    rankings: tuple[Path, ...] = ()
    query_ids: Path | None = None
    gallery_ids: Path | None = None
    normalise: bool | None = None
    distances: bool = False
    late: str | None = None
    allow_missing: bool = False


@dataclass(frozen=True, eq=False)
class External:
    """Results that were read: the features with what the methods look up, a method a draw.

    truncated: rows of the shortest list where lists end before the gallery does (then the methods
    are the list and its two bounds), else None. lines: what was read, for the console and the
    table. missing: bool (Q,), queries without results, or None.
    """

    features: Features
    methods: tuple[Method, ...]
    truncated: int | None
    lines: tuple[str, ...]
    missing: np.ndarray | None = None


def read_external(files: ExternalFiles, features: Features) -> External:
    """Read results of a task's queries. Raises UserError for whatever does not fit."""
    if files.rankings:
        return _of_rankings(files, features)
    if files.scores:
        return _of_scores(files, features)
    return _of_embeddings(files, features)


def _method(files: ExternalFiles, scores: Callable, **reads) -> Method:
    return Method(f"external_{files.name}", NoParameters, scores, "looked up", **reads)


def _digests(paths: Sequence[Path]) -> str:
    return ", ".join(f"{path.name} sha256 {sha256_file(path)[:12]}" for path in paths)


# ---------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------


def _of_embeddings(files: ExternalFiles, features: Features) -> External:
    task = features.task
    gallery, gallery_rule = in_task_order(
        read_embeddings(files.gallery_embeddings),
        files.gallery_ids,
        gallery_ids(task),
        "gallery",
        files.gallery_embeddings[0],
        gallery_blocks(task),
    )
    arrays, methods, lines = {}, [], []
    for draw, path in enumerate(files.query_embeddings):
        query, rule = in_task_order(
            read_embeddings([path]), files.query_ids, query_ids(task), "query", path
        )
        if query.shape[1:] != gallery.shape[1:]:
            raise UserError(
                f"{path} has rows of {query.shape[1:]} but {files.gallery_embeddings[0]} of "
                f"{gallery.shape[1:]}: they come from different models"
            )
        arrays[f"external{draw}"] = ArrayRows(path, _flat(query))
        methods.append(
            _method(
                files,
                _EmbeddingScores(f"external{draw}", _tokens(files, query, path), files.late),
                reads=(f"external{draw}",),
                gallery_reads=("external",),
            )
        )
        lines.append(f"{path.name}: {query.shape}, query ids {rule}")
    queries = [file.read(slice(None)) for file in arrays.values()]
    unit = _settle_unit(files, gallery, queries, task)
    if unit:
        gallery = gallery / np.linalg.norm(gallery, axis=-1, keepdims=True)
    shape = gallery.shape
    lines += [f"gallery: {shape}, ids {gallery_rule}; normalised: {'yes' if unit else 'no'}"]
    lines += [_digests([*files.query_embeddings, *files.gallery_embeddings])]
    place = files.gallery_embeddings[0]
    features = dataclasses.replace(
        features,
        query_files={**features.query_files, **arrays},
        database_files={**features.database_files, "external": ArrayRows(place, _flat(gallery))},
        as_they_are=frozenset() if unit and files.late is None else frozenset(arrays),
    )
    return External(features, tuple(methods), None, tuple(lines))


def _flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.reshape(len(array), -1))


def _tokens(files: ExternalFiles, array: np.ndarray, path: Path) -> int:
    """How many vectors a row has; 0 for plain rows."""
    if (array.ndim == 3) != (files.late is not None):
        raise UserError(
            f"{path}: shape {array.shape}; --late_interaction is for rows of several vectors, and "
            "they need it"
        )
    return array.shape[1] if array.ndim == 3 else 0


def _settle_unit(
    files: ExternalFiles, gallery: np.ndarray, queries: list[np.ndarray], task: Task
) -> bool:
    """Whether rows are normalised: as said, or of no account where all are of unit length.

    gallery, queries: in the task's order.
    """
    if files.late is not None:
        return bool(files.normalise)
    if files.normalise is None and not all(map(is_unit, [gallery, *queries])):
        raise UserError(
            "the embeddings are not of unit length: say --normalise (cosine) or --no-normalise "
            "(dot product), as the system does"
        )
    places = (files.gallery_embeddings[0], *files.query_embeddings)
    for path, rows in zip(places, [gallery, *queries], strict=True) if files.normalise else ():
        with np.errstate(over="ignore"):  # too long a row is refused where it is searched
            lengths = np.linalg.norm(rows, axis=1)
        if not lengths.all():
            ids = gallery_ids(task) if rows is gallery else query_ids(task)
            raise UserError(
                f"{path}: the vector of {ids[int(np.argmin(lengths))]!r} is zero; it has no "
                "direction"
            )
    return bool(files.normalise)


@dataclass(frozen=True)
class _EmbeddingScores:
    """Dot products of looked-up rows or, of several tokens a row, their late interaction."""

    name: str
    tokens: int
    late: str | None

    def __call__(self, points: Sequence, queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
        query, rows = queries[self.name], gallery.kinds["external"].raw
        if not self.tokens:
            scores = query @ rows.T
        else:
            query, rows = (part.unflatten(1, (self.tokens, -1)) for part in (query, rows))
            scores = late_interaction(query, rows, self.late)
        for _ in points:
            yield scores


# ---------------------------------------------------------------------------------------------
# Score matrices
# ---------------------------------------------------------------------------------------------


def _of_scores(files: ExternalFiles, features: Features) -> External:
    """A matrix (Q, N), or a folder with a matrix for each block, named by its instance or pool."""
    task, place = features.task, files.scores
    blocks = _read_matrices(place, task)
    sign = -1.0 if files.distances else 1.0
    outside = 0
    for rows, (queries, matrix) in blocks:
        if matrix.shape != (len(queries), len(rows)):
            raise UserError(
                f"{place}: a matrix of {matrix.shape}, where {len(queries)} queries and "
                f"{len(rows)} gallery rows are due"
            )
        if np.isnan(matrix).any():
            raise UserError(f"{place}: query {int(np.isnan(matrix).any(1).argmax()) + 1} has a NaN")
        outside += int(np.isneginf(sign * matrix).sum())
        large = np.isfinite(matrix) & (np.abs(matrix, dtype=np.float64) > LARGEST_SCORE)
        if large.any():
            query = int(large.any(1).argmax()) + 1
            raise UserError(f"{place}: query {query} has a score beyond float32; scale them down")
    constant = sum(int((m.max(1) == m.min(1)).sum()) for _, (_, m) in blocks)
    lines = [f"{place.name}: scores of {len(task.queries)} queries"]
    lines += [f"{outside} scores say that a row is excluded; they rank last"] if outside else []
    lines += [f"warning: {constant} queries have one score for every row"] if constant else []
    method = _method(files, _MatrixScores(blocks, sign), reads=(), gallery_reads=())
    return External(features, (method,), None, tuple(lines))


def _read_matrices(place: Path, task: Task) -> list:
    """(gallery rows, (queries, matrix)) of each block."""
    everything = np.arange(len(task.gallery))
    if place.is_file():
        matrix = _read_matrix(place)
        if matrix.ndim != 2:
            raise UserError(f"{place}: shape {matrix.shape}; queries times gallery rows are due")
        if len(matrix) != len(task.queries):
            raise UserError(
                f"{place}: {len(matrix)} rows, but the data set has {len(task.queries)} queries"
            )
        return [(everything, (np.arange(len(matrix)), matrix))]
    if not place.is_dir():
        raise UserError(f"--scores {place} is neither a file nor a folder")
    tag = task.queries.tags.get("instance")
    if tag is None:
        raise UserError(f"--scores {place}: a folder of matrices is for data sets with instances")
    blocks = []
    for name in dict.fromkeys(tag):
        queries = np.array([q for q, own in enumerate(tag) if own == name])
        path = place / f"{name}.npy"
        if not path.is_file():
            raise UserError(f"{path} does not exist; a matrix for each instance is expected")
        pool = int(task.pool[queries[0]])
        rows = everything if pool == NO_SET else task.sets[pool]
        blocks.append((rows, (queries, _read_matrix(path))))
    return blocks


def _read_matrix(path: Path) -> np.ndarray:
    """A matrix of a .npy file, mapped. Raises UserError if it is none, or of no numbers."""
    try:
        matrix = map_array(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a .npy file ({one_line(error)})") from None
    if matrix.dtype.kind not in "fiu":
        raise UserError(f"{path}: values of type {matrix.dtype}, where scores are due")
    return matrix


@dataclass(frozen=True, eq=False)
class _MatrixScores:
    """Scores of a matrix; what says that a row is excluded ranks last."""

    blocks: list
    sign: float

    def __call__(self, points: Sequence, queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
        import torch

        found = np.empty((len(queries.number), len(gallery.number)), np.float32)
        block_of = {int(query): block for block in self.blocks for query in block[1][0]}
        for i, query in enumerate(queries.number):
            rows, (members, matrix) = block_of[int(query)]
            own = self.sign * np.asarray(matrix[np.searchsorted(members, query)], np.float64)
            found[i] = own[np.searchsorted(rows, gallery.number)]
        lowest = np.finfo(np.float32).min
        scores = torch.from_numpy(np.maximum(found, lowest)).to(queries.device)
        for _ in points:
            yield scores


# ---------------------------------------------------------------------------------------------
# Ranked lists
# ---------------------------------------------------------------------------------------------


def _of_rankings(files: ExternalFiles, features: Features) -> External:
    """Lists as a method; where they end before the gallery does, with its two bounds.

    Positives that are not listed come right behind the list in the first bound, last in the second.
    """
    lists, task = read_rankings(files.rankings, features.task, files.allow_missing), features.task
    _refuse_short(lists.rows, task, files.rankings)
    missing = np.array([len(rows) == 0 for rows in lists.rows])
    sizes = np.array([len(rows) for rows in lists.rows])
    early = sizes[(sizes < rows_to_rank(task)) & ~missing]
    places = (UNLISTED, UNLISTED_BEST, UNLISTED_WORST) if len(early) else (UNLISTED,)
    methods = tuple(
        _method(files, _ListScores(lists, task, place), reads=(), gallery_reads=())
        for place in places
    )
    lines = (*lists.lines, _digests(files.rankings))
    shortest = int(early.min()) if len(early) else None
    return External(features, methods, shortest, lines, missing)


def _refuse_short(rows: Sequence[np.ndarray], task: Task, path: Path) -> None:
    """Raise UserError for lists that name fewer rows than an evaluation server is to be given."""
    for submission in task.submitted:
        among = task.views[submission.view].candidates
        named = [
            own if among is None else np.intersect1d(own, task.rows_of(among, query))
            for query, own in enumerate(rows)
        ]
        short = [query for query, own in enumerate(named) if len(own) < submission.k]
        if short:
            raise UserError(
                f"{path}: {submission.file} takes {submission.k} rows of each query"
                f"{'' if among is None else ' from its own candidates'}, but {len(short)} lists "
                f"name fewer, the first that of {query_ids(task)[short[0]]!r}, "
                f"{len(named[short[0]])}; bring longer lists"
            )


def rows_to_rank(task: Task) -> np.ndarray:
    """How many rows are ranked for each query in the main view, int64 (Q,)."""
    view = task.views[task.main_view]
    pool = task.pool_sizes
    if view.candidates is not None:
        pool = task.sets.sizes(view.candidates)
    return pool if view.excluded is None else pool - task.sets.sizes(view.excluded)


# Where positives that are not listed come, in places behind the listed rows; others are at 0.
UNLISTED, UNLISTED_BEST, UNLISTED_WORST = 0.0, 0.5, -0.5


@dataclass(frozen=True, eq=False)
class _ListScores:
    """Scores that fall with the place in a list; rows that are not listed tie behind it.

    Places, not the file's scores, so that float32 keeps apart what the file does; equal scores of
    a file are equal here. lift: where positives that are not listed come among those.
    """

    lists: RankedLists
    task: Task
    lift: float

    def __call__(self, points: Sequence, queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
        import torch

        size = max((len(rows) for rows in self.lists.rows), default=0) + 1
        scores = np.full((len(queries.number), len(gallery.number)), -size, np.float32)
        positives = self.task.views[self.task.main_view].positives
        for i, query in enumerate(queries.number):
            scores[i, _places(gallery, self.task.rows_of(positives, query))[0]] += self.lift
            values = self.lists.scores[query]
            places = np.concatenate([[0], np.cumsum(np.diff(values) < 0)])[: len(values)]
            position, there = _places(gallery, self.lists.rows[query])
            scores[i, position] = -places[there]
        found = torch.from_numpy(scores).to(queries.device)
        for _ in points:
            yield found


def _places(gallery: Gallery, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of task rows in the gallery, of those that are in it, and which these are."""
    position = np.searchsorted(gallery.number, rows).clip(max=len(gallery.number) - 1)
    there = gallery.number[position] == rows
    return position[there], there
