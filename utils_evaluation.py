"""One pass over a task: gallery blocks to scores to ranks in every view, for any number of runs."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError
from utils_blocks import Block, Judged, make_blocks, search_blocks, search_parts
from utils_explained import Explained, collect_explained, rows_sampled
from utils_metrics import average, measure, plan_steps
from utils_retrieval import Assets, Gallery, Queries, Rows, unit_rows
from utils_runs import Run, shown_parameters
from utils_search import Found, Search, Times, explain, part_size, prepare
from utils_storage import Features, QueryRows
from utils_task import Task

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor


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
    searching = Search(ties, tops, Times(device))
    prepared = list(prepare(runs, assets, searching.times))
    text = features.task.queries.text

    @torch.inference_mode()
    def search(block: Block, raw: dict[str, Tensor]) -> list[tuple[Block, dict, dict]]:
        """Every part of a block with what the runs find in it, and what that is made of."""
        kinds = {name: Rows.of(rows) for name, rows in raw.items()}
        gallery = Gallery(kinds, block.database_rows(np.arange(len(block))))
        _check_rows(gallery, block, features)
        observed = searching.observe(prepared, select(block), gallery) if whole else None

        @torch.inference_mode()
        def search_part(part: Block) -> tuple[Block, dict, dict]:
            some = select(part)
            own = observed or searching.observe(prepared, some, gallery)
            found, made = searching.find(part, some, gallery, own), {}
            if sampled is not None:
                main = features.task.main_view
                made = explain(part, some, gallery, own, found, main, sampled)
            return part, found, made

        # What sees all queries makes each a vector of its own.
        size = part_size(block, device, 1 if whole else block.per_image)
        return search_parts(search_part, list(block.split(size)), device)

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
        replace(e, seconds=seconds * searching.times.share(e.run.method) / runs_of[e.run.method])
        for e in evaluations
    ]


def _collect(
    blocks: Sequence[Block],
    found: Sequence[Found],
    positives: Positives,
    spans: Sequence[slice],
    k: int,
) -> Ranking:
    """What the parts of a run found in a view, put together."""
    import torch

    count = len(positives.count)
    ranks = _in_order(torch.cat([part.ranks for part in found]).cpu().numpy(), spans)
    tied = _in_order(torch.cat([part.tied for part in found]).cpu().numpy(), spans)
    top_rows, top_scores = _top(blocks, [part.top for part in found], count, k)
    tied = np.bincount(positives.query[np.flatnonzero(tied)], minlength=count) > 0
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


def _all_positives(task: Task, view: str, blocks: Sequence[Block]) -> tuple[Positives, list[slice]]:
    """All positives of a view in query order, and where the blocks have those of each query."""
    cells = [block.views[view].positives for block in blocks]
    queries = np.concatenate([block.queries for block in blocks])
    sizes = [
        np.bincount(c.query, minlength=len(b.queries)) for b, c in zip(blocks, cells, strict=True)
    ]
    row = np.concatenate([b.database_rows(c.row) for b, c in zip(blocks, cells, strict=True)])
    by_query, size = np.argsort(queries), np.concatenate(sizes)
    stop = np.cumsum(size)
    spans = list(map(slice, (stop - size)[by_query].tolist(), stop[by_query].tolist()))
    query = np.repeat(queries[by_query], size[by_query])
    count = np.bincount(query, minlength=len(task.queries))
    ranked = np.zeros(len(task.queries), np.int64)
    for block in blocks:
        ranked[block.queries] = _ranked_rows(block, block.views[view])
    return Positives(query, _in_order(row, spans), count, ranked), spans


def _in_order(values: np.ndarray, spans: Sequence[slice]) -> np.ndarray:
    """The spans of the values one after another."""
    return np.concatenate([values[span] for span in spans])


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
