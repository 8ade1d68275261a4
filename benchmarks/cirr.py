"""CIRR (ICCV 2021): pictures of NLVR2 in groups of six, one target a query.

Layout: cirr/captions/cap.rc2.{val,test1}.json, cirr/image_splits/split.rc2.{val,test1}.json (or
without the inner cirr/), and {dev,test1}/*.png beside them, or below images/ or img_raw/.

The reference is never ranked. Recall@k searches the whole split, Recall_subset@k the other five of
the reference's group; papers add the mean of Recall@5 and Recall_subset@1. test1 has no ground
truth: two files go to the server.
"""

from __future__ import annotations

import posixpath
from functools import partial
from pathlib import Path, PurePosixPath

from benchmarks import Benchmark, Layout
from benchmarks.annotations import (
    Entry,
    distinct_keys,
    find_annotations,
    first_found,
    hash_sources,
    load_json,
    read_entries,
)
from utils import UserError
from utils_task import (
    Column,
    Images,
    Mean,
    QueryTable,
    SetBuilder,
    Submission,
    Task,
    View,
    whole_gallery,
)

HOW_TO_GET = (
    "the annotations come with `python3 data/download.py cirr`, the pictures are NLVR2's: ask for "
    "them at https://lil.nlp.cornell.edu/nlvr/ and put the folders dev and test1 into data/cirr"
)
COLUMNS = (
    *(Column(f"Recall@{k}", f"Hit@{k}") for k in (1, 5, 10, 50)),
    *(Column(f"Recall_subset@{k}", f"Hit@{k}", "subset") for k in (1, 2, 3)),
)
MEANS = (Mean("Average", ("Recall@5", "Recall_subset@1")),)
SUBMISSIONS = (
    Submission("recall.json", "all", 50, "recall"),
    Submission("recall_subset.json", "subset", 3, "recall_subset"),
)


def read(root: Path, name: str, split: str) -> Task:
    """The task of a split ("val", "test1"); raises UserError for annotations that are not right."""
    captions, splits = (
        find_annotations(root, (f"cirr/{path}", path), HOW_TO_GET)
        for path in (f"captions/cap.rc2.{split}.json", f"image_splits/split.rc2.{split}.json")
    )
    entries, paths = read_entries(captions), _read_split(splits)
    rows = {image: row for row, image in enumerate(paths)}
    sets = SetBuilder()
    reference = sets.each([entry.find("reference", str, rows)] for entry in entries)
    group = sets.each(entry.of("img_set").find_each("members", str, rows) for entry in entries)
    hidden = split == "test1"
    target = None if hidden else sets.each([_find_target(entry, rows)] for entry in entries)
    return Task(
        name=name,
        gallery=Images(list(paths.values()), own_mode=True),
        queries=QueryTable(
            key=[str(pair) for pair in distinct_keys(entries, "pairid", int)],
            images=[(paths[entry.content["reference"]],) for entry in entries],
            text=[entry.get("caption", str) for entry in entries],
        ),
        sets=sets.done(),
        pool=whole_gallery(len(entries)),
        views={"all": View(target, reference), "subset": View(target, reference, group)},
        columns=() if hidden else COLUMNS,
        means=() if hidden else MEANS,
        submissions=SUBMISSIONS,
        related=group,
        sources=hash_sources(root, (captions, splits)),
        prompts="cirr",
    )


def _read_split(path: Path) -> dict[str, str]:
    """The images of a split: name -> path below the data set's folder."""
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no object of names and paths; fetch it again")
    split = Entry(content, str(path))
    return {name: posixpath.normpath(split.get(name, str)) for name in content}


def _find_target(entry: Entry, rows: dict[str, int]) -> int:
    """The target's row; it has to be another member of the reference's group."""
    target = entry.get("target_hard", str)
    others = {*entry.content["img_set"]["members"]} - {entry.content["reference"]}
    if target not in others:
        raise UserError(
            f"{entry.place}: the target {target!r} is not another member of the reference's group; "
            "fetch the file again"
        )
    return rows[target]


def locate(root: Path, path: str) -> Path:
    """The file of an image."""
    return first_found(root, (f"{folder}{path}" for folder in ("", "images/", "img_raw/")))


def image_name(path: str) -> str:
    """An image's name in a submission: without folder and ending."""
    return PurePosixPath(path).stem


BENCHMARK = Benchmark(
    tasks={
        "cirr": partial(read, name="cirr", split="val"),
        "cirr_test": partial(read, name="cirr_test", split="test1"),
    },
    how_to_get=HOW_TO_GET,
    folder={"cirr_test": "cirr"},
    locate=locate,
    submissions={
        metric: Layout(image_name, {"version": "rc2", "metric": metric})
        for metric in ("recall", "recall_subset")
    },
)
