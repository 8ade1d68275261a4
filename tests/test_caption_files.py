"""Caption files: our JSONL and the exchange files of CIReVL and CVSI, read against their tasks."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from semantic_world import GOLDEN, needs_golden

from benchmarks import list_benchmarks
from utils import UserError
from utils_captions import (
    instructions,
    read_described,
    read_image_captions,
    read_rewritten,
)
from utils_task import WHOLE, Images, QueryTable, RowSets, Task, View, whole_gallery

ASSETS = GOLDEN / "assets"
# Task, its folder in the golden world, and the rows of the references' files in its order.
TASKS = {
    "cirr": ("cirr", ["cirr_{}val"]),
    "cirr_test": ("cirr", ["cirr_{}test"]),
    "circo": ("circo", ["circo_{}val"]),
    "circo_test": ("circo", ["circo_{}test"]),
    "fashioniq": ("fashioniq", [f"fashioniq_{c}_{{}}val" for c in ("dress", "shirt", "toptee")]),
}


def golden_task(name: str) -> Task:
    benchmark = list_benchmarks()[name]
    return benchmark.tasks[name](GOLDEN / benchmark.folder.get(name, name))


def small_task(prompts: str = "", hidden: bool = False, **fields) -> Task:
    """Three queries of two images against a gallery of four, one of them twice."""
    positives = None if hidden else np.zeros(3, np.int64)
    return Task(
        name="small",
        gallery=Images(["a.jpg", "b.jpg", "c.jpg", "b.jpg"]),
        queries=QueryTable(
            key=["k1", "k2", "k3"],
            images=[("q1.jpg",), ("q2.jpg",), ("q1.jpg",)],
            text=["at night", "with a hat", "in red"],
            fields=fields,
        ),
        sets=RowSets.of([np.array([0])]),
        pool=whole_gallery(3),
        views={"all": View(positives)},
        columns=(),
        prompts=prompts,
    )


def write_lines(path: Path, lines: list) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------
# The references' files
# ---------------------------------------------------------------------------------------------


def raw_mods(system: str, names: list[str], tag: str) -> list[dict]:
    folder = ASSETS / system / "precomputed"
    paths = [next(folder.glob(f"{name.format(tag)}_mods_*.json")) for name in names]
    return [json.loads(path.read_text()) for path in paths]


@needs_golden
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("system", "tag"), [("cirevl", "blip2_t5_"), ("cvsi", "")])
def test_rewritten_captions_of_the_references(name, system, tag):
    found = read_rewritten(ASSETS / system, golden_task(name))
    mods = raw_mods(system, TASKS[name][1], tag)
    rows = [row for own in mods for row in own["modified_captions"]]
    assert list(found.captions) == [(row,) if isinstance(row, str) else tuple(row) for row in rows]
    added = [text for own in mods for text in own.get("added_content", [])]
    assert found.added == (added if system == "cvsi" else None)
    assert len(found.sources) == len(TASKS[name][1])


@needs_golden
@pytest.mark.parametrize("name", ["genecis", "genecis_focus_attribute", "genecis_change_object"])
def test_rewritten_captions_of_genecis(name):
    task = golden_task(name)
    found = read_rewritten(ASSETS / "cirevl" / "precomputed", task)
    tasks = dict.fromkeys(task.queries.tags["task"])
    mods = raw_mods("cirevl", [f"genecis_{own}_{{}}val" for own in tasks], "blip2_t5_")
    assert [row for (row,) in found.captions] == [r for m in mods for r in m["modified_captions"]]


@needs_golden
@pytest.mark.parametrize("name", TASKS)
def test_gallery_captions_of_cvsi(name):
    task = golden_task(name)
    found = read_described(ASSETS / "cvsi", task)
    rows = []
    for own in TASKS[name][1]:
        path = ASSETS / "cvsi" / "precomputed" / f"{own.format('')}_target_captions.pkl"
        rows += pickle.loads(path.read_bytes())["target_captions"]
    assert list(found.captions) == [tuple(row) for row in rows]
    assert len(rows) == len(task.gallery)


@needs_golden
def test_files_of_another_split_or_order_are_refused(tmp_path):
    folder = ASSETS / "cirevl" / "precomputed"
    name = "circo_blip2_t5_{}_mods_structural_modifier_prompt.json"
    content = json.loads((folder / name.format("val")).read_text())
    path = tmp_path / name.format("val")
    task = golden_task("circo")
    shutil.copy(folder / name.format("test"), path)
    with pytest.raises(UserError, match=r"hold 10 rows, but the task has 24 queries"):
        read_rewritten(tmp_path, task)
    swapped = {key: [rows[1], rows[0], *rows[2:]] for key, rows in content.items()}
    path.write_text(json.dumps(swapped))
    with pytest.raises(UserError, match=r"val_mods\S+, row 1: made for .*\(2 of 24 rows differ\)"):
        read_rewritten(tmp_path, task)
    path.write_text(json.dumps(content))
    assert read_rewritten(tmp_path, task).captions
    shutil.copy(path, tmp_path / name.format("val").replace("structural", "short"))
    with pytest.raises(UserError, match=r"2 files fit circo .*; keep one of them"):
        read_rewritten(tmp_path, task)


def mods(**changes) -> str:
    content = {"modified_captions": ["x", "y", "z"], "instruction": None, "added_content": None}
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no list 'modified_captions'"),
        (mods(modified_captions="x"), "holds no list 'modified_captions'"),
        (mods(modified_captions=["x", "y"]), "hold 2 rows, but the task has 3 queries"),
        (mods(modified_captions=["x", 5, "z"]), "'modified_captions', row 2 is 5, not a list of"),
        (mods(modified_captions=["x", [], "z"]), r"'modified_captions', row 2 is \[\], not a list"),
        (mods(modified_captions=["x", ["y", 7], "z"]), "row 2 holds 7, which is no text"),
        (mods(modified_captions=["x", [None], "z"]), "row 2 holds None, which is no text"),
        (mods(instruction=["a"]), "'instruction' is not a list of 3 texts"),
        (mods(added_content=["a", None, "b"]), "'added_content', row 2 is no text"),
    ],
)
def test_rewritten_captions_that_are_not_right_are_one_line(tmp_path, content, message):
    (tmp_path / "circo_val_mods_p.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rewritten(tmp_path, small_task("circo"))
    assert "\n" not in str(caught.value)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"neither rewritten\.jsonl nor circo_test_mods_\*\.json"):
        read_rewritten(tmp_path, small_task("circo", hidden=True))
    with pytest.raises(UserError, match=r"neither images\.jsonl nor circo_val_target_capti"):
        read_described(tmp_path, small_task("circo"))
    with pytest.raises(UserError, match=r"nor small_val_mods"):
        read_rewritten(tmp_path, small_task())


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/never-made", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Hostile(), r"is refused: it holds (io|_io)\.open"),
        ({"target_captions": 3}, "holds no list 'target_captions'"),
        ({"target_captions": [["a"], ["b"]]}, "hold 2 rows, but the task has 4 images"),
        ({"target_captions": [["a"], "b", [3], ["c"]]}, "'target_captions', row 3 holds 3, which"),
    ],
)
def test_gallery_captions_that_are_not_right_are_one_line(tmp_path, content, message):
    (tmp_path / "circo_val_target_captions.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_described(tmp_path, small_task("circo"))
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/never-made").exists()


# ---------------------------------------------------------------------------------------------
# Our files
# ---------------------------------------------------------------------------------------------


def test_our_files_are_read_by_name(tmp_path):
    task = small_task()
    rewritten = [
        {"query": "k3", "captions": ["three"], "added": "c", "problem": "cut"},
        {"query": "k1", "captions": ["one", "uno"], "added": "a"},
        "",
        {"query": "k2", "captions": ["two"], "added": "b"},
        {"query": "another", "captions": ["four"]},
    ]
    write_lines(tmp_path / "rewritten.jsonl", rewritten)
    found = read_rewritten(tmp_path, task)
    assert found.captions == [("one", "uno"), ("two",), ("three",)]
    assert found.added == ["a", "b", "c"]
    assert list(found.sources) == ["rewritten.jsonl"]
    images = [{"image": f"{name}.jpg", "captions": [name, f"{name}!"]} for name in "cabz"]
    write_lines(tmp_path / "images.jsonl", images)
    assert read_described(tmp_path, task).captions == [(n, f"{n}!") for n in "abcb"]


def test_without_what_is_added_there_is_none(tmp_path):
    lines = [{"query": f"k{n}", "captions": ["x"]} for n in (1, 2, 3)]
    write_lines(tmp_path / "rewritten.jsonl", [*lines[:2], lines[2] | {"added": "a"}])
    assert read_rewritten(tmp_path, small_task()).added is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"rewritten\.jsonl, line 1 is not valid JSON"),
        (["[]"], "line 1 holds no JSON object"),
        ([{"query": 3, "captions": ["x"]}], "line 1: 'query' is 3, not a text"),
        ([{"query": "k1"}], "line 1: 'captions' is None, not a list of texts"),
        ([{"query": "k1", "captions": []}], r"line 1: 'captions' is \[\], not a list of texts"),
        ([{"query": "k1", "captions": ["x"], "added": 1}], "line 1: 'added' is 1, not a text"),
        ([{"query": "k1", "captions": ["x"]}] * 2, "line 2: 'k1' is there a second time"),
        ([{"query": "k1", "captions": ["x"]}], r"no captions of the query 'k2' \(2 of 3 are miss"),
    ],
)
def test_lines_that_are_not_right_are_named(tmp_path, lines, message):
    write_lines(tmp_path / "rewritten.jsonl", lines)
    with pytest.raises(UserError, match=message):
        read_rewritten(tmp_path, small_task())


def test_a_gallery_image_without_captions_is_named(tmp_path):
    write_lines(tmp_path / "images.jsonl", [{"image": "a.jpg", "captions": ["a"]}])
    with pytest.raises(UserError, match=r"no captions of the image 'b.jpg' \(3 of 4 are missing\)"):
        read_described(tmp_path, small_task())


def test_boxes_tell_images_apart(tmp_path):
    boxes = [
        {"image": "a", "box": [0, 0, 5, 5], "captions": ["x"]},
        {"image": "a", "captions": "y"},
    ]
    path = write_lines(tmp_path / "images.jsonl", boxes)
    assert read_image_captions(path) == {("a", (0, 0, 5, 5)): ("x",), ("a", WHOLE): ("y",)}
    write_lines(path, [{"image": "a", "box": [1, 2], "captions": ["x"]}])
    with pytest.raises(UserError, match=r"line 1: 'box' is \[1, 2\], not four whole numbers"):
        read_image_captions(path)
    path.write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(UserError, match="is not text in UTF-8"):
        read_image_captions(path)


def test_images_of_a_task_and_the_texts_it_gives_to_a_model():
    task = small_task("fashioniq", first=["is red. ", "", "a?"], second=[" and long", "b", ", c"])
    assert instructions(task) == ["is red and and long", " and b", "a and c"]
    assert instructions(small_task()) == ["at night", "with a hat", "in red"]
    assert task.queries.pictures()[1] == [("q2.jpg", WHOLE)]
    assert task.gallery.pictures()[3] == ("b.jpg", WHOLE)
