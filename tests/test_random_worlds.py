"""Random worlds through the command, against the oracle; labels come back as they were."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
from oracle import Refused, judge, make_trials
from random_worlds import make_world, write_assets, write_native, write_pickles

import run_retrieval
from utils import UserError
from utils_storage import load_features
from utils_values import read_values

TOLERANCE = 1e-6
TRIALS_IN_THE_SUITE = 4  # of a world; the stress test runs all of them


def read_aps(folder: Path) -> tuple[list[tuple[str, ...]], list[float]]:
    """The labels and APs of a run's only folder of results."""
    (path,) = folder.rglob("APs.csv")
    with open(path, encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [tuple(row[:3]) for row in rows], [float(row[3]) for row in rows]


def check_world(seed: int, folder: Path, most: int = 100) -> tuple[int, int]:
    """Run trials on a world, from native files or pickles.

    Gives the number of APs compared, and of those that rounding and ties leave no room.
    """
    world = make_world(seed)
    write = write_pickles if seed % 3 == 0 else write_native
    write(world, folder / "features/clip_features/icir")
    write_assets(world, folder)
    task = load_features(folder / "features", "clip", "icir").task
    assert list(task.gallery.path) == [row[0] for row in world.rows]
    assert list(task.gallery.note) == [row[1] for row in world.rows]
    compared = decided = 0
    trials = make_trials(seed, world)
    for number, trial in enumerate(random.Random(seed).sample(trials, min(most, len(trials)))):
        results = folder / str(number)
        places = {"features": "features", "data": "data"}
        flags = [t for n, at in places.items() for t in (f"--{n}_dir", str(folder / at))]
        flags += ["--results_dir", str(results), "--backbone", "clip", "--gpu", "-1"]
        if trial.flags.get("normalize_similarities"):
            flags += ["--path_to_synthetic_data", str(folder / "synthetic")]
        try:
            bounds = judge(world, trial)
        except Refused:
            with pytest.raises(UserError, match="no positive eigenvalue to keep"):
                run_retrieval.main([*flags, *trial.words()])
            continue
        run_retrieval.main([*flags, *trial.words()])
        labels, found = read_aps(results)
        assert sorted(labels) == sorted(world.queries)
        (path,) = results.rglob("APs.json")
        kept = read_values(path.parent).labels
        assert set(zip(*kept.values(), strict=True)) == set(labels)
        expected = dict(zip(world.queries, bounds, strict=True))
        for label, ap in zip(labels, found, strict=True):
            lowest, highest = expected[label]
            assert lowest - TOLERANCE <= ap <= highest + TOLERANCE, (seed, trial, label)
            compared += 1
            decided += highest - lowest < TOLERANCE
    return compared, decided


@pytest.mark.parametrize("seed", range(20))
def test_a_random_world(tmp_path, seed):
    compared, _ = check_world(seed, tmp_path, TRIALS_IN_THE_SUITE)
    assert compared
