"""An annotation that has changed since the features were made: read anew, or refused."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from extraction_world import environment, write_rows
from test_own_dataset import PLACES, THINGS, draw_photo, make_photos

import create_features
import run_retrieval
from benchmarks.icir import Annotation
from utils import UserError
from utils_labels import _still_skipped

SAID = "changed since the features were made: the labels were read anew; every image and text"


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_clip) -> Path:
    """Features of a folder with labels, and of one with queries.jsonl."""
    folder = tmp_path_factory.mktemp("labels")
    make_photos(folder / "data/photos")
    paths = [f"{thing} {place}.jpg" for thing in THINGS for place in PLACES]
    for seed, path in enumerate(paths):
        thing, _, place = path.removesuffix(".jpg").partition(" ")
        draw_photo(folder / "data/shop" / path, thing, place, seed)
    write_queries(folder, [(paths[0], "at night", paths[2:3]), (paths[3], "on sand", paths[4:5])])
    write_rows(folder / "corpora/generic_subjects.csv", [("mug",)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment().items():
            patch.setenv(name, value)
        for dataset in ("photos", "shop"):
            create(small_clip, dataset)
    return folder


def write_queries(folder: Path, queries: list[tuple[str, str, list[str]]]) -> None:
    rows = [{"image": i, "text": t, "positives": p} for i, t, p in queries]
    (folder / "data/shop/queries.jsonl").write_text("\n".join(map(json.dumps, rows)))


def flags(clip: Path, dataset: str) -> list[str]:
    return ["--backbone", f"local-dir:{clip}", "--gpu", "-1", "--dataset", dataset]


def create(clip: Path, dataset: str, *more: str) -> None:
    create_features.main([*flags(clip, dataset), "--workers", "0", *more])


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    copy = shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def table(clip: Path, dataset: str, results: str) -> dict[str, str]:
    """The row of a run of `sum`, but for what differs from run to run."""
    run_retrieval.main([*flags(clip, dataset), "--method", "sum", "--results_dir", results])
    (path,) = Path(results).glob("*/sum*/mAP_table.csv")
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    return {name: row[name] for name in ("mAP", "mmAP", "queries", "notes") if name in row}


def read_rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("given", ["photos", "data/photos"], ids=["by name", "by path"])
def test_labels_are_read_anew(folder, small_clip, capsys, given):
    """Another order, fewer rows, other texts of the database, another instance: as if extracted."""
    before = table(small_clip, given, "before")
    assert SAID not in capsys.readouterr().err
    query, database = (folder / f"data/photos/{s}_files.csv" for s in ("query", "database"))
    write_rows(query, read_rows(query)[::-1][:4])
    rows = [row for row in read_rows(database)[::-1] if "sand 1" not in row[0]]
    write_rows(
        database, [[path, text.replace("at night", "on grass"), i] for path, text, i in rows]
    )
    create(small_clip, given)  # encodes nothing
    assert "every image and text has its feature" in capsys.readouterr().out
    after = table(small_clip, given, "after")
    assert f"query_files.csv, database_files.csv {SAID}" in capsys.readouterr().err
    assert SAID in after.pop("notes")
    create(small_clip, given, "--overwrite")
    assert after == {k: v for k, v in table(small_clip, given, "again").items() if k != "notes"}
    assert (before["queries"], after["queries"]) == ("6", "4")
    assert before["mAP"] != after["mAP"]


def read_pickles(folder: Path) -> list[dict]:
    paths = [*folder.glob("features/*/photos/*.pkl")]
    assert len(paths) == 2
    return [pickle.loads(path.read_bytes()) for path in sorted(paths)]


def test_the_references_files_have_the_labels_that_hold_now(folder, small_clip):
    """As if extracted anew; what a method reads beside features is refused until they are."""
    create(small_clip, "photos", "--format", "pkl")
    before = read_pickles(folder)
    for split, kept in (("query", 3), ("database", 8)):
        path = folder / f"data/photos/{split}_files.csv"
        rows = [(name, text, instance.upper()) for name, text, instance in read_rows(path)]
        write_rows(path, rows[::-1][:kept])
    create(small_clip, "photos", "--format", "pkl")
    now = read_pickles(folder)
    with pytest.raises(UserError, match="inputs are of their rows; first make them anew: python3"):
        create(small_clip, "photos", "--inputs", "searle", "--phi", "phi.pt")
    create(small_clip, "photos", "--format", "pkl", "--overwrite")
    for own, anew, old in zip(now, read_pickles(folder), before, strict=True):
        assert own.keys() == anew.keys()
        for name in ("paths", "texts", "instances"):
            assert own[name] == anew[name] != old[name]
        for name in own.keys() - {"paths", "texts", "instances"}:
            assert own[name] is anew[name] is None or np.allclose(own[name], anew[name], atol=1e-5)


@pytest.mark.parametrize("given", ["photos", "data/photos"], ids=["by name", "by path"])
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (0, "images/new.jpg", "query_files.csv, row 2: the query image 'images/new.jpg' has no"),
        (1, "under water", "query_files.csv, row 2: the query text 'under water' has no feature"),
    ],
    ids=["image", "text"],
)
def test_what_has_no_feature_is_refused(folder, small_clip, given, column, value, said):
    draw_photo(folder / "data/photos/images/new.jpg", "mug", "on sand", 1)
    path = folder / "data/photos/query_files.csv"
    rows = read_rows(path)
    rows[1][column] = value
    write_rows(path, rows)
    for command in (lambda: table(small_clip, given, "results"), lambda: create(small_clip, given)):
        with pytest.raises(UserError, match="--overwrite makes them anew") as error:
            command()
        assert said in str(error.value)


def test_queries_of_ones_own_form(folder, small_clip, capsys):
    table(small_clip, "shop", "before")
    paths = [f"{thing} {place}.jpg" for thing in THINGS for place in PLACES]
    changed = [
        (paths[3], "on sand", paths[:2]),
        (paths[3], "at night", []),
        (paths[0], "on sand", []),
    ]
    write_queries(folder, changed)
    create(small_clip, "shop")
    after = table(small_clip, "shop", "after")
    assert f"queries.jsonl {SAID}" in capsys.readouterr().err
    create(small_clip, "shop", "--overwrite")
    again = table(small_clip, "shop", "again")
    assert after["mAP"] == again["mAP"]
    assert after["queries"] == again["queries"] == "3"
    write_queries(folder, [*changed, (paths[1], "in snow", [])])
    with pytest.raises(UserError, match="shop, query 4: the query text 'in snow' has no feature"):
        table(small_clip, "shop", "new")


def test_an_image_that_is_gone_from_the_folder(folder, small_clip, capsys):
    """The gallery is the images below the folder: one less, and the rest has its features."""
    (folder / "data/shop/kite on grass.jpg").rename(folder / "kite.jpg")
    with pytest.raises(UserError, match="kite on grass"):
        table(small_clip, "shop", "broken")  # its query's image
    (folder / "kite.jpg").rename(folder / "data/shop/kite on grass.jpg")
    (folder / "data/shop/mug on sand.jpg").unlink()
    table(small_clip, "shop", "after")
    assert f"images below the folder {SAID}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "image"),
    [("photos", "images/mug/mug at night 0.jpg"), ("shop", "mug at night.jpg")],
)
def test_another_image_in_the_place_of_one(folder, small_clip, capsys, dataset, image):
    create(small_clip, dataset)
    assert "already finished" in capsys.readouterr().out
    path = folder / "data" / dataset / image
    size = path.stat().st_size
    draw_photo(path, "kite", "on sand", 99)
    with pytest.raises(UserError, match=r"of other image files \(.* bytes in all, now .*overwrite"):
        create(small_clip, dataset)
    assert path.stat().st_size != size


def test_queries_that_are_asked_again(folder, small_clip, capsys):
    path = folder / "data/photos/query_files.csv"
    rows = read_rows(path)
    write_rows(path, [*rows, rows[1]])
    table(small_clip, "photos", "again")
    said = f"1 of {len(rows) + 1} queries ask the same as an earlier one, and all count; the first:"
    assert f"{said} query {len(rows) + 1}, as query 2" in capsys.readouterr().err


def test_wrong_settings_are_not_passed_over(folder, small_clip):
    (folder / "data/shop/benchmark.json").write_text('{"columns": ["R@1 = Hit1"]}')
    with pytest.raises(UserError, match=r"benchmark\.json, line 1: .*'Hit1' is no measure"):
        table(small_clip, "shop", "wrong")


def test_what_was_left_out_is_counted_by_the_rows_that_are_there(tmp_path):
    """Of an image that cannot be read: two rows now, where there was one."""
    paths = ["a.jpg", "x.jpg", "x.jpg"]
    columns = (paths, ["", "", ""], ["i", "i", "j"], [1, 2, 4])
    now = {"database": Annotation("database", tmp_path, "", *columns)}
    lost = [("x.jpg", "it is cut"), ("gone.jpg", "it is empty")]
    skipped = [{"split": "database", "row": 9, "image_path": p, "cause": c} for p, c in lost]
    found = _still_skipped({"skipped": skipped}, now)
    assert [(entry["row"], entry["cause"]) for entry in found] == [(n, "it is cut") for n in (2, 4)]
