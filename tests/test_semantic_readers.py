"""The readers of CIRR, CIRCO, FashionIQ and GeneCIS: layouts, spellings, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import find_folder, list_benchmarks
from tests import semantic_files
from tests.refusals import refused_data
from utils import UserError
from utils_protocol import describe_unranked
from utils_submissions import format_submission, read_submission, score_submission
from utils_task import Task

CAP, SPLIT = "cirr/captions/cap.rc2.val.json", "cirr/image_splits/split.rc2.val.json"
CIRCO, INFO = "annotations/val.json", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
DRESS, DRESSES = "captions/cap.dress.val.json", "image_splits/split.dress.val.json"
FOCUS = "genecis/focus_attribute.json"
MADE = {
    "cirr": semantic_files.cirr(),
    "circo": semantic_files.circo(),
    "fashioniq": semantic_files.fashioniq(),
    "genecis": semantic_files.genecis(),
}


def read(root: Path, name: str) -> Task:
    return list_benchmarks()[name].tasks[name](root)


def rows(task: Task, numbers: np.ndarray) -> list[list[int]]:
    return [task.rows_of(numbers, query).tolist() for query in range(len(task.queries))]


# ---------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["cirr/", ""])
def test_cirr(tmp_path, inner):
    files = {name.replace("cirr/", inner, 1): content for name, content in MADE["cirr"].items()}
    task = read(semantic_files.write(tmp_path, files), "cirr")
    assert task.gallery.path[7] == "dev/dev-1-1-img0.png"
    assert rows(task, task.views["all"].positives) == [[1], [5], [6]]
    assert rows(task, task.views["all"].excluded) == [[0], [2], [9]]
    assert rows(task, task.views["subset"].candidates)[2] == [*range(6, 12)]
    assert task.queries.key == ["100", "101", "102"]
    assert set(task.sources) == {name for name in files if "val" in name}
    hidden = read(tmp_path, "cirr_test")
    assert hidden.views["subset"].positives is None
    assert hidden.columns == hidden.means == ()


def test_cirr_train_names_lie_in_numbered_folders(tmp_path):
    files = copy.deepcopy(MADE["cirr"])
    files[SPLIT] = {name: f"./train/34/{name}.png" for name in files[SPLIT]}
    task = read(semantic_files.write(tmp_path, files), "cirr")
    path = task.gallery.path[0]
    assert path == "train/34/dev-0-0-img0.png"
    file = tmp_path / "images" / path
    file.parent.mkdir(parents=True)
    file.touch()
    assert list_benchmarks()["cirr"].locate(tmp_path, path) == file


def test_circo(tmp_path):
    root = semantic_files.write(tmp_path, MADE["circo"])
    task = read(root, "circo")
    assert rows(task, task.views["all"].positives) == [[51, 53], [59]]
    assert rows(task, task.views["target"].positives) == [[53], [59]]
    assert rows(task, task.views["reference_out"].excluded) == [[57], [53]]
    assert task.queries.images[0] == ("COCO2017_unlabeled/unlabeled2017/000000000003.jpg",)
    assert task.queries.tags["aspect"] == [("addition", "negation"), ("addition",)]
    test = read(root, "circo_test")
    assert test.gallery.path == task.gallery.path
    assert test.gallery.shared == task.gallery.shared is not None


@pytest.mark.parametrize("folder", ["captions", "json"])
def test_fashioniq(tmp_path, folder):
    files = {name.replace("captions", folder): c for name, c in MADE["fashioniq"].items()}
    root = semantic_files.write(tmp_path, files)
    task, small = read(root, "fashioniq"), read(root, "fashioniq_small")
    assert rows(task, task.pool)[2] == [5, 6, 7, 8, 9]
    assert rows(small, small.pool)[2] == [5, 6, 8]
    assert describe_unranked(small) == []  # by the protocol
    [warning] = describe_unranked(replace(small, spares_rows=False))
    assert "never ranked" in warning
    assert rows(task, task.views["all"].positives) == [[0], [3], [5], [8], [10], [13]]
    assert rows(task, task.views["reference_out"].excluded) == [[1], [0], [6], [5], [11], [10]]
    assert task.queries.texts[:2] == [
        ("is red and is long", "is long and is red"),
        (" and has dots", "has dots and "),
    ]
    assert task.queries.fields["first"][:2] == [" is red.", ""]
    assert task.queries.key == [f"{c}-{i}" for c in ("dress", "shirt", "toptee") for i in (0, 1)]


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_fashioniq_images_end_either_way(tmp_path, ending):
    file = tmp_path / "images" / f"B0X{ending}"
    file.parent.mkdir()
    file.touch()
    assert list_benchmarks()["fashioniq"].locate(tmp_path, "images/B0X.jpg") == file


@pytest.mark.parametrize("inner", ["genecis/", ""])
def test_genecis(tmp_path, inner):
    files = {name.replace("genecis/", inner): c for name, c in MADE["genecis"].items()}
    root = semantic_files.write(tmp_path, files)
    task = read(root, "genecis_focus_attribute")
    assert rows(task, task.pool) == [[0, 1, 2, 3], [0, 1, 3, 4]]
    assert rows(task, task.views["all"].positives) == [[0], [1]]
    assert task.ties == "worst"
    assert task.gallery.path[1] == task.gallery.path[4]
    # x = 90, w = 56, y = 22, h = 53: left 50.8, top 0, right 50.8 + 95.2, bottom 90.1
    assert task.gallery.box[0].tolist() == [51, 0, 146, 90]
    # 3.5 - 0.7 * 58 is below zero: the box begins at 0 and is as wide as ever (98.6)
    assert task.queries.box[0].tolist() == [0, 0, 99, 94]
    whole = read(root, "genecis")
    assert whole.gallery.box[-1].tolist() == [0, 0, 0, 0]
    assert [c.name for c in whole.columns[:3]] == ["R@1", "R@2", "R@3"]
    assert read(root, "genecis_focus_object").gallery.box is None


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("coco2017/val2017/000000000001.jpg", "val2017/000000000001.jpg"),
        ("Visual_Genome/VG_All/1.jpg", "Visual_Genome/VG_100K_2/1.jpg"),
        ("Visual_Genome/VG_All/1.jpg", "VG_100K/1.jpg"),
    ],
)
def test_genecis_images_lie_where_the_archives_put_them(tmp_path, path, where):
    file = tmp_path / where
    file.parent.mkdir(parents=True)
    file.touch()
    assert list_benchmarks()["genecis"].locate(tmp_path, path) == file


@pytest.mark.parametrize("written", ["cirr", "CIRR"])
def test_a_folder_may_be_written_in_capitals(tmp_path, written):
    (tmp_path / written).mkdir()
    assert find_folder(tmp_path, "cirr") == tmp_path / written
    assert find_folder(tmp_path, "genecis") == tmp_path / "genecis"


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


def at(*keys, value):
    """An edit: what stands under these keys becomes the value (None: is taken away)."""

    def edit(content):
        *outer, last = keys
        for key in outer:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return edit


def repeated(content):
    content.append(content[0])


WRONG = [
    ("cirr", CAP, at(1, "reference", value="dev-9"), "entry 2: 'reference' names 'dev-9'"),
    ("cirr", CAP, at(1, "reference", value=None), "entry 2 has no 'reference'"),
    ("cirr", CAP, at(2, "target_hard", value="dev-9"), "entry 3: the target 'dev-9' is not"),
    ("cirr", CAP, at(2, "target_hard", value=None), "entry 3 has no 'target_hard'"),
    ("cirr", CAP, at(0, "target_hard", value="dev-0-0-img0"), "entry 1: the target 'dev-0-0-img0'"),
    ("cirr", CAP, at(0, "img_set", "members", 5, value="dev-9"), "entry 1, 'img_set': 'members'"),
    ("cirr", CAP, at(0, "img_set", "members", 5, value="dev-0-0-img0"), "lists a name twice"),
    ("cirr", CAP, at(0, "img_set", value=7), "entry 1: 'img_set' is 7, not an object"),
    ("cirr", CAP, at(1, "pairid", value=100), "entry 2: 100 is there a second time (entry 1"),
    ("cirr", CAP, at(1, "pairid", value="x"), "entry 2: 'pairid' is 'x', not a whole number"),
    ("cirr", CAP, at(1, "caption", value=5), "entry 2: 'caption' is 5, not a text"),
    ("cirr", CAP, at(1, value="row"), "entry 2 is 'row', not an object"),
    ("cirr", SPLIT, at("dev-0-0-img0", value=3), "'dev-0-0-img0' is 3, not a text"),
    ("cirr", SPLIT, at("dev-0-0-img0", value=None), "entry 1: 'reference' names 'dev-0-0-img0'"),
    ("circo", CIRCO, at(0, "reference_img_id", value=61), "entry 1: 'reference_img_id' names 61"),
    ("circo", CIRCO, at(1, "target_img_id", value=61), "entry 2: 'target_img_id' names 61"),
    ("circo", CIRCO, at(0, "gt_img_ids", 1, value=61), "entry 1: 'gt_img_ids' names 61"),
    ("circo", CIRCO, at(0, "gt_img_ids", 1, value=7), "'gt_img_ids' lists a name twice: [7, 7]"),
    ("circo", CIRCO, at(1, "semantic_aspects", value=None), "entry 2 has no 'semantic_aspects'"),
    ("circo", CIRCO, at(1, "id", value=0), "entry 2: 0 is there a second time"),
    ("circo", INFO, at("images", 1, "id", value=60), "entry 2: 60 is there a second time"),
    ("circo", INFO, at("images", value=None), "has no 'images'"),
    ("circo", INFO, at("images", value=[]), "holds no list of entries"),
    ("fashioniq", DRESS, at(0, "candidate", value="B1"), "entry 1: 'candidate' names 'B1'"),
    ("fashioniq", DRESS, at(1, "target", value="B1"), "entry 2: 'target' names 'B1', which is not"),
    ("fashioniq", DRESS, at(1, "target", value=None), "entry 2 has no 'target'"),
    ("fashioniq", DRESS, at(1, "captions", 1, value=None), "entry 2: 'captions' holds 1 captions"),
    ("fashioniq", DRESSES, repeated, "entry 6: 'B0COMMON' is there a second time (entry 1"),
    ("fashioniq", DRESSES, at(0, value=4), "holds a value that is 4, not a text"),
    ("genecis", FOCUS, at(0, "target", value=None), "entry 1 has no 'target'"),
    ("genecis", FOCUS, at(1, "gallery", 2, "image_id", value=None), "'gallery' number 3 has no"),
    (
        "genecis",
        FOCUS,
        at(1, "reference", "instance_bbox", value=[1, 2]),
        "[1, 2], not four numbers",
    ),
    ("genecis", FOCUS, at(1, "target", "instance_bbox", 2, value=0), "which has no area"),
    ("genecis", FOCUS, at(1, "condition", value=None), "entry 2 has no 'condition'"),
]


@pytest.mark.parametrize(("name", "file", "edit", "message"), WRONG)
def test_wrong_annotations_are_one_line_that_names_file_and_entry(
    tmp_path, monkeypatch, capsys, name, file, edit, message
):
    files = copy.deepcopy(MADE[name])
    edit(files[file])
    data = tmp_path / "data"
    root = semantic_files.write(data if file.startswith(name) else data / name, files)
    line = refused_data(monkeypatch, capsys, tmp_path / "here", data, name)
    named = file if "reference' names 'dev-0" not in message else CAP
    assert str(root / named) in line
    assert message in line


@pytest.mark.parametrize(("name", "file"), [("cirr", CAP), ("circo", INFO), ("genecis", FOCUS)])
def test_truncated_absent_and_doubled_json(tmp_path, monkeypatch, capsys, name, file):
    data = tmp_path / "data"
    root = semantic_files.write(data if file.startswith(name) else data / name, MADE[name])
    path = root / file
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    line = refused_data(monkeypatch, capsys, tmp_path / "here", data, name)
    assert f"{path} is not valid JSON" in line
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid JSON"):
        read(root, name)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        read(root, name)
    path.unlink()
    with pytest.raises(UserError, match=r"does not exist; the annotations come with .*download"):
        read(root, name)


def test_a_name_that_stands_twice_in_a_split_is_refused(tmp_path):
    path = semantic_files.write(tmp_path, MADE["cirr"]) / SPLIT
    first = '"dev-0-0-img0": "./dev/dev-0-0-img0.png",'
    path.write_text(path.read_text().replace(first, first * 2))
    with pytest.raises(UserError, match="the key 'dev-0-0-img0' is there twice"):
        read(tmp_path, "cirr")


# ---------------------------------------------------------------------------------------------
# Submissions
# ---------------------------------------------------------------------------------------------


def listed(task: Task, k: int) -> np.ndarray:
    """For each query the first k rows of its view, the reference left out, int64 (Q, k)."""
    excluded = task.views["all"].excluded
    return np.stack(
        [
            np.setdiff1d(np.arange(len(task.gallery)), task.rows_of(excluded, query))[:k]
            for query in range(len(task.queries))
        ]
    )


def many_images(files: dict) -> dict:
    """CIRR with 60 images more, which no query names."""
    files = copy.deepcopy(files)
    for split in ("val", "test1"):
        more = {f"dev-x-{i}": f"./dev/dev-x-{i}.png" for i in range(60)}
        files[f"cirr/image_splits/split.rc2.{split}.json"] |= more
    return files


def test_a_cirr_submission_has_the_bytes_of_the_servers_example(tmp_path):
    root = semantic_files.write(tmp_path, many_images(MADE["cirr"]))
    task, layouts = read(root, "cirr_test"), list_benchmarks()["cirr_test"].submissions
    recall, subset = task.submissions
    rows = listed(task, 50)
    text = format_submission(task, recall, layouts[recall.layout], rows)
    start = '{"version": "rc2", "metric": "recall", "100": ["dev-0-1-img0", "dev-0-2-img0", '
    assert text.startswith(start)
    assert json.loads(text)["102"] == [Path(task.gallery.path[row]).stem for row in rows[2]]
    three = np.array([[1, 2, 3], [0, 1, 3], [6, 7, 8]])
    assert format_submission(task, subset, layouts[subset.layout], three) == (
        '{"version": "rc2", "metric": "recall_subset", '
        '"100": ["dev-0-1-img0", "dev-0-2-img0", "dev-0-3-img0"], '
        '"101": ["dev-0-0-img0", "dev-0-1-img0", "dev-0-3-img0"], '
        '"102": ["dev-1-0-img0", "dev-1-1-img0", "dev-1-2-img0"]}'
    )
    file = tmp_path / "recall.json"
    file.write_text(text)
    assert read_submission(task, recall, layouts[recall.layout], file).tolist() == rows.tolist()


def test_a_circo_submission_lists_numbers(tmp_path):
    task = read(semantic_files.write(tmp_path, MADE["circo"]), "circo_test")
    layout = list_benchmarks()["circo_test"].submissions["ids"]
    rows = np.tile(np.arange(50), (2, 1))
    text = format_submission(task, task.submissions[0], layout, rows)
    assert text == json.dumps({str(query): [*range(60, 10, -1)] for query in range(2)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ((1, 4, 2), "query 101: dev/dev-0-2-img0.png is the query's own and may not be listed"),
        ((2, 4, 3), "query 102: dev/dev-0-3-img0.png is listed twice"),
        ((0, 49, -1), "query 100: only 49 images can be ranked, and 50 are needed"),
    ],
)
def test_rows_that_break_the_rules_are_not_written(tmp_path, edit, message):
    task = read(semantic_files.write(tmp_path, many_images(MADE["cirr"])), "cirr_test")
    rows, (query, place, row) = listed(task, 50), edit
    rows[query, place] = row
    layout = list_benchmarks()["cirr_test"].submissions["recall"]
    with pytest.raises(UserError) as error:
        format_submission(task, task.submissions[0], layout, rows)
    assert message in str(error.value)


def test_a_subset_submission_stays_in_its_group_and_names_its_metric(tmp_path):
    task = read(semantic_files.write(tmp_path, MADE["cirr"]), "cirr")
    layouts = list_benchmarks()["cirr"].submissions
    subset = task.submissions[1]
    rows = np.array([[1, 2, 3], [5, 1, 3], [7, 6, 8]])
    text = format_submission(task, subset, layouts[subset.layout], rows)
    file = tmp_path / "subset.json"
    file.write_text(text)
    assert read_submission(task, subset, layouts[subset.layout], file).tolist() == rows.tolist()
    with pytest.raises(UserError, match="'metric' has to be 'recall'"):
        read_submission(task, task.submissions[0], layouts["recall"], file)
    file.write_text(text.replace("dev-1-2-img0", "dev-0-2-img0"))
    with pytest.raises(UserError, match=r"query 102: dev/dev-0-2-img0.png is not among"):
        read_submission(task, subset, layouts[subset.layout], file)
    assert score_submission(task, subset, rows) == pytest.approx(
        {"Recall_subset@1": 200 / 3, "Recall_subset@2": 100, "Recall_subset@3": 100}
    )
