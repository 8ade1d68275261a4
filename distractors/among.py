"""Evaluation among distractors: the task's own galleries first, then the pool, then the sum."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distractors.counting import Counting, Part, find_thresholds, listen
from distractors.passes import LEFT_OUT, Found
from distractors.pool import QUERIES_AT_ONCE, Pool
from distractors.questions import Among, Answers, Asking, Unanswered, take_in
from utils_evaluation import Evaluation, evaluate, measure_columns, plan_columns
from utils_retrieval import Assets, Gallery, Method, Queries, equal_rows
from utils_task import View

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils_runs import Run
    from utils_storage import Features
    from utils_task import Task


Call = tuple[Sequence, Queries]  # the observed states of a method's points, and of which queries


# ---------------------------------------------------------------------------------------------
# Methods that are overheard
# ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Overheard:
    """A method that sees the pool behind every gallery, and what it observed of which queries.

    answers: None where observe sees the gallery alone. points: the parameters of its runs, in the
    order of the states. prepared: their states before observe, made once. observed: the numbers of
    some queries, as bytes -> their observed states, and the queries.
    """

    method: Method
    answers: Answers | None
    points: Sequence[Any] = ()
    prepared: Sequence | None = None
    observed: dict[bytes, Call] = field(default_factory=dict)

    @property
    def observes(self) -> bool:
        """Whether the method asks anything of a gallery before it scores."""
        return self.method.observe is not Method.observe

    def speaking(self) -> Method:
        """The method as an evaluation runs it."""
        return replace(self.method, prepare=self._prepare, observe=self._observe)

    def asking(self) -> Method:
        """The method without scores: it only asks what is not answered yet."""
        return replace(self.method, prepare=self._prepare, observe=self._ask, scores=_no_scores)

    def _prepare(self, points: Sequence, assets: Assets) -> Sequence:
        if self.prepared is None:
            self.points, self.prepared = tuple(points), self.method.prepare(points, assets)
        return self.prepared

    def _observe(self, states: Sequence, queries: Queries, gallery: Gallery) -> Sequence:
        key = queries.number.tobytes()
        if key not in self.observed:
            if self.answers is not None:
                gallery = Among.around(gallery, self.answers)
            self.observed[key] = self.method.observe(states, queries, gallery), queries
        return self.observed[key][0]

    def _ask(self, states: Sequence, queries: Queries, gallery: Gallery) -> Sequence:
        with contextlib.suppress(Unanswered):
            self._observe(states, queries, gallery)
        return states


def _no_scores(states: Sequence, queries: Queries, gallery: Gallery) -> Iterable[Tensor]:
    import torch

    for _ in states:
        yield torch.zeros(len(queries.number), len(gallery), device=queries.device)


def _hidden(features: Features) -> Features:
    """The features with a task that asks for nothing, so that nothing is ranked."""
    task = features.task
    views = {task.main_view: View(None)}
    hidden = replace(task, views=views, columns=(), means=(), submissions=(), breakdowns=())
    return replace(features, task=hidden)


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def make_parts(task: Task, overheard: Sequence[Overheard], runs: Sequence[Run]) -> list[Part]:
    """What the methods observed, as parts of some queries each, with all their positives.

    Queries of which a method observed nothing are put together, and those whose states agree, so
    that products, and what is made of them, are large. Of queries that score the same, by their
    features, a part has the first, with the positives of all.
    """
    positives = _Positives(task)
    parts = []
    for own in overheard:
        method = own.method
        of_run = {run.parameters: n for n, run in enumerate(runs) if run.method is method}
        numbers = [of_run[point] for point in own.points]
        # Threads have no order.
        seen = sorted(own.observed.values(), key=lambda call: int(call[1].number[0]))
        for calls in _alike(seen, method.of_queries) if own.observes else [seen]:
            states, queries = _joined(calls, method.of_queries)
            query, row = positives.of(queries.number)
            number = queries.number[query]
            if method.by_features and not own.observes:
                names = {name: 0 for p in own.points for name in method.query_features(p)}
                queries, kind = _distinct(queries, names)
                query = kind[query]
                order = np.argsort(query, kind="stable")
                query, row, number = query[order], row[order], number[order]
            divisible = not own.observes or method.together
            size = QUERIES_AT_ONCE if divisible else len(queries.number)
            for first, some in _split(queries, size):
                cells = slice(*np.searchsorted(query, [first, first + size]))
                if cells.start < cells.stop:
                    held = query[cells] - first, row[cells], number[cells]
                    parts.append(Part(method, states, own.points, numbers, some, *held))
    return parts


def _distinct(queries: Queries, names: Iterable[str]) -> tuple[Queries, np.ndarray]:
    """The first of all queries that agree in some features, and which of them each one is."""
    import torch

    first, kind = equal_rows(torch.cat([queries[name] for name in names], dim=1))
    return queries.some(first), kind.cpu().numpy()


def _alike(seen: Sequence[Call], of_queries: Sequence[str]) -> Iterator[list[Call]]:
    """Calls in groups of at most QUERIES_AT_ONCE whose states agree in all but these fields.

    Without these each is a group of its own.
    """
    group: list[Call] = []
    for states, queries in seen:
        count = sum(len(own.number) for _, own in group) + len(queries.number)
        if group and not (count <= QUERIES_AT_ONCE and _agree(group[0][0], states, of_queries)):
            yield group
            group = []
        group.append((states, queries))
    if group:
        yield group


def _agree(states: Sequence, others: Sequence, of_queries: Sequence[str]) -> bool:
    """Whether the states of the points, dataclasses, are the same in all but these fields."""
    return bool(of_queries) and all(
        _is_same(getattr(state, one.name), getattr(other, one.name))
        for state, other in zip(states, others, strict=True)
        for one in fields(state)
        if one.name not in of_queries
    )


def _is_same(value: Any, other: Any) -> bool:
    import torch

    return value is other or (not isinstance(value, torch.Tensor) and value == other)


def _joined(calls: Sequence[Call], of_queries: Sequence[str]) -> Call:
    """Calls whose states agree in all but these fields, as one."""
    import torch

    states, queries = zip(*calls, strict=True)
    features = {name: torch.cat([own[name] for own in queries]) for name in queries[0].features}
    number = np.concatenate([own.number for own in queries])
    words = [word for own in queries for word in own.words]
    held: dict[tuple, Tensor] = {}  # points share what they agree in

    def join(values: list[Tensor]) -> Tensor:
        key = tuple(map(id, values))
        if key not in held:
            held[key] = torch.cat(values)
        return held[key]

    joined = states[0]
    if of_queries:
        joined = [
            replace(of_point[0], **{n: join([getattr(s, n) for s in of_point]) for n in of_queries})
            for of_point in zip(*states, strict=True)
        ]
    return joined, Queries(features, number, words, queries[0].device)


def _split(queries: Queries, size: int) -> Iterable[tuple[int, Queries]]:
    """Queries by so many at a time, and the place of the first."""
    for first in range(0, len(queries.number), size):
        some = slice(first, first + size)
        features = {name: values[some] for name, values in queries.features.items()}
        yield first, Queries(features, queries.number[some], queries.words[some], queries.device)


class _Positives:
    """The positives of a task's queries in all views that distractors are ranked in."""

    def __init__(self, task: Task):
        pairs = [np.empty((2, 0), np.int64)]
        for view in ranked_views(task).values():
            query, row = task.sets.gather(view.positives)
            pairs.append(np.stack([query, row]))
        self.query, self.row = np.unique(np.concatenate(pairs, axis=1), axis=1)

    def of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in numbers, row) of the positives of some queries, sorted: int64 (P,) both."""
        start, stop = (np.searchsorted(self.query, numbers, side) for side in ("left", "right"))
        count = stop - start
        first = np.repeat(start - (np.cumsum(count) - count), count)
        return np.repeat(np.arange(len(numbers)), count), self.row[first + np.arange(count.sum())]


def ranked_views(task: Task) -> dict[str, View]:
    """The views in which distractors are ranked: not those of candidates, nor hidden ones."""
    return {
        name: view
        for name, view in task.views.items()
        if view.candidates is None and view.positives is not None
    }


def count_against(parts: Sequence[Part], features: Features, kinds: Sequence[str]) -> Counting:
    """What a counting pass needs of the parts: their positives' scores, the vectors compared."""
    rows = np.unique(np.concatenate([part.row for part in parts]))
    copy_of = features.task.gallery.copy_of
    shown = rows if copy_of is None else np.asarray(copy_of)[rows]  # copies score as the first does
    stored, place = np.unique(shown, return_inverse=True)
    arrays = {kind: features.database(kind).read(stored) for kind in kinds}
    thresholds = [
        find_thresholds(part, _rows(arrays, place[np.searchsorted(rows, part.row)], part))
        for part in parts
    ]
    widths = {kind: array.shape[1] for kind, array in arrays.items()}
    return Counting(parts, listen(parts, widths), thresholds)


def _rows(arrays: Mapping[str, np.ndarray], place: np.ndarray, part: Part) -> dict[str, Tensor]:
    import torch

    return {
        kind: torch.from_numpy(array[place].astype(np.float32)).to(part.queries.device)
        for kind, array in arrays.items()
    }


# ---------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Counts:
    """What one run found in the pool for each positive, sorted by key: int64 (P,) each.

    key: query * N + row, of N gallery rows. above, tied: distractors that score higher, as high.
    """

    key: np.ndarray
    above: np.ndarray
    tied: np.ndarray


def counts_of_runs(counting: Counting, found: Found, runs: int, rows: int) -> list[Counts]:
    """The counts of each run. rows: of the task's gallery."""
    parts: list[list[tuple]] = [[] for _ in range(runs)]
    above, tied = (counting.split(found[name]) for name in ("above", "tied"))
    for (run, part, own_above), (_, _, own_tied) in zip(above, tied, strict=True):
        key = part.number * rows + part.row
        parts[run].append((key, own_above, own_tied))
    counts = []
    for own in parts:
        key, above, tied = (np.concatenate(some) for some in zip(*own, strict=True))
        order = np.argsort(key)
        counts.append(Counts(key[order], above[order], tied[order]))
    return counts


def rank_among(evaluation: Evaluation, counts: Counts, distractors: int, ties: str) -> Evaluation:
    """An evaluation whose ranks count distractors too. ties: see positive_ranks."""
    task = evaluation.task
    views = dict(evaluation.views)
    for name in ranked_views(task):
        ranking, positives = views[name], views[name].positives
        key = positives.query * len(task.gallery) + positives.row
        place = np.searchsorted(counts.key, key)
        above, tied = counts.above[place], counts.tied[place]
        ranks = ranking.ranks + above + (tied if ties == "worst" else 0)
        of_query = np.bincount(positives.query[tied > 0], minlength=len(task.queries)) > 0
        views[name] = replace(
            ranking,
            positives=replace(positives, ranked=positives.ranked + distractors),
            ranks=ranks,
            tied=ranking.tied | of_query,
        )
    values = measure_columns(task, views)
    return replace(evaluation, views=views, values=values, columns=plan_columns(task)(values))


# ---------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Distractors:
    """A pool and how it is read.

    neighbours: what methods observe sees the pool's rows too ("all"), or the gallery's ("gallery").
    run_work: run_pass with all but the work, its kinds and the device.
    """

    pool: Pool
    run_work: Callable[..., Found]
    neighbours: str = "all"


def evaluate_among(
    features: Features,
    runs: Sequence[Run],
    assets: Assets,
    device: torch.device,
    distractors: Distractors,
    ties: str = "row",
) -> list[Evaluation]:
    """What evaluate yields, with the pool's rows ranked for every query behind its own gallery.

    Where scores are equal, a distractor is a row behind all of the gallery's. Views of candidates
    rank these alone. Rankings of best rows are not kept. Raises UserError as evaluate does.
    """
    import torch

    start = time.perf_counter()
    methods = list(dict.fromkeys(run.method for run in runs))
    kinds = list(dict.fromkeys(kind for method in methods for kind in method.gallery_reads))
    pool, sees_all = distractors.pool, distractors.neighbours == "all"
    run_work = partial(distractors.run_work, device=device)
    answers = Answers(len(pool), device)
    heard = {method: Overheard(method, answers if sees_all else None) for method in methods}
    asking = {method: own.asking() for method, own in heard.items() if own.observes and sees_all}
    while asking:
        evaluate(_hidden(features), _with_methods(runs, asking), assets, device)
        if not answers.is_open:
            break
        with torch.inference_mode():
            work = Asking.of(answers)
            take_in(answers, work, run_work(work, kinds=kinds), pool)
    speaking = {method: own.speaking() for method, own in heard.items()}
    evaluated = evaluate(features, _with_methods(runs, speaking), assets, device, ties)
    with torch.inference_mode():
        parts = make_parts(features.task, list(heard.values()), runs)
        if not parts:  # hidden ground truth
            return [replace(e, run=run) for e, run in zip(evaluated, runs, strict=True)]
        counting = count_against(parts, features, kinds)
        found = run_work(counting, kinds=kinds)
    counts = counts_of_runs(counting, found, len(runs), len(features.task.gallery))
    ranked = len(pool) - int(found[LEFT_OUT][0])
    total = time.perf_counter() - start
    working = sum(evaluation.seconds for evaluation in evaluated) or 1.0
    return [
        rank_among(
            replace(e, run=run, seconds=total * e.seconds / working, total_seconds=total),
            *(own, ranked, ties),
        )
        for e, run, own in zip(evaluated, runs, counts, strict=True)
    ]


def _with_methods(runs: Sequence[Run], methods: Mapping[Method, Method]) -> list[Run]:
    """The runs of some methods, with others in their place."""
    return [replace(run, method=methods[run.method]) for run in runs if run.method in methods]
