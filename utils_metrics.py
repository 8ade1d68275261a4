"""Ranks of the positives, measures of them per query, and the averaging of queries to one number.

Ranks are 0-based throughout. Two formulas of average precision are in use and named apart: AP-T
(trapezoidal) and AP-S (standard); other libraries give AP-S, and leave out the queries without
positives, which score 0 here. torch is imported inside the functions that need it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product, repeat, takewhile
from typing import TYPE_CHECKING

from utils import UserError
from utils_startup import Late

if TYPE_CHECKING:
    import torch

    from utils_task import Group

np = Late("numpy")

EPSILON = 1e-5  # in the divisors of FREEDOM's and i-CIR's code: a perfect ranking scores below 1

# ---------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------

# (positive, row) pairs compared in one step: fits a core's cache; fills a GPU
PAIRS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}
SHARE_TO_SELECT = 0.6  # of the rows in play, below which picking them out is less than it saves
ROWS_SAMPLED = 97  # one of so many is looked at to know that share
TIES_COMPARED = 32  # positives of a query, at most, of which each is compared with all columns
FEW_POSITIVES = 48  # of a query: on a CPU compared with the rows of several runs, else rows sorted


def positive_ranks(
    scores: Sequence[torch.Tensor],
    query: torch.Tensor,
    position: torch.Tensor,
    ties: str = "row",
    kind: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """0-based ranks of the positives: how many columns score higher, or as high and rank earlier.

    scores: float32 (Q, N) of each of R runs, higher is better; -inf in columns that are not ranked,
    never NaN. query, position: int64 (P,), row and column in each run's scores of every positive,
    sorted by query, then position. ties: equal scores rank in column order ("row"), or with the
    positives before ("best") or after ("worst") the negatives. kind: int64, the row of scores of
    each query, which several may share; None: query i has row i. Returns ranks int64 (R, P), and
    tied bool (R, P): the positive ties with a negative.
    """
    queries = len(scores[0]) if kind is None else len(kind)
    few = len(query) <= FEW_POSITIVES * queries and len(scores) > 1
    on_gpu = query.device.type != "cpu"
    if not on_gpu and not few:  # see tests/speed/bench_ranks.py
        return ranks_by_sorting(scores, query, position, ties, kind)
    if kind is not None:
        scores = [own.index_select(0, kind) for own in scores]
    ranks = ranks_by_searching if on_gpu else ranks_by_comparing
    return ranks(scores, query, position, ties)


def ranks_by_sorting(
    scores: Sequence[torch.Tensor],
    query: torch.Tensor,
    position: torch.Tensor,
    ties: str,
    kind: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What positive_ranks returns, on a CPU, where numpy's sort is ten times as fast as torch's.

    A row of scores is sorted once, however many positives and queries it has: N log N, not N n.
    """
    import torch

    query, position = query.numpy(), position.numpy()
    row = query if kind is None else kind.numpy()[query]
    places = _places(row)
    found = [_rank_run(own.numpy(), row, places, query, position, ties) for own in scores]
    return tuple(torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))


def _places(row: np.ndarray) -> dict[int, slice | np.ndarray]:
    """Where each number of (P,) is: a slice if all lie side by side, else int64, rising."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    spans = defaultdict(list)
    for start, stop in pairwise([*starts.tolist(), len(row)]):
        spans[int(row[start])].append(slice(start, stop))
    return {own: some[0] if len(some) == 1 else np.r_[tuple(some)] for own, some in spans.items()}


def _rank_run(
    scores: np.ndarray,
    row: np.ndarray,
    places: Mapping[int, slice | np.ndarray],
    query: np.ndarray,
    position: np.ndarray,
    ties: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks int64 and tied bool (P,) in one run's scores (Q, N).

    row: int64 (P,), which scores are each positive's. places: where each of these is in it.
    """
    values = scores[row, position]
    ranks, columns = np.empty(len(row), np.int64), np.ones(len(row), np.int64)  # of its score
    for number, some in places.items():
        own = values[some]
        ordered = _in_play(scores[number], own.min())
        ordered.sort()
        end = ordered.searchsorted(own, "right")
        ranks[some] = len(ordered) - end
        if (ordered[end - 2] == own).any():  # of one score in play, this is it
            columns[some] = end - ordered.searchsorted(own)
    tied = np.zeros(len(row), bool)
    for number in np.unique(query[columns > 1]).tolist():
        some = slice(*query.searchsorted((number, number + 1)))
        own = np.flatnonzero(columns[some] > 1)
        twins, earlier_twins, earlier = _equal_columns(
            scores[row[some.start]], position[some], own, ties == "row"
        )
        others = columns[some][own] - twins
        tied[some][own] = others > 0
        more = {"row": earlier, "best": earlier_twins, "worst": others + earlier_twins}
        ranks[some][own] += more[ties]
    return ranks, tied


def _in_play(row: np.ndarray, lowest: float) -> np.ndarray:
    """A copy of the scores (N,) without those below the lowest, where that is worth it."""
    sample = row[::ROWS_SAMPLED]
    few = np.count_nonzero(sample >= lowest) < SHARE_TO_SELECT * len(sample)
    return row.take(np.flatnonzero(row >= lowest)) if few else row.copy()


def _equal_columns(
    row: np.ndarray, position: np.ndarray, which: np.ndarray, all_columns: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """How many columns score as some of a query's positives do, int64 (p,) each.

    row: its scores (N,). position: its positives, rising (n,). which: some of these, (p,). Returns
    how many positives do, how many earlier ones, and how many earlier columns, where all are asked.
    """
    own, earlier = row[position], None
    if len(which) <= TIES_COMPARED:
        same = own == own[which, None]
        twins, place = same.sum(1), np.arange(len(own))
        if all_columns:
            cells = zip(position[which].tolist(), own[which], strict=True)
            earlier = np.array([np.count_nonzero(row[:end] == value) for end, value in cells])
        return twins, (same & (place < which[:, None])).sum(1), earlier
    twins, earlier_twins = _count_equal(row, position, position[which])
    if all_columns:
        rivals = np.flatnonzero(row >= own[which].min())
        _, earlier = _count_equal(row, rivals, position[which])
    return twins, earlier_twins, earlier


def _count_equal(
    row: np.ndarray, among: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many columns among some score as those at the positions do, and how many earlier ones."""
    first = _order(row[position])  # of each score, where the key of column c is c lower
    keys = np.sort(_order(row[among]) - among)
    stop = keys.searchsorted(first, "right")
    of_score, later = (
        keys.searchsorted(first - columns, "right") for columns in (len(row), position)
    )
    return stop - of_score, stop - later


def _order(values: np.ndarray) -> np.ndarray:
    """Integers, 2**32 apart at least, in the order of the float32 values; -0.0 is 0.0."""
    bits = (values + np.float32(0)).view(np.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32


def ranks_by_comparing(
    scores: Sequence[torch.Tensor], query: torch.Tensor, position: torch.Tensor, ties: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What positive_ranks returns, by comparing every positive with every column; for few."""
    value = _values(scores, query, position)
    return _decide_ties(scores, query, position, ties, value, *_compare(scores, query, value))


def ranks_by_searching(
    scores: Sequence[torch.Tensor], query: torch.Tensor, position: torch.Tensor, ties: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What positive_ranks returns, by seeking every score among its query's positives; for a GPU.

    N log n steps for n positives, all queries' at once.
    """
    value = _values(scores, query, position)
    return _decide_ties(scores, query, position, ties, value, *_search(scores, query, value))


def _values(
    scores: Sequence[torch.Tensor], query: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The positives' scores (R, P)."""
    import torch

    cells = query * scores[0].shape[1] + position
    return torch.stack([own.flatten().index_select(0, cells) for own in scores])


def _decide_ties(
    scores: Sequence[torch.Tensor],
    query: torch.Tensor,
    position: torch.Tensor,
    ties: str,
    value: torch.Tensor,
    higher: torch.Tensor,
    equal: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks and tied (R, P) of how many columns score higher, and how many others the same."""
    import torch

    tied = torch.zeros_like(equal, dtype=torch.bool)
    run, which = equal.nonzero(as_tuple=True)
    if not len(run):
        return higher, tied
    others = equal[run, which]
    twin, twin_earlier = _equal_positives(query[which] + len(scores[0]) * run, value[run, which])
    tied[run, which] = others > twin
    if ties == "best":
        higher[run, which] += twin_earlier
    elif ties == "worst":
        higher[run, which] += others - twin + twin_earlier
    else:
        columns = scores[0].shape[1]
        column = torch.arange(columns, device=query.device)
        step = max(1, PAIRS_AT_ONCE[query.device.type] // columns)
        for number, own in enumerate(scores):
            for some in which[run == number].split(step):
                same = own[query[some]] == value[number, some, None]
                higher[number, some] += (same & (column < position[some, None])).sum(1)
    return higher, tied


def _search(
    scores: Sequence[torch.Tensor], query: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What _compare returns: each query's positives are sorted, each score is placed among them."""
    import torch

    queries, columns = scores[0].shape
    count = torch.bincount(query, minlength=queries)
    place = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
    wide = max(1, int(count.max())) if queries else 1
    step = max(1, PAIRS_AT_ONCE[query.device.type] // max(columns, wide))
    above, not_below = (torch.empty_like(value, dtype=torch.int64) for _ in range(2))
    for own, values, *found in zip(scores, value, above, not_below, strict=True):
        rising = values.new_full((queries, wide), float("inf"))
        rising[query, place] = values
        rising, order = rising.sort(dim=1)
        for right, counted in zip((False, True), found, strict=True):
            whole = torch.empty_like(order)
            for some in slices(0, queries, step):
                passed = torch.searchsorted(rising[some], own[some].contiguous(), right=right)
                whole[some] = count_beyond(passed, wide)
            counted.copy_(torch.empty_like(order).scatter_(1, order, whole)[query, place])
    return above, not_below - above - 1


def count_beyond(place: torch.Tensor, wide: int) -> torch.Tensor:
    """How many of a row's numbers are above each of 0 ... wide - 1: int64 (Q, N) -> (Q, wide)."""
    import torch

    times = place.new_zeros((len(place), wide + 1))
    times.scatter_add_(1, place, torch.ones_like(place))
    return times.flip(1).cumsum(1).flip(1)[:, 1:]


def _compare(
    scores: Sequence[torch.Tensor], query: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many columns score higher than each positive, and how many others the same.

    scores: R times (Q, N); query (P,), sorted; value (R, P), the positives' scores. Returns int64
    (R, P) both. A column that scores less than every positive of its query counts for none.
    """
    import torch

    runs, queries = len(scores), len(scores[0])
    lowest = value.new_full((runs, queries, 1), float("inf"))
    lowest[..., 0].scatter_reduce_(1, query.expand(runs, -1), value, "amin")
    # Comparisons are written, and counted, as floats: several times faster than as bools.
    in_play, mask = value.new_zeros(scores[0].shape), value.new_empty(scores[0].shape)
    for own, least in zip(scores, lowest, strict=True):
        torch.maximum(in_play, torch.ge(own, least, out=mask), out=in_play)
    in_play = in_play.bool()
    cells = in_play.flatten().nonzero()[:, 0]
    scores = torch.stack([own.flatten().index_select(0, cells) for own in scores])  # query by query
    sizes = in_play.sum(1).tolist()

    at_once = PAIRS_AT_ONCE[value.device.type]
    higher, at_least = torch.empty_like(value), torch.empty_like(value)  # exact below 2**24
    buffer = value.new_empty(max(at_once, max(sizes)))
    start = 0
    counts = torch.bincount(query, minlength=queries).tolist()
    for rows, size, count in zip(scores.split(sizes, dim=1), sizes, counts, strict=True):
        stop = start + count
        for part in slices(start, stop, at_once // max(1, size)):
            for some in slices(0, runs, at_once // (size * (part.stop - part.start))):
                own = value[some, part, None]
                mask = buffer[: own.numel() * size].view(*own.shape[:2], size)
                higher[some, part] = torch.gt(rows[some, None], own, out=mask).sum(2)
                at_least[some, part] = torch.ge(rows[some, None], own, out=mask).sum(2)
        start = stop
    higher = higher.long()
    return higher, at_least.long() - higher - 1


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """The range in slices of at most that size, at least 1."""
    for first in range(start, stop, max(1, size)):
        yield slice(first, min(first + max(1, size), stop))


def _equal_positives(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each positive (P,): how many others of its query score the same, and how many earlier.

    A stable sort by (query, value) puts equal ones side by side in their first order.
    """
    import torch

    by_value = torch.sort(value, stable=True).indices
    order = by_value[torch.sort(query[by_value], stable=True).indices]
    query, value = query[order], value[order]
    new = torch.ones_like(query, dtype=torch.bool)
    new[1:] = (query[1:] != query[:-1]) | (value[1:] != value[:-1])
    group = new.cumsum(0) - 1
    size = torch.bincount(group)
    first = size.cumsum(0) - size
    twin, earlier = torch.empty_like(order), torch.empty_like(order)
    twin[order] = size[group] - 1
    earlier[order] = torch.arange(len(order), device=order.device) - first[group]
    return twin, earlier


# ---------------------------------------------------------------------------------------------
# Measures: f(ranks int (P,), query int (P,), n int (Q,), N int (Q,), k) -> float64 (Q,)
#
# ranks: of the positives, 0-based, in any order within a query; query: whose they are, sorted;
# n: how many positives each query has (of none: value 0); N: how many rows were ranked for it;
# k: the cut-off, None without one.
# ---------------------------------------------------------------------------------------------


def average_precision_trapezoidal(ranks, query, n, N, k):
    """AP-T: sum over j of (p0 + p1) / 2 / (n + 1e-5), p0 = j / r_j (1 at 0), p1 = (j+1) / (r_j+1).

    r_0 < r_1 < ... are the ranks. As the reference and the VRG code have it (DESIGN section 6).
    """
    ranks, j = _rising(ranks, query, len(n))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    after = (j + 1) / (ranks + 1)
    return np.bincount(query, (before + after) / 2, minlength=len(n)) / (n + EPSILON)


def average_precision_standard(ranks, query, n, N, k):
    """AP-S: sum over the positives with r_j < k of (j+1) / (r_j+1), over min(n, k) (CIRCO)."""
    divisor = n
    if k is not None:
        ranks, query = ranks[ranks < k], query[ranks < k]
        divisor = np.minimum(n, k)
    ranks, j = _rising(ranks, query, len(n))
    total = np.bincount(query, (j + 1) / (ranks + 1), minlength=len(n))
    return total / np.maximum(divisor, 1)


def hit(ranks, query, n, N, k):
    """Hit@k: 1 where any positive has a rank below k. Many papers call it Recall@k."""
    return (_hits(ranks, query, n, k) > 0).astype(np.float64)


def recall(ranks, query, n, N, k):
    """Recall@k: the share of the positives with ranks below k, over n + 1e-5 (FREEDOM)."""
    return _hits(ranks, query, n, k) / (n + EPSILON)


def precision(ranks, query, n, N, k):
    """P@k: positives with ranks below k, over min(n, k, N) + 1e-5 (FREEDOM)."""
    return _hits(ranks, query, n, k) / (np.minimum(np.minimum(n, N), k) + EPSILON)


def _hits(ranks, query, n, k):
    return np.bincount(query[ranks < k], minlength=len(n))


def _rising(ranks, query, queries):
    """Each query's ranks, rising, and the number j of each in its query."""
    first = query * (ranks.max(initial=0) + 1)
    count = np.bincount(query, minlength=queries)
    return np.sort(first + ranks) - first, np.arange(len(ranks)) - (np.cumsum(count) - count)[query]


QUERIES_MEASURED = 1024  # at once: bounds the memory

MEASURES = {
    "AP-T": average_precision_trapezoidal,
    "AP-S": average_precision_standard,
    "AP-S@k": average_precision_standard,
    "Hit@k": hit,
    "Recall@k": recall,
    "P@k": precision,
}


def parse_measure(name: str) -> tuple[Callable, int | None]:
    """A measure and its cut-off from a name: "AP-S@10" -> (average_precision_standard, 10).

    Raises UserError for an unknown measure, and for a cut-off that is missing or no number.
    """
    kind, at, cut = name.partition("@")
    form = f"{kind}@k" if at else kind
    if form not in MEASURES or (at and not re.fullmatch("[1-9][0-9]*", cut)):
        known = ", ".join(MEASURES)
        raise UserError(f"{name!r} is no measure; there are {known} (k = 1, 2, ...)")
    return MEASURES[form], int(cut) if at else None


def measure(
    name: str, ranks: np.ndarray, query: np.ndarray, n: np.ndarray, N: np.ndarray
) -> np.ndarray:
    """The value of a measure for every query, float64 (Q,), a fraction.

    ranks: int (P,), 0-based, of the positives, in any order within a query; query: int (P,), whose
    they are, sorted; n: int (Q,), how many positives each query has (of none: value 0); N: int
    (Q,), how many rows were ranked. Raises UserError as parse_measure does.
    """
    value, k = parse_measure(name)
    first = np.arange(0, max(1, len(n)), QUERIES_MEASURED)
    start, stop = (np.searchsorted(query, first + more) for more in (0, QUERIES_MEASURED))
    found = []
    for i, own in zip(first, map(slice, start, stop), strict=True):
        some = slice(i, i + QUERIES_MEASURED)
        found.append(value(ranks[own], query[own] - i, n[some], N[some], k))
    return np.concatenate(found)


# ---------------------------------------------------------------------------------------------
# Averages
# ---------------------------------------------------------------------------------------------

AVERAGE = "average"  # the last row and column of a breakdown


def _mean(values: np.ndarray, code: np.ndarray) -> np.ndarray:
    return np.bincount(code, values) / np.bincount(code)


def _lowest(values: np.ndarray, code: np.ndarray) -> np.ndarray:
    lowest = np.full(code.max() + 1, np.inf)
    np.minimum.at(lowest, code, values)
    return lowest


STEPS = {"mean": _mean, "min": _lowest}  # by Group.how: one value of those with the same code


def _numpy_round(values: np.ndarray, digits: int) -> np.ndarray:
    return values.round(digits)


def _python_round(values: np.ndarray, digits: int) -> np.ndarray:
    return np.array([round(value, digits) for value in values.tolist()])


# By Group.rounding: the precision of a step's values, and what rounds them (in percent).
ROUNDINGS = {"numpy": ("float64", _numpy_round), "python": ("float32", _python_round)}


@dataclass(frozen=True, eq=False)
class Step:
    """A group whose tags are looked up: value member[i] is one of those averaged to code[i].

    member, code: int (M,). Codes number the group's labels in their order.
    """

    group: Group
    member: np.ndarray
    code: np.ndarray


def reduce(values: np.ndarray, groups: Sequence[Group], tags: Mapping[str, Sequence]) -> float:
    """Average the queries' values to one number, in percent.

    values: float (Q,), fractions. groups: innermost first; each takes the mean (or the lowest) of
    what has one label of its tag (or of the one label it is for), then rounds; what is left is
    averaged. tags: name -> the label of each query, or a tuple of labels, in each of which the
    query counts once (of none: nowhere).
    Percent is taken where the first rounding asks for it, or at the end. Raises UserError as
    plan_steps does.
    """
    return average(values, plan_steps(len(values), groups, tags))


def average(values: np.ndarray, steps: Sequence[Step]) -> float:
    """What reduce computes, with the steps of plan_steps, which serve any number of runs."""
    factor = 100
    for step in steps:
        kind, rounded = ROUNDINGS[step.group.rounding]
        values = STEPS[step.group.how](values[step.member].astype(kind), step.code).astype(kind)
        if step.group.digits is not None:
            values = rounded(factor * values.astype(np.float64), step.group.digits)
            factor = 1
    return float(factor * values.mean())


def plan_steps(queries: int, groups: Sequence[Group], tags: Mapping[str, Sequence]) -> list[Step]:
    """The steps that average Q queries over these groups; see reduce.

    Raises UserError if there is no query, for an unknown step or rounding, and for a tag that is
    absent, without any label, or not constant within the groups inside it.
    """
    if not queries:
        raise UserError("there is no query to average over")
    for group in groups:
        for word, known in ((group.how, STEPS), (group.rounding, ROUNDINGS)):
            if word not in known:
                raise UserError(f"groups know no {word!r}; there are {', '.join(known)}")
    steps, query = [], np.arange(queries)  # query: one for each value, that has all its outer tags
    for level, group in enumerate(groups):
        member, code = _codes(query, group, tags)
        steps.append(Step(group, member, code))
        first = query[member][np.unique(code, return_index=True)[1]]
        for outer in groups[level + 1 :]:
            if outer.tag is not None:
                _require_constant(query[member], first[code], group.tag, outer.tag, tags)
        query = first
    return steps


def _require_constant(query, standing, inner: str | None, outer: str, tags: Mapping) -> None:
    labels = _labels(tags, outer)
    for one, other in zip(standing.tolist(), query.tolist(), strict=True):
        if labels[one] != labels[other]:
            raise UserError(
                f"values cannot be averaged by {inner or 'nothing'} first and then by {outer}: "
                f"{labels[one]!r} and {labels[other]!r} would be averaged together"
            )


def _codes(query: np.ndarray, group: Group, tags: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Every (value, label) pair as numbers, int (M,) both; labels are numbered in their order."""
    if group.tag is None:
        return np.arange(len(query)), np.zeros(len(query), np.int64)
    labels = _labels(tags, group.tag)
    owned = [_all_labels(labels[i]) for i in query.tolist()]
    if group.only is not None:
        owned = [(group.only,) * (group.only in own) for own in owned]
    number = {label: i for i, label in enumerate(sorted({*chain.from_iterable(owned)}))}
    if not number:
        wanted = "a label" if group.only is None else f"the label {group.only!r}"
        raise UserError(f"no query has {wanted} of the tag {group.tag!r}")
    member = np.repeat(np.arange(len(query)), [len(own) for own in owned])
    return member, np.array([number[label] for label in chain.from_iterable(owned)])


def _labels(tags: Mapping[str, Sequence], tag: str) -> Sequence:
    if tag not in tags:
        raise UserError(f"queries have no tag {tag!r} (there are: {', '.join(tags) or 'none'})")
    return tags[tag]


def _all_labels(label: Hashable) -> tuple[Hashable, ...]:
    return label if isinstance(label, tuple) else (label,)


def breakdown(
    values: np.ndarray,
    groups: Sequence[Group],
    tags: Mapping[str, Sequence],
    rows: str,
    columns: str | None,
) -> tuple[list[str], list[str], np.ndarray]:
    """What reduce averages, as a matrix by two tags, with the averages of rows and columns.

    values, groups, tags: as reduce takes them. rows, columns: the tags of the matrix; columns None:
    the column of averages alone. A cell is averaged over the groups inside both (those before the
    first of either tag or of none); NaN where no query has both labels. Returns the labels of R
    rows and of C columns, sorted, then "average", and float64 (R + 1, C + 1) in percent: the last
    column holds the means of the rows, the last row those of the columns; at the end all is rounded
    to the digits of the last group. Raises UserError as plan_steps does.
    """
    inner = tuple(takewhile(lambda group: group.tag not in (rows, columns, None), groups))
    members = defaultdict(list)
    for pair, some in _pairs(len(values), tags, rows, columns).items():
        for cell in product(*map(_all_labels, pair)):
            members[cell] += some
    if not members:
        raise UserError(f"no query has labels of both tags, {rows!r} and {columns!r}")
    names = [sorted(set(labels)) for labels in zip(*members, strict=True)]
    matrix = np.full([len(labels) + 1 for labels in names], np.nan)
    for (row, column), some in members.items():
        some.sort()
        own_tags = {group.tag: [_labels(tags, group.tag)[i] for i in some] for group in inner}
        cell = names[0].index(row), names[1].index(column)
        matrix[cell] = reduce(values[some], inner, own_tags)
    matrix[:-1, -1] = _mean_of_present(matrix[:-1, :-1], axis=1)
    matrix[-1] = _mean_of_present(matrix[:-1], axis=0)
    if groups and groups[-1].digits is not None:
        matrix = np.round(matrix, groups[-1].digits)
    shown = slice(None) if columns else slice(-1, None)
    return [*names[0], AVERAGE], [*names[1], AVERAGE][shown], matrix[:, shown]


def _pairs(queries: int, tags: Mapping, rows: str, columns: str | None) -> dict[tuple, list[int]]:
    """The queries of every pair of what they have as tags of rows and columns."""
    of_columns = _labels(tags, columns) if columns else repeat(AVERAGE, queries)
    found = defaultdict(list)
    for query, pair in enumerate(zip(_labels(tags, rows), of_columns, strict=True)):
        found[pair].append(query)
    return found


def _mean_of_present(matrix: np.ndarray, axis: int) -> np.ndarray:
    return np.nansum(matrix, axis) / np.count_nonzero(~np.isnan(matrix), axis)
