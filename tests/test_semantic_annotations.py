"""CIRR, CIRCO, FashionIQ and GeneCIS on their published annotation files.

The figures are those of the publishers' evaluation programs (expected.json beside the files).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import list_benchmarks
from tests.semantic_world import ANNOTATIONS, draw, needs_annotations, plain_columns, unpack
from utils import UserError, write_json
from utils_submissions import format_submission, read_submission, score_submission
from utils_task import Task, load_task, save_task

pytestmark = needs_annotations
TOLERANCE = 1e-9  # percent
SIZES = {"dress": 3817, "shirt": 6346, "toptee": 5373}  # of FashionIQ's whole galleries


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four benchmarks' annotation files, CIRCO's with the expected figures' gallery."""
    root = unpack(ANNOTATIONS, tmp_path_factory.mktemp("annotations"))
    write_image_info(root / "circo", [*circo_ids(root / "circo"), *range(600000, 610000)])
    return root


def circo_ids(folder: Path) -> list[int]:
    """The sorted distinct ids that the annotations of val and test name."""
    val, test = (
        json.loads((folder / f"annotations/{split}.json").read_text()) for split in ("val", "test")
    )
    ids = {entry["reference_img_id"] for entry in val + test}
    return sorted(ids.union(*(entry["gt_img_ids"] for entry in val)))


def write_image_info(folder: Path, ids: list[int]) -> None:
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in ids]
    path = folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"info": {}, "images": images})


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((ANNOTATIONS / "expected.json").read_text())


@pytest.fixture(scope="module")
def ranks() -> dict[str, np.ndarray]:
    return dict(np.load(ANNOTATIONS / "expected_ranks.npz"))


def read(root: Path, name: str) -> Task:
    benchmark = list_benchmarks()[name]
    return benchmark.tasks[name](root / benchmark.folder.get(name, name))


def names_of(task: Task) -> list[str]:
    """The gallery's images, by their files' names alone."""
    return [Path(path).stem for path in task.gallery.path]


def positives_of(task: Task, view: str = "all") -> list[np.ndarray]:
    numbers = task.views[view].positives
    return [task.rows_of(numbers, query) for query in range(len(task.queries))]


def references_of(task: Task) -> list[str]:
    return [Path(images[0]).stem for images in task.queries.images]


def drawn_scores(task: Task, seed: int, check: dict):
    """The recipe's features of a task whose gallery rows are in the recipe's order."""
    names = names_of(task)
    positives = [[names[row] for row in own] for own in positives_of(task)]
    gallery, queries = draw(seed, names, positives, references_of(task))
    check_draw(gallery, queries, check)
    return lambda query: gallery @ queries[query]


def check_draw(gallery: np.ndarray, queries: np.ndarray, check: dict) -> None:
    """A wrong draw is told from a wrong metric."""
    assert gallery.sum() == pytest.approx(check["sum_gallery"], abs=1e-9)
    assert queries.sum() == pytest.approx(check["sum_queries"], abs=1e-9)


# ---------------------------------------------------------------------------------------------
# What the files say
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "queries", "gallery"),
    [
        ("cirr", 4181, 2297),
        ("cirr_test", 4148, 2315),
        ("circo", 220, 11903),
        ("circo_test", 800, 11903),
        ("fashioniq", 6016, 15536),
        ("fashioniq_small", 6016, 15536),
        ("genecis_change_object", 1960, 2735),
        ("genecis_focus_object", 1960, 2192),
    ],
)
def test_counts_and_the_way_over_the_disk(root, tmp_path, name, queries, gallery):
    task = read(root, name)
    assert (len(task.queries), len(task.gallery)) == (queries, gallery)
    assert len(set(task.queries.key)) == queries
    save_task(task, tmp_path)
    again = load_task(tmp_path)
    assert again.queries.labels() == task.queries.labels()
    assert again.queries.texts == task.queries.texts
    assert (again.columns, again.means, again.submissions) == (
        task.columns,
        task.means,
        task.submissions,
    )
    assert (again.ties, again.gallery.own_mode) == (task.ties, True)
    for name, view in task.views.items():
        for part, numbers in vars(view).items():
            np.testing.assert_array_equal(vars(again.views[name])[part], numbers)


def test_cirr_groups_have_six_members_and_the_blank_caption_is_kept(root):
    val, test = read(root, "cirr"), read(root, "cirr_test")
    assert len(np.unique(val.related)) == 503
    assert set(val.sets.sizes(val.related)) == set(test.sets.sizes(test.related)) == {6}
    assert len({*val.queries.images}) == 2165
    assert test.queries.text[test.queries.key.index("27098")] == " "
    assert val.queries.key[0] == "12060"
    assert val.queries.text[0] == "show three bottles of soft drink"
    assert val.queries.images[0] == ("dev/dev-244-0-img0.png",)
    assert test.views["all"].positives is None


def test_circo_has_1_to_14_positives_the_target_first_and_nine_aspects(root):
    task = read(root, "circo")
    sizes = task.sets.sizes(task.views["all"].positives)
    assert (sizes.min(), sizes.max()) == (1, 14)
    assert sizes.mean() == pytest.approx(4.16, abs=0.005)
    aspects = [name for own in task.queries.tags["aspect"] for name in own]
    assert {name: aspects.count(name) for name in aspects} == {
        "statement_with_conjunction": 164,
        "direct_addressing": 119,
        "spatial_relations_background": 100,
        "compare_change": 86,
        "addition": 80,
        "viewpoint": 54,
        "comparative_statement": 50,
        "cardinality": 37,
        "negation": 21,
    }
    assert task.queries.fields["concept"][0] == "a girl with a traditional Chinese umbrella"


def test_fashioniq_has_a_gallery_a_category_of_two_sizes(root):
    whole, small = read(root, "fashioniq"), read(root, "fashioniq_small")
    for task, sizes in ((whole, [3817, 6346, 5373]), (small, [2628, 3089, 2902])):
        pools = np.unique(task.pool)
        assert task.sets.sizes(pools).tolist() == sizes
    assert whole.gallery.path == small.gallery.path
    assert len({*whole.gallery.path}) == 15415
    assert [whole.queries.tags["category"].count(c) for c in SIZES] == [
        2017,
        2038,
        1961,
    ]


def test_fashioniq_captions_are_stripped_and_joined_in_both_orders(root):
    both, forward, backward = (
        read(root, f"fashioniq{order}") for order in ("", "_forward", "_reversed")
    )
    ab = ("is shiny and silver with shorter sleeves and fit and flare",)
    ba = ("fit and flare and is shiny and silver with shorter sleeves",)
    assert both.queries.texts[0] == ab + ba
    assert forward.queries.text[0] == ab[0]
    assert backward.queries.text[0] == ba[0]
    assert forward.queries.texts is backward.queries.texts is None
    empty = [
        key
        for key, text in zip(forward.queries.key, forward.queries.text, strict=True)
        if text.startswith(" and ")
    ]
    assert empty == ["shirt-1928", "toptee-676", "toptee-1076"]
    changed = [
        category
        for category, a, b in zip(
            both.queries.tags["category"],
            both.queries.fields["first"],
            both.queries.fields["second"],
            strict=True,
        )
        if (a, b) != (a.strip(".?, "), b.strip(".?, "))
    ]
    assert [changed.count(c) for c in SIZES] == [426, 260, 499]


def test_a_genecis_gallery_has_15_rows_of_which_one_image_may_be_two(root):
    change, focus = (read(root, f"genecis_{task}_object") for task in ("change", "focus"))
    assert set(change.sets.sizes(change.pool)) == set(focus.sets.sizes(focus.pool)) == {15}
    images = [
        {*task.gallery.path, *(own[0] for own in task.queries.images)} for task in (change, focus)
    ]
    assert [*map(len, images)] == [2739, 2198]
    target = change.rows_of(change.views["all"].positives, 19)
    paths = [change.gallery.path[row] for row in change.rows_of(change.pool, 19)]
    assert paths.count(change.gallery.path[target[0]]) == 2


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def test_cirr_figures_of_drawn_features(root, expected, ranks):
    task, figures = read(root, "cirr"), expected["drawn"]["cirr_val"]
    scores = drawn_scores(task, 100, figures["check"])
    values, found = plain_columns(task, scores)
    metrics = {
        name.replace("group_recall", "Recall_subset").replace("recall", "Recall"): value
        for name, value in figures["metrics"].items()
    }
    average = (metrics["Recall@5"] + metrics["Recall_subset@1"]) / 2
    assert values == pytest.approx(metrics | {"Average": average}, abs=TOLERANCE)
    assert np.concatenate(found["all"]).tolist() == ranks["cirr_val"].tolist()
    assert np.concatenate(found["subset"]).tolist() == ranks["cirr_val_subset"].tolist()


def test_circo_figures_of_drawn_features(root, expected, ranks):
    task, figures = read(root, "circo"), expected["drawn"]["circo_val"]
    scores = drawn_scores(task, 101, figures["check"])
    values, _ = plain_columns(task, scores)
    official, removed = figures["metrics"].values()
    for name, value in official.items():
        assert values[name.replace("/", " ")] == pytest.approx(value, abs=TOLERANCE), name
    for k in (5, 10, 25, 50):
        out = values[f"mAP@{k} reference out"]
        assert out == pytest.approx(removed[f"mAP@{k}"], abs=TOLERANCE)
    top = np.stack([np.argsort(-scores(query), kind="stable")[:50] for query in range(220)])
    ids = np.array([int(name) for name in names_of(task)])
    np.testing.assert_array_equal(ids[top], ranks["circo_val_top50"])
    listed = score_submission(task, task.submissions[0], top)
    assert listed == pytest.approx(
        {name: values[name] for name in values if "reference" not in name}, abs=TOLERANCE
    )


@pytest.mark.parametrize(
    ("name", "protocol"), [("fashioniq", "original"), ("fashioniq_small", "VAL")]
)
def test_fashioniq_figures_of_drawn_features(root, expected, ranks, name, protocol):
    task = read(root, name)
    figures = expected["drawn"]["fashioniq_val"][protocol]
    category = np.array(task.queries.tags["category"])
    rows, scores = {}, {}
    names, positives, references = names_of(task), positives_of(task), references_of(task)
    start = 0
    for seed, label in enumerate(SIZES, 102):
        members = np.flatnonzero(category == label)
        size = SIZES[label]
        wanted = [[names[row] for row in positives[query]] for query in members]
        asked = [references[query] for query in members]
        gallery, queries = draw(seed, names[start : start + size], wanted, asked)
        pool = task.rows_of(task.pool, members[0]) - start
        check_draw(gallery[pool], queries, figures[label]["check"])
        for query, own in zip(members, queries, strict=True):
            rows[query], scores[query] = slice(start, start + size), gallery @ own
        start += size

    everything = np.zeros(len(names))

    def of(query: int) -> np.ndarray:
        everything[rows[query]] = scores[query]
        return everything

    values, found = plain_columns(task, of)
    for k in (10, 50):
        assert values[f"R@{k}"] == pytest.approx(figures["average"][f"Recall@{k}"], abs=TOLERANCE)
        removed = [figures[label]["reference removed"][f"Recall@{k}"] for label in SIZES]
        assert values[f"R@{k} reference out"] == pytest.approx(np.mean(removed), abs=TOLERANCE)
    for label in SIZES:
        members = np.flatnonzero(category == label)
        got = [found["all"][query][0] for query in members]
        assert got == ranks[f"fashioniq_{label}_{protocol}"].tolist()
        for k in (10, 50):
            metric = figures[label]["metrics"][f"Recall@{k}"]
            assert values[f"{label} R@{k}"] == pytest.approx(metric, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "seed"), [("change_object", 105), ("focus_object", 106)])
def test_genecis_figures_of_drawn_features(root, expected, ranks, name, seed):
    task, figures = read(root, f"genecis_{name}"), expected["drawn"]["genecis"][name]
    names, references = names_of(task), references_of(task)
    order = sorted({*names, *references})
    positives = [[names[row] for row in own] for own in positives_of(task)]
    gallery, queries = draw(seed, order, positives, references)
    check_draw(gallery, queries, figures["check"])
    number = [order.index(name) for name in names]
    values, found = plain_columns(task, lambda query: (gallery @ queries[query])[number])
    assert values == pytest.approx(figures["ties counted against the positive"], abs=TOLERANCE)
    twice = figures["rows whose target is repeated in the gallery"]
    rest = [query for query in range(len(names)) if query < 1960 and query not in twice]
    assert [found["all"][query][0] for query in rest] == ranks[f"genecis_{name}"][rest].tolist()
    for query in twice:
        assert found["all"][query][0] == ranks[f"genecis_{name}"][query] + 1


@pytest.mark.parametrize("name", ["cirr", "circo", "fashioniq_small", "genecis_change_object"])
def test_a_perfect_system_scores_100(root, name):
    task = read(root, name)
    everything = positives_of(task)
    target = positives_of(task, "target") if "target" in task.views else everything

    def scores(query: int) -> np.ndarray:
        own = np.zeros(len(task.gallery))
        own[everything[query]] = 1
        own[target[query]] = 2
        return own

    values, _ = plain_columns(task, scores)
    assert values == pytest.approx(dict.fromkeys(values, 100), abs=TOLERANCE)


# ---------------------------------------------------------------------------------------------
# Submissions
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circo_example(root, tmp_path_factory) -> tuple[Task, Path]:
    """CIRCO's val with the images of the publisher's example in its gallery; the example."""
    example = root / "circo/submission_examples/submission_val.json"
    listed = {number for own in json.loads(example.read_text()).values() for number in own}
    folder = tmp_path_factory.mktemp("circo")
    (folder / "annotations").symlink_to(root / "circo/annotations")
    write_image_info(folder, sorted(listed.union(circo_ids(root / "circo"))))
    return list_benchmarks()["circo"].tasks["circo"](folder), example


def test_circos_own_example_scores_what_the_official_script_says(circo_example, expected):
    task, example = circo_example
    submission, layout = task.submissions[0], list_benchmarks()["circo"].submissions["ids"]
    rows = read_submission(task, submission, layout, example)
    values = score_submission(task, submission, rows)
    figures = {name.replace("/", " "): value for name, value in expected["circo_fixture"].items()}
    assert values == pytest.approx(figures, abs=TOLERANCE)
    assert format_submission(task, submission, layout, rows) == example.read_text()


def edited(content: dict, key: str, position: int, value) -> dict:
    return content | {key: [*content[key][:position], value, *content[key][position + 1 :]]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: {k: c[k] for k in list(c)[:10]}, "lacks the queries 10, 11, 12, ... (210)"),
        (lambda c: c | {"220": c["0"]}, "has entries that are no queries: 220 (1)"),
        (lambda c: c | {"7": c["7"][:49]}, "query 7: a list of 50 images is needed"),
        (lambda c: edited(c, "3", 5, c["3"][4]), "query 3: COCO2017_unlabeled/unlabeled2017/"),
        (lambda c: edited(c, "3", 5, 1), "query 3: 1 is no image of the gallery"),
        (lambda c: edited(c, "3", 5, None), "query 3: None is no image of the gallery"),
        (lambda c: list(c), "holds no JSON object"),
    ],
)
def test_a_wrong_submission_is_one_line_that_names_file_and_query(
    circo_example, tmp_path, edit, message
):
    task, example = circo_example
    layout = list_benchmarks()["circo"].submissions["ids"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(edit(json.loads(example.read_text()))))
    with pytest.raises(UserError) as error:
        read_submission(task, task.submissions[0], layout, file)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_as_strings_are_read_as_well(circo_example, tmp_path):
    task, example = circo_example
    layout = list_benchmarks()["circo"].submissions["ids"]
    content = json.loads(example.read_text())
    file = tmp_path / "strings.json"
    file.write_text(json.dumps({key: [str(n) for n in own] for key, own in content.items()}))
    rows = read_submission(task, task.submissions[0], layout, file)
    assert rows.tolist() == read_submission(task, task.submissions[0], layout, example).tolist()
