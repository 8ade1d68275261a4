"""The pass over a task against a naive oracle: pools, views, several images, ties, top rows."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import utils_search
from methods import find_method
from utils import UserError
from utils_blocks import make_blocks
from utils_evaluation import evaluate
from utils_retrieval import Assets, Method, NoParameters
from utils_runs import Run
from utils_storage import ArrayRows, Features
from utils_task import (
    NO_SET,
    Column,
    Group,
    Images,
    QueryTable,
    SetBuilder,
    Task,
    View,
)

CPU = torch.device("cpu")
DIM = 6
MEASURES = ("AP-T", "AP-S@5", "Hit@3", "Recall@5", "P@5")


@dataclass(frozen=True)
class World:
    """A random task, its features, and what a naive reading of it says."""

    task: Task
    features: Features
    image: np.ndarray
    gallery: np.ndarray


def make_world(seed: int, queries: int = 17, rows: int = 60, pools: int = 3) -> World:
    """Pools of any rows and of all, positives of some, excluded rows, candidates, equal rows."""
    random = np.random.default_rng(seed)
    gallery = random.normal(size=(rows, DIM)).astype(np.float32)
    gallery[rows // 2 :: 4] = gallery[3]  # equal scores
    images = random.normal(size=(queries + 2, DIM)).astype(np.float32)
    image_row = [[q] if q % 5 else [q, queries, queries + 1] for q in range(queries)]
    sets, pool, views = SetBuilder(), [], {"all": [], "out": [], "few": []}
    some = [np.sort(random.choice(rows, rows // 2, replace=False)) for _ in range(pools)]
    some[1] = np.arange(5, 35)
    for query in range(queries):
        members = some[query % pools] if query % 4 else np.arange(rows)
        pool.append(sets(members) if query % 4 else NO_SET)
        chosen = random.permutation(members)
        positives = chosen[: random.integers(0, 5)]
        candidates = chosen[: len(positives) + 6]
        views["all"].append((sets(positives), NO_SET, NO_SET))
        views["out"].append((sets(positives), sets(chosen[10:13]), NO_SET))
        views["few"].append((sets(positives), sets(chosen[len(positives) :][:2]), sets(candidates)))
    arrays = {name: np.array(parts, np.int64).T for name, parts in views.items()}
    task = Task(
        name="made",
        gallery=Images([f"{row}.jpg" for row in range(rows)]),
        queries=QueryTable(
            key=[f"q{query}" for query in range(queries)],
            images=[tuple(map(str, own)) for own in image_row],
            text=["text"] * queries,
            tags={"source": ["ab"[query % 2] for query in range(queries)]},
        ),
        sets=sets.done(),
        pool=np.array(pool),
        views={
            "all": View(arrays["all"][0]),
            "out": View(arrays["out"][0], excluded=arrays["out"][1]),
            "few": View(arrays["few"][0], arrays["few"][1], arrays["few"][2]),
        },
        columns=tuple(
            Column(f"{measure} {view}", measure, view, (Group("source"),))
            for measure in MEASURES
            for view in arrays
        ),
    )
    features = Features(
        backbone="made",
        dataset="made",
        task=task,
        query_files={"image": ArrayRows(Path("query"), images)},
        database_files={"image": ArrayRows(Path("database"), gallery)},
        source=Path("manifest.json"),
        manifest=None,
        image_row=image_row,
    )
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    mean = np.stack([unit[own].mean(0) for own in image_row])
    return World(task, features, mean, gallery)


def run_image(world: World, **options):
    run = Run(find_method("image"), NoParameters(), "image")
    (evaluation,) = evaluate(world.features, [run], Assets(), CPU, **options)
    return evaluation


def naive_rankings(world: World, view: str) -> list[tuple[list[int], set[int]]]:
    """For each query the ranked rows, best first, equal ones by row, and its positives."""
    vectors = torch.from_numpy(world.image).float()
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    rows = torch.from_numpy(world.gallery)
    scores = (vectors @ (rows / rows.norm(dim=1, keepdim=True)).T).numpy()
    of, rankings = world.task.views[view], []
    for query in range(len(world.task.queries)):
        ranked = set(world.task.rows_of(world.task.pool, query).tolist()) or set(
            range(len(world.gallery))
        )
        if of.candidates is not None:
            ranked &= set(world.task.rows_of(of.candidates, query).tolist())
        ranked -= set(world.task.rows_of(of.excluded, query).tolist())
        twins = scores[query, 3]
        value = {r: twins if np.array_equal(rows[r], rows[3]) else scores[query, r] for r in ranked}
        order = sorted(ranked, key=lambda row: (-value[row], row))
        rankings.append((order, set(world.task.rows_of(of.positives, query).tolist())))
    return rankings


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("view", ["all", "out", "few"])
def test_ranks_in_every_view_are_those_of_a_sorted_list(seed, view):
    world = make_world(seed)
    evaluation = run_image(world, tops={view: 4})
    ranking = evaluation.views[view]
    for query, (order, positives) in enumerate(naive_rankings(world, view)):
        own = ranking.positives.query == query
        found = dict(zip(ranking.positives.row[own].tolist(), ranking.ranks[own], strict=True))
        assert found == {row: order.index(row) for row in positives}
        assert ranking.positives.count[query] == len(positives)
        assert ranking.positives.ranked[query] == len(order)
        top = [row for row in ranking.top_rows[query] if row >= 0]
        assert top == order[:4]


def test_columns_average_the_views_measures():
    world = make_world(7)
    means, groups = run_image(world).means(), np.array(world.task.queries.tags["source"])
    for view in world.task.views:
        hits = np.array(
            [bool(set(order[:3]) & positives) for order, positives in naive_rankings(world, view)]
        )
        expected = 100 * np.mean([hits[groups == name].mean() for name in "ab"])
        assert means[f"Hit@3 {view}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("shared", [0, 1 << 30])
def test_pieces_of_a_large_gallery_give_the_same(monkeypatch, kept, shared):
    whole = run_image(make_world(1), tops={"all": 7})
    monkeypatch.setattr(utils_search, "PAIRS_SCORED", {"cpu": 1})
    monkeypatch.setattr(utils_search, "IMAGES_COMPARED", 1)
    monkeypatch.setattr(utils_search, "PAIRS_COMPARED", 1)
    monkeypatch.setattr("utils_retrieval.BYTES_KEPT", kept)
    monkeypatch.setattr("utils_retrieval.PAIRS_WORTH_SHARING", shared)
    pieces = run_image(make_world(1), tops={"all": 7})
    assert np.array_equal(pieces.main.top_rows, whole.main.top_rows)
    for name, ranking in whole.views.items():
        assert np.array_equal(ranking.ranks, pieces.views[name].ranks)


def test_a_tags_queries_stay_together_where_a_method_asks_for_it():
    world, seen = make_world(2), []

    def scores(states, queries, gallery):
        seen.append(queries.number.tolist())
        yield gallery.similarity(queries.image)

    method = Method("kept", NoParameters, scores, reads=("image",), together="source")
    evaluate(world.features, [Run(method, NoParameters(), "kept")], Assets(), CPU)
    tags = world.task.queries.tags["source"]
    assert sorted(number for numbers in seen for number in numbers) == list(range(len(tags)))
    for numbers in seen:
        assert len({(tags[n], int(world.task.pool[n])) for n in numbers}) == 1
    keys = [(tags[numbers[0]], int(world.task.pool[numbers[0]])) for numbers in seen]
    assert len(set(keys)) == len(keys)


def test_a_positive_outside_the_gallery_is_named():
    world = make_world(3)
    outside = next(
        (query, row)
        for query in range(1, 17)
        for row in range(60)
        if world.task.pool[query] != NO_SET
        and row not in world.task.rows_of(world.task.pool, query)
    )
    query, row = outside
    sets = replace(world.task.sets, row=np.append(world.task.sets.row, row))
    sets = replace(sets, start=np.append(sets.start, len(sets.row)))
    positives = world.task.views["all"].positives.copy()
    positives[query] = len(sets) - 1
    task = replace(world.task, sets=sets, views={"all": View(positives)})
    message = rf"positive image '{row}\.jpg' of query 'q{query}' is not in its gallery"
    with pytest.raises(UserError, match=message):
        make_blocks(task)


def test_hidden_ground_truth_gives_rankings_alone():
    world = make_world(5)
    task = replace(world.task, views={"all": View(None)}, columns=())
    features = replace(world.features, task=task)
    evaluation = run_image(replace(world, features=features, task=task), tops={"all": 5})
    assert evaluation.means() == {}
    assert evaluation.main.top_rows.shape == (17, 5)
    assert len(evaluation.main.ranks) == 0


@pytest.mark.parametrize("levels", [2, 7, 1000])
@pytest.mark.parametrize("k", [1, 5, 40, 60])
def test_the_best_rows_are_those_of_a_stable_sort(levels, k):
    draw = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (30, 40), generator=draw).float()
    scores[::3, 5:] = -torch.inf  # rows that are not ranked
    value, position = utils_search.best_rows(scores, k)
    ordered = scores.sort(dim=1, descending=True, stable=True)
    expected = np.where(ordered.values.isneginf(), -1, ordered.indices)[:, :k]
    np.testing.assert_array_equal(position, expected)
    np.testing.assert_array_equal(value, ordered.values[:, :k])
