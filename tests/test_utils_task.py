"""Sets of rows against plain Python sets, and a task as it comes back from disk."""

import dataclasses
import json

import numpy as np
import pytest

from utils import UserError
from utils_task import (
    NO_SET,
    Breakdown,
    Column,
    Group,
    Images,
    Mean,
    QueryTable,
    RowSets,
    SetBuilder,
    Submission,
    Task,
    View,
    load_task,
    save_task,
    whole_gallery,
)

# ---------------------------------------------------------------------------------------------
# Sets of rows
# ---------------------------------------------------------------------------------------------


def check_sets(sets: RowSets, expected: list[list[int]]) -> None:
    assert (sets.start.dtype, sets.row.dtype) == (np.int64, np.int64)
    assert [sets[number].tolist() for number in range(len(sets))] == expected
    numbers = np.array([*range(len(expected)), NO_SET])
    assert sets.sizes(numbers).tolist() == [*map(len, expected), 0]


@pytest.mark.parametrize("seed", range(20))
def test_grouped_rows_are_those_of_each_group(seed):
    generator = np.random.default_rng(seed)
    count, rows = generator.integers(0, 8), generator.integers(0, 40)
    group = generator.integers(-2, count, rows) if count else np.full(rows, -1)
    for kind in (np.int64, np.int32, np.int8):
        expected = [[row for row in range(rows) if group[row] == i] for i in range(count)]
        check_sets(RowSets.grouped(group.astype(kind), int(count)), expected)


@pytest.mark.parametrize("seed", range(20))
def test_equal_sets_get_one_number(seed):
    generator = np.random.default_rng(seed)
    given = [generator.integers(0, 5, generator.integers(0, 6)).tolist() for _ in range(60)]
    builder = SetBuilder()
    numbers = [builder(iter(rows)) for rows in given]
    sets = builder.done()
    distinct = list(dict.fromkeys(frozenset(rows) for rows in given if rows))
    check_sets(sets, [sorted(rows) for rows in distinct])
    for rows, number in zip(given, numbers, strict=True):
        assert number == (distinct.index(frozenset(rows)) if rows else NO_SET)


@pytest.mark.parametrize("seed", range(20))
def test_joined_and_gathered_sets(seed):
    generator = np.random.default_rng(seed)
    given = [
        [
            sorted(set(generator.integers(0, 9, size).tolist()))
            for size in generator.integers(0, 5, n)
        ]
        for n in generator.integers(0, 4, generator.integers(0, 4))
    ]
    joined = RowSets.joined([RowSets.of(sets) for sets in given])
    flat = [rows for sets in given for rows in sets]
    check_sets(joined, flat)
    numbers = generator.integers(-1, len(flat), 12) if flat else np.full(3, NO_SET)
    which, rows = joined.gather(numbers)
    chosen = [[] if number == NO_SET else flat[number] for number in numbers]
    assert rows.tolist() == [row for own in chosen for row in own]
    assert which.tolist() == [i for i, own in enumerate(chosen) for _ in own]


def test_no_sets_at_all():
    check_sets(SetBuilder().done(), [])
    check_sets(RowSets.of([]), [])
    check_sets(RowSets.of([np.array([3, 7]), np.array([], int), np.array([7])]), [[3, 7], [], [7]])


# ---------------------------------------------------------------------------------------------
# Tasks on disk
# ---------------------------------------------------------------------------------------------


def full_task() -> Task:
    """A task in which no field has its default."""
    return Task(
        name="world",
        gallery=Images(
            path=["a/é.jpg", "b, c.png", "a/é.jpg"],
            box=np.array([[0, 0, 9, 9], [0, 0, 0, 0], [1, 2, 3, 4]]),
            note=["one", "", "three"],
            shared="world_gallery",
            own_mode=True,
            copy_of=np.array([0, 1, 0]),
        ),
        queries=QueryTable(
            key=["q1", "q2"],
            images=[("a/é.jpg",), ("b, c.png", "a/é.jpg")],
            text=["as a “sketch”", ""],
            texts=[("x and y", "y and x"), ("z",)],
            box=np.array([[5, 6, 7, 8], [0, 0, 0, 0]]),
            fields={"caption": ["as a sketch", "by night"]},
            tags={"instance": ["one", "two"], "aspect": [("colour", "count"), ()]},
            shown={"Pair": ["1", "2"]},
        ),
        sets=RowSets.of([np.array([0, 2]), np.array([1])]),
        pool=np.array([NO_SET, 0]),
        views={
            "all": View(np.array([0, NO_SET]), np.array([1, NO_SET]), np.array([NO_SET, 0])),
            "hidden/part": View(None, excluded=np.array([1, 1])),
            "plain": View(np.array([1, 1])),
        },
        columns=(
            Column("mAP", "AP-T"),
            Column(
                "low",
                "AP-S@10",
                "plain",
                (Group("instance", "min", 2, "one", "python"), Group(None, digits=1)),
            ),
        ),
        means=(Mean("average", ("mAP", "low")),),
        submissions=(Submission("recall.json", "hidden/part", 50, "names"),),
        breakdowns=(Breakdown("matrix.csv", "mAP", "instance", "aspect"),),
        ties="best",
        related=np.array([1, NO_SET]),
        sources={"captions.json": "0123abcd"},
        notes=("the reference is left out",),
        prompts="world",
        spares_rows=True,
    )


def bare_task() -> Task:
    """A task in which every optional field has its default."""
    return Task(
        name="bare",
        gallery=Images(["a.jpg"]),
        queries=QueryTable(["q"], [("a.jpg",)], ["text"]),
        sets=RowSets.of([]),
        pool=whole_gallery(1),
        views={"all": View(None)},
        columns=(),
    )


def check_equal(found, expected) -> None:
    """The same values, of the same types (an array of the same dtype), through all fields."""
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            check_equal(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            check_equal(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("make", [full_task, bare_task])
def test_a_task_comes_back_as_it_was(tmp_path, make):
    save_task(make(), tmp_path)
    check_equal(load_task(tmp_path), make())
    assert {path.name for path in tmp_path.iterdir()} == {"task.json", "task.npz"}


@pytest.mark.parametrize("part", [lambda t: t, lambda t: t.gallery, lambda t: t.queries])
def test_the_full_task_leaves_no_field_at_its_default(part):
    for field in dataclasses.fields(part(full_task())):
        if field.default is not dataclasses.MISSING:
            assert getattr(part(full_task()), field.name) is not field.default


def test_rows_of_a_query():
    task = full_task()
    positives = task.views["all"].positives
    assert task.rows_of(positives, 0).tolist() == [0, 2]
    assert task.rows_of(positives, 1).tolist() == task.rows_of(None, 0).tolist() == []
    assert task.main_view == "all"


def test_labels_name_queries_by_what_is_shown():
    assert full_task().queries.labels() == {"Pair": ["1", "2"]}
    shown = {"Query": ["q"], "Image Query": ["a.jpg"], "Text Query": ["text"]}
    assert bare_task().queries.labels() == shown


def damage_numbers(folder) -> None:
    content = (folder / "task.npz").read_bytes()
    (folder / "task.npz").write_bytes(content[: len(content) // 2])


def change_format(folder) -> None:
    words = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    (folder / "task.json").write_text(json.dumps(words | {"format": 0}), encoding="utf-8")


def drop_words(folder) -> None:
    words = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    del words["queries"]
    (folder / "task.json").write_text(json.dumps(words), encoding="utf-8")


def mix_numbers(folder) -> None:
    """The numbers of another task with the same views, as after a stop between the two files."""
    other = dataclasses.replace(full_task(), pool=np.array([0, 0]))
    save_task(other, folder / "other")
    (folder / "other" / "task.npz").replace(folder / "task.npz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "task.json").unlink(), "task.json does not exist"),
        (lambda folder: (folder / "task.npz").unlink(), "task.npz does not exist"),
        (damage_numbers, "do not fit"),
        (mix_numbers, "do not fit"),
        (change_format, "another version"),
        (drop_words, "do not fit"),
    ],
)
def test_damage_is_one_line_that_names_the_folder(tmp_path, damage, message):
    save_task(full_task(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_task(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
