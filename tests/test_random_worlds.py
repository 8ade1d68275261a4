"""Random worlds through the command, against the oracle; labels come back as they were."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from random_worlds import METHODS, judge, make_world, write_native, write_pickles

import run_retrieval
from utils_storage import load_features
from utils_values import read_values

TOLERANCE = 1e-6


def read_aps(folder: Path) -> tuple[list[tuple[str, ...]], list[float]]:
    """The labels and APs of a run's only folder of results."""
    (path,) = folder.rglob("APs.csv")
    with open(path, encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [tuple(row[:3]) for row in rows], [float(row[3]) for row in rows]


def check_world(seed: int, folder: Path) -> int:
    """Run every method on a world, from native files or pickles; the number of APs compared."""
    world = make_world(seed)
    write = write_pickles if seed % 3 == 0 else write_native
    write(world, folder / "features/clip_features/icir")
    task = load_features(folder / "features", "clip", "icir").task
    assert list(task.gallery.path) == [row[0] for row in world.rows]
    assert list(task.gallery.note) == [row[1] for row in world.rows]
    compared = 0
    for method in METHODS:
        results = folder / method
        flags = ("--features_dir", str(folder / "features"), "--results_dir", str(results))
        run_retrieval.main([*flags, "--method", method, "--backbone", "clip", "--gpu", "-1"])
        labels, found = read_aps(results)
        assert sorted(labels) == sorted(world.queries)
        (path,) = results.rglob("APs.json")
        kept = read_values(path.parent).labels
        assert set(zip(*kept.values(), strict=True)) == set(labels)
        expected = dict(zip(world.queries, judge(world, method), strict=True))
        for label, ap in zip(labels, found, strict=True):
            lowest, highest = expected[label]
            assert lowest - TOLERANCE <= ap <= highest + TOLERANCE, (seed, method, label)
            compared += 1
    return compared


@pytest.mark.parametrize("seed", range(20))
def test_a_random_world(tmp_path, seed):
    assert check_world(seed, tmp_path)
