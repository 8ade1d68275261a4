"""Benchmarks without code: what the files of such a folder may say, and what they may not."""

import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from benchmarks.own import is_own, name_of, read
from utils import UserError
from utils_tables import describe_task
from utils_task import Column, Group, Task, load_task, save_task

GALLERY = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
FIRST = {"image": "q.jpg", "text": "at night", "positives": ["a.jpg"]}
SECOND = {"image": "q.jpg", "text": "in the snow", "positives": ["b.jpg", "c.jpg"]}


def lines(*queries: dict) -> str:
    return "".join(json.dumps(query) + "\n" for query in queries)


def write(root: Path, **files: str | bytes | dict | list | None) -> Path:
    """A folder `shop` with these files: queries, gallery (None: absent) and settings."""
    root = root / "shop"
    root.mkdir(exist_ok=True)
    defaults = {"queries": [FIRST, SECOND], "gallery": "\n".join(GALLERY), "settings": None}
    for part, content in (defaults | files).items():
        if isinstance(content, list):
            content = lines(*content)
        if isinstance(content, dict):
            content = json.dumps(content, indent=2)
        if isinstance(content, str):
            content = content.encode()
        if content is not None:
            name = {"queries": "queries.jsonl", "gallery": "gallery.csv"}.get(part)
            (root / (name or "benchmark.json")).write_bytes(content)
    return root


def draw(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def paths(task: Task, numbers: np.ndarray | None) -> list[set[str]]:
    """Each query's set of a per-query array, as paths."""
    return [
        {task.gallery.path[row] for row in task.rows_of(numbers, query)}
        for query in range(len(task.queries))
    ]


# ---------------------------------------------------------------------------------------------
# What the files say
# ---------------------------------------------------------------------------------------------


def test_three_lines_are_a_benchmark(tmp_path):
    root = write(tmp_path)
    task = read(root)
    assert is_own(root)
    assert not is_own(tmp_path)
    assert (task.name, name_of(root)) == ("shop", "shop")
    assert list(task.gallery.path) == GALLERY
    assert list(task.queries.key) == ["1", "2"]
    assert list(task.queries.images) == [("q.jpg",), ("q.jpg",)]
    assert list(task.queries.text) == ["at night", "in the snow"]
    assert paths(task, task.views["all"].positives) == [{"a.jpg"}, {"b.jpg", "c.jpg"}]
    assert (task.pool == -1).all()
    assert (task.views["all"].excluded, task.related, task.notes) == (None, None, ())
    measures = [(column.name, column.measure) for column in task.columns]
    assert measures == [("mAP", "AP-T"), ("R@1", "Hit@1"), ("R@5", "Hit@5"), ("R@10", "Hit@10")]
    assert sorted(task.sources) == ["gallery.csv", "queries.jsonl"]


def test_everything_that_can_be_said(tmp_path):
    queries = [
        {
            "id": "red",
            "images": ["x/q.jpg", "y/q.jpg"],
            "text": "in red",
            "positives": ["a.jpg"],
            "excluded": ["d.jpg"],
            "related": ["b.jpg"],
            "gallery": "small",
            "tags": {"kind": "dress", "aspect": ["colour", "size"]},
        },
        {
            "id": 7,
            "image": "b.jpg",
            "text": "longer",
            "positives": ["c.jpg"],
            "gallery": ["a.jpg", "c.jpg"],
            "tags": {"kind": "shirt", "aspect": []},
        },
        {
            "id": "x",
            "image": "q.jpg",
            "text": "as a toy",
            "positives": ["d.jpg"],
            "gallery": "listed",
            "tags": {"kind": 12, "aspect": "size"},
        },
    ]
    settings = {
        "name": "clothes",
        "columns": ["mAP = AP-T", "mAP@10 = AP-S@10", "R@5 = Hit@5", "P@2", "by kind = AP-T"],
        "groups": {
            "R@5": "kind",
            "by kind": [{"tag": "kind", "how": "min", "digits": 2}, {"digits": 1}],
        },
        "lists": {"small": ["a.jpg", "b.jpg", "d.jpg"], "listed": "lists/listed.csv"},
    }
    root = write(tmp_path, queries=queries, settings=settings)
    (root / "lists").mkdir()
    (root / "lists/listed.csv").write_text("d.jpg\n\n b.jpg \n")
    task = read(root)
    assert (task.name, name_of(root)) == ("clothes", "clothes")
    assert task.columns == (
        Column("mAP", "AP-T"),
        Column("mAP@10", "AP-S@10"),
        Column("R@5", "Hit@5", groups=(Group("kind"),)),
        Column("P@2", "P@2"),
        Column("by kind", "AP-T", groups=(Group("kind", "min", 2), Group(None, digits=1))),
    )
    assert list(task.queries.key) == ["red", "7", "x"]
    assert task.queries.images[0] == ("x/q.jpg", "y/q.jpg")
    assert task.queries.labels()["Image Query"] == ["x/q.jpg + y/q.jpg", "b.jpg", "q.jpg"]
    assert task.queries.tags == {
        "kind": ["dress", "shirt", "12"],
        "aspect": [("colour", "size"), (), "size"],
    }
    assert paths(task, task.pool) == [
        {"a.jpg", "b.jpg", "d.jpg"},
        {"a.jpg", "c.jpg"},
        {"b.jpg", "d.jpg"},
    ]
    assert paths(task, task.views["all"].excluded) == [{"d.jpg"}, set(), set()]
    assert paths(task, task.related) == [{"b.jpg"}, set(), set()]
    assert sorted(task.sources) == [
        *("benchmark.json", "gallery.csv", "lists/listed.csv", "queries.jsonl")
    ]
    assert task.notes == (
        "queries with a tag without labels, counted in no average over it: 1 of 3, "
        "the first '7' (queries.jsonl, line 2)",
    )


def test_ways_of_writing_do_not_matter(tmp_path):
    """BOM, CRLF, blank lines and ends, backslashes, ./, absolute paths, null, Unicode forms."""
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    assert composed != decomposed
    root = write(tmp_path, gallery=f'\ufeffs/a.jpg \r\n\r\n"b, c.jpg"\r\n  \r\n{decomposed}')
    written = {
        "id": None,
        "image": f"{root}/q.jpg",
        "text": "at night ",
        "positives": [r"s\a.jpg", "./b, c.jpg"],
        "excluded": [composed],
        "related": None,
    }
    text = "\ufeff\r\n" + json.dumps(written) + "  \r\n\r\n\t\r\n"
    (root / "queries.jsonl").write_text(text, encoding="utf-8", newline="")
    task = read(root)
    assert list(task.gallery.path) == ["s/a.jpg", "b, c.jpg", decomposed]
    assert list(task.queries.images) == [("q.jpg",)]
    assert list(task.queries.text) == ["at night"]
    assert paths(task, task.views["all"].positives) == [{"s/a.jpg", "b, c.jpg"}]
    assert paths(task, task.views["all"].excluded) == [{decomposed}]
    assert list(task.queries.key) == ["2"]  # the line


def test_without_gallery_csv_every_image_below_is_the_gallery(tmp_path):
    root = write(tmp_path, gallery=None)
    draw(root, "q.jpg", "b.jpg", "deep/er/x.PNG", "a.jpg", "c.jpg", "readme.txt")
    draw(root, "._a.jpg", ".cache/z.jpg", "scan.tiff", "results/mAP_table.csv", "results/x/t.webp")
    outside = tmp_path / "outside"
    draw(outside, "o.webp")
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "zweite").symlink_to(outside)
    task = read(root)
    expected = ["a.jpg", "b.jpg", "c.jpg", "deep/er/x.PNG", "link/o.webp", "q.jpg"]
    assert list(task.gallery.path) == expected
    gallery, left, own = task.notes
    assert gallery == "gallery: the 6 images below the folder, as there is no gallery.csv"
    assert left.endswith(": 6, the first '._a.jpg'")  # .cache, loop, results, scan.tiff, zweite
    assert own == (
        'queries whose own image is in the gallery as a negative, unless "excluded" or '
        "--exclude_query_image leaves it out: 2 of 2, the first '1' (queries.jsonl, line 1)"
    )
    before = task.sources
    draw(root, "new.jpg")
    assert read(root).sources != before


def test_what_is_allowed_and_may_not_be_meant_is_counted(tmp_path):
    queries = [
        FIRST | {"positives": [], "gallery": ["b.jpg"]},
        {"image": "a.jpg", "text": "t", "positives": ["a.jpg"], "gallery": ["a.jpg", "b.jpg"]},
        {"image": "b.jpg", "text": "t", "positives": ["a.jpg"], "gallery": ["a.jpg", "b.jpg"]},
        FIRST | {"gallery": ["a.jpg"], "excluded": ["c.jpg"]},
    ]
    root = write(tmp_path, queries=queries, gallery="a.jpg\nb.jpg\n./a.jpg\nc.jpg\nd.jpg\nb.jpg\n")
    task = read(root)
    assert list(task.gallery.path) == GALLERY
    assert task.notes == (
        "gallery.csv: lines that repeat an image, which counts once: 2, the first 'a.jpg', line 3",
        "queries without positives, which score 0: 1 of 4, the first '1' (queries.jsonl, line 1)",
        'queries whose own image is in the gallery as a negative, unless "excluded" or '
        "--exclude_query_image leaves it out: 1 of 4, the first '3' (queries.jsonl, line 3)",
        "queries whose own image is among their positives: 1 of 4, the first '2' (queries.jsonl, "
        "line 2)",
        'queries that exclude images which are not in their "gallery" anyway: 1 of 4, the first '
        "'4' (queries.jsonl, line 4)",
    )
    assert paths(task, task.views["all"].positives)[0] == set()
    assert describe_task(task) == [f"note: {note}" for note in task.notes]


# ---------------------------------------------------------------------------------------------
# Mistakes: one line that names the file and the line
# ---------------------------------------------------------------------------------------------

MISTAKES_OF_QUERIES = {
    "not JSON": ('{"image": "q.jpg" "text": "x"}', "not one JSON object (Expecting ',' delimiter"),
    "comma behind": (json.dumps(SECOND) + ",", "not one JSON object (Extra data, column"),
    "a list": ("[]", "what stands here has to be an object, not a list"),
    "a text": ('"q.jpg"', "what stands here has to be an object, not a text"),
    "nested": ("[" * 100_000, "not one JSON object ("),
    "digits": ('{"id": ' + "1" * 5000 + "}", "not one JSON object ("),
    "key twice": ('{"text": "a", "text": "b"}', "the key 'text' stands twice in one object"),
    "unknown": (SECOND | {"positive": []}, "unknown key 'positive'; did you mean 'positives'?"),
    "other word": (SECOND | {"target": "a"}, "unknown key 'target'; did you mean 'positives'?"),
    "strange": (SECOND | {"zzz": 1}, "unknown key 'zzz'; there are id, image, images, text, "),
    "no text": ({"image": "q.jpg", "positives": []}, '"text" is missing'),
    "no positives": ({"image": "q.jpg", "text": "x"}, '"positives" is missing; write [] for'),
    "null positives": (SECOND | {"positives": None}, '"positives" is missing; write [] for'),
    "no image": ({"text": "x", "positives": []}, 'either "image", a path, or "images"'),
    "both": (SECOND | {"images": ["q.jpg"]}, 'either "image", a path, or "images"'),
    "image list": (SECOND | {"image": ["q.jpg"]}, '"image" has to be a text, not a list'),
    "image number": (SECOND | {"image": 3}, '"image" has to be a text, not a whole number'),
    "image blank": (SECOND | {"image": "  "}, '"image" is empty'),
    "image outside": (SECOND | {"image": "../q.jpg"}, "\"image\", '../q.jpg', is not below "),
    "image absolute": (SECOND | {"image": "/x/q.jpg"}, "\"image\", '/x/q.jpg', is not below "),
    "image on C:": (SECOND | {"image": r"C:\q.jpg"}, "\"image\", 'C:/q.jpg', is not below "),
    "images": ({"images": [], "text": "x", "positives": []}, '"images" is empty'),
    "images text": (
        {"images": "q.jpg", "text": "x", "positives": []},
        '"images" has to be a list, not a text; write ["q.jpg"]',
    ),
    "images twice": (
        {"images": ["q.jpg", "./q.jpg"], "text": "x", "positives": []},
        '"images" names an image twice',
    ),
    "text empty": (SECOND | {"text": " "}, '"text" is empty'),
    "text number": (SECOND | {"text": 1.5}, '"text" has to be a text, not a number with a point'),
    "text lines": (SECOND | {"text": "a\nb"}, '"text" holds a line break or another control'),
    "surrogate": (SECOND | {"text": "\ud800"}, '"text" holds a line break or another control'),
    "positive text": (
        SECOND | {"positives": "a.jpg"},
        '"positives" has to be a list, not a text; write ["a.jpg"]',
    ),
    "positive number": (
        SECOND | {"positives": [1]},
        'a path of "positives" has to be a text, not a whole number',
    ),
    "positive twice": (SECOND | {"positives": ["a.jpg", "a.jpg"]}, "'a.jpg' is listed twice"),
    "typo": (
        SECOND | {"positives": ["x/B.JPG"]},
        "\"positives\": 'x/B.JPG' is not in the gallery; did you mean 'b.jpg'?",
    ),
    "not in the gallery": (
        SECOND | {"positives": ["holiday/IMG_2041.png"]},
        "\"positives\": 'holiday/IMG_2041.png' is not in the gallery; add it to ",
    ),
    "excluded elsewhere": (SECOND | {"excluded": ["e.jpg"]}, "'e.jpg' is not in the gallery"),
    "related elsewhere": (SECOND | {"related": ["e.jpg"]}, "'e.jpg' is not in the gallery"),
    "positive excluded": (
        SECOND | {"excluded": ["c.jpg"]},
        '\'c.jpg\' is in "positives" and in "excluded"; take it out of one',
    ),
    "positive not searched": (
        SECOND | {"gallery": ["b.jpg"]},
        '\'c.jpg\' is in "positives", but not in the query\'s "gallery"',
    ),
    "all excluded": (
        SECOND | {"positives": [], "gallery": ["b.jpg"], "excluded": ["b.jpg", "a.jpg"]},
        '"excluded" leaves nothing of the gallery that the query searches',
    ),
    "gallery empty": (SECOND | {"gallery": []}, '"gallery" is empty; leave it out for the whole'),
    "gallery number": (SECOND | {"gallery": 3}, '"gallery" has to be a list, not a whole number'),
    "unknown list": (
        SECOND | {"gallery": "small"},
        '"gallery": benchmark.json has no list \'small\' under "lists"; there are none',
    ),
    "id float": (SECOND | {"id": 1.0}, '"id" has to be a text, not a number with a point'),
    "id bool": (SECOND | {"id": True}, '"id" has to be a text, not true or false'),
    "only some ids": (SECOND | {"id": 1}, '"id" is missing, which line 2 has; give all or none'),
    "tags text": (SECOND | {"tags": "red"}, '"tags" has to be an object, not a text'),
    "tag number": (SECOND | {"tags": {"kind": 0.5}}, "the tag 'kind' has to be a text, not a numb"),
    "tag object": (SECOND | {"tags": {"k": {}}}, "the tag 'k' has to be a text, not an object"),
    "tag twice": (SECOND | {"tags": {"k": ["x", "x "]}}, "the tag 'k' has a label twice"),
    "tag list": (
        SECOND | {"tags": {"k": [None]}},
        "a label of the tag 'k' has to be a text, not n",
    ),
    "tag name": (SECOND | {"tags": {" ": "x"}}, "the name of a tag is empty"),
    "only some tags": (SECOND | {"tags": {"k": "x"}}, "the tag 'k' is missing, which line 2 has"),
}
# Where the first line is at fault, not the second.
FIRST_AT_FAULT = {"only some ids", "only some tags"}


def complaint(root: Path) -> str:
    with pytest.raises(UserError) as error:
        read(root)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mistake", MISTAKES_OF_QUERIES)
def test_a_mistake_in_a_query_is_one_line(tmp_path, mistake):
    second, message = MISTAKES_OF_QUERIES[mistake]
    second = second if isinstance(second, str) else json.dumps(second)
    root = write(tmp_path, queries=f"{json.dumps(FIRST)}\n{second}\n")
    line = 1 if mistake in FIRST_AT_FAULT else 2
    assert complaint(root).startswith(f"{root / 'queries.jsonl'}, line {line}: ")
    assert message in complaint(root)


def test_mistakes_that_need_other_lines(tmp_path):
    root = write(tmp_path, queries=[FIRST | {"id": 7}, SECOND | {"id": "7 "}])
    assert complaint(root) == f"{root}/queries.jsonl, line 2: the id '7' is line 1's too"
    root = write(tmp_path, queries=[FIRST | {"tags": {"k": "x"}}, SECOND | {"tags": {"l": "x"}}])
    assert f"{root}/queries.jsonl, line 1: the tag 'l' is missing, which line 2 has" in complaint(
        root
    )
    root = write(tmp_path, queries="\n \n")
    assert complaint(root) == f"{root}/queries.jsonl is empty; write a query a line"
    root = write(tmp_path, queries=lines(FIRST).encode() + b'{"text": "caf\xe9"}')
    assert complaint(root) == f"{root}/queries.jsonl, line 2: not UTF-8; save the file as UTF-8"


GALLERY_MISTAKES = {
    "header": ("image_path\na.jpg\n", 1, "no image 'image_path'; the file takes no header line"),
    "columns": ("a.jpg\n\nb.jpg,night\n", 3, "2 columns where one is expected"),
    "index": ('a.jpg\n"b\nc.jpg"\n', 2, "the path holds a line break"),
    "outside": ("a.jpg\n../b.jpg\n", 2, "'../b.jpg', is not below"),
    "folder": ("a.jpg\n.\n", 2, "'.', is not below"),
    "quote": ('a.jpg\nb.jpg\n"c.jpg', 3, "not CSV"),
}


@pytest.mark.parametrize("mistake", GALLERY_MISTAKES)
def test_a_mistake_in_the_gallery_is_one_line(tmp_path, mistake):
    content, line, message = GALLERY_MISTAKES[mistake]
    root = write(tmp_path, gallery=content)
    said = complaint(root)
    assert said.startswith(
        (f"{root}/gallery.csv, line {line}: ", f"{root}/gallery.csv, row {line}: ")
    )
    assert message in said


def test_a_gallery_of_nothing(tmp_path):
    root = write(tmp_path, queries=[FIRST | {"positives": ["b.jpg"]}], gallery="\n\n")
    empty = f"{root}/gallery.csv is empty; write an image path a line, or remove it"
    assert complaint(root) == empty
    (root / "gallery.csv").unlink()
    assert complaint(root) == f"there is no .jpg/.jpeg/.png/.webp file below {root}"
    draw(root, r"a\b.jpg")
    assert "rename the image" in complaint(root)
    (root / r"a\b.jpg").unlink()
    draw(root, "a.jpg")
    assert complaint(root).endswith("'b.jpg' is not in the gallery; did you mean 'a.jpg'?")
    write(tmp_path, queries=[FIRST | {"positives": ["IMG_2041.gif"]}], gallery=None)
    assert complaint(root).endswith(f"there is no such .jpg/.jpeg/.png/.webp file below {root}")


def test_a_file_that_cannot_be_listed_is_said(tmp_path):
    root = write(tmp_path, gallery=None)
    draw(root, "a.jpg", "b.jpg", "c.jpg", os.fsdecode(b"caf\xe9.jpg"))
    assert complaint(root).startswith(f"{root}: an image holds a line break or another control")


# The words by which the line is found: the value at fault stands on a line of its own.
SETTINGS_MISTAKES = {
    "not JSON": ('{\n  "name": "x",\n}', 3, "not one JSON object ("),
    "no object": ("[1]", 1, "what stands here has to be an object, not a list"),
    "twice": ('{\n "name": "a",\n "lists": {},\n "name": "b"}', 2, "the key 'name' stands twice"),
    "unknown": ({"name": "x", "colums": []}, 3, "unknown key 'colums'; did you mean 'columns'?"),
    "name": ({"columns": ["AP-T"], "name": 3}, 5, '"name" has to be a text, not a whole number'),
    "reserved": ({"name": "corpus"}, 2, "a data set cannot be called 'corpus'"),
    "name path": ({"name": "../x"}, 2, "a data set cannot be called '../x'"),
    "columns": ({"columns": "AP-T"}, 2, '"columns" has to be a list, not a text; write ["AP-T"]'),
    "no columns": ({"columns": []}, 2, '"columns" is empty; leave it out for mAP, R@1, R@5, R@10'),
    "measure": (
        {"columns": ["mAP = AP-T", "mAP = APT"]},
        4,
        "the column 'mAP = APT': 'APT' is no measure; there are AP-T, ",
    ),
    "no cut": ({"columns": ["R = Hit"]}, 3, "'Hit' is no measure; there are"),
    "column number": ({"columns": [1]}, 2, "a column has to be a text, not a whole number"),
    "same name": ({"columns": ["A=AP-T", "A = AP-S"]}, 2, "two columns are called 'A'"),
    "groups list": ({"groups": []}, 2, '"groups" has to be an object, not a list'),
    "groups column": ({"groups": {"R@6": "k"}}, 3, "no column 'R@6'; did you mean 'R@5'?"),
    "groups tag": ({"groups": {"mAP": "k"}}, 3, "\"groups\" of 'mAP': queries have no tag 'k'"),
    "groups step": ({"groups": {"mAP": [3]}}, 3, "a step of \"groups\" of 'mAP' has to be an obj"),
    "groups key": (
        {"groups": {"mAP": {"tags": "k"}}},
        3,
        "unknown key 'tags'; did you mean 'tag'?",
    ),
    "groups how": (
        {"groups": {"mAP": {"how": "max"}}},
        3,
        "groups know no 'max'; there are mean, ",
    ),
    "groups digits": (
        {"groups": {"mAP": {"digits": -1}}},
        3,
        '"digits" in "groups" of \'mAP\' has to be from 0 to 15, not -1',
    ),
    "lists list": ({"lists": []}, 2, '"lists" has to be an object, not a list'),
    "lists type": (
        {"lists": {"x": 3}},
        3,
        "the list 'x' (or the name of its file) has to be a list",
    ),
    "lists name": ({"lists": {"": ["a.jpg"]}}, 3, "the name of a list is empty"),
    "lists file": ({"lists": {"x": "x.csv"}}, 3, "the list 'x': there is no file"),
    "lists path": (
        {"lists": {"x": ["a.jpg", "b.jpgg"]}},
        5,
        "the list 'x': 'b.jpgg' is not in the gallery; did you mean 'b.jpg'?",
    ),
    "lists empty": ({"lists": {"x": []}}, 3, "the list 'x' is empty"),
    "lists twice": ({"lists": {"x": ["a.jpg", "a.jpg"]}}, 4, "'a.jpg' is listed twice"),
}


@pytest.mark.parametrize("mistake", SETTINGS_MISTAKES)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, mistake):
    content, line, message = SETTINGS_MISTAKES[mistake]
    root = write(tmp_path, settings=content)
    assert complaint(root).startswith(f"{root / 'benchmark.json'}, line {line}: ")
    assert message in complaint(root)


def test_groups_that_cannot_be_averaged_and_lists_misspelled(tmp_path):
    queries = [
        FIRST | {"tags": {"pair": "x", "source": "s"}},
        SECOND | {"tags": {"pair": "x", "source": "t"}},
    ]
    settings = {"groups": {"mAP": ["pair", "source"]}, "lists": {"small": "s.csv"}}
    root = write(tmp_path, queries=queries, settings=settings)
    (root / "s.csv").write_text("a.jpg\nx.jpg\n")
    assert complaint(root).startswith(f"{root}/s.csv, line 2: the list 'small': 'x.jpg' is not in")
    (root / "s.csv").write_text("a.jpg\n")
    said = complaint(root)
    assert said.startswith(f"{root}/benchmark.json, line 3: \"groups\" of 'mAP': values cannot be")
    root = write(tmp_path, queries=[FIRST | {"gallery": "smal"}], settings=settings)
    assert complaint(root).endswith("has no list 'smal' under \"lists\"; did you mean 'small'?")


# ---------------------------------------------------------------------------------------------
# Random folders against a naive reading
# ---------------------------------------------------------------------------------------------

WORDS = ["007", "7", "NA", "null", "True", "été", 'a "b"', "x,y", "日本", "1e5", "-", "İ"]


def random_folder(root: Path, seed: int) -> tuple[list[dict], list[str], dict]:
    """Write a random folder; gives the queries, the gallery and the lists as they were written."""
    chance = random.Random(seed)
    gallery = [f"{chance.choice(WORDS)}/{i} {chance.choice(WORDS)}.jpg" for i in range(30)]
    lists = {name: chance.sample(gallery, chance.randint(5, 30)) for name in ("one", "two")}
    tags = chance.sample(WORDS, chance.randint(0, 3))
    queries = []
    for number in range(chance.randint(1, 40)):
        choice = chance.choice(["whole", "one", "two", "inline"])
        pool = {"whole": gallery, "inline": chance.sample(gallery, 8)} | lists
        rows = chance.sample(pool[choice], 4)
        cut = chance.randint(0, 3)
        query = {
            "id": f"{chance.choice(WORDS)} {number}",
            "text": chance.choice(WORDS),
            "positives": rows[:cut],
            "excluded": rows[cut:3],
            "related": chance.sample(gallery, chance.randint(0, 3)),
            "tags": {tag: label_of(chance) for tag in tags},
            **(
                {"gallery": pool[choice] if choice == "inline" else choice}
                if choice != "whole"
                else {}
            ),
        }
        several = chance.random() < 0.3
        images = chance.sample([*gallery, "q.jpg"], 3)
        queries.append(query | ({"images": images} if several else {"image": images[0]}))
    files = {
        "queries": lines(*queries).replace("\n", chance.choice(["\n", "\r\n", "\n\n"])),
        "gallery": "".join('"' + path.replace('"', '""') + '"\n' for path in gallery),
        "settings": {"lists": lists},
    }
    write(root, **files)
    return queries, gallery, lists


def label_of(chance: random.Random) -> str | list[str]:
    return chance.sample(WORDS, 2) if chance.random() < 0.5 else chance.choice(WORDS)


@pytest.mark.parametrize("seed", range(30))
def test_a_random_folder_is_what_was_written(tmp_path, seed):
    queries, gallery, lists = random_folder(tmp_path, seed)
    save_task(read(tmp_path / "shop"), tmp_path)
    task = load_task(tmp_path)
    view = task.views["all"]
    assert list(task.gallery.path) == gallery
    assert list(task.queries.key) == [query["id"] for query in queries]
    assert list(task.queries.text) == [query["text"] for query in queries]
    images = [tuple(query.get("images", [query.get("image")])) for query in queries]
    assert list(task.queries.images) == images
    for numbers, key in (
        (view.positives, "positives"),
        (view.excluded, "excluded"),
        (task.related, "related"),
    ):
        assert paths(task, numbers) == [set(query[key]) for query in queries]
    pools = [query.get("gallery", []) for query in queries]
    expected = [set(lists[pool] if isinstance(pool, str) else pool) for pool in pools]
    assert paths(task, task.pool) == expected
    for tag in queries[0]["tags"]:
        labels = [query["tags"][tag] for query in queries]
        written = [tuple(label) if isinstance(label, list) else label for label in labels]
        assert list(task.queries.tags[tag]) == written


@pytest.mark.parametrize("name", ["seconds", "queries", "method", "ties", "timestamp"])
def test_columns_are_not_called_like_those_of_every_table(tmp_path, name):
    root = write(tmp_path, settings={"columns": ["mAP = AP-T", f"{name} = Hit@1"]})
    with pytest.raises(UserError, match=rf"benchmark\.json.*column cannot be called '{name}'"):
        read(root)
