"""One pass over a task: gallery blocks to scores to ranks in every view, for any number of runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError
from utils_blocks import Block, Cells, Judged, make_blocks, search_blocks, search_parts
from utils_explained import Explained, collect_explained, explain_part, rows_sampled
from utils_metrics import average, measure, plan_steps, positive_ranks
from utils_retrieval import Assets, Gallery, Method, Queries, Rows, unit_rows
from utils_runs import Run, shown_parameters
from utils_storage import Features, QueryRows
from utils_task import Task

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

# (query, row) pairs of a block that are scored together: fits the caches; fills a GPU
PAIRS_SCORED = {"cpu": 1 << 19, "cuda": 1 << 24}
PAIRS_COMPARED = 9 << 20  # (image, row) pairs of one product: 36 MiB, more than malloc holds on to,
IMAGES_COMPARED = 64  # of at least so many images: products of fewer wait for memory
PARTS = 4  # at least, for each thread
SCORES_RANKED = 1 << 22  # of several runs, together


# ---------------------------------------------------------------------------------------------
# What an evaluation yields
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Positives:
    """The positives of all queries in a view: int64 (P,) each, sorted by query, then row.

    count: int64 (Q,), positives of each query. ranked: int64 (Q,), rows that are ranked for it.
    """

    query: np.ndarray
    row: np.ndarray
    count: np.ndarray
    ranked: np.ndarray


@dataclass(frozen=True, eq=False)
class Ranking:
    """What one run yields in one view.

    ranks: int32 (P,), 0-based, of the positives. tied: bool (Q,), a positive ties with a negative.
    top_rows: int64 (Q, K) database rows, best first, -1 past the end of a small gallery;
    top_scores: float32 (Q, K). K is 0 where no ranking was asked for.
    """

    positives: Positives
    ranks: np.ndarray
    tied: np.ndarray
    top_rows: np.ndarray
    top_scores: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one run of a method over a task yields.

    views: name -> Ranking. values: (measure, view) -> float64 (Q,), for the task's columns.
    columns: the task's columns and means, in percent. seconds: of the pass, shared among its runs
    by the time that their methods' own work took; total_seconds: of all passes. explained: what
    the scores are made of, where that was asked for and the method tells.
    """

    run: Run
    backbone: str
    task: Task
    views: Mapping[str, Ranking]
    values: Mapping[tuple[str, str], np.ndarray]
    columns: Mapping[str, float]
    seconds: float
    total_seconds: float = 0.0
    explained: Explained | None = None

    def means(self) -> dict[str, float]:
        """The task's columns and means by name, in percent."""
        return dict(self.columns)

    @property
    def method(self) -> str:
        return self.run.method.name

    @property
    def variant(self) -> str:
        return self.run.variant

    @property
    def config(self) -> dict[str, str]:
        """The method's parameters, by name, as tables show them."""
        return shown_parameters(self.run.parameters)

    @property
    def main(self) -> Ranking:
        """The ranking in the task's main view."""
        return self.views[self.task.main_view]

    @property
    def tied(self) -> np.ndarray:
        """Queries of which a positive ties with a negative in any view, bool (Q,)."""
        return np.logical_or.reduce([ranking.tied for ranking in self.views.values()])

    @cached_property
    def positive_ranks(self) -> list[np.ndarray]:
        """For each query the 0-based ranks of its positives in the main view, int32, rising."""
        return self._by_query(self.main.ranks)

    @cached_property
    def positive_rows(self) -> list[np.ndarray]:
        """For each query the database rows of its positives, int64, in the order of their ranks."""
        return self._by_query(self.main.positives.row)

    def _by_query(self, values: np.ndarray) -> list[np.ndarray]:
        positives = self.main.positives
        order = np.lexsort((self.main.ranks, positives.query))
        return np.split(values[order], np.cumsum(positives.count)[:-1])


# ---------------------------------------------------------------------------------------------
# Searching a block
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A method with its prepared points, the numbers of their runs, and the features they read."""

    method: Method
    points: Sequence
    numbers: Sequence[int]
    reads: Sequence[str]


class _Times:
    """The seconds that methods' own work took, whichever threads did it."""

    def __init__(self, device: torch.device):
        self.device, self.of = device, defaultdict(float)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, method: Method) -> Iterator[None]:
        """What happens inside is the method's work."""
        start = self._now()
        try:
            yield
        finally:
            with self._lock:
                self.of[method] += self._now() - start

    def _now(self) -> float:
        """The time when the device has done what it was given."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def share(self, method: Method) -> float:
        """The share of a method in the work of all."""
        return self.of[method] / (sum(self.of.values()) or 1.0)


@dataclass(frozen=True, eq=False)
class _Found:
    """What one run finds in one view of a block (or of a part of it, of fewer queries).

    ranks int32, tied bool: (p,), of the positives, on the device. top: scores float32 and positions
    int64 (q, K), best first, -1 where nothing is ranked, or None.
    """

    ranks: Tensor
    tied: Tensor
    top: tuple[np.ndarray, np.ndarray] | None


def _batches(pairs: Iterator, size: int) -> Iterator[list]:
    """Pairs in order, at most `size` at a time, at least one."""
    while batch := list(islice(pairs, max(1, size))):
        yield batch


def _observe(
    prepared: Sequence[_Prepared], queries: Queries, gallery: Gallery, times: _Times
) -> list[_Prepared]:
    """Each method's points with what the gallery decides for these queries."""
    observed = []
    for p in prepared:
        with times.measure(p.method):
            observed.append(replace(p, points=p.method.observe(p.points, queries, gallery)))
    return observed


def _find_part(
    part: Block,
    queries: Queries,
    gallery: Gallery,
    observed: Sequence[_Prepared],
    ties: str,
    tops: Mapping[str, int],
    times: _Times,
) -> dict[int, dict[str, _Found]]:
    """What all runs find for a part of a block, by number and view.

    Queries that score the same are ranked once; others a few at a time, for the caches' sake.
    """
    import torch

    found: dict[int, dict[str, _Found]] = {}
    plain = all(view.excluded is None and view.candidates is None for view in part.views.values())
    in_pieces = []
    for p in observed:
        first, kind = slice(None), None
        if p.method.by_features and plain:
            read = torch.cat([queries[name] for name in p.reads], dim=1)
            first, kind = gallery.distinct(read)
        if kind is None:
            in_pieces.append(p)
        else:
            found |= _find(part, queries.some(first), gallery, [p], ties, tops, times, kind)
    size = max(1, PAIRS_SCORED[queries.device.type] // len(part))
    pieces = [
        _find(piece, queries.some(slice(i, i + size)), gallery, in_pieces, ties, tops, times)
        for i, piece in zip(range(0, len(part.queries), size), part.split(size), strict=True)
    ]
    for p in in_pieces:
        for number in p.numbers:
            own = [piece.pop(number) for piece in pieces]
            found[number] = {name: _joined([views[name] for views in own]) for name in part.views}
    return found


def _joined(found: Sequence[_Found]) -> _Found:
    """What a run finds for some queries after others."""
    import torch

    if len(found) == 1:
        return found[0]
    tops = [own.top for own in found]
    top = None if None in tops else tuple(map(np.concatenate, zip(*tops, strict=True)))
    ranks, tied = (torch.cat([getattr(own, n) for own in found]) for n in ("ranks", "tied"))
    return _Found(ranks, tied, top)


def _find(
    block: Block,
    queries: Queries,
    gallery: Gallery,
    observed: Sequence[_Prepared],
    ties: str,
    tops: Mapping[str, int],
    times: _Times,
    kind: Tensor | None = None,
) -> dict[int, dict[str, _Found]]:
    """Score a gallery for a block's queries in all runs; what each finds, by number and view.

    kind: which of the queries each of the block's scores as, int64 (q,), or None: they are these.
    """
    found: dict[int, dict[str, _Found]] = {}
    for p in observed:
        with times.measure(p.method):
            pairs = zip(p.numbers, p.method.scores(p.points, queries, gallery), strict=True)
            for some in _batches(pairs, SCORES_RANKED // (len(block) * len(block.queries))):
                numbers = [number for number, _ in some]
                scores = [with_copies(block.copies, own) for _, own in some]
                for name, judged in block.views.items():
                    ranked = _rank(judged, scores, ties, tops.get(name, 0), kind)
                    for number, own in zip(numbers, ranked, strict=True):
                        found.setdefault(number, {})[name] = own
    return found


def _explain(
    block: Block,
    queries: Queries,
    gallery: Gallery,
    observed: Sequence[_Prepared],
    found: Mapping[int, Mapping[str, _Found]],
    main: str,
    sampled: int,
) -> dict[int, Explained]:
    """What the scores of a block's queries are made of, by run, of methods that tell."""
    import torch

    judged, explained = block.views[main], {}
    ranked = torch.zeros((len(block.queries), len(block)), device=queries.device)
    ranked = ~_ranked_scores(judged, ranked).isneginf()
    for p in observed:
        for number, state in zip(p.numbers, p.points, strict=True) if p.method.parts else ():
            own, parts = found[number][main], p.method.parts(state, queries, gallery)
            positives = judged.positives, own.ranks.cpu().numpy()
            explained[number] = explain_part(parts, block, positives, ranked, own.top[1], sampled)
    return explained


def with_copies(copies: np.ndarray | None, scores: Tensor) -> Tensor:
    """Scores (q, n) in which a picture's copies (Block.copies) score as the first does.

    A product of matrices may part equal columns by the last bit, which would decide ties.
    """
    import torch

    if copies is None:
        return scores
    copy, first = torch.from_numpy(copies).to(scores.device)
    return scores.index_copy(1, copy, scores[:, first])


def _rank(
    judged: Judged, scores: Sequence[Tensor], ties: str, top_k: int, kind: Tensor | None
) -> list[_Found]:
    """Rank the rows of a view in each run's scores (q, n); kind: see _find."""
    scores = [_ranked_scores(judged, own) for own in scores]
    ranked = positive_ranks(scores, *_on_device(judged.positives, scores[0]), ties, kind)
    tops = [best_rows(own, top_k) if top_k else None for own in scores]
    if kind is not None and top_k:
        tops = [tuple(part[kind.cpu().numpy()] for part in top) for top in tops]
    return [_Found(ranks.int(), tied, top) for top, ranks, tied in zip(tops, *ranked, strict=True)]


def _ranked_scores(judged: Judged, scores: Tensor) -> Tensor:
    """Scores (q, n) in which rows that are not ranked have -inf."""
    if judged.candidates is not None:
        cells = _on_device(judged.candidates, scores)
        ranked = scores.new_full(scores.shape, -np.inf)
        ranked[cells] = scores[cells]
        scores = ranked
    if judged.excluded is not None:
        scores = scores.clone()
        scores[_on_device(judged.excluded, scores)] = -np.inf
    return scores


def _on_device(cells: Cells, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and rows of cells, int64 (p,) both, where the scores are."""
    import torch

    return tuple(torch.from_numpy(index).to(scores.device) for index in (cells.query, cells.row))


def best_rows(scores: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best scores of every query and their positions: (Q, N) -> twice (Q, min(k, N)).

    Equal scores in the order of their positions. Only where more of them than there is room for
    share the last place is the whole row sorted.
    """
    k = min(k, scores.shape[1])
    value, position = scores.topk(k)
    position, order = position.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    position = position.gather(1, order)
    crowded = (scores >= value[:, -1:]).sum(1) > k
    if crowded.any():
        ordered = scores[crowded].sort(dim=1, descending=True, stable=True)
        value[crowded], position[crowded] = (part[:, :k] for part in ordered)
    value, position = value.cpu().numpy(), position.cpu().numpy()
    return value, np.where(np.isneginf(value), -1, position)


# ---------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------


def evaluate(
    features: Features,
    runs: Sequence[Run],
    assets: Assets,
    device: torch.device,
    ties: str = "row",
    tops: Mapping[str, int] | None = None,
    progress=lambda blocks, count: blocks,
    explain: bool = False,
) -> list[Evaluation]:
    """Run methods over a task in one pass.

    assets: on the device. ties: see positive_ranks. tops: view -> how many best rows to keep per
    query. progress: wraps what the blocks yield, whose number it is told (tqdm). explain: the
    methods that can tell what the best rows' scores are made of. Methods that keep a tag's queries
    together are run in a pass of their own. Raises UserError if there are no
    queries, for a positive outside its gallery, and for a row that is zero, infinite or NaN.
    """
    passes = {}
    for number, run in enumerate(runs):
        passes.setdefault(run.method.together, []).append(number)
    found: dict[int, Evaluation] = {}
    telling = sum(1 for run in runs if run.method.parts)
    sampled = rows_sampled(len(features.task.queries), telling) if explain else None
    start = time.perf_counter()
    for together, numbers in passes.items():
        some = [runs[number] for number in numbers]
        blocks = make_blocks(features.task, together)
        evaluations = _evaluate(
            *(features, some, assets, device, ties, tops or {}, progress, blocks, bool(together)),
            sampled,
        )
        found |= dict(zip(numbers, evaluations, strict=True))
    total = time.perf_counter() - start
    return [replace(found[number], total_seconds=total) for number in range(len(runs))]


def _evaluate(
    features: Features,
    runs: Sequence[Run],
    assets: Assets,
    device: torch.device,
    ties: str,
    tops: Mapping[str, int],
    progress,
    blocks: list[Block],
    whole: bool,
    sampled: int | None,
) -> list[Evaluation]:
    """The runs of one pass. whole: what observes the queries of a block sees all of them.

    sampled: gallery rows a query that are explained, None where nothing is.
    """
    import torch

    start = time.perf_counter()
    if not blocks:
        raise UserError(f"{features.folder} holds no query; extract the features again")
    queries = {
        name: unit_queries(features.query(name), device)
        for name in dict.fromkeys(n for r in runs for n in r.method.query_features(r.parameters))
    }
    kinds = dict.fromkeys(name for run in runs for name in run.method.gallery_reads)
    database = {name: features.database(name) for name in kinds}
    times = _Times(device)
    prepared = list(_by_method(runs, assets, times))
    text = features.task.queries.text

    @torch.inference_mode()
    def search(block: Block, raw: dict[str, Tensor]) -> list[tuple[Block, dict, dict]]:
        """Every part of a block with what the runs find in it, and what that is made of."""
        kinds = {name: Rows.of(rows) for name, rows in raw.items()}
        gallery = Gallery(kinds, block.database_rows(np.arange(len(block))))
        _check_rows(gallery, block, features)
        observed = _observe(prepared, select(block), gallery, times) if whole else None

        @torch.inference_mode()
        def search_part(part: Block) -> tuple[Block, dict, dict]:
            some = select(part)
            own = observed or _observe(prepared, some, gallery, times)
            found, made = _find_part(part, some, gallery, own, ties, tops, times), {}
            if sampled is not None:
                main = features.task.main_view
                made = _explain(part, some, gallery, own, found, main, sampled)
            return part, found, made

        return search_parts(search_part, list(block.split(_part_size(block, device))), device)

    def select(block: Block) -> Queries:
        """The queries of a block with their features."""
        own = {name: rows.select(block.queries) for name, rows in queries.items()}
        return Queries(own, block.queries, [text[query] for query in block.queries], device)

    with contextlib.closing(search_blocks(search, database, blocks, device)) as searches:
        searched = chain.from_iterable(progress(searches, len(blocks)))
        parts, found, made = zip(*searched, strict=True)
    views = {name: _all_positives(features.task, name, parts) for name in features.task.views}
    averaged = plan_columns(features.task)
    evaluations = []
    for number, run in enumerate(runs):
        own = [by_run.pop(number) for by_run in found]  # of many runs, not all are kept twice
        rankings = {
            name: _collect(parts, [part[name] for part in own], *views[name], tops.get(name, 0))
            for name in views
        }
        values = measure_columns(features.task, rankings)
        columns = averaged(values)
        told = [part.pop(number) for part in made if number in part]
        explained = collect_explained(parts, told, len(features.task.queries)) if told else None
        common = (run, features.backbone, features.task, rankings, values, columns)
        evaluations.append(Evaluation(*common, 0.0, explained=explained))
    seconds = time.perf_counter() - start
    runs_of = Counter(run.method for run in runs)
    return [
        replace(e, seconds=seconds * times.share(e.run.method) / runs_of[e.run.method])
        for e in evaluations
    ]


def _part_size(block: Block, device: torch.device) -> int:
    """How many queries of a block are compared by one product: of a CPU, parts for all threads."""
    import torch

    images = max(IMAGES_COMPARED, PAIRS_COMPARED // len(block))
    size = images * len(block.queries) // block.images
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        return size
    share = -(-len(block.queries) // (PARTS * threads))
    return min(size, max(share, PAIRS_SCORED["cpu"] // len(block), 1))


def _by_method(runs: Sequence[Run], assets: Assets, times: _Times) -> Iterator[_Prepared]:
    """For each method its prepared points and the numbers of their runs.

    Runs are put in the order of their parameters, so that those that differ in the last ones alone
    (harris_lambda) lie side by side and share most.
    """
    for method in dict.fromkeys(run.method for run in runs):
        numbers = [number for number, run in enumerate(runs) if run.method is method]
        numbers.sort(key=lambda number: astuple(runs[number].parameters))
        points = [runs[number].parameters for number in numbers]
        reads = dict.fromkeys(name for p in points for name in method.query_features(p))
        with times.measure(method):
            prepared = method.prepare(points, assets)
        yield _Prepared(method, prepared, numbers, tuple(reads))


def _collect(
    blocks: Sequence[Block],
    found: Sequence[_Found],
    positives: Positives,
    order: np.ndarray,
    k: int,
) -> Ranking:
    """What the parts of a run found in a view, put together."""
    import torch

    count = len(positives.count)
    ranks = torch.cat([part.ranks for part in found]).cpu().numpy()[order]
    tied = torch.cat([part.tied for part in found]).cpu().numpy()[order]
    top_rows, top_scores = _top(blocks, [part.top for part in found], count, k)
    tied = np.bincount(positives.query[tied], minlength=count) > 0
    return Ranking(positives, ranks, tied, top_rows, top_scores)


def measure_columns(
    task: Task, rankings: Mapping[str, Ranking]
) -> dict[tuple[str, str], np.ndarray]:
    """Every measure of the task's columns, for each query."""
    values = {}
    for name, view in dict.fromkeys((column.measure, column.view) for column in task.columns):
        own, positives = rankings[view], rankings[view].positives
        values[name, view] = measure(
            name, own.ranks, positives.query, positives.count, positives.ranked
        )
    return values


def plan_columns(task: Task) -> Callable[[Mapping], dict[str, float]]:
    """What averages the measured values of a run to the task's columns and means."""
    tags, queries = task.queries.tags, len(task.queries)
    steps = {column.name: plan_steps(queries, column.groups, tags) for column in task.columns}

    def averaged(values: Mapping[tuple[str, str], np.ndarray]) -> dict[str, float]:
        columns = {c.name: average(values[c.measure, c.view], steps[c.name]) for c in task.columns}
        means = {m.name: float(np.mean([columns[name] for name in m.of])) for m in task.means}
        return columns | means

    return averaged


# ---------------------------------------------------------------------------------------------
# Query features
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _UnitQueries:
    """Query features on the device, mostly at unit length: values (d, D); row (Q,), or None."""

    values: Tensor
    row: Tensor | None

    def select(self, queries: np.ndarray) -> Tensor:
        """The rows of some queries, int64 (q,) -> (q, D)."""
        import torch

        index = torch.from_numpy(queries).to(self.values.device)
        return self.values.index_select(0, index if self.row is None else self.row[index])


def unit_queries(rows: QueryRows, device: torch.device) -> _UnitQueries:
    """Raises UserError for a row that is zero, infinite or NaN."""
    import torch

    if rows.is_unit:
        values = unit_features(rows.values, device, rows.place)
    else:
        values = torch.tensor(rows.values, device=device)  # a copy: the file is read-only
    if rows.of is not None:  # the mean of the features of a query's images
        of = torch.from_numpy(rows.of).to(device)
        used = (of >= 0).float()[..., None]
        sums = (values[of.clamp(min=0)] * used).sum(1)
        return _UnitQueries(unit_rows(sums) if rows.is_unit else sums / used.sum(1), None)
    row = None if rows.row is None else torch.from_numpy(rows.row).to(device)
    return _UnitQueries(values, row)


def unit_features(array: np.ndarray, device: torch.device, place: str) -> Tensor:
    """Feature rows at unit length on the device: (rows, D) float32 -> the same.

    Raises UserError, with the place and the row, for a row that is zero, infinite or NaN.
    """
    import torch

    raw = torch.from_numpy(array).to(device)
    length = raw.norm(dim=1)
    rows, bad = unit_rows(raw), (~((length > 0) & length.isfinite())).nonzero()
    if len(bad):
        raise UserError(f"{place}: row {int(bad[0]) + 1} is zero or not finite; make them again")
    return rows


def _check_rows(gallery: Gallery, block: Block, features: Features) -> None:
    for name, rows in gallery.kinds.items():
        check_lengths(rows.length, features.database(name).path, block.database_rows)


def check_lengths(
    length: Tensor, path: Path, number: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> None:
    """Raise UserError for a row of a file whose length, of (N,), is zero or not finite.

    number: the rows of the file at some positions, int64 (n,) both.
    """
    usable = (length > 0) & length.isfinite()
    if not usable.all():
        row = number((~usable).nonzero()[0].cpu().numpy())[0]
        raise UserError(f"{path}: row {row + 1} is zero or not finite; extract it again")


# ---------------------------------------------------------------------------------------------
# Putting parts together
# ---------------------------------------------------------------------------------------------


def _all_positives(task: Task, view: str, blocks: Sequence[Block]) -> tuple[Positives, np.ndarray]:
    """All positives of a view in query order, and the order that brings the blocks' to it."""
    cells = [block.views[view].positives for block in blocks]
    queries = np.concatenate([block.queries for block in blocks])
    sizes = [
        np.bincount(c.query, minlength=len(b.queries)) for b, c in zip(blocks, cells, strict=True)
    ]
    row = np.concatenate([b.database_rows(c.row) for b, c in zip(blocks, cells, strict=True)])
    by_query, size = np.argsort(queries), np.concatenate(sizes)
    start, size = (np.cumsum(size) - size)[by_query], size[by_query]
    query = np.repeat(queries[by_query], size)
    order = np.repeat(start - (np.cumsum(size) - size), size)
    order += np.arange(len(order))
    count = np.bincount(query, minlength=len(task.queries))
    ranked = np.zeros(len(task.queries), np.int64)
    for block in blocks:
        ranked[block.queries] = _ranked_rows(block, block.views[view])
    return Positives(query, row[order], count, ranked), order


def _ranked_rows(block: Block, judged: Judged) -> np.ndarray:
    """How many rows are ranked for each query of a block, int64 (q,)."""
    queries, rows = len(block.queries), len(block)
    if judged.candidates is None:
        ranked = np.full(queries, rows)
        out = judged.excluded and judged.excluded.query
    else:
        candidates = judged.candidates.query * rows + judged.candidates.row
        ranked = np.bincount(judged.candidates.query, minlength=queries)
        out = (
            judged.excluded
            and judged.excluded.query[
                np.isin(judged.excluded.query * rows + judged.excluded.row, candidates)
            ]
        )
    return ranked if out is None else ranked - np.bincount(out, minlength=queries)


def _top(
    blocks: Sequence[Block], top: Sequence, queries: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Top rows int64 (Q, K) and scores float32 (Q, K) from the blocks' (scores, positions)."""
    k = min(k, max(map(len, blocks)))
    rows = np.full((queries, k), -1, dtype=np.int64)
    scores = np.full((queries, k), -np.inf, dtype=np.float32)
    for block, (value, position) in zip(blocks, top, strict=True) if k else ():
        rows[block.queries, : position.shape[1]] = block.database_rows(position)
        scores[block.queries, : value.shape[1]] = value
    return rows, scores
