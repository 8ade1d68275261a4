"""What a method asks of the gallery before it scores, answered from gallery and pool together.

observe is called with a gallery that has the pool's rows behind its own. A question that has no
answer yet is noted and ends the call; a pass over the pool answers all that were noted, and observe
is called again, until nothing is open. Answers are computed, or settled, in float64, so that they
depend neither on how the pool is cut nor on who read which part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from distractors.passes import LEFT_OUT
from distractors.pool import QUERIES_AT_ONCE, Buffers, rows_at_once
from utils import UserError
from utils_retrieval import Gallery, Rows, equal_rows

if TYPE_CHECKING:
    from torch import Tensor

    from distractors.pool import Chunk, Pool

SPARE = 8  # neighbours kept beyond those asked for, of which float64 decides the last places
UNIT_OF_SUMS = 2.0**-32  # of which sums over the pool are whole multiples: 2**31 rows have room
ROWS_AT_ONCE = 4096  # of a gallery that are summed in float64 together
NUMBERS_AT_ONCE = 1 << 24  # of the rows of neighbours that are compared in float64 together


class Unanswered(Exception):
    """A question of a method that no pass over the pool has answered yet."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """The pool's rows nearest to V vectors: float64 similarity and their numbers, (V, k)."""

    similarity: Tensor
    rows: Tensor


@dataclass(eq=False)
class Answers:
    """What is known of a pool, and what is asked of it.

    rows: how many it has; left_out: how many of them are none, known once it was read. device:
    where answers are to be. sums: (kind, whether products are known) -> float64 sum of its unit
    rows (D,) and of their outer products (D, D), or None. nearest: digest of vectors and k ->
    Nearest. numbers, vectors: the pool's rows that are neighbours, increasing int64 (n,), as they
    are stored, (n, D).
    """

    rows: int
    device: Any
    left_out: int = 0
    sums: dict[tuple[str, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    nearest: dict[bytes, Nearest] = field(default_factory=dict)
    numbers: Tensor | None = None
    vectors: Tensor | None = None
    open_sums: set[tuple[str, bool]] = field(default_factory=set)
    open_nearest: dict[bytes, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def ranked(self) -> int:
        """How many rows there are to be ranked."""
        return self.rows - self.left_out

    @property
    def is_open(self) -> bool:
        """Whether anything is asked that is not answered."""
        return bool(self.open_sums or self.open_nearest)

    def ask_sums(self, kind: str, products: bool) -> tuple[Tensor, Tensor]:
        """Raises Unanswered, and notes the question, where it is not answered."""
        for known in ((kind, products), (kind, True)):
            if known in self.sums:
                return self.sums[known]
        self.open_sums.add((kind, products))
        raise Unanswered

    def ask_nearest(self, vectors: Tensor, k: int) -> Nearest:
        """Raises Unanswered, and notes the question, where it is not answered."""
        key = hashlib.sha256(vectors.cpu().numpy().tobytes() + b"%d" % k).digest()
        if key not in self.nearest:
            self.open_nearest[key] = (vectors, k)
            raise Unanswered
        return self.nearest[key]

    def rows_of(self, numbers: Tensor) -> Tensor:
        """Neighbours by their numbers in the pool, (n,): rows as stored, (n, D)."""
        import torch

        return self.vectors[torch.searchsorted(self.numbers, numbers)]


@dataclass(frozen=True, eq=False)
class Among(Gallery):
    """A gallery with a pool's rows behind its own: row len(own) + i is row i of the pool."""

    own: Gallery = None
    answers: Answers = None

    @classmethod
    def around(cls, own: Gallery, answers: Answers) -> Among:
        return cls({}, own.number, own=own, answers=answers)

    def __len__(self) -> int:
        return len(self.own) + self.answers.rows

    def similarities(self, parts: Mapping, of: str = "image", few: Collection = ()) -> dict:
        raise UserError(
            "the method compares every row before it scores, which a pool of distractors does not "
            "answer: add --neighbours_from gallery, or leave --distractors"
        )

    def nearest(self, vectors: Tensor, k: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        import torch

        pool = self.answers.ask_nearest(vectors, k)
        images = self.own.kinds["image"]
        rough = self.own.similarity(vectors)
        rows = rough.topk(min(k + SPARE, len(self.own)), dim=1).indices
        similarity = exact_similarity(vectors, rows, images.raw)
        similarity = torch.cat([similarity, pool.similarity], dim=1)
        rows = torch.cat([rows, pool.rows + len(self.own)], dim=1)
        similarity, rows = first_best(similarity, rows, k)
        if mean is not None:
            similarity = similarity - (vectors.double() @ mean.double())[:, None]
        return similarity.float(), rows

    def mean(self, of: str = "image") -> Tensor:
        pool, _ = self.answers.ask_sums(of, False)
        own = self.own.remember(("sum", of), lambda: sum_of_units(self.own.kinds[of]))
        return ((own + pool) / (len(self.own) + self.answers.ranked)).float()

    def moments(self, vectors: Tensor, of: str = "image") -> tuple[Tensor, Tensor]:
        total, products = self.answers.ask_sums(of, True)
        rows, count = self.answers.ranked, len(self.own)
        vectors64 = vectors.double()
        own = self.own.similarity(vectors, of=of).double()
        own_mean, own_squares = own.mean(1), own.var(1, correction=0) * count
        mean = vectors64 @ (total / rows)
        centred = products - total[:, None] * total / rows
        squares = ((vectors64 @ centred) * vectors64).sum(1).clamp(min=0)
        apart = (mean - own_mean).square() * (rows * count / (rows + count))
        variance = (own_squares + squares + apart) / (rows + count - 1)
        joint = (own_mean * count + mean * rows) / (rows + count)
        return joint.float()[:, None], variance.sqrt().float()[:, None]

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return self.own.remember(("among", key), make)

    def weighted_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        import torch

        numbers, place = torch.unique(rows, return_inverse=True)
        own, pool = numbers[numbers < len(self.own)], numbers[numbers >= len(self.own)]
        raw = self.own.kinds["image"].raw[own].float()
        if len(pool):
            raw = torch.cat([raw, self.answers.rows_of(pool - len(self.own))])
        return Gallery.of(raw).weighted_rows(weights, place)


def exact_similarity(vectors: Tensor, rows: Tensor, raw: Tensor) -> Tensor:
    """Cosines of V vectors with K rows each of raw (N, D), int64 (V, K): float64 (V, K)."""
    import torch

    at_once = max(1, NUMBERS_AT_ONCE // (rows.shape[1] * raw.shape[1]))
    found = []
    for some, own in zip(rows.split(at_once), vectors.double().split(at_once), strict=True):
        near = raw[some].double()
        found.append((near * own[:, None]).sum(2) / near.norm(dim=2))
    return torch.cat(found)


def first_best(similarity: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each line, best first, equal ones in the order of their rows: (V, k) both."""
    rows, order = rows.sort(dim=1)
    similarity = similarity.gather(1, order)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], rows.gather(1, order)[:, :k]


def sum_of_units(rows: Rows) -> Tensor:
    """The sum of the unit rows of X, float64 (D,)."""
    chunks = zip(rows.raw.split(ROWS_AT_ONCE), rows.length.split(ROWS_AT_ONCE), strict=True)
    return sum((raw.double() / length.double()[:, None]).sum(0) for raw, length in chunks)


# ---------------------------------------------------------------------------------------------
# The pass that answers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asking:
    """Everything that is asked in a round: sums of kinds, and neighbours of distinct vectors.

    sums: kind -> whether products are asked for too. vectors: float32 (U, D); k: how many rows of
    each are kept. places: key of a question -> the places of its vectors among them.
    """

    sums: Mapping[str, bool]
    vectors: Tensor | None = None
    k: int = 0
    places: Mapping[bytes, Tensor] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=Buffers, repr=False)

    @classmethod
    def of(cls, answers: Answers) -> Asking:
        import torch

        sums: dict[str, bool] = {}
        for kind, products in sorted(answers.open_sums):
            sums[kind] = sums.get(kind, False) or products
        asked = dict(sorted(answers.open_nearest.items()))
        if not asked:
            return cls(sums)
        every = torch.cat([vectors for vectors, _ in asked.values()])
        first, kind = equal_rows(every)
        places = kind.split([len(vectors) for vectors, _ in asked.values()])
        k = min(max(k for _, k in asked.values()) + SPARE, answers.rows)
        return cls(sums, every[first], k, dict(zip(asked, places, strict=True)))

    def counter(self) -> UnitAnswers:
        return UnitAnswers(self)

    @property
    def rows_at_once(self) -> int:
        vectors = 1 if self.vectors is None else len(self.vectors)
        return rows_at_once(vectors, QUERIES_AT_ONCE)

    def content(self) -> Iterator[bytes]:
        """All that decides the answers, for a digest."""
        yield repr((sorted(self.sums.items()), self.k)).encode()
        if self.vectors is not None:
            yield self.vectors.cpu().numpy().tobytes()

    def join(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        sums = [name for name in found[0] if name.startswith("sum")]
        joined = {name: sum(own[name] for own in found) for name in sums}
        if self.vectors is not None:
            similarity, rows = (
                np.concatenate([own[name] for own in found], axis=1)
                for name in ("similarity", "rows")
            )
            order = np.lexsort((rows, -similarity), axis=1)[:, : self.k]
            joined["similarity"] = np.take_along_axis(similarity, order, 1)
            joined["rows"] = np.take_along_axis(rows, order, 1)
        return joined


class UnitAnswers:
    """Answers from the rows of one unit."""

    def __init__(self, asking: Asking):
        self._asking = asking
        self._sums: dict[str, Any] = {}
        self._best: tuple[Tensor, Tensor] | None = None

    def add(self, chunk: Chunk) -> None:
        """Take in some rows."""
        for kind, products in self._asking.sums.items():
            unit = chunk.raw[kind].double()
            unit /= unit.norm(dim=1, keepdim=True)
            self._add(f"sum_{kind}", unit.sum(0))
            if products:
                self._add(f"sum_products_{kind}", unit.T @ unit)
        if self._asking.vectors is not None:
            self._find_nearest(chunk.number, chunk.unit["image"])

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name].add_(value) if name in self._sums else value

    def _find_nearest(self, pool_number: Tensor, unit: Tensor) -> None:
        import torch

        vectors = self._asking.vectors
        similarity = self._asking.buffers.of("similarity", (len(vectors), len(unit)), unit.device)
        torch.mm(vectors, unit.T, out=similarity)
        k = self._asking.k
        if self._best is None:
            best = similarity.new_full((len(similarity), k), -torch.inf)
            self._best = best, torch.full_like(best, -1, dtype=torch.int64)
            value, column = similarity.topk(min(k, similarity.shape[1]), dim=1)
            self._take_in(slice(None), value, pool_number[column])
            return
        vector, column = _places(similarity > self._best[0][:, -1:])
        better, count = torch.unique_consecutive(vector, return_counts=True)
        if not len(better):
            return
        place = torch.arange(len(vector), device=vector.device)
        slot = place - (count.cumsum(0) - count).repeat_interleave(count)
        cell = place[: len(better)].repeat_interleave(count), slot
        value = similarity.new_full((len(better), int(count.max())), -torch.inf)
        number = torch.full_like(value, -1, dtype=torch.int64)
        value[cell], number[cell] = similarity[vector, column], pool_number[column]
        self._take_in(better, value, number)

    def _take_in(self, some: Tensor | slice, value: Tensor, number: Tensor) -> None:
        """Keep the best of what some vectors have and of these."""
        import torch

        best, rows = self._best
        value = torch.cat([best[some], value], dim=1)
        number = torch.cat([rows[some], number], dim=1)
        value, place = value.topk(self._asking.k, dim=1)
        best[some], rows[some] = value, number.gather(1, place)

    def result(self) -> dict[str, np.ndarray]:
        """sum_KIND, sum_products_KIND: int64, in UNIT_OF_SUMS, so that their order does not matter;
        similarity float32, rows int64: (U, k).
        """
        sums = {name: (value / UNIT_OF_SUMS).round().long() for name, value in self._sums.items()}
        found = {name: value.cpu().numpy() for name, value in sums.items()}
        if self._best is not None:
            names = ("similarity", "rows")
            found |= {n: v.cpu().numpy() for n, v in zip(names, self._best, strict=True)}
        return found


def take_in(answers: Answers, asking: Asking, found: Mapping[str, np.ndarray], pool: Pool) -> None:
    """Close the open questions with what a pass found."""
    import torch

    def held(name: str) -> Tensor:
        return torch.from_numpy(found[name]).to(answers.device)

    answers.left_out = int(found[LEFT_OUT][0])
    for kind, products in asking.sums.items():
        total = held(f"sum_{kind}").double() * UNIT_OF_SUMS
        outer = held(f"sum_products_{kind}").double() * UNIT_OF_SUMS if products else None
        answers.sums[kind, products] = total, outer
    if asking.vectors is not None:
        _take_in_nearest(answers, asking, held("rows")[:, : answers.ranked], pool)
    answers.open_sums.clear()
    answers.open_nearest.clear()


def _take_in_nearest(answers: Answers, asking: Asking, rows: Tensor, pool: Pool) -> None:
    import torch

    known = [] if answers.numbers is None else [answers.numbers]
    answers.numbers = torch.unique(torch.cat([rows.flatten(), *known]))
    vectors = torch.from_numpy(pool.gather(answers.numbers.cpu().numpy()))
    answers.vectors = vectors.to(answers.device)
    similarity = exact_similarity(
        asking.vectors, torch.searchsorted(answers.numbers, rows), answers.vectors
    )
    similarity, rows = first_best(similarity, rows, rows.shape[1])
    for key, place in asking.places.items():
        k = answers.open_nearest[key][1]
        answers.nearest[key] = Nearest(similarity[place, :k], rows[place, :k])


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of those that are true, in order; on a CPU numpy is several times as
    fast as torch.
    """
    import torch

    if mask.device.type == "cpu":
        flat = np.flatnonzero(mask.numpy())
        return tuple(map(torch.from_numpy, np.divmod(flat, mask.shape[1])))
    return mask.nonzero(as_tuple=True)
