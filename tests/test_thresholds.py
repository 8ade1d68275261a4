"""Counting scores against thresholds, by every way there is, against counting in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import distractors.thresholds
from distractors.thresholds import Counter, Thresholds, count_exact, count_scores

ROWS = 900
COUNTS = (0, 1, 3, 60, 5, 0, 40, 2)  # positives of each query


def make_scores(lowest):
    """(query of each positive, its score, scores of rows (Q, n)) in float64.

    Some rows score as high as positives, or nearly, or zero as some of these do.
    """
    random = np.random.default_rng(0)
    query = np.repeat(np.arange(len(COUNTS)), COUNTS)
    value = random.uniform(lowest, 1, len(query))
    value[query == 3] = 0.5 + 2e-7 * random.integers(0, 20, COUNTS[3])  # intervals that overlap
    value[(query == 6).nonzero()[0][:7]] = value[(query == 6).nonzero()[0][7]]  # the same
    value[(query == 4).nonzero()[0][0]] = 0.0
    scores = np.maximum(random.normal(0, 0.4, (len(COUNTS), ROWS)), 0)
    for own in set(query.tolist()):
        rows = random.permutation(ROWS)[:120]
        scores[own, rows[:60]] = random.choice(value[query == own], 60)
        scores[own, rows[60:]] = scores[own, rows[:60]] + random.normal(0, 1e-7, 60)
    scores[4, 3] = 1e-7
    return query, value, scores


def brute_force(query, value, scores):
    own = scores[query]
    equal = np.abs(own - value[:, None]) <= 1e-12
    return ((own > value[:, None]) & ~equal).sum(1), equal.sum(1)


@pytest.mark.parametrize(
    "share", [-1.0, 0.07, 1.0, None], ids=["sorted", "both", "placed", "as on a GPU"]
)
@pytest.mark.parametrize("lowest", [0.01, 0.9], ids=["many", "few"])
def test_counts_are_those_of_float64(monkeypatch, share, lowest):
    monkeypatch.setattr(distractors.thresholds, "SHARE_TO_SORT", share)
    monkeypatch.setattr(distractors.thresholds, "ROWS_SAMPLED", 7)
    monkeypatch.setattr(distractors.thresholds, "NEAR_AT_ONCE", 5000)
    query, value, scores = make_scores(lowest)
    exact = torch.from_numpy(value)
    thresholds = Thresholds.of(query, len(COUNTS), exact, exact.float())
    counter = Counter.of(thresholds)
    if share is None:

        def count(scores, flat, passed):
            own = torch.from_numpy(scores), thresholds, counter
            return tuple(index.numpy() for index in distractors.thresholds._count_on_gpu(*own))

        monkeypatch.setattr(distractors.thresholds, "_count_on_cpu", count)
    exact = torch.from_numpy(scores)
    rough = exact.float()
    rough[rough == 0] = torch.tensor([0.0, -0.0]).repeat(ROWS * len(COUNTS))[: (rough == 0).sum()]
    for some in range(0, ROWS, 400):
        own = slice(some, some + 400)
        near = count_scores(rough[:, own].contiguous(), thresholds, counter)
        assert len(near.query) < 0.5 * rough[:, own].numel(), "only what is near is scored again"
        count_exact(exact[near.query, near.row + some], near, thresholds, counter)
    above, tied = counter.totals(thresholds)
    expected = brute_force(query, value, scores)
    np.testing.assert_array_equal(above, expected[0])
    np.testing.assert_array_equal(tied, expected[1])
    assert thresholds.only_zero.tolist() == [number == 4 for number in range(len(COUNTS))]


def test_equal_thresholds_are_one():
    value = torch.tensor([0.5, 0.25, 0.5, 0.5], dtype=torch.float64)
    thresholds = Thresholds.of(np.array([0, 0, 0, 1]), 2, value, value.float())
    assert thresholds.value.tolist() == [[0.25, 0.5], [0.5, float("inf")]]
    assert thresholds.order.tolist() == [1, 0, 1, 2]
