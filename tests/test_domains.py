"""benchmarks/domains.py: lists to composed queries, positives, and the tables' averages."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from domain_world import DATA, GOLDEN, NAMES, copy_lists, golden, published_ranks, read_task
from refusals import refused_data

from benchmarks import list_benchmarks, missing_images
from benchmarks.domains import BENCHMARK, DATA_SETS, build_imagenet_r, read
from utils import UserError
from utils_metrics import breakdown, measure, reduce
from utils_task import load_task, save_task

REAL = Path(__file__).parents[1] / "data"  # where data/download.py puts the real lists


def counts_of_positives(task) -> np.ndarray:
    return task.sets.sizes(task.views["all"].positives)


@pytest.mark.parametrize("name", NAMES)
def test_composed_queries_are_the_published_ones_in_their_order(name):
    task, figures = read_task(name), golden(name)
    tags, n = task.queries.tags, counts_of_positives(task).tolist()
    images = [own[0] for own in task.queries.images]
    found = zip(images, tags["source"], task.queries.text, tags["class"], n, strict=True)
    assert [list(row) for row in found] == figures["queries"]
    assert len(task.gallery) == figures["gallery_rows"]
    assert n.count(0) == figures["without_positives"]
    assert len(set(task.queries.key)) == len(task.queries)
    assert tags["target"] == task.queries.text


@pytest.mark.parametrize("name", NAMES)
def test_positives_have_the_class_of_the_query_and_the_domain_asked_for(name):
    task = read_task(name)
    notes = np.array(task.gallery.note)
    for query in range(0, len(task.queries), 7):
        label = task.queries.tags["class"][query]
        positives = task.rows_of(task.views["all"].positives, query)
        wanted = f"{label}, {task.queries.text[query]}"
        assert positives.tolist() == np.flatnonzero(notes == wanted).tolist()
        related = task.rows_of(task.related, query)
        assert {note.rsplit(", ", 1)[0] for note in notes[related]} == {label}


@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_found_where_its_users_have_it(name):
    assert missing_images(list_benchmarks()[name], read_task(name), DATA / name) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_cell_from_the_published_ranks(name):
    """Ranks to every cell, row, column and corner of every table, for every method."""
    task, figures = read_task(name), golden(name)
    n, ranked = counts_of_positives(task), np.full(len(task.queries), len(task.gallery))
    assert next(b.file for b in task.breakdowns) == "mAP_matrix.csv"
    for own in figures["methods"].values():
        ranks, query = published_ranks(own)
        for table, column in zip(task.breakdowns, task.columns, strict=True):
            values = measure(column.measure, ranks, query, n, ranked)
            tags = task.queries.tags
            rows, columns, cells = breakdown(values, column.groups, tags, table.rows, table.columns)
            expected = own[column.name]
            assert rows == columns == [*sorted(expected["rows"]), "average"]
            for row, line in zip(rows[:-1], cells, strict=False):
                pairs = dict(zip(columns, line.tolist(), strict=True))
                assert np.isnan(pairs.pop(row))
                assert pairs == {**expected["matrix"][row], "average": expected["rows"][row]}
            last = dict(zip(columns, cells[-1].tolist(), strict=True))
            assert last == {**expected["columns"], "average": expected["mean"]}
            assert reduce(values, column.groups, tags) == expected["mean"]


def test_imagenet_r_is_built_from_its_lists_as_the_published_script_builds_it():
    rows = build_imagenet_r(DATA / "imagenet_r", DATA_SETS["imagenet_r"].texts)
    lines = zip(rows.images, rows.domains, rows.classes, strict=True)
    built = "".join(f"{' '.join(line)}\r\n" for line in lines)
    expected = GOLDEN / "expected" / "imagenet_r_full_files.csv"
    assert built.encode() == expected.read_bytes()


def test_the_built_file_gives_the_same_task(tmp_path):
    (tmp_path / "full_files.csv").write_bytes(
        (GOLDEN / "expected" / "imagenet_r_full_files.csv").read_bytes()
    )
    task, other = read(tmp_path, "imagenet_r"), read_task("imagenet_r")
    assert vars(task.queries) == vars(other.queries)
    assert task.gallery.path == other.gallery.path
    assert list(task.sources) == ["full_files.csv"]
    assert list(other.sources) == ["imgnet_targets.txt", "label_names.csv"]


def test_a_task_is_kept_on_disk_as_it_is(tmp_path):
    task = read_task("ltll")
    save_task(task, tmp_path)
    again = load_task(tmp_path)
    assert again.columns == task.columns
    assert again.breakdowns == task.breakdowns
    assert again.queries.tags == task.queries.tags
    assert np.array_equal(counts_of_positives(again), counts_of_positives(task))
    assert again.gallery.own_mode


@pytest.mark.parametrize("ending", ["\r\n", " \n", "\n\n", "\n"])
def test_ends_of_lines_do_not_matter(tmp_path, ending):
    root = copy_lists("nico", tmp_path / "nico")
    for path in root.glob("*.csv"):
        lines = path.read_text(encoding="utf-8").split("\n")
        path.write_bytes(("\ufeff" + ending.join(lines)).encode())
    task = read(root, "nico")
    assert task.queries.images == read_task("nico").queries.images
    assert task.gallery.path == read_task("nico").gallery.path
    assert task.notes == ()


def test_more_than_three_fields_are_told(tmp_path):
    root = copy_lists("ltll", tmp_path / "ltll")
    path = root / "full_files.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] += " and more"
    path.write_text("\n".join(lines), encoding="utf-8")
    task = read(root, "ltll")
    assert task.queries.images == read_task("ltll").queries.images
    (note,) = task.notes
    assert "1 lines have more than three fields (the first is line 5)" in note


SPOILED = {
    "short row": ("nico", "query_files.csv", 3, "nico/dim/a.jpg dim", "line 3: 2 fields"),
    "blank in a path": ("ltll", "full_files.csv", 2, "ltll/a b.jpg New Q001", "line 2: 'b.jpg'"),
    "unknown domain": ("nico", "database_files.csv", 9, "nico/x.jpg fog cat", "line 9: 'fog'"),
    "two blanks": ("minidn", "query_files.csv", 1, "minidn/x.jpg  real bus", "line 1: ''"),
    "unknown class": ("nico", "query_files.csv", 5, "nico/x.jpg dim yeti", "class 'yeti'"),
    "no code": ("imagenet_r", "imgnet_targets.txt", 2, "imgnet/a/n1/x.jpg ", "line 2"),
    "unknown folder": ("imagenet_r", "imgnet_targets.txt", 2, "imgnet/a/n1/x.jpg 7", "'n1'"),
    "comma": ("imagenet_r", "label_names.csv", 4, "n1,a,b", "line 4"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_fault_is_named_with_file_and_line(tmp_path, monkeypatch, capsys, fault):
    name, file, line, text, said = SPOILED[fault]
    root = copy_lists(name, tmp_path / "data" / name)
    lines = (root / file).read_text(encoding="utf-8").split("\n")
    lines[line - 1] = text
    (root / file).write_text("\n".join(lines), encoding="utf-8")
    refused = refused_data(monkeypatch, capsys, tmp_path / "here", root.parent, name)
    assert said in refused
    assert file in refused


@pytest.mark.parametrize("file", ["query_files.csv", "database_files.csv"])
def test_a_domain_without_images_is_named(tmp_path, monkeypatch, capsys, file):
    root = copy_lists("minidn", tmp_path / "data" / "minidn")
    lines = (root / file).read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if " sketch " not in line]
    (root / file).write_text("\n".join(kept), encoding="utf-8")
    refused = refused_data(monkeypatch, capsys, tmp_path / "here", root.parent, "minidn")
    assert f"{file} has no image of the domain 'sketch'" in refused


@pytest.mark.parametrize(
    ("name", "file"),
    [("nico", "database_files.csv"), ("ltll", "full_files.csv"), ("imagenet_r", "label_names.csv")],
)
def test_missing_and_empty_files_are_named(tmp_path, monkeypatch, capsys, name, file):
    root = copy_lists(name, tmp_path / "data" / name)
    (root / file).unlink()
    refused = refused_data(monkeypatch, capsys, tmp_path / "here", root.parent, name)
    assert re.search(rf"{file} does not exist; .*data/download.py", refused)
    if file.endswith("files.csv"):
        (root / file).write_text("\n\n")
        with pytest.raises(UserError, match=rf"{file} is empty"):
            read(root, name)


def test_a_list_that_is_not_utf8_is_named(tmp_path):
    root = copy_lists("ltll", tmp_path / "ltll")
    (root / "full_files.csv").write_bytes(b"ltll/New/\xe9.jpg New Q001\n")
    with pytest.raises(UserError, match=r"full_files.csv is not UTF-8"):
        read(root, "ltll")


# ---------------------------------------------------------------------------------------------
# The real lists, where they are
# ---------------------------------------------------------------------------------------------

# Composed queries, query rows by domain, gallery rows (None: not known), and queries without any
# positive, of the published lists.
COUNTS = {
    "imagenet_r": (
        67_932,
        {"photo": 10_000, "cartoon": 3_726, "toy": 1_511, "sculpture": 1_196, "origami": 550},
        16_983,
        14_721,
    ),
    "nico": (
        43_615,
        {
            "grass": 2_006,
            "water": 1_897,
            "outdoor": 1_637,
            "dimlight": 1_221,
            "rock": 1_079,
            "autumn": 883,
        },
        80_134,
        0,
    ),
    "minidn": (7_560, dict.fromkeys(("clipart", "painting", "photo", "sketch"), 630), None, None),
    "ltll": (488, {"Today": 279, "Archive": 209}, 488, 0),
}


def real_task(name: str):
    try:
        return BENCHMARK.tasks[name](REAL / name)
    except UserError as error:
        pytest.skip(f"the real lists are not there: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_the_real_lists(name):
    task = real_task(name)
    composed, rows, gallery, empty = COUNTS[name]
    assert len(task.queries) == composed
    targets = len(rows) - 1
    assert Counter(task.queries.tags["source"]) == {d: targets * c for d, c in rows.items()}
    assert gallery in (None, len(task.gallery))
    assert empty in (None, int((counts_of_positives(task) == 0).sum()))


def test_a_perfect_system_on_the_real_imagenet_r():
    task = real_task("imagenet_r")
    n = counts_of_positives(task)
    query = np.repeat(np.arange(len(n)), n)
    ranks = np.arange(len(query)) - (np.cumsum(n) - n)[query]
    values = measure("AP-T", ranks, query, n, np.full(len(n), len(task.gallery)))
    (column, *_), tags = task.columns, task.queries.tags
    rows, _, cells = breakdown(values, column.groups, tags, "source", "target")
    assert reduce(values, column.groups, tags) == 89.11
    sources = {"photo": 68.12, "cartoon": 91.41, "sculpture": 93.85, "toy": 94.16, "origami": 98.0}
    assert dict(zip(rows[:-1], cells[:-1, -1].tolist(), strict=True)) == sources
