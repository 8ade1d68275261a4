"""Tables of runs: P@K and R@K as means, and one order of columns wherever they stand."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from report_world import evaluate_world, make_rooms, make_world

from utils_tables import console_columns, result_row, write_results, write_rows
from utils_task import Column

K = 6
FACTS = {"dataset": "world", "ties": "row", "features": "0123", "version": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    return evaluate_world(world, ("image", "sum", "product"), K)


def test_means_of_hits_are_those_of_the_rankings(runs, tmp_path):
    for run in runs:
        row = result_row(run, FACTS, K)
        write_results(tmp_path / run.variant, run, row, K)
        with open(tmp_path / run.variant / f"top{K}.csv", newline="") as file:
            queries = list(csv.DictReader(file))
        for name in (f"P@{K}", f"R@{K}"):
            mean = np.mean([float(query[name]) for query in queries])
            assert row[name] == f"{100 * mean:.2f}"
            assert 0 < mean < 1
        hits = [sum(query[f"match_{n}"] == "1" for n in range(1, K + 1)) for query in queries]
        assert row[f"P@{K}"] == f"{100 * np.mean(hits) / K:.2f}"


def test_without_rankings_or_where_the_name_is_taken_there_are_none(runs, tmp_path):
    assert f"P@{K}" not in result_row(runs[0], FACTS)
    task = runs[0].task
    taken = replace(task, columns=(*task.columns, Column(f"R@{K}", "Hit@6")))
    own = replace(runs[0], task=taken, columns={**runs[0].columns, f"R@{K}": 12.0})
    row = result_row(own, FACTS, K)
    assert row[f"R@{K}"] == "12.00"
    assert f"P@{K}" in row


def test_hidden_ground_truth_has_none(tmp_path):
    [run] = evaluate_world(make_rooms(tmp_path), ["image"], K, "rooms")
    view = replace(run.task.views["all"], positives=None)
    hidden = replace(run, task=replace(run.task, views={"all": view}, columns=(), means=()))
    assert not {f"P@{K}", f"R@{K}"} & set(result_row(hidden, FACTS, K))


def test_columns_have_one_order(runs, tmp_path):
    rows = [result_row(run, FACTS, K) for run in runs]
    rows[1]["notes"] = "something"
    write_rows(tmp_path / "all.csv", rows)
    with open(tmp_path / "all.csv", newline="") as file:
        header = next(csv.reader(file))
    for row in rows:
        assert [name for name in header if name in row] == list(row)
    shown = console_columns(runs[0].task, K)
    assert [name for name in header if name in shown] == shown
    assert header.index("seconds") + 1 == header.index("total_seconds")
