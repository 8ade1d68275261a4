"""A gallery searched by the queries of a block: scores, ranks of the positives, best rows."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from utils_blocks import Block, Cells, Judged
from utils_explained import Explained, explain_part
from utils_metrics import positive_ranks
from utils_retrieval import Assets, Gallery, Method, Queries
from utils_runs import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# (query, row) pairs of a block that are scored together: fits the caches; fills a GPU
PAIRS_SCORED = {"cpu": 1 << 19, "cuda": 1 << 24}
PAIRS_COMPARED = 12 << 20  # (image, row) pairs of one product: 48 MiB, which malloc gives back,
IMAGES_COMPARED = 64  # of at least so many images: products of fewer wait for memory
PARTS = 4  # at least, for each thread
SCORES_RANKED = 1 << 22  # of several runs, together


# ---------------------------------------------------------------------------------------------
# Methods, prepared, and the time they take
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """A method with its prepared points, the numbers of their runs, and the features they read."""

    method: Method
    points: Sequence
    numbers: Sequence[int]
    reads: Sequence[str]


class Times:
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


def prepare(runs: Sequence[Run], assets: Assets, times: Times) -> Iterator[Prepared]:
    """Each method with its prepared points and the numbers of their runs.

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
        yield Prepared(method, prepared, numbers, tuple(reads))


# ---------------------------------------------------------------------------------------------
# Searching
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """What one run finds in one view of a block (or of a part of it, of fewer queries).

    ranks int32, tied bool: (p,), of the positives, on the device. top: scores float32 and positions
    int64 (q, K), best first, -1 where nothing is ranked, or None.
    """

    ranks: Tensor
    tied: Tensor
    top: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Search:
    """How galleries are searched. ties: see positive_ranks. tops: view -> best rows of a query."""

    ties: str
    tops: Mapping[str, int]
    times: Times

    def observe(
        self, prepared: Sequence[Prepared], queries: Queries, gallery: Gallery
    ) -> list[Prepared]:
        """Each method's points with what the gallery decides for these queries."""
        observed = []
        for p in prepared:
            with self.times.measure(p.method):
                observed.append(replace(p, points=p.method.observe(p.points, queries, gallery)))
        return observed

    def find(
        self, part: Block, queries: Queries, gallery: Gallery, observed: Sequence[Prepared]
    ) -> dict[int, dict[str, Found]]:
        """What all runs find for a part of a block, by number and view.

        Queries that score the same are ranked once; others a few at a time, for the caches' sake.
        """
        import torch

        found: dict[int, dict[str, Found]] = {}
        plain = all(v.excluded is None and v.candidates is None for v in part.views.values())
        in_pieces = []
        for p in observed:
            first, kind = slice(None), None
            if p.method.by_features and plain:
                read = torch.cat([queries[name] for name in p.reads], dim=1)
                first, kind = gallery.distinct(read)
            if kind is None:
                in_pieces.append(p)
            else:
                found |= self._rank(part, queries.some(first), gallery, [p], kind)
        if not in_pieces:
            return found
        size = _piece_size(part, queries.device)
        pieces = [
            self._rank(piece, queries.some(slice(i, i + size)), gallery, in_pieces)
            for i, piece in zip(range(0, len(part.queries), size), part.split(size), strict=True)
        ]
        for p in in_pieces:
            for number in p.numbers:
                own = [piece.pop(number) for piece in pieces]
                found[number] = {name: _joined([v[name] for v in own]) for name in part.views}
        return found

    def _rank(
        self,
        block: Block,
        queries: Queries,
        gallery: Gallery,
        observed: Sequence[Prepared],
        kind: Tensor | None = None,
    ) -> dict[int, dict[str, Found]]:
        """Score a gallery for a block's queries in all runs; what each finds, by number and view.

        kind: which of the queries each of the block's scores as, (q,), or None: they are these.
        """
        found: dict[int, dict[str, Found]] = {}
        for p in observed:
            with self.times.measure(p.method):
                pairs = zip(p.numbers, p.method.scores(p.points, queries, gallery), strict=True)
                for some in _batches(pairs, SCORES_RANKED // (len(block) * len(block.queries))):
                    numbers = [number for number, _ in some]
                    scores = [with_copies(block.copies, own) for _, own in some]
                    for name, judged in block.views.items():
                        top_k = self.tops.get(name, 0)
                        ranked = rank_view(judged, scores, self.ties, top_k, kind)
                        for number, own in zip(numbers, ranked, strict=True):
                            found.setdefault(number, {})[name] = own
        return found


def part_size(block: Block, device: torch.device, per_image: int) -> int:
    """How many queries of a block are compared by one product: of a CPU, parts for all threads.

    per_image: how many of them have a vector in common, on the average.
    """
    import torch

    size = max(IMAGES_COMPARED, PAIRS_COMPARED // len(block)) * per_image
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        return size
    share = -(-len(block.queries) // (PARTS * threads))
    return min(size, max(share, PAIRS_SCORED["cpu"] // len(block), 1))


def _piece_size(block: Block, device: torch.device) -> int:
    """How many queries of a part are scored together: those of an image, if they are that few."""
    size = max(1, PAIRS_SCORED[device.type] // len(block))
    return max(1, size // block.per_image) * block.per_image if size >= block.per_image else size


def _batches(pairs: Iterator, size: int) -> Iterator[list]:
    """Pairs in order, at most `size` at a time, at least one."""
    while batch := list(islice(pairs, max(1, size))):
        yield batch


def _joined(found: Sequence[Found]) -> Found:
    """What a run finds for some queries after others."""
    import torch

    if len(found) == 1:
        return found[0]
    tops = [own.top for own in found]
    top = None if None in tops else tuple(map(np.concatenate, zip(*tops, strict=True)))
    ranks, tied = (torch.cat([getattr(own, n) for own in found]) for n in ("ranks", "tied"))
    return Found(ranks, tied, top)


def explain(
    block: Block,
    queries: Queries,
    gallery: Gallery,
    observed: Sequence[Prepared],
    found: Mapping[int, Mapping[str, Found]],
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


def rank_view(
    judged: Judged, scores: Sequence[Tensor], ties: str, top_k: int, kind: Tensor | None
) -> list[Found]:
    """Rank the rows of a view in each run's scores (q, n); kind: see positive_ranks."""
    scores = [_ranked_scores(judged, own) for own in scores]
    ranked = positive_ranks(scores, *_on_device(judged.positives, scores[0]), ties, kind)
    tops = [best_rows(own, top_k) if top_k else None for own in scores]
    if kind is not None and top_k:
        tops = [tuple(part[kind.cpu().numpy()] for part in top) for top in tops]
    return [Found(ranks.int(), tied, top) for top, ranks, tied in zip(tops, *ranked, strict=True)]


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
