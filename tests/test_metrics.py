"""Ranks and average precision against the definition, looped."""

import numpy as np
import pytest
import torch

from utils import average_precision, positive_ranks, summarise


def naive_ranking(scores: np.ndarray, positive: np.ndarray, ties: str) -> np.ndarray:
    """Sorted 0-based ranks of the positives of one query, by sorting everything."""
    first = {"row": np.zeros(len(scores)), "best": ~positive, "worst": positive}[ties]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], first[i], i))
    return np.array([rank for rank, row in enumerate(order) if positive[row]], dtype=np.int64)


def naive_average_precision(ranks: np.ndarray) -> float:
    total = 0.0
    for j, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else j / rank
        total += (before + (j + 1) / (rank + 1)) / 2
    return total / (len(ranks) + 1e-5)


def naive_tied(scores: np.ndarray, positive: np.ndarray) -> bool:
    return bool(set(scores[positive]) & set(scores[~positive]))


def world(seed: int, queries: int = 12, rows: int = 40, levels: int = 6):
    """Scores of few levels (many ties); the first query has no positive, the second all."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (queries, rows)).astype(np.float32)
    positive = generator.random((queries, rows)) < 0.2
    positive[0], positive[1] = False, True
    return scores, positive


def ranks_of(scores, positive, ties, device="cpu"):
    query, position = np.nonzero(positive)
    arguments = (torch.from_numpy(a).to(device) for a in (scores, query, position))
    ranks, tied = positive_ranks([next(arguments)], *arguments, ties=ties)
    return query, ranks[0].cpu().numpy(), tied[0].cpu().numpy()


@pytest.mark.parametrize("ties", ["row", "best", "worst"])
@pytest.mark.parametrize("levels", [1, 2, 6, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_ap_equal_the_looped_definition(seed, levels, ties):
    scores, positive = world(seed, levels=levels)
    query, ranks, tied = ranks_of(scores, positive, ties)
    ap = average_precision(ranks, query, len(scores))
    for i, (row, mask) in enumerate(zip(scores, positive, strict=True)):
        expected = naive_ranking(row, mask, ties)
        assert sorted(ranks[query == i]) == expected.tolist()
        assert ap[i] == pytest.approx(naive_average_precision(expected), abs=1e-12)
        assert tied[query == i].any() == naive_tied(row, mask)


def test_ranks_in_row_order_belong_to_their_own_rows():
    scores, positive = world(seed=5, levels=3)
    query, ranks, _ = ranks_of(scores, positive, "row")
    order = np.argsort(-scores, axis=1, kind="stable")
    position = np.nonzero(positive)[1]
    assert (order[query, ranks] == position).all()


@pytest.mark.parametrize("ties", ["row", "best", "worst"])
@pytest.mark.parametrize("pairs_at_once", [1, 100, 1_000, 10_000])
def test_several_runs_in_any_chunks_rank_as_each_alone(monkeypatch, pairs_at_once, ties):
    scores, positive = world(seed=7)
    several = np.stack([scores, -scores, np.random.default_rng(0).permuted(scores, axis=1)])
    alone = [ranks_of(own, positive, ties) for own in several]
    monkeypatch.setattr("utils.PAIRS_AT_ONCE", {"cpu": pairs_at_once})
    index = [torch.from_numpy(numbers) for numbers in np.nonzero(positive)]
    ranks, tied = positive_ranks(list(torch.from_numpy(several)), *index, ties=ties)
    for number, (_, own_ranks, own_tied) in enumerate(alone):
        assert ranks[number].tolist() == own_ranks.tolist()
        assert tied[number].tolist() == own_tied.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ties", ["row", "best", "worst"])
def test_ranks_on_cuda_equal_the_cpu(ties):
    scores, positive = world(seed=1)
    here, there = ranks_of(scores, positive, ties), ranks_of(scores, positive, ties, "cuda")
    assert all((a == b).all() for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([1], 0.2499975), ([0], 0.99999), ([0, 2, 5], 0.67777552), ([3, 4, 9], 0.23703625)],
)
def test_worked_examples(ranks, expected):
    ap = average_precision(np.array(ranks), np.zeros(len(ranks), dtype=np.int64), 1)
    assert ap[0] == pytest.approx(expected, abs=1e-8)


def test_summary_means_over_queries_and_instances():
    ap = np.array([0.2, 0.4, 1.0, 0.0])
    summary = summarise(ap, np.array(["b", "b", "a", "b"]))
    assert summary == pytest.approx({"mAP": 40.0, "mmAP": 60.0, "minmAP": 50.0})
