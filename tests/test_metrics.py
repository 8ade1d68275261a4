"""Ranks, measures and averages against their definitions, looped."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils_metrics
from utils import TIE_RULES, UserError
from utils_metrics import (
    MEASURES,
    breakdown,
    measure,
    parse_measure,
    positive_ranks,
    ranks_by_comparing,
    ranks_by_searching,
    ranks_by_sorting,
    reduce,
)
from utils_task import Group

SHARED = Path(__file__).resolve().parents[2] / "shared"


# ---------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------


def naive_ranking(scores: np.ndarray, positive: np.ndarray, ties: str) -> np.ndarray:
    """Sorted 0-based ranks of the positives of one query, by sorting everything."""
    first = {"row": np.zeros(len(scores)), "best": ~positive, "worst": positive}[ties]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], first[i], i))
    return np.array([rank for rank, row in enumerate(order) if positive[row]], dtype=np.int64)


def world(seed: int, queries: int = 12, rows: int = 40, levels: int = 6):
    """Scores of few levels (many ties); the first query has no positive, the second all."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (queries, rows)).astype(np.float32)
    positive = generator.random((queries, rows)) < 0.2
    positive[0], positive[1] = False, True
    return scores, positive


def ranks_of(find, scores, positive, ties, device="cpu"):
    query, position = np.nonzero(positive)
    arguments = (torch.from_numpy(a).to(device) for a in (scores, query, position))
    ranks, tied = find([next(arguments)], *arguments, ties)
    return query, ranks[0].cpu().numpy(), tied[0].cpu().numpy()


@pytest.fixture(params=[ranks_by_sorting, ranks_by_comparing, ranks_by_searching, positive_ranks])
def find(request):
    return request.param


def check_ranks(find, scores, positive, ties):
    query, ranks, tied = ranks_of(find, scores, positive, ties)
    assert (ranks.dtype, tied.dtype) == (np.int64, bool)
    for i, (row, mask) in enumerate(zip(scores, positive, strict=True)):
        assert sorted(ranks[query == i]) == naive_ranking(row, mask, ties).tolist()
        shared = set(row[mask]) & set(row[~mask])
        assert tied[query == i].tolist() == [value in shared for value in row[mask]]


@pytest.mark.parametrize("ties", TIE_RULES)
@pytest.mark.parametrize("levels", [1, 2, 6, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_the_looped_definition(find, seed, levels, ties):
    check_ranks(find, *world(seed, levels=levels), ties)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("ties", TIE_RULES)
@pytest.mark.parametrize("seed", range(40))
def test_ranks_of_random_shapes(find, seed, ties):
    """Any numbers of rows, of positives, of distinct scores, below and above 0, masked columns."""
    generator = np.random.default_rng(seed)
    queries, rows = generator.integers(1, 9), generator.integers(1, 300)
    levels = generator.choice([1, 3, 30, 300])
    scores = (generator.integers(-levels, levels + 1, (queries, rows)) / 7).astype(np.float32)
    positive = generator.random((queries, rows)) < generator.choice([0.02, 0.3, 0.9])
    scores[~positive & (generator.random((queries, rows)) < generator.choice([0, 0.3]))] = -np.inf
    check_ranks(find, scores, positive, ties)


def test_ranks_in_row_order_belong_to_their_own_rows(find):
    for levels in (1, 3, 40, 10_000):  # 40: more tied values than are compared one by one
        scores, positive = world(seed=5, rows=400, levels=levels)
        query, ranks, _ = ranks_of(find, scores, positive, "row")
        order = np.argsort(-scores, axis=1, kind="stable")
        position = np.nonzero(positive)[1]
        assert (order[query, ranks] == position).all()


@pytest.mark.parametrize(("ties", "expected"), [("row", 1), ("best", 0), ("worst", 2)])
def test_zero_and_minus_zero_tie(find, ties, expected):
    scores = np.array([[0.0, -0.0, 0.0, -1.0]], dtype=np.float32)
    _, ranks, tied = ranks_of(find, scores, np.array([[False, True, False, False]]), ties)
    assert (ranks.tolist(), tied.tolist()) == ([expected], [True])


def test_columns_at_minus_infinity_are_as_if_absent(find):
    scores, positive = world(seed=9, rows=60, levels=5)
    masked = ~positive & (np.random.default_rng(9).random(scores.shape) < 0.5)
    query, ranks, tied = ranks_of(find, np.where(masked, -np.inf, scores), positive, "row")
    for i, kept in enumerate(~masked):
        _, own, own_tied = ranks_of(find, scores[i : i + 1, kept], positive[i : i + 1, kept], "row")
        assert ranks[query == i].tolist() == own.tolist()
        assert tied[query == i].tolist() == own_tied.tolist()


@pytest.mark.parametrize("ties", TIE_RULES)
@pytest.mark.parametrize("pairs_at_once", [1, 100, 1_000, 10_000])
def test_several_runs_in_any_chunks_rank_as_each_alone(find, monkeypatch, pairs_at_once, ties):
    scores, positive = world(seed=7)
    several = np.stack([scores, -scores, np.random.default_rng(0).permuted(scores, axis=1)])
    alone = [ranks_of(find, own, positive, ties) for own in several]
    monkeypatch.setattr("utils_metrics.PAIRS_AT_ONCE", {"cpu": pairs_at_once})
    index = [torch.from_numpy(numbers) for numbers in np.nonzero(positive)]
    ranks, tied = find(list(torch.from_numpy(several)), *index, ties)
    for number, (_, own_ranks, own_tied) in enumerate(alone):
        assert ranks[number].tolist() == own_ranks.tolist()
        assert tied[number].tolist() == own_tied.tolist()


def test_queries_without_any_positive_have_no_ranks(find):
    none = torch.empty(0, dtype=torch.int64)
    ranks, tied = find([torch.rand(3, 5)] * 2, none, none, "row")
    assert ranks.shape == tied.shape == (2, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ties", ["row", "best", "worst"])
def test_ranks_on_cuda_equal_the_cpu(ties):
    scores, positive = world(seed=1)
    here, there = (ranks_of(positive_ranks, scores, positive, ties, at) for at in ("cpu", "cuda"))
    assert all((a == b).all() for a, b in zip(here, there, strict=True))


# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def naive_trapezoidal(ranks: list[int], n: int, N: int, k: int | None) -> float:
    total = 0.0
    for j, rank in enumerate(sorted(ranks)):
        before = 1.0 if rank == 0 else j / rank
        total += (before + (j + 1) / (rank + 1)) / 2
    return total / (n + 1e-5)


def naive_standard(ranks: list[int], n: int, N: int, k: int | None) -> float:
    relevant = [rank in ranks for rank in range(N)]
    found, total = 0, 0.0
    for rank, good in enumerate(relevant[:k]):
        found += good
        total += good * found / (rank + 1)
    return total / min(n, k or n) if n else 0.0


def naive_hit(ranks: list[int], n: int, N: int, k: int) -> float:
    return float(any(rank in ranks for rank in range(k)))


def naive_recall(ranks: list[int], n: int, N: int, k: int) -> float:
    return len([rank for rank in range(k) if rank in ranks]) / (n + 1e-5)


def naive_precision(ranks: list[int], n: int, N: int, k: int) -> float:
    return len([rank for rank in range(k) if rank in ranks]) / (min(n, min(k, N)) + 1e-5)


NAIVE = {
    "AP-T": naive_trapezoidal,
    "AP-S": naive_standard,
    "AP-S@k": naive_standard,
    "Hit@k": naive_hit,
    "Recall@k": naive_recall,
    "P@k": naive_precision,
}


def random_ranks(seed: int):
    """Ranks of 0 to 9 positives of 9 queries among 1 to 12 rows, in any order within a query."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(1, 13, 9)
    counts = np.minimum(generator.integers(0, 10, 9), rows)
    counts[generator.integers(9)] = 0
    ranks = [generator.permutation(N)[:n] for N, n in zip(rows, counts, strict=True)]
    query = np.repeat(np.arange(9), counts)
    return ranks, np.concatenate(ranks), query, counts, rows


def test_every_measure_has_a_looped_definition():
    assert NAIVE.keys() == MEASURES.keys()


@pytest.mark.parametrize("k", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("form", MEASURES)
def test_measures_equal_the_looped_definition(form, k):
    for seed in range(20):
        own, ranks, query, n, rows = random_ranks(seed)
        values = measure(form.replace("@k", f"@{k}"), ranks, query, n, rows)
        cut = k if "@" in form else None
        expected = [NAIVE[form](r.tolist(), len(r), N, cut) for r, N in zip(own, rows, strict=True)]
        assert values.dtype == np.float64
        assert values == pytest.approx(expected, abs=1e-12)
        assert (values[n == 0] == 0).all()


def test_positives_that_are_not_ranked_count_in_the_divisors():
    ranks, query, n, rows = np.array([0]), np.array([0]), np.array([2]), np.array([5])
    values = [measure(name, ranks, query, n, rows)[0] for name in ("AP-T", "AP-S", "Recall@3")]
    assert values == pytest.approx([1 / 2.00001, 0.5, 1 / 2.00001], abs=1e-12)
    fewer_rows = measure("P@3", ranks, query, np.array([4]), np.array([2]))
    assert fewer_rows == pytest.approx([1 / 2.00001], abs=1e-12)


@pytest.mark.parametrize(
    ("ranks", "trapezoidal", "standard"),
    [
        ([1], 0.2499975, 0.5),
        ([0], 0.99999, 1.0),
        ([0, 2, 5], 0.67777552, 0.72222222),
        ([3, 4, 9], 0.23703625, 0.31666667),
    ],
)
def test_worked_examples(ranks, trapezoidal, standard):
    ranks, n = np.array(ranks), np.array([len(ranks)])
    query = np.zeros(len(ranks), np.int64)
    given = (ranks, query, n, np.array([40]))
    assert measure("AP-T", *given)[0] == pytest.approx(trapezoidal, abs=1e-8)
    assert measure("AP-S", *given)[0] == pytest.approx(standard, abs=1e-8)


def test_standard_precision_is_that_of_ranx_ir_measures_and_pytrec_eval():
    ranks = np.array([0, 2, 5, 1, 3, 4, 9, 0])
    query = np.array([0, 0, 0, 1, 2, 2, 2, 3])
    given = (ranks, query, np.array([3, 1, 3, 1, 0]), np.full(5, 40))
    whole = [0.722222, 0.5, 0.316667, 1, 0]
    assert measure("AP-S", *given) == pytest.approx(whole, abs=1e-6)
    assert measure("AP-S@5", *given) == pytest.approx([0.555556, 0.5, 0.216667, 1, 0], abs=1e-6)
    assert reduce(measure("AP-T", *given), (), {}) == pytest.approx(43.2960, abs=1e-4)
    assert reduce(measure("AP-S", *given), (), {}) == pytest.approx(50.7778, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["AP", "AP-T@5", "Hit", "Hit@", "Hit@0", "P@-1", "P@1.5", "Recall@k", "hit@5", ""]
)
def test_a_measure_that_does_not_exist_is_named_beside_those_that_do(name):
    with pytest.raises(UserError) as caught:
        parse_measure(name)
    assert repr(name) in str(caught.value)
    assert all(form in str(caught.value) for form in MEASURES)


# ---------------------------------------------------------------------------------------------
# Averages
# ---------------------------------------------------------------------------------------------

DOMAINS = (Group("pair", digits=2), Group("source"), Group(None, digits=2))
DOMAINS_AT_K = (Group("pair", digits=2, rounding="python"), *DOMAINS[1:])


def naive_reduce(values, groups, tags) -> float:
    """Nested lists: (value, a query that it stands for) pairs."""
    items = [(value, number) for number, value in enumerate(values)]
    percent = False
    for group in groups:
        held = {}
        for value, number in items:
            labels = tags[group.tag][number] if group.tag else None
            for label in labels if isinstance(labels, tuple) else [labels]:
                if group.only in (None, label):
                    held.setdefault(label, []).append((value, number))
        items = []
        for label in sorted(held) if group.tag else held:
            own = [value for value, _ in held[label]]
            value = min(own) if group.how == "min" else sum(own) / len(own)
            if group.digits is not None:
                value = round(float(np.round(value if percent else 100 * value, group.digits)), 12)
            items.append((value, held[label][0][1]))
        percent = percent or group.digits is not None
    mean = sum(value for value, _ in items) / len(items)
    return mean if percent else 100 * mean


@pytest.mark.parametrize(
    "groups",
    [
        (),
        (Group("instance"),),
        (Group("instance", "min"),),
        (Group(None),),
        (Group(None, "min", digits=1),),
        (Group("instance", digits=0), Group("source", "min", digits=3)),
        (Group("instance"), Group("source", digits=2), Group(None, digits=1)),
        (Group("aspect"),),
        (Group("aspect", "min", digits=2),),
        (Group("aspect", only="b"),),
        (Group("instance", digits=2), Group("source", only="s1")),
    ],
)
def test_averages_equal_the_looped_definition(groups):
    generator = np.random.default_rng(4)
    for _ in range(20):
        values = generator.random(30)
        instance = generator.integers(0, 8, 30)
        tags = {
            "instance": [f"i{number}" for number in instance],
            "source": [f"s{number % 3}" for number in instance],
            "aspect": [tuple("abcd"[: number % 5]) for number in generator.integers(0, 5, 30)],
        }
        expected = naive_reduce(values, groups, tags)
        assert reduce(values, groups, tags) == pytest.approx(expected, abs=1e-9)


def instance_means(ap: np.ndarray, instance: np.ndarray) -> dict[str, float]:
    """mAP, and the means over instances of the mean and of the lowest AP, in percent."""
    _, group = np.unique(instance, return_inverse=True)
    means = np.bincount(group, ap) / np.bincount(group)
    lowest = np.full(len(means), np.inf)
    np.minimum.at(lowest, group, ap)
    values = {"mAP": ap, "mmAP": means, "minmAP": lowest}
    return {name: 100 * float(own.mean()) for name, own in values.items()}


@pytest.mark.parametrize("seed", range(20))
def test_means_of_instances_are_the_summary_of_old_to_the_last_bit(seed):
    generator = np.random.default_rng(seed)
    values = generator.random(int(generator.integers(1, 400)))
    instance = np.array([f"i{number}" for number in generator.integers(0, 40, len(values))])
    tags = {"instance": instance.tolist()}
    groups = {"mAP": (), "mmAP": (Group("instance"),), "minmAP": (Group("instance", "min"),)}
    found = {name: reduce(values, own, tags) for name, own in groups.items()}
    assert found == instance_means(values, instance)


def test_a_query_counts_once_for_each_of_its_labels():
    values = np.array([1.0, 0.5, 0.0, 0.9])
    tags = {"aspect": [("a", "b"), ("b",), "a", ()]}
    assert reduce(values, (Group("aspect"),), tags) == pytest.approx((50 + 75) / 2)


def test_rounding_is_numpys_or_pythons():
    values, tags = np.array([0.00415]), {"pair": ["p"]}  # 100 times it lies just below 0.415
    assert reduce(values, (Group("pair", digits=2),), tags) == 0.42
    assert reduce(values, (Group("pair", digits=2, rounding="python"),), tags) == 0.41


def test_a_mean_that_pythons_round_gets_is_of_float32():
    values = np.full(3, 0.123456789)
    mean = reduce(values, (Group(None, digits=12, rounding="python"),), {})
    assert mean == round(float(np.float32(0.123456789)) * 100, 12)


def test_outer_tags_have_to_be_constant_within_inner_ones():
    tags = {"pair": ["a", "a", "b"], "source": ["s", "t", "t"]}
    with pytest.raises(UserError, match="by pair first and then by source: 's' and 't'"):
        reduce(np.zeros(3), (Group("pair"), Group("source")), tags)
    reduce(np.zeros(3), (Group("source"), Group(None)), tags)


@pytest.mark.parametrize(
    ("queries", "group", "message"),
    [
        (0, Group(None), "no query"),
        (2, Group("class"), "no tag 'class'"),
        (2, Group("aspect"), "no query has a label of the tag 'aspect'"),
        (2, Group("pair", only="b"), "no query has the label 'b' of the tag 'pair'"),
        (2, Group(None, "max"), "no 'max'; there are mean, min"),
        (2, Group(None, rounding="up"), "no 'up'; there are numpy, python"),
    ],
)
def test_averages_that_cannot_be_taken(queries, group, message):
    with pytest.raises(UserError, match=message):
        reduce(np.zeros(queries), (group,), {"aspect": [()] * queries, "pair": ["a"] * queries})


def test_breakdown_has_cells_and_averages_in_string_order():
    tags = {
        "pair": ["b>a", "b>a", "a>b", "Z>a", "Z>b"],
        "source": ["b", "b", "a", "Z", "Z"],
        "target": ["a", "a", "b", "a", "b"],
    }
    values = np.array([0.1, 0.2, 0.33333, 0.5, 0.6])
    rows, columns, matrix = breakdown(values, DOMAINS, tags, "source", "target")
    assert rows == ["Z", "a", "b", "average"]
    assert columns == ["a", "b", "average"]
    nan = np.nan
    expected = [[50, 60, 55], [nan, 33.33, 33.33], [15, nan, 15], [32.5, 46.66, 34.44]]
    assert matrix == pytest.approx(np.array(expected), nan_ok=True, abs=1e-9)
    assert matrix[-1, -1] == reduce(values, DOMAINS, tags)


def test_breakdown_by_one_tag_of_several_labels():
    tags = {"aspect": [("b", "a"), ("b",), ()]}
    found = breakdown(np.array([0.5, 1.0, 0.0]), (), tags, "aspect", None)
    assert found[:2] == (["a", "b", "average"], ["average"])
    assert found[2].tolist() == [[50.0], [75.0], [62.5]]


@pytest.mark.skipif(
    not (SHARED / "golden_domains").is_dir(), reason="the golden worlds of domains are not here"
)
@pytest.mark.parametrize("dataset", ["nico", "minidn", "ltll", "imagenet_r"])
def test_domain_tables_are_those_of_the_published_code(dataset):
    """From the published ranks, every cell and mean of mAP, R@k and P@k, without a tolerance."""
    folder = SHARED / "golden_domains" / "expected"
    golden = json.loads((folder / f"{dataset}.json").read_text(encoding="utf-8"))
    _, source, target, _, n = zip(*golden["queries"], strict=True)
    tags = {"source": source, "target": target}
    tags["pair"] = [f"{s}-->{t}" for s, t in zip(source, target, strict=True)]
    query = np.repeat(np.arange(len(n)), n)
    rows = np.full(len(n), golden["gallery_rows"])
    columns = {"mAP": ("AP-T", DOMAINS)}
    for k in golden["at"]:
        columns |= {f"R@{k}": (f"Recall@{k}", DOMAINS_AT_K), f"P@{k}": (f"P@{k}", DOMAINS_AT_K)}
    for figures in golden["methods"].values():
        ranks = np.array([int(rank) for own in figures["ranks"] for rank in own.split()])
        ap = measure("AP-T", ranks, query, np.array(n), rows)
        assert ap == pytest.approx(figures["AP"], abs=1e-12)
        for name, (kind, groups) in columns.items():
            values = measure(kind, ranks, query, np.array(n), rows)
            table = breakdown(values, groups, tags, "source", "target")
            check_table(figures[name], table)
            assert reduce(values, groups, tags) == figures[name]["mean"]


def check_table(expected: dict, table) -> None:
    rows, columns, matrix = table
    cells = {
        row: {c: v for c, v in zip(columns, own, strict=True) if not np.isnan(v)}
        for row, own in zip(rows, matrix.tolist(), strict=True)
    }
    average = cells.pop("average")
    assert average.pop("average") == expected["mean"]
    assert average == expected["columns"]
    assert {row: own.pop("average") for row, own in cells.items()} == expected["rows"]
    assert cells == expected["matrix"]


def test_no_torch_until_ranks_are_counted():
    program = "import sys, utils_metrics; sys.exit('torch' in sys.modules)"
    root = Path(inspect.getfile(utils_metrics)).parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
