"""Averages of two runs over the same queries, with intervals of their differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas

from utils_metrics import STEPS, Step, average, plan_steps
from utils_task import Group
from utils_values import Average

RESAMPLES = 10_000
CELLS = 1 << 22  # of resamples x queries that are held in memory at once


def compare_means(
    values_a: Mapping[str, np.ndarray],
    values_b: Mapping[str, np.ndarray],
    averages: Sequence[Average],
    tags: Mapping[str, Sequence],
    outer: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pandas.DataFrame:
    """The averages of two runs in percent, and 95 % intervals of their differences.

    values_a, values_b: header -> float64 (Q,), fractions, row i of both is the same query.
    averages, tags, outer: as in QueryValues (outer: a tag of one label a query, or None).
    Returns a row an average: mean (its name), a, b, difference (b - a), and the ends queries_low,
    queries_high, groups_low, groups_high; NaN where there is no interval.

    Intervals are the 2.5 and 97.5 percentiles of a paired bootstrap: each resample draws Q queries
    (or, as clusters, the queries of as many labels of `outer` as there are) with replacement, the
    same for both runs, and averages anew, without the averages' rounding. A group of queries that
    a draw leaves out is left out of the average. There is none where queries are drawn and the
    lowest of a group is taken (it can only rise when queries are drawn from the group, so that the
    draws do not lie around the mean), nor where groups are drawn and the average is of one alone.
    """
    count = len(next(iter(values_a.values())))
    order = np.argsort(tags[outer], kind="stable") if outer else np.arange(count)
    tags = {name: [labels[query] for query in order] for name, labels in tags.items()}
    pairs = {name: np.stack([values_a[name], values_b[name]])[:, order] for name in values_a}
    runs = np.concatenate(list(pairs.values()))  # both of a header, then both of the next
    place = {name: slice(2 * i, 2 * i + 2) for i, name in enumerate(pairs)}
    measured = [own for own in averages if own.values]
    steps = {own.groups: plan_steps(count, own.groups, tags) for own in measured}
    generator = np.random.default_rng(seed)

    def exact(run: int) -> np.ndarray:
        found = {own.name: average(pairs[own.values][run], steps[own.groups]) for own in measured}
        return _combine(averages, found)

    def drawn(unit: np.ndarray | None) -> Iterator[np.ndarray]:
        recipes = {groups: _make_recipe(own, runs, unit) for groups, own in steps.items()}
        for times in _draws(generator, count if unit is None else unit.max() + 1, resamples):
            none = np.full((len(runs), len(times)), np.nan)
            by_groups = {g: _follow(own, times) if own else none for g, own in recipes.items()}
            found = {own.name: by_groups[own.groups][place[own.values]] for own in measured}
            yield _combine(averages, found)

    def ends(unit: np.ndarray | None) -> np.ndarray:
        pair = np.concatenate(list(drawn(unit)), axis=2)  # (averages, 2, resamples)
        return np.stack([_percentiles(100 * (b - a)) for a, b in pair])

    none = np.full((len(averages), 2), np.nan)
    by_query = ends(None)
    by_group = none if outer is None else ends(np.unique(tags[outer], return_inverse=True)[1])
    a, b = exact(0), exact(1)
    return pandas.DataFrame(
        {
            "mean": [own.name for own in averages],
            "a": a,
            "b": b,
            "difference": b - a,
            "queries_low": by_query[:, 0],
            "queries_high": by_query[:, 1],
            "groups_low": by_group[:, 0],
            "groups_high": by_group[:, 1],
        }
    )


def _combine(averages: Sequence[Average], found: Mapping[str, np.ndarray]) -> np.ndarray:
    """What was found for the averages of values, by name, and the means for those of others."""
    return np.stack(
        [
            found[own.name] if own.values else np.mean([found[name] for name in own.of], axis=0)
            for own in averages
        ]
    )


def _draws(generator: np.random.Generator, size: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each of `size` units is drawn: float64 (some resamples, size) at a time."""
    at_once = max(1, CELLS // size)
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        drawn = generator.integers(size, size=(count, size))
        shifted = (drawn + size * np.arange(count)[:, None]).ravel()
        times = np.bincount(shifted, minlength=count * size).reshape(count, size)
        yield times.astype(np.float64)


def _percentiles(values: np.ndarray) -> np.ndarray:
    """The ends of the 95 % interval of values (R,); NaN where none of them is a number."""
    known = values[~np.isnan(values)]
    return np.percentile(known, [2.5, 97.5]) if len(known) else np.full(2, np.nan)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How an average of several runs follows from how often units of queries are drawn.

    sums: for each of G groups the units (u,) that have queries in it, and float64 (u, 1 + runs),
    for each unit how many values and the sum of each run's. later: of each step after it the
    memberships, float64 (groups, groups of groups). The last step has one group.
    """

    sums: list[tuple[np.ndarray, np.ndarray]]
    later: list[np.ndarray]


def _make_recipe(
    steps: Sequence[Step], values: np.ndarray, unit: np.ndarray | None
) -> _Recipe | None:
    """The recipe of an average, None where a bootstrap has no meaning for it.

    values: float64 (runs, Q). unit: int (Q,), the unit of each query; None: each is its own. Groups
    inside units are averaged here, once for all draws: they count as often as their unit is drawn,
    as if they were that many groups. Any other group counts once if any of it is drawn.
    """
    count = steps[-1].code.max() + 1 if steps else values.shape[1]
    steps = [*steps, Step(Group(None), np.arange(count), np.zeros(count, np.int64))]
    own = np.arange(values.shape[1]) if unit is None else unit
    while unit is not None and len(steps) > 1 and _lies_inside(steps[0], own):
        step = steps.pop(0)
        if step.group.only is not None:
            return None
        values = np.stack([STEPS[step.group.how](run[step.member], step.code) for run in values])
        own = own[step.member[np.unique(step.code, return_index=True)[1]]]
    if any(step.group.how == "min" for step in steps):
        return None
    first, *rest = steps
    groups = (first.member[first.code == code] for code in range(first.code.max() + 1))
    return _Recipe([_sum_units(own, values, group) for group in groups], list(map(_members, rest)))


def _lies_inside(step: Step, unit: np.ndarray) -> bool:
    """Whether all members of every group of a step are of one unit."""
    units = np.full(step.code.max() + 1, -1)
    units[step.code] = unit[step.member]
    return bool((units[step.code] == unit[step.member]).all())


def _sum_units(
    unit: np.ndarray, values: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The units of some values, and for each of them their number and their sums."""
    units, place = np.unique(unit[group], return_inverse=True)
    rows = [np.ones(len(group)), *values[:, group]]
    return units, np.stack([np.bincount(place, row) for row in rows], axis=1)


def _members(step: Step) -> np.ndarray:
    members = np.zeros((step.member.max() + 1, step.code.max() + 1))
    np.add.at(members, (step.member, step.code), 1)
    return members


def _follow(recipe: _Recipe, times: np.ndarray) -> np.ndarray:
    """The average of each run in every draw, float64 (runs, R), fractions; NaN of nothing.

    times: float64 (R, U), how often each unit is drawn.
    """
    sums = np.stack(
        [times[:, units] @ own for units, own in recipe.sums], axis=1
    )  # (R, G, 1 + runs)
    for members in recipe.later:
        sums = members.T @ _means(sums)
    means = _means(sums)[:, 0]
    return np.where(means[:, 0] > 0, means[:, 1:].T, np.nan)


def _means(sums: np.ndarray) -> np.ndarray:
    """Numbers and sums (..., 1 + runs) -> 1 and the means, or zeros where the number is 0."""
    return sums / np.where(sums[..., :1] > 0, sums[..., :1], 1)
