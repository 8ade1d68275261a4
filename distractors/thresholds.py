"""Rows against thresholds: how many score above each positive of their query, and how many near it.

A query's distinct thresholds lie in rising order. On a CPU a score is placed among them by one
search over the thresholds of all queries at once, and counts for the highest it is above alone, or,
where many rows score as high as the lowest one, each query's scores are sorted and its thresholds
are sought in them. On a GPU every score is sought among its query's thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from utils_metrics import count_beyond, slices

if TYPE_CHECKING:
    from torch import Tensor

LEAST_MARGIN = 1e-6  # relative to the largest threshold: float32 products of unit vectors err less
MARGIN_FACTOR = 32  # times the largest float32 error that the positives' scores show
EQUAL = 1e-12  # float64 scores that differ less are of equal rows
ROWS_SAMPLED = 97  # one of so many is looked at to know how many are in play
SHARE_TO_SORT = 0.07  # of a query's rows in play, from which they are sorted
NEAR_AT_ONCE = 1 << 20  # scores that are compared with thresholds near to them


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The positives' scores in one run of a part, each query's distinct ones rising.

    value: float64 (Q, P), +inf behind a query's last. order: int64 (p,), the places in `value` of
    the part's positives in their order. margin: how near a float32 score is not trusted. low, high:
    float32 (Q, P), value -+ margin. only_zero: bool (Q,), 0 is a threshold and no other is as near.
    """

    value: Tensor
    order: np.ndarray
    margin: float
    low: Tensor
    high: Tensor
    only_zero: Tensor

    @classmethod
    def of(cls, query: np.ndarray, queries: int, exact: Tensor, rough: Tensor) -> Thresholds:
        """Of some positives: int64 (p,), sorted, whose they are; their scores in float64, float32.

        The largest difference of the two says how far float32 is to be trusted.
        """
        import torch

        own = exact.cpu().numpy()
        rising = np.lexsort((own, query))
        of, values = query[rising], own[rising]
        is_new = np.ones(len(own), bool)
        is_new[1:] = (of[1:] != of[:-1]) | (values[1:] != values[:-1])
        count = np.bincount(of[is_new], minlength=queries)
        wide = max(1, int(count.max(initial=0)))
        column = np.cumsum(is_new) - 1 - (np.cumsum(count) - count)[of]
        value = np.full((queries, wide), np.inf)
        value[of, column] = values
        order = np.empty(len(own), np.int64)
        order[rising] = of * wide + column
        error = float((exact - rough).abs().max()) if len(own) else 0.0
        largest = max(1.0, float(np.abs(own).max(initial=0)))
        margin = max(LEAST_MARGIN * largest, MARGIN_FACTOR * error)
        near_zero = np.abs(value) <= 2 * margin
        only_zero = (value == 0).any(1) & (near_zero == (value == 0)).all(1)
        values, zero = (torch.from_numpy(array).to(exact.device) for array in (value, only_zero))
        low, high = (values - margin).float(), (values + margin).float()
        return cls(values, order, margin, low, high, zero)

    @cached_property
    def flat(self) -> Flat:
        """Those there are, in order."""
        is_there = np.isfinite(self.value.cpu().numpy())
        count = is_there.sum(1)
        query = np.repeat(np.arange(len(count)), count)
        low, high = (own.cpu().numpy()[is_there] for own in (self.low, self.high))
        start = np.concatenate([[0], np.cumsum(count)])
        beyond = np.nextafter(high, np.float32(np.inf))
        has_one_before = query[1:] == query[:-1]
        low[1:] = np.where(has_one_before, np.maximum(low[1:], beyond[:-1]), low[1:])
        lowest = self.low[:, :1].cpu().numpy()
        return Flat(query, start, low, high, _keys(query, high), lowest)


@dataclass(frozen=True, eq=False)
class Flat:
    """The thresholds there are, one query's after another's, t of them.

    query: int64 (t,). start: int64 (Q + 1,), where each query's begin. low, high: float32 (t,), the
    scores that are near to it and to none before. key: int64 (t,), rising, of query and high.
    lowest: float32 (Q, 1), +inf where there is none.
    """

    query: np.ndarray
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray
    key: np.ndarray
    lowest: np.ndarray

    @cached_property
    def of_queries(self) -> Sequence[np.ndarray]:
        """high of each query."""
        return np.split(self.high, self.start[1:-1])


def _keys(query: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Integers in the order of queries, and in each of the float32 values; -0.0 is 0.0."""
    bits = (values + np.float32(0)).view(np.int32)
    return (query << 32) + (bits ^ (bits >> 31 & 0x7FFFFFFF))


@dataclass(frozen=True, eq=False)
class Counter:
    """What is counted against the thresholds of one run of a part.

    above, tied: int64 (Q, P) on the device, rows that score higher than a threshold, and as high.
    zeros: int64 (Q,), rows that score 0 where only_zero. passed: int64 (t,) of the flat thresholds,
    rows that score higher than this one and all before it of its query, but no other; `above` is
    without these.
    """

    above: Tensor
    tied: Tensor
    zeros: Tensor
    passed: np.ndarray

    @classmethod
    def of(cls, thresholds: Thresholds) -> Counter:
        shape = thresholds.value.shape
        zeros = (thresholds.value.new_zeros(s).long() for s in (shape, shape, shape[:1]))
        return cls(*zeros, np.zeros(len(thresholds.flat.query), np.int64))

    def totals(self, thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray]:
        """Rows above, and as high as, each positive in the part's order: int64 (p,) both."""
        tied = self.tied + self.zeros[:, None] * (thresholds.value == 0)
        above, tied = (own.cpu().numpy().copy() for own in (self.above, tied))
        flat = thresholds.flat
        passed = np.append(self.passed[::-1].cumsum()[::-1], 0)
        above[np.isfinite(thresholds.value.cpu().numpy())] += (
            passed[:-1] - passed[flat.start[flat.query + 1]]
        )
        return tuple(own.reshape(-1)[thresholds.order] for own in (above, tied))


@dataclass(frozen=True, eq=False)
class Near:
    """Rows whose float32 scores lie within the margin of thresholds: query, row, value (E,)."""

    query: Tensor
    row: Tensor
    value: Tensor


def count_scores(scores: Tensor, thresholds: Thresholds, counter: Counter) -> Near:
    """Count rows by their float32 scores (Q, n), but where these are too near to a threshold."""
    import torch

    if scores.device.type == "cpu":
        found = _count_on_cpu(scores.numpy(), thresholds.flat, counter.passed)
        query, row, value = map(torch.from_numpy, found)
    else:
        query, row, value = _count_on_gpu(scores, thresholds, counter)
    if not query.numel():
        return Near(query, row, value)
    zero = (value == 0) & thresholds.only_zero[query]
    counter.zeros.index_add_(0, query[zero], zero[zero].long())
    return Near(query[~zero], row[~zero], value[~zero])


def count_exact(exact: Tensor, near: Near, thresholds: Thresholds, counter: Counter) -> None:
    """Count the rows near to thresholds by their float64 scores (E,), where they are near."""
    value, rough, exact = thresholds.value[near.query], near.value[:, None], exact[:, None]
    open_ones = (rough >= thresholds.low[near.query]) & (rough <= thresholds.high[near.query])
    equal = open_ones & ((exact - value).abs() <= EQUAL * value.abs().clamp(min=1, max=1e300))
    counter.above.index_add_(0, near.query, (open_ones & ~equal & (exact > value)).long())
    counter.tied.index_add_(0, near.query, equal.long())


# ---------------------------------------------------------------------------------------------
# On a CPU: passed is counted; query, row and value of what is near are returned, (E,) each
# ---------------------------------------------------------------------------------------------

Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def _count_on_cpu(scores: np.ndarray, flat: Flat, passed: np.ndarray) -> Cells:
    in_play = scores >= flat.lowest
    sample = in_play[:, ::ROWS_SAMPLED]
    is_sorted = sample.sum(1) > SHARE_TO_SORT * sample.shape[1]
    if not is_sorted.any():
        return _count_few(scores, in_play, flat, passed)
    in_play[is_sorted] = False
    few = _count_few(scores, in_play, flat, passed)
    others = _count_sorted(scores, np.flatnonzero(is_sorted), flat, passed)
    return tuple(map(np.concatenate, zip(few, others, strict=True)))


def _count_few(scores: np.ndarray, in_play: np.ndarray, flat: Flat, passed: np.ndarray) -> Cells:
    """By the place of some scores among all thresholds. in_play: bool (Q, n), which these are."""
    count, wide = scores.shape
    cell = np.flatnonzero(in_play)
    bounds = cell.searchsorted(np.arange(count + 1) * wide)
    query = np.repeat(np.arange(count), bounds[1:] - bounds[:-1])
    value = scores.take(cell)
    place = flat.key.searchsorted(_keys(query, value))  # of the first that it is not above
    np.add.at(passed, place[place > flat.start[query]] - 1, 1)
    near = np.flatnonzero(place < flat.start[query + 1])
    near = near[flat.low[place[near]] <= value[near]]
    query = query[near]
    return query, cell[near] - query * wide, value[near]


def _count_sorted(scores: np.ndarray, which: np.ndarray, flat: Flat, passed: np.ndarray) -> Cells:
    """By the sorted scores of some queries, int64 (q,), each of which has a threshold."""
    ordered = scores[which]
    ordered.sort(axis=1)
    highs = [flat.of_queries[number] for number in which.tolist()]
    pairs = zip(ordered, highs, strict=True)
    not_above = np.concatenate([own.searchsorted(high, "right") for own, high in pairs])
    count = np.diff(flat.start)[which]
    last = np.cumsum(count) - 1
    own = np.arange(len(not_above)) + np.repeat(flat.start[which] - (last + 1 - count), count)
    beyond = np.append(not_above[1:], 0)
    beyond[last] = scores.shape[1]
    passed[own] += beyond - not_above
    line = np.repeat(np.arange(len(which)), count)
    highest = ordered[line, np.maximum(not_above - 1, 0)]  # that is not above
    near = own[(not_above > 0) & (highest >= flat.low[own])]
    return _cells_near(scores, near, flat)


def _cells_near(scores: np.ndarray, near: np.ndarray, flat: Flat) -> Cells:
    """Where the scores of its query are near to some thresholds, int64 (k,)."""
    found = [np.empty((2, 0), np.int64)]
    for some in slices(0, len(near), NEAR_AT_ONCE // scores.shape[1]):
        own = near[some]
        query, low, high = flat.query[own], flat.low[own, None], flat.high[own, None]
        values = scores[query]
        place = np.flatnonzero((values >= low) & (values <= high))
        of, row = np.divmod(place, scores.shape[1])
        found.append(np.stack([query[of], row]))
    query, row = np.concatenate(found, axis=1)
    return query, row, scores[query, row]


# ---------------------------------------------------------------------------------------------
# On a GPU: above is counted; query, row and value of what is near are returned, (E,) each
# ---------------------------------------------------------------------------------------------


def _count_on_gpu(
    scores: Tensor, thresholds: Thresholds, counter: Counter
) -> tuple[Tensor, Tensor, Tensor]:
    """By the place of every score among its query's thresholds."""
    import torch

    low, high = thresholds.low, thresholds.high
    wide = high.shape[1]
    place = torch.searchsorted(high, scores.contiguous())  # of the first that it is not above
    counter.above.add_(count_beyond(place, wide))
    near = (place < wide) & (low.gather(1, place.clamp(max=wide - 1)) <= scores)
    query, row = near.nonzero(as_tuple=True)
    return query, row, scores[query, row]
