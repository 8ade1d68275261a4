"""How many rows of a pool score above each positive, and how many as high: a pass without a matrix.

What a measure needs of distractors is, for each positive, how many of them rank before it. The
positives' scores (thresholds) are computed first, in float64; then rows are scored a few at a time
in float32 as in every evaluation, by one product for all vectors that all methods compare them
with, and counted. A row whose score lies within the margin of a threshold is scored once more, in
float64, so that what is counted depends neither on how rows are cut into blocks nor on the machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from distractors.pool import Buffers, rows_at_once
from distractors.precision import FULL, multiply, rounded
from distractors.thresholds import Counter, Near, Thresholds, count_exact, count_scores
from utils_retrieval import Gallery, Method, Queries, Rows, equal_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distractors.pool import Chunk

NUMBERS_AT_ONCE = 1 << 22  # of the rows of pairs that are scored together in float64
NEAR_OF_A_QUERY = 8  # rows near a threshold, on average, after which they are scored again


# ---------------------------------------------------------------------------------------------
# Parts: some queries with what a method observed for them
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Some queries as a method sees them: its observed points, R of them, one for each run.

    parameters, runs: of each point, and the number of its run. query, row: int64 (P,), the
    positives by the place of their query in the part and by their row of the task's gallery, sorted
    by query. number: int64 (P,), the query of the task whose positives they are, which scores as
    that of the part does.
    """

    method: Method
    points: Sequence[Any]
    parameters: Sequence[Any]
    runs: Sequence[int]
    queries: Queries
    query: np.ndarray
    row: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.queries.number)

    def scores(self, gallery: Gallery) -> Iterator[Tensor]:
        """The scores of a gallery's rows in each run, (Q, n) each; nothing is remembered."""
        return self.method.scores(self.points, self.queries.anew(), gallery)


Distinct = tuple["slice | Tensor", "Tensor | None"]  # see Gallery.distinct


@dataclass(frozen=True, eq=False)
class Listening(Gallery):
    """A gallery that notes which of the vectors it is asked about are distinct, and compares these.

    asked: (kind, distinct vectors, mean or None) of each question.
    """

    said: list[Distinct] = field(default_factory=list)
    asked: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list)

    def distinct(self, vectors: Tensor) -> Distinct:
        first, kind = equal_rows(vectors)
        self.said.append((first, kind) if len(first) < len(kind) else (slice(None), None))
        return self.said[-1]

    def similarities(self, parts: Mapping, of: str = "image", few: Collection = ()) -> dict:
        self.asked.extend((of, vectors, mean) for vectors, mean in parts.values())
        return super().similarities(parts, of)


@dataclass(frozen=True, eq=False)
class Answering(Gallery):
    """A gallery that says what one said that listened, of similarities that are computed already.

    said: of each vectors that it is asked about, found: (u, n) of each question, u its distinct
    vectors, both in the order in which that one was asked. open: what was said since the last
    question, which may be about the vectors themselves where they have no room.
    """

    said: Iterator[Distinct] = field(default_factory=lambda: iter(()))
    found: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    open: list[Distinct] = field(default_factory=list)

    def distinct(self, vectors: Tensor) -> Distinct:
        self.open.append(next(self.said))
        return self.open[-1]

    def pick(self, vectors: Tensor, first: Tensor | slice) -> Tensor:
        """As many, whichever: they have been compared."""
        return vectors[first] if isinstance(first, slice) else vectors[: first.numel()]

    def similarities(self, parts: Mapping, of: str = "image", few: Collection = ()) -> dict:
        kinds = [kind for _, kind in self.open] or [None] * len(parts)
        self.open.clear()
        found = {}
        for (name, (vectors, _)), kind in zip(parts.items(), kinds, strict=True):
            own = next(self.found)
            found[name] = own if own.shape[0] == vectors.shape[0] else own.index_select(0, kind)
        return found


@dataclass(frozen=True, eq=False)
class Pairs(Gallery):
    """A gallery in which some queries have K rows of their own: raw (q, K, D), length (Q, K).

    which: int64 (q,), which queries these are; others compare with nothing, and score so.
    """

    which: Tensor = None

    def distinct(self, vectors: Tensor) -> tuple[slice, None]:
        return slice(None), None

    def similarities(self, parts: Mapping, of: str = "image", few: Collection = ()) -> dict:
        import torch

        rows, found = self.kinds[of], {}
        for name, (vectors, mean) in parts.items():
            vectors = vectors.to(rows.raw.dtype)
            own = (rows.raw * vectors[self.which][:, None]).sum(2) / rows.length[self.which]
            found[name] = torch.zeros_like(rows.length).index_copy_(0, self.which, own)
            if mean is not None:
                found[name] -= (vectors @ mean.to(vectors.dtype))[:, None]
        return found


def pair_scores(
    part: Part, query: np.ndarray, raw: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """The scores of single (query, row) pairs in every run: (R, E) of that type.

    query: int64 (E,), places in the part. raw: the rows of the pairs by kind, (E, D). Of queries
    that have more rows than others, ever more are scored together, so that few places are empty.
    """
    import torch

    device = next(iter(raw.values())).device
    order = np.argsort(query, kind="stable")
    count = np.bincount(query, minlength=len(part))
    slot = np.empty_like(query)
    slot[order] = np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count)
    found = torch.empty((len(part.points), len(query)), dtype=dtype, device=device)
    wide = max(values.shape[1] for values in raw.values())
    first, most = 0, int(count.max(initial=0))
    while first < most:
        which = np.flatnonzero(count > first)
        slots = max(1, min(first, most - first, NUMBERS_AT_ONCE // (len(which) * wide)))
        some = np.flatnonzero((slot >= first) & (slot < first + slots))
        line = np.searchsorted(which, query[some])
        place, which, line, column, own_query = (
            torch.from_numpy(index).to(device)
            for index in (some, which, line, slot[some] - first, query[some])
        )
        kinds = {}
        for name, values in raw.items():
            own = torch.ones((len(which), slots, values.shape[1]), dtype=dtype, device=device)
            own[line, column] = values[place].to(dtype)
            length = torch.ones((len(part), slots), dtype=dtype, device=device)
            kinds[name] = Rows(own, length.index_copy_(0, which, own.norm(dim=2)))
        for run, scores in enumerate(part.scores(Pairs(kinds, which=which))):
            found[run, place] = scores[own_query, column]
        first += slots
    return found


def find_thresholds(part: Part, raw: Mapping[str, Tensor]) -> list[Thresholds]:
    """The thresholds of each run of a part. raw: the rows of its positives by kind, (p, D)."""
    import torch

    exact = pair_scores(part, part.query, raw, torch.float64)
    rough = pair_scores(part, part.query, raw, torch.float32)
    runs = zip(exact, rough, strict=True)
    return [Thresholds.of(part.query, len(part), *run) for run in runs]


# ---------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Compared:
    """The distinct vectors that all parts compare with rows, and who asks for which.

    vectors: kind -> float32 (U, D). said: for each part, which are distinct of the vectors that it
    asks about. asked: for each part, in order: the kind, the places of a question's distinct
    vectors among all (a slice where they are neighbours), and what is subtracted, (u, 1) or None.
    """

    vectors: Mapping[str, Tensor]
    said: Sequence[Sequence[Distinct]]
    asked: Sequence[Sequence[tuple[str, slice | Tensor, Tensor | None]]]


def listen(parts: Sequence[Part], widths: Mapping[str, int]) -> Compared:
    """What the parts ask of rows. widths: the dimension of each kind of features."""
    import torch

    heard, said = [], []
    for part in parts:
        kinds = {
            n: Rows.of(torch.ones(1, d, device=part.queries.device)) for n, d in widths.items()
        }
        gallery = Listening(kinds)
        for _ in part.scores(gallery):
            pass
        heard.append(gallery.asked)
        said.append(gallery.said)
    vectors, place = {}, {}
    for kind in widths:
        own = [vectors for asked in heard for of, vectors, _ in asked if of == kind]
        if own:
            every = torch.cat(own)
            first, which = equal_rows(every)
            vectors[kind] = every[first]
            place[kind] = iter(which.split([len(some) for some in own]))
    asked = [
        [(of, _as_slice(next(place[of])), _shift(own, mean)) for of, own, mean in part]
        for part in heard
    ]
    return Compared(vectors, said, asked)


def _shift(vectors: Tensor, mean: Tensor | None) -> Tensor | None:
    return None if mean is None else (vectors @ mean)[:, None]


def _as_slice(place: Tensor) -> slice | Tensor:
    first, count = int(place[0]), len(place)
    neighbours = place.new_tensor(range(first, first + count))
    return slice(first, first + count) if bool((place == neighbours).all()) else place


@dataclass(frozen=True, eq=False)
class Counting:
    """Everything that a counting pass needs: parts, what they compare, their thresholds.

    precision: the type of torch to which the factors of products are rounded.
    """

    parts: Sequence[Part]
    compared: Compared
    thresholds: Sequence[Sequence[Thresholds]]
    precision: str = FULL
    buffers: Buffers = field(default_factory=Buffers, repr=False)

    @cached_property
    def factors(self) -> dict[str, Tensor]:
        """The vectors that are compared as factors of products, (U, D) by kind."""
        vectors = self.compared.vectors
        return {kind: rounded(own, self.precision) for kind, own in vectors.items()}

    def counter(self) -> UnitCounter:
        return UnitCounter(self)

    @property
    def rows_at_once(self) -> int:
        vectors = sum(map(len, self.compared.vectors.values()))
        return rows_at_once(vectors, -(-sum(map(len, self.parts)) // len(self.parts)))

    def content(self) -> Iterator[bytes]:
        """All that decides what is counted, for a digest."""
        yield self.precision.encode()
        for kind, vectors in self.compared.vectors.items():
            yield kind.encode()
            yield vectors.cpu().numpy().tobytes()
        compared = self.compared
        for part, said, asked, thresholds in zip(
            self.parts, compared.said, compared.asked, self.thresholds, strict=True
        ):
            yield repr((part.method.name, part.parameters)).encode()
            for _, kind in said:
                yield b"" if kind is None else kind.cpu().numpy().tobytes()
            for of, place, shift in asked:
                yield of.encode()
                yield repr(place if isinstance(place, slice) else place.tolist()).encode()
                yield b"" if shift is None else shift.cpu().numpy().tobytes()
            for own in thresholds:
                yield own.value.cpu().numpy().tobytes() + own.order.tobytes()
                yield repr(own.margin).encode()

    def join(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: sum(own[name] for own in found) for name in ("above", "tied")}

    def split(self, values: np.ndarray) -> Iterator[tuple[int, Part, np.ndarray]]:
        """What is found of all runs of all parts, in one array, as (run, part, (p,))."""
        start = 0
        for part in self.parts:
            for run in part.runs:
                yield run, part, values[start : start + len(part.query)]
                start += len(part.query)

    def positive(self, place: int) -> tuple[int, int, int]:
        """Of a place in what is found of all runs: its run, query and row of the gallery."""
        for run, part, _ in self.split(np.empty(0)):
            if place < len(part.query):
                return run, int(part.number[place]), int(part.row[place])
            place -= len(part.query)
        raise IndexError(place)


class UnitCounter:
    """Counts the rows of one unit."""

    def __init__(self, counting: Counting):
        self._counting = counting
        self._counters = [[Counter.of(own) for own in some] for some in counting.thresholds]
        self._near: list[list[tuple[int, Near, dict[str, Tensor]]]] = [[] for _ in counting.parts]

    def add(self, chunk: Chunk) -> None:
        """Count some rows, whatever their numbers in the pool are."""
        kinds = {name: Rows(raw, chunk.length[name]) for name, raw in chunk.raw.items()}
        product = {name: self._product(name, unit) for name, unit in chunk.unit.items()}
        compared = self._counting.compared
        parts = zip(self._counting.parts, compared.said, compared.asked, strict=True)
        for number, (part, said, asked) in enumerate(parts):
            found = (_similarity(product, *own) for own in asked)
            gallery = Answering(kinds, said=iter(said), found=found)
            for run, scores in enumerate(part.scores(gallery)):
                near = count_scores(scores, *self._of(number, run))
                if near.query.numel():
                    own = {name: raw[near.row] for name, raw in chunk.raw.items()}
                    self._near[number].append((run, near, own))
            if sum(n.query.numel() for _, n, _ in self._near[number]) > NEAR_OF_A_QUERY * len(part):
                self._settle(number)

    def _of(self, number: int, run: int) -> tuple[Thresholds, Counter]:
        return self._counting.thresholds[number][run], self._counters[number][run]

    def _product(self, kind: str, unit: Tensor) -> Tensor | None:
        """All vectors against unit rows: (U, n), in a buffer that the next rows will reuse."""
        vectors = self._counting.factors.get(kind)
        if vectors is None:
            return None
        out = self._counting.buffers.of(kind, (len(vectors), len(unit)), unit.device)
        return multiply(vectors, rounded(unit, self._counting.precision), out)

    def _settle(self, number: int) -> None:
        """Count what lay near a threshold, by float64 scores."""
        import torch

        waiting, part = self._near[number], self._counting.parts[number]
        self._near[number] = []
        if not waiting:
            return
        query = torch.cat([near.query for _, near, _ in waiting])
        raw = {name: torch.cat([own[name] for _, _, own in waiting]) for name in waiting[0][2]}
        exact = pair_scores(part, query.cpu().numpy(), raw, torch.float64)
        start = 0
        for run, near, _ in waiting:
            stop = start + len(near.query)
            count_exact(exact[run, start:stop], near, *self._of(number, run))
            start = stop

    def result(self) -> dict[str, np.ndarray]:
        """above, tied: int64, the counts of each run of each part, one after the other."""
        for number in range(len(self._counting.parts)):
            self._settle(number)
        found = [
            counter.totals(own)
            for some, counters in zip(self._counting.thresholds, self._counters, strict=True)
            for own, counter in zip(some, counters, strict=True)
        ]
        above, tied = (np.concatenate(own) for own in zip(*found, strict=True))
        return {"above": above, "tied": tied}


def _similarity(
    product: Mapping[str, Tensor], kind: str, place: slice | Tensor, shift: Tensor | None
) -> Tensor:
    own = product[kind]
    own = own[place] if isinstance(place, slice) else own.index_select(0, place)
    return own if shift is None else own - shift
