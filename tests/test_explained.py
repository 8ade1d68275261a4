"""What scores are made of: the parts that methods declare, and those that a run keeps."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from report_world import evaluate_world, make_rooms, make_world

from methods import find_method, list_methods
from report.page import _collect_parts
from utils_evaluation import evaluate
from utils_explained import BELOW_TOP, SAMPLED, SAMPLED_IN_ALL, Explained, rows_sampled
from utils_retrieval import Assets, Fusion, Gallery, Queries, Rows
from utils_runs import Run
from utils_storage import load_features

QUERIES, ROWS, DIM, K = 5, 40, 16, 6
# Settings of each method that tells, other than its defaults.
SETTINGS = {
    "sum": [{}, {"fusion_weight": 0.3}, {"contextualize": True}],
    "product": [{}, {"clamp": False}],
    "weicom": [{}, {"weicom_lambda": 0.8, "contextualize": True}],
    "cvsi": [{}, {"cvsi_image": 0.2, "cvsi_unit_caption": True}],
    "basic": [
        {"harris_lambda": 0.3},
        {"do_query_expansion": True, "qe_k": 3, "normalize_similarities": True},
        {
            "standardize_features": True,
            "project_features": True,
            "num_principal_components_for_projection": 4.0,
            "do_query_expansion": True,
            "qe_k": 4,
        },
    ],
}


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture
def searched() -> tuple[Queries, Gallery, Assets]:
    torch.manual_seed(0)
    names = ("image", "text", "context_text", "cvsi_text", "cvsi_word")
    queries = Queries({name: unit(torch.randn(QUERIES, DIM)) for name in names})
    kinds = ("image", "cvsi_caption")
    gallery = Gallery({name: Rows.of(torch.randn(ROWS, DIM)) for name in kinds})
    corpora = {f"generic_{name}": unit(torch.randn(50, DIM)) for name in ("subjects", "styles")}
    synthetic = [unit(torch.randn(30, DIM)) for _ in range(2)]
    return queries, gallery, Assets(corpora, None, *synthetic)


def test_every_method_that_tells_is_tried():
    assert {name for name, method in list_methods().items() if method.parts} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_make_the_score(name, searched):
    method = find_method(name)
    queries, gallery, assets = searched
    points = [method.parameters(**setting) for setting in SETTINGS[name]]
    states = method.observe(method.prepare(points, assets), queries, gallery)
    for state, scores in zip(states, method.scores(states, queries, gallery), strict=True):
        told = method.parts(state, queries, gallery)
        x, y = told.similarities.values()
        assert x.shape == y.shape == scores.shape
        assert (told.fusion(x, y) - scores).abs().max() < 2e-6
        assert (x - x.mean()).abs().max() > 1e-3 < (y - y.mean()).abs().max()


def test_neighbours_are_those_that_expansion_took(searched):
    method = find_method("basic")
    queries, gallery, assets = searched
    points = [method.parameters(**setting) for setting in SETTINGS["basic"]]
    states = method.observe(method.prepare(points, assets), queries, gallery)
    told = [method.parts(state, queries, gallery).neighbours for state in states]
    assert told[0] is None
    rows = unit(gallery.kinds["image"].raw)
    plain = (queries.image @ rows.T).topk(3).indices
    assert torch.equal(told[1], plain)
    mean, basis = rows.mean(0), states[2].basis
    centred = (queries.image - mean) @ basis @ basis.T
    assert torch.equal(told[2], (centred @ (rows - mean).T).topk(4).indices)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def evaluate_explained(world, methods, dataset="world", **settings):
    features = load_features(world.folder / "features", "clip", dataset)
    found = [find_method(name) for name in methods]
    runs = [Run(method, method.parameters(**settings), method.name) for method in found]
    tops = {features.task.main_view: K}
    options = {"tops": tops, "explain": True}
    return evaluate(features, runs, Assets(), torch.device("cpu"), **options)


def test_what_a_run_keeps_makes_its_scores(world):
    image, total, product = evaluate_explained(world, ("image", "sum", "product"))
    assert image.explained is None
    for run in (total, product):
        told = run.explained
        assert told.names == ("image", "text")
        top = told.fusion(*np.moveaxis(told.top, -1, 0))
        np.testing.assert_allclose(top, run.main.top_scores, atol=2e-6)
        for query, (rows, ranks) in enumerate(
            zip(run.positive_rows, run.positive_ranks, strict=True)
        ):
            own = told.positives[query]
            assert np.isfinite(own).all(1).sum() == min(len(rows), K + BELOW_TOP)
            scores = told.fusion(*own[: len(rows)].T)
            assert (np.diff(scores) <= 1e-6).all()  # best ranked first
            if len(rows) and ranks[0] < K:
                assert abs(scores[0] - run.main.top_scores[query, ranks[0]]) < 2e-6
        assert not (told.sample < told.low[:, None] - 1e-6).any()  # NaN past a small gallery's end
        assert not (told.sample > told.high[:, None] + 1e-6).any()
        assert np.isfinite(told.sample).any(axis=(1, 2)).all()
        assert told.neighbours.shape == (len(world.queries), 0)


def test_rows_that_are_not_ranked_are_not_sampled(tmp_path):
    rooms = make_rooms(tmp_path)
    [run] = evaluate_explained(rooms, ["basic"], "rooms", do_query_expansion=True, qe_k=3)
    told = run.explained
    lost = np.isnan(told.sample).any(-1)
    assert lost.sum(1).tolist() == [0, 0, 1, 2]  # the rows that the main view leaves out
    assert np.isfinite([told.low, told.high]).all()
    assert told.neighbours.shape == (4, 3)
    assert ((told.neighbours >= 0) & (told.neighbours < 12)).all()
    assert np.isnan(told.positives[3]).all()  # it has none


def test_samples_are_bounded():
    assert rows_sampled(10, 2) == SAMPLED
    assert rows_sampled(67_932, 5) * 67_932 * 5 <= SAMPLED_IN_ALL
    assert rows_sampled(10_000_000, 1) == 0


def test_each_method_has_seconds_of_its_own(world):
    runs = evaluate_world(world, ("image", "sum", "weicom"), K)
    assert len({run.total_seconds for run in runs}) == 1
    assert all(0 < run.seconds < run.total_seconds for run in runs)
    assert sum(run.seconds for run in runs) <= runs[0].total_seconds
    assert len({run.seconds for run in runs}) == 3


def test_positives_without_a_picture_are_points_of_the_page():
    random = np.random.default_rng(1)
    low, high = np.float32([[0, 0.5]]), np.float32([[1, 0.5]])  # one part is the same everywhere
    positives = random.uniform(0, 1, (1, 12, 2)).astype(np.float32)
    positives[0, 10:] = np.nan
    arrays = {"top": positives[:, :3], "positives": positives, "sample": positives[:, :5]}
    neighbours = np.empty((1, 0), np.int64)
    told = Explained(("x", "y"), Fusion(1, 1), **arrays, low=low, high=high, neighbours=neighbours)
    page = _collect_parts(told, 0, 3, np.arange(2, 20))  # of 20, 12 have their parts, 10 a value
    assert page["box"] == [0, 1, 0.5, 0.5]
    assert len(page["missedParts"]) == 6
    more = np.frombuffer(base64.b64decode(page["more"]), np.uint8).reshape(-1, 2)
    np.testing.assert_array_equal(more[:, 0], np.rint(255 * positives[0, 8:10, 0]))
    assert len(base64.b64decode(page["cloud"])) == 2 * 5
    assert page["best"] == [float(f"{value:.4g}") for value in positives[0, 0]]
