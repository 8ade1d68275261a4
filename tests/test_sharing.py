"""What queries share: similarities of equal vectors, rankings of queries that score the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import CPU, make_world

from methods import find_method
from utils_evaluation import evaluate
from utils_metrics import positive_ranks
from utils_retrieval import Asked, Assets, Gallery, Queries, Shared
from utils_runs import Run
from utils_storage import ArrayRows, Features


@pytest.mark.parametrize(
    ("place", "copied"),
    [
        (slice(0, 3), False),  # one row
        (slice(2, 5), False),  # rows that follow each other
        (slice(4, 7), True),
        (torch.tensor([6, 0]), True),
    ],
)
def test_shared_values_are_those_of_each_query_and_copied_only_where_scattered(place, copied):
    values = torch.arange(12.0).view(4, 3)
    shared = Shared(values, torch.tensor([1, 1, 1, 2, 3, 0, 3]))
    found = shared.of(place)
    assert torch.equal(found, values[shared.kind][place])
    assert (found.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()) == copied


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("worth", [0, 1 << 30])
def test_some_of_the_queries_get_their_own_rows_of_what_is_asked(monkeypatch, kept, worth):
    monkeypatch.setattr("utils_retrieval.BYTES_KEPT", kept)
    monkeypatch.setattr("utils_retrieval.PAIRS_WORTH_SHARING", worth)
    draw = torch.Generator().manual_seed(0)
    distinct, rows = torch.randn(3, 8, generator=draw), torch.randn(20, 8, generator=draw)
    mean = torch.randn(8, generator=draw)
    images = distinct[[0, 0, 1, 1, 2, 0]]
    queries, gallery = Queries({"image": images}, np.arange(6), list("abcdef")), Gallery.of(rows)
    calls = []

    def vectors():
        calls.append(1)
        return images

    asked = {"a": Asked(vectors, mean, lambda own, some: own.mul_(2) + images[some][:, :1])}
    expected = 2 * (images @ torch.nn.functional.normalize(rows).T - (images @ mean)[:, None])
    expected += images[:, :1]
    for place in (slice(0, 2), slice(1, 5), torch.tensor([5, 2])):
        some = queries.some(place)
        assert some.words == [queries.words[i] for i in np.arange(6)[place]]
        for _ in range(2):
            found = some.compare(gallery, asked)["a"]
            assert torch.allclose(found, expected[place], atol=1e-5)
        [image] = some.similarities(gallery, "image")
        assert torch.allclose(image, images[place] @ torch.nn.functional.normalize(rows).T)
    assert len(calls) == (1 if kept else 12)


@pytest.mark.parametrize("ties", ["row", "best", "worst"])
@pytest.mark.parametrize("levels", [2, 9, 10_000])
def test_ranks_in_rows_that_queries_share_are_those_of_each_query(ties, levels):
    draw = np.random.default_rng(levels)
    scores = draw.integers(0, levels, (2, 3, 80)).astype(np.float32)
    kind = torch.tensor([2, 0, 0, 2, 1, 0])
    query, position = map(torch.from_numpy, np.nonzero(draw.random((6, 80)) < 0.1))
    runs = list(torch.from_numpy(scores))
    shared = positive_ranks(runs, query, position, ties, kind)
    each = positive_ranks([own[kind] for own in runs], query, position, ties)
    for one, other in zip(shared, each, strict=True):
        assert torch.equal(one, other)


def exact_rows(draw: np.random.Generator, rows: int) -> np.ndarray:
    """Rows of length 4 of 16 ones or minus ones: unit rows, products and sums are exact."""
    places = np.argsort(draw.random((rows, 64)))[:, :16]
    found = np.zeros((rows, 64), np.float32)
    np.put_along_axis(found, places, draw.choice([-1, 1], (rows, 16)).astype(np.float32), 1)
    return found


def exact_features(views: dict) -> Features:
    """23 queries of 6 images and 4 texts, in no order, on 60 rows; views as make_world has them."""
    world, draw = make_world(11, queries=23), np.random.default_rng(5)
    files = {
        "image": ArrayRows(Path("image"), exact_rows(draw, 6)),
        "text": ArrayRows(Path("text"), exact_rows(draw, 4)),
    }
    image, text = draw.integers(0, 6, 23), draw.integers(0, 4, 23)
    queries = replace(world.task.queries, images=[(f"{row}.jpg",) for row in image])
    columns = tuple(c for c in world.task.columns if c.view in views)
    return replace(
        world.features,
        task=replace(world.task, queries=queries, views=views, columns=columns),
        query_files=files,
        database_files={"image": ArrayRows(Path("database"), exact_rows(draw, 60))},
        image_row=[[row] for row in image],
        text_row=[[row] for row in text],
    )


@pytest.mark.parametrize("plain", [True, False])
def test_what_is_shared_gives_what_each_query_alone_gives(monkeypatch, plain):
    """Exact numbers with many ties: no product of another shape may part them by the last bit."""
    views = make_world(11, queries=23).task.views
    views = {"all": views["all"]} if plain else views
    features = exact_features(views)
    methods = map(find_method, ("image", "text", "sum", "product", "weicom"))
    runs = [Run(method, method.parameters(), method.name) for method in methods]
    settings = [
        (worth, kept, images)
        for worth in (0, 1 << 30)
        for kept in (0, 1 << 30)
        for images in (1, 2, 64)
    ]
    expected = None
    for worth, kept, images in settings[::-1]:
        monkeypatch.setattr("utils_retrieval.PAIRS_WORTH_SHARING", worth)
        monkeypatch.setattr("utils_retrieval.BYTES_KEPT", kept)
        monkeypatch.setattr("utils_search.IMAGES_COMPARED", images)
        monkeypatch.setattr("utils_search.PAIRS_COMPARED", 1)
        monkeypatch.setattr("utils_search.PAIRS_SCORED", {"cpu": 60 * images})
        found = evaluate(features, runs, Assets(), CPU, tops={"all": 7})
        expected = expected or found
        for own, other in zip(found, expected, strict=True):
            for name, ranking in own.views.items():
                for part in ("ranks", "tied", "top_rows", "top_scores"):
                    assert np.array_equal(getattr(ranking, part), getattr(other.views[name], part))
    assert any(own.tied.any() for own in expected)
