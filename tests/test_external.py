"""Results of other systems: what is read, how it is judged, and what is refused."""

import csv
import json
import subprocess
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from native import world_arguments, write_native_world
from semantic_world import ANNOTATIONS, draw, needs_annotations, unpack
from test_semantic_annotations import circo_ids, write_image_info

import run_retrieval
import utils_running
from benchmarks import read_task
from external.ids import match_ids
from utils import UserError
from utils_storage import load_features

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_native_world(tmp_path_factory.mktemp("external"))


@pytest.fixture(scope="module")
def features(world):
    return load_features(world / "features", "clip", "icir")


def judge(world: Path, *flags: str) -> subprocess.CompletedProcess:
    return run_command("run_retrieval.py", *world_arguments(world), *flags)


def row_of(world: Path, variant: str) -> dict[str, str]:
    with open(world / "results/icir" / variant / "mAP_table.csv", newline="") as file:
        return list(csv.DictReader(file))[-1]


@pytest.fixture(scope="module")
def own(world):
    """The row of our own image method, with its scores."""
    done = judge(world, "--method", "image")
    assert done.returncode == 0, done.stderr
    return row_of(world, "image")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vectors(features) -> tuple[np.ndarray, np.ndarray]:
    database = features.database("image")
    return features.query("image").values, database.read(slice(0, database.shape[0]))


# --- embeddings --------------------------------------------------------------------------------


def test_embeddings_give_our_own_figures(world, features, own, tmp_path):
    query, gallery = vectors(features)
    np.save(tmp_path / "q.npy", query.astype(np.float64))
    np.save(tmp_path / "g_2.npy", gallery[500:])
    np.save(tmp_path / "g_1.npy", gallery[:500])
    files = ["--query_embeddings", tmp_path / "q.npy", "--gallery_embeddings"]
    files += [tmp_path / "g_2.npy", tmp_path / "g_1.npy"]
    done = judge(world, "--external", "them", *files)
    assert done.returncode == 2
    assert "say --normalise (cosine) or --no-normalise" in done.stderr
    done = judge(world, "--external", "them", *files, "--normalise")
    assert done.returncode == 0, done.stderr
    row = row_of(world, "external_them")
    assert [row[name] for name in ("mAP", "mmAP", "minmAP")] == [
        own[name] for name in ("mAP", "mmAP", "minmAP")
    ]
    assert "sha256" in row["notes"]
    assert row["method"] == "external_them"
    assert "Warning" not in done.stderr


def test_embeddings_by_id_in_any_order_and_several_draws(world, features, own, tmp_path):
    query, gallery = map(unit, vectors(features))
    order = np.random.default_rng(0).permutation(len(gallery))
    np.save(tmp_path / "g.npy", gallery[order])
    paths = [features.task.gallery.path[row].removesuffix(".jpg") for row in order]
    (tmp_path / "ids.txt").write_text("\n".join(["id", *paths]))
    noise = np.random.default_rng(1).normal(size=query.shape)
    for seed, strength in enumerate((0.0, 0.3)):
        np.save(tmp_path / f"seed{seed}.npy", unit(query + strength * noise).astype(np.float32))
    flags = ["--query_embeddings", tmp_path / "seed0.npy", tmp_path / "seed1.npy"]
    flags += ["--gallery_embeddings", tmp_path / "g.npy", "--gallery_ids", tmp_path / "ids.txt"]
    done = judge(world, "--external", "drawn", *flags)
    if len(set(paths)) < len(paths):
        pytest.skip("paths repeat in this world")
    assert done.returncode == 0, done.stderr
    assert "without ./ and image suffix" in done.stderr
    assert "mean of 2 draws" in row_of(world, "external_drawn")["notes"]
    done = judge(world, "--external", "first", flags[0], flags[1], *flags[3:])
    assert row_of(world, "external_first")["mAP"] == own["mAP"]


@pytest.mark.parametrize("kind", ["max", "maxsim", "mean"])
def test_late_interaction_is_its_definition(kind):
    import torch

    from utils_retrieval import late_interaction

    generator = torch.Generator().manual_seed(0)
    query, rows = (torch.randn(n, 3, 5, generator=generator) for n in (4, 6))
    scores = late_interaction(query, rows, kind)
    for q in range(4):
        for n in range(6):
            pairs = query[q] @ rows[n].T
            expected = {
                "max": pairs.max(),
                "maxsim": pairs.max(1).values.sum(),
                "mean": query[q].mean(0) @ rows[n].mean(0),
            }[kind]
            assert torch.allclose(scores[q, n], expected, atol=1e-5)


# --- scores and lists --------------------------------------------------------------------------


def test_a_score_matrix_gives_our_own_figures(world, features, own, tmp_path):
    query, gallery = map(unit, vectors(features))
    np.save(tmp_path / "s.npy", query @ gallery.T)
    done = judge(world, "--external", "matrix", "--scores", tmp_path / "s.npy")
    assert done.returncode == 0, done.stderr
    assert row_of(world, "external_matrix")["mAP"] == own["mAP"]
    np.save(tmp_path / "d.npy", 1 - query @ gallery.T)
    done = judge(world, "--external", "far", "--scores", tmp_path / "d.npy", "--distances")
    assert row_of(world, "external_far")["mAP"] == own["mAP"]
    folder = tmp_path / "by instance"
    folder.mkdir()
    instances = np.array(features.task.queries.tags["instance"])
    for name in set(instances):
        members = np.flatnonzero(instances == name)
        rows = features.task.sets[features.task.pool[members[0]]]
        np.save(folder / f"{name}.npy", (query @ gallery.T)[np.ix_(members, rows)])
    done = judge(world, "--external", "blocks", "--scores", folder)
    assert done.returncode == 0, done.stderr
    assert row_of(world, "external_blocks")["mAP"] == own["mAP"]


def ranked_lists(features, length: int | None) -> dict[str, list[str]]:
    query, gallery = map(unit, vectors(features))
    scores, lists = query @ gallery.T, {}
    for number in range(len(query)):
        rows = features.task.sets[features.task.pool[number]]
        best = rows[np.argsort(-scores[number, rows], kind="stable")]
        lists[f"query_{number:06d}"] = [f"d{row:07d}" for row in best[:length]]
    return lists


def test_whole_lists_give_our_own_figures_and_short_ones_what_they_decide(
    world, features, own, tmp_path
):
    for name, length in (("whole", None), ("short", 20)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(ranked_lists(features, length)))
        flags = ("--rankings", path, "--metrics", "Hit@5", "Hit@50", "--report")
        done = judge(world, "--external", name, *flags)
        assert done.returncode == 0, done.stderr
    whole, short = row_of(world, "external_whole"), row_of(world, "external_short")
    assert whole["mAP"] == own["mAP"]
    assert (short["mAP"], short["Hit@50"], short["Hit@5"]) == ("-", "-", whole["Hit@5"])
    assert "the lists end at rank 20" in short["notes"]
    page = (world / "results/icir/external_short/report/index.html").read_text("utf-8")
    assert page.count('<td class="number main">-</td>') == 4
    low, high = (
        float(word)
        for word in short["notes"].split("mAP lies between ")[1].split(",")[0].split()
        if word != "and"
    )
    assert low < float(whole["mAP"]) < high


def test_forms_of_one_list_give_the_same(world, features, tmp_path):
    lists = ranked_lists(features, None)
    scored = {q: {d: len(rows) - i for i, d in enumerate(rows)} for q, rows in lists.items()}
    (tmp_path / "scored.json").write_text(json.dumps(scored))
    lines = [
        f"{q} Q0 {d} {i} {len(rows) - i} them"
        for q, rows in lists.items()
        for i, d in enumerate(rows, 1)
    ]
    (tmp_path / "run.trec").write_text("\n".join(lines))
    rows = [f"{q},{d},{s}" for q, entries in scored.items() for d, s in entries.items()]
    (tmp_path / "run.csv").write_text("\n".join(["query_id,gallery_id,score", *rows]))
    for path in ("scored.json", "run.trec", "run.csv"):
        done = judge(world, "--external", path, "--rankings", tmp_path / path)
        assert done.returncode == 0, done.stderr
    figures = {
        row_of(world, f"external_{n}")["mAP"] for n in ("scored.json", "run.trec", "run.csv")
    }
    assert len(figures) == 1


# --- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "known", "rule"),
    [
        (["a/1.jpg"], ["a/1.jpg", "b/1.jpg"], "as they are"),
        (["./a/1"], ["a/1.jpg", "b/1.jpg"], "without ./ and image suffix"),
        (["dev-1"], ["./dev/dev-1.png", "dev/dev-2.png"], "by file name"),
        (["271520"], ["unlabeled2017/000000271520.jpg"], "by number"),
        (["query_000001"], ["x", "y"], "as row numbers"),
    ],
)
def test_ids_match_by_the_first_rule_that_keeps_all_apart(given, known, rule):
    matched = match_ids(given, known)
    assert matched.rule.startswith(rule)
    assert (matched.rows >= 0).all()


def test_a_rule_that_would_mix_up_two_images_is_not_used():
    matched = match_ids(["1"], ["a/1.jpg", "b/1.jpg"])
    assert (matched.rows < 0).all()


# --- mistakes ----------------------------------------------------------------------------------


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def edited(change, *flags: str) -> callable:
    """A list file with one change."""

    def write(folder: Path, features) -> list:
        lists = ranked_lists(features, 5)
        change(lists)
        (folder / "lists.json").write_text(json.dumps(lists))
        return ["--rankings", folder / "lists.json", *flags]

    return write


def matrix_with(value: float):
    def write(folder: Path, features) -> list:
        scores = np.zeros((len(features.task.queries), len(features.task.gallery)))
        scores[3, 5] = value
        return ["--scores", save(folder / "s.npy", scores)]

    return write


def embeddings(rows: int = 0, width: int = 96, value: float = 1.0, **options):
    def write(folder: Path, features) -> list:
        query = np.full((len(features.task.queries) + rows, width), value, np.float32)
        gallery = np.ones((len(features.task.gallery), 96), np.float32)
        for rows_of, name in ((gallery, "zero"), (query, "zero_query")):
            rows_of[options.get(name, [])] = 0
        files = [save(folder / f"{n}.npy", a) for n, a in (("q", query), ("g", gallery))]
        flags = ["--query_embeddings", files[0], "--gallery_embeddings", files[1]]
        return [*flags, "--normalise"]

    return write


def text_file(name: str, content: str):
    def write(folder: Path, features) -> list:
        (folder / name).write_text(content)
        return ["--rankings", folder / name]

    return write


def gallery_rows(change):
    """Embeddings with an ids file of the gallery, changed: rows are named by their numbers."""

    def write(folder: Path, features) -> list:
        names = [f"gallery_{row:06d}" for row in range(len(features.task.gallery))]
        names = change(names, features)
        (folder / "ids.txt").write_text("\n".join(names))
        flags = embeddings()(folder, features)
        save(folder / "g.npy", np.ones((len(names), 96), np.float32))
        return [*flags, "--gallery_ids", folder / "ids.txt"]

    return write


def without_an_instance(names: list[str], features) -> list[str]:
    """Ids without those of all rows that the first query searches, and of one row more."""
    own = set(features.task.sets[features.task.pool[0]].tolist())
    other = next(row for row in range(len(names)) if row not in own)
    return [name for row, name in enumerate(names) if row not in own and row != other]


MISTAKES = {
    "nothing": (lambda f, w: [], "--external takes one of"),
    "two kinds": (lambda f, w: ["--scores", "a", "--rankings", "b"], "--external takes one of"),
    "one side": (lambda f, w: ["--query_embeddings", "a"], "belong together"),
    "no effect": (
        lambda f, w: ["--scores", "a", "--allow_missing"],
        "--allow_missing has no effect",
    ),
    "a method of ours": (
        lambda f, w: ["--scores", "a", "--method", "sum"],
        "--method has no effect",
    ),
    "a parameter of ours": (lambda f, w: ["--scores", "a", "--aa", "0.1"], "--aa has no effect"),
    "no cosine": (
        lambda f, w: ["--scores", "a", "--no-normalise"],
        "--normalise has no effect",
    ),
    "best rows that no list names": (
        edited(lambda o: None, "--top_k", "6"),
        "the lists end at rank 5, before the 6 best rows",
    ),
    "no file": (lambda f, w: ["--rankings", f / "none.json"], "none.json is no file"),
    "a missing query": (edited(lambda o: o.popitem()), "1 of 70 queries have no list"),
    "an unknown query": (edited(lambda o: o.update(nobody=["d0000001"])), "query ids are unknown"),
    "an unknown image": (
        edited(lambda o: o["query_000003"].append("nothing.jpg")),
        "gallery ids are unknown to the data set, 'nothing.jpg'",
    ),
    "an image twice": (
        edited(lambda o: o["query_000003"].append(o["query_000003"][0])),
        "1 images are listed twice",
    ),
    "an image of another gallery": (
        edited(lambda o: o["query_000003"].append(o["query_000069"][0])),
        "1 listed images are not ranked for their query, '4",
    ),
    "an empty list": (edited(lambda o: o.update(query_000003=[])), "1 of 70 queries have no list"),
    "a list of lists": (edited(lambda o: o.update(query_000003=[[1]])), "a list of ids, or an"),
    "a score that is none": (
        edited(lambda o: o.update(query_000003={"d0000001": "x"})),
        "'x' is no",
    ),
    "an endless score": (
        edited(lambda o: o.update(query_000003={"d0000001": float("nan")})),
        "is no finite number",
    ),
    "no JSON": (text_file("a.json", '{"a": '), "is not valid JSON"),
    "no header": (
        text_file("a.csv", "a,b\n1,2\n"),
        "its first line is not the header query_id,gallery_id or query_id,gallery_id,score",
    ),
    "a short line": (text_file("a.trec", "q000000 Q0 d0000001 1\n"), "line 1: qid Q0 docid"),
    "rising scores": (
        text_file("a.trec", "q000000 Q0 d0000001 1 1 x\nq000000 Q0 d0000002 2 5 x\n"),
        "line 2: the score rises",
    ),
    "a NaN score": (matrix_with(np.nan), "query 4 has a NaN"),
    "rows too many": (embeddings(rows=3), "73 rows, but the data set has 70 query rows"),
    "another width": (embeddings(width=12), "they come from different models"),
    "gallery rows without a vector": (
        gallery_rows(without_an_instance),
        "gallery ids have no row, the first",
    ),
    "a whole instance": (gallery_rows(without_an_instance), "; whole instances have none, "),
    "an unknown gallery row": (
        gallery_rows(lambda names, features: [*names[:-1], "nothing.jpg"]),
        "gallery ids are unknown to the data set, 'nothing.jpg'",
    ),
    "a gallery row twice": (
        gallery_rows(lambda names, features: [*names, names[4]]),
        "1 ids are given twice, 'gallery_000004'",
    ),
    "a NaN": (embeddings(value=np.nan), "70 rows hold NaN or infinity, the first 1, 2, 3"),
    "a zero row": (
        embeddings(zero=41),
        "g.npy: the vector of './data/icir/database/blue_kettle/4.jpg'",
    ),
    "a zero query": (
        embeddings(zero_query=6),
        "q.npy: the vector of './data/icir/query/temple_of_",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_line_and_nothing_is_written(world, features, tmp_path, name, monkeypatch):
    write, message = MISTAKES[name]
    flags = [str(flag) for flag in write(tmp_path, features)]
    monkeypatch.setattr(utils_running, "quick_imports", nullcontext)  # is for a process's start
    out = tmp_path / "out"
    command = [*world_arguments(world), "--external", "x", *flags, "--results_dir", str(out)]
    with pytest.raises(UserError) as refused:
        run_retrieval.main(command)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not out.exists()


def test_constant_and_tied_scores_are_told(world, features, tmp_path):
    scores = np.zeros((len(features.task.queries), len(features.task.gallery)))
    scores[1:, ::2] = 1
    done = judge(world, "--external", "flat", "--scores", save(tmp_path / "s.npy", scores))
    assert done.returncode == 0, done.stderr
    assert "warning: 1 queries have one score for every row" in done.stderr
    assert "a positive ties with a negative" in done.stderr


def test_missing_queries_score_0_where_that_is_allowed(world, features, tmp_path):
    lists = ranked_lists(features, None)
    gone = [lists.pop(f"query_{n:06d}") for n in range(35)]
    assert gone
    (tmp_path / "half.json").write_text(json.dumps(lists))
    flags = ("--rankings", tmp_path / "half.json", "--allow_missing", "--top_k", "3")
    done = judge(world, "--external", "half", *flags)
    assert done.returncode == 0, done.stderr
    with open(world / "results/icir/external_half/top3.csv", newline="") as file:
        assert [bool(row["path_1"]) for row in csv.DictReader(file)] == [False] * 35 + [True] * 35
    with open(world / "results/icir/external_half/APs.csv", newline="") as file:
        values = [float(row["AP"]) for row in csv.DictReader(file)]
    assert values[:35] == [0.0] * 35
    assert any(values[35:])


def test_files_of_another_system_without_its_name(world):
    for flags in (["--rankings", "a"], ["--scores", "a"], ["--distances"], ["--no-normalise"]):
        with pytest.raises(UserError, match="has no effect without --external NAME: add it"):
            run_retrieval.main([*world_arguments(world), *flags])


# --- export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory) -> Path:
    """The folder of a run that was exported in every form, one after the other."""
    results = tmp_path_factory.mktemp("exported")
    for kind in ("csv", "ranx", "trec"):
        done = judge(world, "--method", "product", "--results_dir", results, "--export", kind)
        assert done.returncode == 0, done.stderr
    return results / "icir" / "product"


@pytest.mark.parametrize("name", ["run.trec", "run.json", "run.csv"])
def test_an_exported_run_read_back_is_the_run_itself(world, exported, tmp_path, name):
    flags = ("--rankings", exported / name, "--results_dir", tmp_path)
    done = judge(world, "--external", "back", *flags)
    assert done.returncode == 0, done.stderr
    back = (tmp_path / "icir/external_back/APs.csv").read_text()
    assert back == (exported / "APs.csv").read_text()


def test_exports_of_other_features_do_not_stay(world, tmp_path):
    flags = ("--method", "text", "--results_dir", tmp_path)
    assert judge(world, *flags, "--export", "trec").returncode == 0
    folder = tmp_path / "icir/text"
    left = {*folder.iterdir()}
    assert judge(world, *flags).returncode == 0
    assert {*folder.iterdir()} == left
    table = folder / "mAP_table.csv"
    (features,) = {row["features"] for row in csv.DictReader(table.open())}
    table.write_text(table.read_text().replace(features, "another"))
    assert judge(world, *flags).returncode == 0
    names = {path.name for path in left - {*folder.iterdir()}}
    assert names >= {"ids.csv", "qrels.txt", "run.trec"}


def test_scores_of_a_trec_run_fall_strictly(exported):
    lines = (exported / "run.trec").read_text().splitlines()
    scores = [(line.split()[0], int(line.split()[4])) for line in lines]
    assert all(b[1] == a[1] - 1 for a, b in pairwise(scores) if a[0] == b[0])


def test_pytrec_eval_gives_our_standard_ap_of_each_query(world, exported, tmp_path):
    """AP-S without cut-off, and with one where a query has no more positives than it."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    flags = ("--method", "product", "--metrics", "AP-S", "AP-S@5", "--results_dir", tmp_path)
    done = judge(world, *flags)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "icir/product/APs.csv", newline="") as file:
        ours = list(csv.DictReader(file))
    run, qrels = (json.loads((exported / n).read_text()) for n in ("run.json", "qrels.json"))
    judge_of = pytrec_eval.RelevanceEvaluator(qrels, {"map", "map_cut.5"})
    theirs = judge_of.evaluate({q: {d: float(s) for d, s in own.items()} for q, own in run.items()})
    assert len(theirs) == len(qrels) > 50
    for query, measures in theirs.items():
        row, n = ours[int(query[1:])], len(qrels[query])
        assert float(row["AP-S"]) == pytest.approx(measures["map"], abs=1e-6)
        cut = measures["map_cut_5"] * n / min(n, 5)
        assert float(row["AP@5"]) == pytest.approx(cut, abs=1e-6)


def test_exports_of_every_kind(world, features, tmp_path):
    for kind in ("csv", "ranx"):
        flags = ("--method", "text", "--export", kind, "--export_k", "7")
        done = judge(world, *flags, "--results_dir", tmp_path)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "icir" / "text"
    with open(folder / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 70 * 7
    labels = features.task.queries.labels()
    assert rows[0]["query_id"] == f"{labels['Image Query'][0]}\t{labels['Text Query'][0]}"
    run, qrels = (json.loads((folder / n).read_text()) for n in ("run.json", "qrels.json"))
    assert set(map(len, run.values())) == {7}
    assert sum(map(len, qrels.values())) == sum(
        len(features.task.rows_of(features.task.views["all"].positives, q)) for q in range(70)
    )


# --- benchmarks from their annotations alone ---------------------------------------------------


@needs_annotations
def test_drawn_fashioniq_embeddings_give_the_figures_of_its_evaluator(tmp_path):
    """The three categories' galleries one behind the other, with no features of our own."""
    expected = json.loads((ANNOTATIONS / "expected.json").read_text())["drawn"]["fashioniq_val"]
    unpack(ANNOTATIONS, tmp_path)
    task = read_task("fashioniq", tmp_path)
    category = np.array(task.queries.tags["category"])
    names = [Path(path).stem for path in task.gallery.path]
    positives = [
        [names[row] for row in task.rows_of(task.views["all"].positives, query)]
        for query in range(len(task.queries))
    ]
    references = [Path(images[0]).stem for images in task.queries.images]
    gallery, queries, start = [], np.empty((len(category), 64)), 0
    for seed, label in enumerate(("dress", "shirt", "toptee"), 102):
        members = np.flatnonzero(category == label)
        rows = task.rows_of(task.pool, members[0])
        assert rows[0] == start
        start += len(rows)
        own, queries[members] = draw(
            seed,
            [names[row] for row in rows],
            [positives[query] for query in members],
            [references[query] for query in members],
        )
        gallery.append(own)
    files = [save(tmp_path / "q.npy", queries), save(tmp_path / "g.npy", np.concatenate(gallery))]
    flags = ["--dataset", "fashioniq", "--external", "drawn", "--gpu", "-1"]
    flags += ["--query_embeddings", files[0], "--gallery_embeddings", files[1]]
    flags += ["--data_dir", tmp_path, "--results_dir", tmp_path / "results"]
    run_retrieval.main([str(flag) for flag in flags])
    with open(tmp_path / "results/fashioniq/external_drawn/mAP_table.csv") as file:
        (row,) = csv.DictReader(file)
    figures = expected["original"]
    for k in (10, 50):
        average = figures["average"][f"Recall@{k}"]
        assert float(row[f"R@{k}"]) == pytest.approx(average, abs=0.00501)
        for label in ("dress", "shirt", "toptee"):
            value = figures[label]["metrics"][f"Recall@{k}"]
            assert float(row[f"{label} R@{k}"]) == pytest.approx(value, abs=0.00501)


@needs_annotations
def test_lists_of_cirr_go_out_as_its_server_takes_them(tmp_path, capsys):
    """--export cirr of val, which --check_submission scores; a list with the reference is refused;
    circo's files are not CIRR's."""
    unpack(ANNOTATIONS, tmp_path)
    task = read_task("cirr", tmp_path)
    generator = np.random.default_rng(0)
    gallery, queries = (generator.normal(size=(n, 8)) for n in (len(task.gallery), 4181))
    files = [save(tmp_path / "q.npy", unit(queries)), save(tmp_path / "g.npy", unit(gallery))]
    places = ["--data_dir", tmp_path, "--results_dir", tmp_path / "results", "--gpu", "-1"]
    flags = ["--dataset", "cirr", "--external", "out", *places, "--query_embeddings", files[0]]
    flags += ["--gallery_embeddings", files[1]]
    run_retrieval.main([str(flag) for flag in [*flags, "--export", "cirr"]])
    folder = tmp_path / "results/cirr/external_out"
    with open(folder / "mAP_table.csv") as file:
        (row,) = csv.DictReader(file)
    capsys.readouterr()
    for submission in task.submissions:
        flags_of = ["--dataset", "cirr", "--check_submission", folder / submission.file]
        run_retrieval.main([str(flag) for flag in [*flags_of, "--data_dir", tmp_path]])
    said = dict(
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("Recall")
    )
    assert said["Recall@5"] == row["Recall@5"]
    assert said["Recall_subset@1"] == row["Recall_subset@1"]
    with pytest.raises(UserError, match="is for the queries of circo, not of cirr"):
        run_retrieval.main([str(flag) for flag in [*flags, "--export", "circo"]])
    with pytest.raises(UserError, match="its lists have 50 and 3"):
        run_retrieval.main([str(f) for f in [*flags, "--export", "cirr", "--export_k", "9"]])
    lists = {
        key: [Path(images[0]).stem]
        for key, images in zip(task.queries.key, task.queries.images, strict=True)
    }
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    flags = ["--dataset", "cirr", "--external", "own", *places, "--rankings"]
    with pytest.raises(UserError, match="4181 listed images are not ranked"):
        run_retrieval.main([str(flag) for flag in [*flags, tmp_path / "lists.json"]])


@needs_annotations
def test_lists_that_are_too_short_for_the_server_are_refused(tmp_path):
    unpack(ANNOTATIONS, tmp_path)
    task = read_task("cirr_test", tmp_path)
    names = [Path(path).stem for path in task.gallery.path]
    lists = {}
    for query, key in enumerate(task.queries.key):
        excluded = task.rows_of(task.views[task.main_view].excluded, query)
        lists[key] = [names[row] for row in range(60) if row not in excluded]
    flags = ["--dataset", "cirr_test", "--external", "own", "--data_dir", tmp_path]
    flags += ["--results_dir", tmp_path / "results", "--gpu", "-1", "--allow_missing"]
    flags = [str(flag) for flag in [*flags, "--rankings", tmp_path / "lists.json"]]

    def refusal():
        (tmp_path / "lists.json").write_text(json.dumps(lists))
        with pytest.raises(UserError) as error:
            run_retrieval.main(flags)
        return str(error.value)

    key = task.queries.key[1]
    assert "takes 3 rows of each query from its own candidates, but" in refusal()
    del lists[key]
    assert f"takes 50 rows of each query, but 1 lists name fewer, the first that of {key!r}, 0" in (
        refusal()
    )
    assert not (tmp_path / "results").exists()


@needs_annotations
def test_drawn_embeddings_give_the_figures_of_the_official_evaluators(tmp_path, capsys):
    """CIRCO, CIRR and FashionIQ as their publishers ship them, with no features of our own."""
    expected = json.loads((ANNOTATIONS / "expected.json").read_text())["drawn"]
    unpack(ANNOTATIONS, tmp_path)
    ids = [*circo_ids(tmp_path / "circo"), *range(600000, 610000)]
    write_image_info(tmp_path / "circo", ids)
    official = next(iter(expected["circo_val"]["metrics"].values()))
    for name, seed, figures in (
        ("circo", 101, official),
        ("cirr", 100, expected["cirr_val"]["metrics"]),
    ):
        task = read_task(name, tmp_path)
        names = [Path(path).stem for path in task.gallery.path]
        positives = [
            [names[row] for row in task.rows_of(task.views["all"].positives, query)]
            for query in range(len(task.queries))
        ]
        references = [Path(images[0]).stem for images in task.queries.images]
        gallery, queries = draw(seed, names, positives, references)
        files = [save(tmp_path / f"{name}_{n}.npy", a) for n, a in (("q", queries), ("g", gallery))]
        (tmp_path / "ids.txt").write_text("\n".join(names[::-1]))
        np.save(files[1], gallery[::-1])
        flags = ["--dataset", name, "--external", "drawn", "--gpu", "-1"]
        flags += ["--query_embeddings", files[0], "--gallery_embeddings", files[1]]
        flags += ["--gallery_ids", tmp_path / "ids.txt", "--data_dir", tmp_path]
        flags += ["--results_dir", tmp_path / "results"]
        run_retrieval.main([str(flag) for flag in flags])
        with open(tmp_path / "results" / task.name / "external_drawn/mAP_table.csv") as file:
            (row,) = csv.DictReader(file)
        for metric, value in figures.items():
            column = metric.replace("group_recall", "Recall_subset").replace("recall", "Recall")
            assert float(row[column.replace("/", " ")]) == pytest.approx(value, abs=0.00501), metric


# --- numbers beyond float32 --------------------------------------------------------------------


def test_rows_and_scores_that_are_not_finite_are_refused(world, features, tmp_path):
    query, gallery = vectors(features)
    np.save(tmp_path / "q.npy", query * np.float32(1e30))
    np.save(tmp_path / "g.npy", gallery * np.float32(1e30))
    files = ["--query_embeddings", tmp_path / "q.npy", "--gallery_embeddings", tmp_path / "g.npy"]
    done = judge(world, "--external", "them", *files, "--no-normalise")
    assert done.returncode == 2
    assert "g.npy: row" in done.stderr
    assert "is zero or not finite" in done.stderr
    assert "Warning" not in done.stderr
    scores = (query @ gallery.T).astype(np.float64)
    scores[3, 5] = 1e300
    np.save(tmp_path / "scores.npy", scores)
    done = judge(world, "--external", "them", "--scores", tmp_path / "scores.npy")
    assert done.returncode == 2
    assert "query 4 has a score beyond float32" in done.stderr
