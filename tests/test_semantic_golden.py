"""Golden features of CIRR, CIRCO, FashionIQ and GeneCIS through run_retrieval.py.

What the published programs made of small worlds with the tiny backbone; see README.md there.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import run_retrieval
from benchmarks.annotations import read_entries
from benchmarks.genecis import TASKS
from tests.semantic_world import (
    GOLDEN,
    golden_arrays,
    golden_figures,
    needs_golden,
    read_golden,
    same_lists,
    save_features,
)
from utils import UserError
from utils_task import Task

pytestmark = needs_golden
CATEGORIES = ("dress", "shirt", "toptee")
BACKBONE = "golden"


def run(world: Path, dataset: str, *flags: str) -> list[dict[str, str]]:
    """The rows of the table that all baselines of a world get, as they are printed."""
    run_retrieval.main(
        [
            *("--dataset", dataset, "--backbone", BACKBONE, "--gpu", "-1"),
            *("--features_dir", str(world), "--results_dir", str(world / "results"), *flags),
        ]
    )
    [table] = (world / "results" / dataset).glob("*/mAP_table.csv")
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def save(world: Path, task: Task, gallery, images, texts) -> Path:
    folder = world / f"{BACKBONE}_features" / task.name
    save_features(folder, task, gallery, images, texts)
    return world


def stack(names: list[str], key: str) -> np.ndarray:
    return np.concatenate([golden_arrays(name)[key] for name in names])


def save_whole(world: Path, name: str, files: list[str]) -> Path:
    """A task whose galleries are those of the files, one behind the other."""
    arrays = {key: stack(files, key) for key in ("gallery.targetpad", "query.image", "query.text")}
    return save(world, read_golden(name), *arrays.values())


def expect(row: dict[str, str], figures: dict[str, float]) -> None:
    for name, value in figures.items():
        assert row[name] == f"{value:.2f}", name


@pytest.mark.parametrize("method", ["image", "text"])
def test_cirr_tables(tmp_path, method):
    world = save_whole(tmp_path, "cirr", ["cirr_val"])
    [row] = run(world, "cirr", "--method", method)
    metrics = golden_figures("cirr_val")[method]["metrics"]
    expect(row, metrics)
    expect(row, {"Average": (metrics["Recall@5"] + metrics["Recall_subset@1"]) / 2})


@pytest.mark.parametrize("method", ["image", "text"])
def test_circo_tables(tmp_path, method):
    world = save_whole(tmp_path, "circo", ["circo_val"])
    [row] = run(world, "circo", "--method", method)
    figures = golden_figures("circo_val")[method]
    removed = figures["metrics, reference removed"]
    expect(row, {name.replace("/", " "): v for name, v in figures["metrics"].items()})
    expect(row, {f"mAP@{k} reference out": removed[f"mAP@{k}"] for k in (5, 10, 25, 50)})


@pytest.mark.parametrize("method", ["image", "text"])
@pytest.mark.parametrize(
    ("dataset", "key"), [("fashioniq", "metrics"), ("fashioniq_small", "metrics, VAL gallery")]
)
def test_fashioniq_tables(tmp_path, dataset, key, method):
    files = [f"fashioniq_{category}_val" for category in CATEGORIES]
    world = save_whole(tmp_path, dataset, files)
    [row] = run(world, dataset, "--method", method)
    figures = [golden_figures(file)[method] for file in files]
    for k in (10, 50):
        own = [metrics[key][f"Recall@{k}"] for metrics in figures]
        expect(row, {f"{c} R@{k}": v for c, v in zip(CATEGORIES, own, strict=True)})
        expect(row, {f"R@{k}": np.mean(own)})
        if key == "metrics":
            removed = [m["metrics, reference removed"][f"Recall@{k}"] for m in figures]
            expect(row, {f"R@{k} reference out": np.mean(removed)})


@pytest.mark.parametrize("method", ["image", "text"])
@pytest.mark.parametrize(
    "task", ["focus_attribute", "change_attribute", "focus_object", "change_object"]
)
def test_genecis_tables(tmp_path, task, method):
    read, arrays = read_golden(f"genecis_{task}"), golden_arrays(f"genecis_{task}")
    gallery = np.zeros((len(read.gallery), 128))
    for query, candidates in enumerate(arrays["candidates.plain"]):
        positive = read.rows_of(read.views["all"].positives, query)
        rows = [positive[0], *candidate_rows(read, task, query)]
        gallery[rows] = candidates
    texts = np.zeros((12, 128))
    for query, (candidates, scores) in enumerate(
        zip(arrays["candidates.plain"], arrays["scores.genecis.text_only"], strict=True)
    ):  # the texts' features are not given, their scores are
        texts[query] = np.linalg.lstsq(candidates.astype(float), scores.astype(float))[0]
    world = save(tmp_path, read, gallery, arrays["reference.plain (raw)"], texts)
    [row] = run(world, read.name, "--method", method)
    figures = golden_figures(f"genecis_{task}")[f"genecis.{method}_only"]
    expect(row, figures["metrics with ties against the positive"])


def candidate_rows(read: Task, task: str, query: int) -> list[int]:
    """The gallery rows of a query's distractors, in the order of its annotation."""
    entry = read_entries(GOLDEN / f"genecis/genecis/{task}.json")[query]
    pool = read.rows_of(read.pool, query).tolist()
    pool.remove(read.rows_of(read.views["all"].positives, query)[0])
    boxes = np.zeros((len(read.gallery), 4)) if read.gallery.box is None else read.gallery.box
    rows = []
    for image in entry.entries("gallery"):
        path, box = TASKS[task](image)
        own = (r for r in pool if read.gallery.path[r] == path and (boxes[r] == box).all())
        rows.append(next(r for r in own if r not in rows))
    return rows


@pytest.mark.parametrize("method", ["image", "text"])
@pytest.mark.parametrize(
    ("dataset", "files"),
    [
        ("cirr_test", {"recall.json": "recall", "recall_subset.json": "recall_subset"}),
        ("circo_test", {"submission.json": None}),
    ],
)
def test_submission_files(tmp_path, capsys, dataset, files, method):
    world = save_whole(tmp_path, dataset, [dataset])
    [row] = run(world, dataset, "--method", method, "--top_k", "3")
    assert "R@1" not in row
    place = tmp_path / "results" / dataset / f"{method}_{BACKBONE}"
    said = f"for the evaluation server: {' and '.join(files)} in {place}\n"
    assert said in capsys.readouterr().out
    [top] = (world / "results" / dataset).glob("*/top3.csv")
    with open(top, newline="") as file:
        for ranked in csv.DictReader(file):
            assert ranked["path_1"]
            assert ranked["P@3"] == ranked["R@3"] == ranked["match_1"] == ""
    arrays = golden_arrays(dataset)
    names = arrays["gallery_names"].tolist()
    for file, metric in files.items():
        path = tmp_path / "results" / dataset / f"{method}_{BACKBONE}" / file
        name = "_".join(filter(None, (dataset, method, metric)))
        theirs = json.loads((GOLDEN / f"expected/submissions/{name}.json").read_text())
        ours = json.loads(path.read_text())
        if metric:
            assert list(ours)[:2] == ["version", "metric"]
            assert (ours["version"], ours["metric"]) == (theirs["version"], theirs["metric"])
        same_lists(ours, theirs, arrays[f"scores.{method}"], names)
        capsys.readouterr()
        flags = ("--dataset", dataset, "--data_dir", str(GOLDEN), "--check_submission", str(path))
        run_retrieval.main([*flags])
        assert f"{path}: right for {dataset}, {file}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--sweep", "fusion_weight=0:1:0.5", "--method", "sum"), ("--metrics", "Hit@5")]
)
def test_hidden_ground_truth_gives_no_figures(tmp_path, flags):
    world = save_whole(tmp_path, "circo_test", ["circo_test"])
    with pytest.raises(UserError, match="ground truth of circo_test is hidden"):
        run(world, "circo_test", *(flags if "--sweep" in flags else ("--method", "text", *flags)))
    assert not (tmp_path / "results").exists()


def test_a_submission_of_a_split_with_ground_truth_is_scored(tmp_path, capsys):
    figures = golden_figures("circo_val")["text"]
    content = {query["id"]: query["top"] for query in figures["queries"]}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    flags = ("--dataset", "circo", "--data_dir", str(GOLDEN), "--check_submission", str(file))
    run_retrieval.main([*flags])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{file}: right for circo, submission.json: 24 queries of 50 images each"
    values = dict(line.rsplit(maxsplit=1) for line in lines)
    expect(values, {name.replace("/", " "): v for name, v in figures["metrics"].items()})
