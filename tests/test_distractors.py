"""Distractors against one gallery in which they are ordinary rows, for every method."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from distractor_world import in_double, make_rows, two_ways, write_pool
from domain_world import DATA, NAMES, read_prompts, read_task, stored_features
from domain_world import WORDS as WORD_LIST
from test_evaluation import make_world
from test_golden import CPU, FIGURES, GOLDEN, arguments, golden_assets

import distractors.among
import distractors.pool
import run_retrieval
import utils_retrieval
from benchmarks.icir import task_of_labels
from distractors.among import Distractors, Overheard, evaluate_among
from distractors.passes import Kept, run_pass
from distractors.pool import Pool, check_pool, open_pool
from distractors.precision import describe_effect
from distractors.questions import Asking
from distractors.running import refuse_tokens
from methods import list_methods
from utils import UserError
from utils_evaluation import evaluate
from utils_features import load_encoder
from utils_ranks import Group
from utils_retrieval import Assets, Gallery, NoParameters, Rows, unit_rows
from utils_runs import Run, Setting
from utils_storage import ArrayRows, Features, load_features

ROWS = 700
TINY = Path(run_retrieval.__file__).parent / "data" / "tiny"


def among(pool, kept, **options):
    return Distractors(
        pool, partial(run_pass, pool=pool, kept=Kept(kept), group=Group()), **options
    )


def evaluate_exactly(features, runs, assets, ties="row"):
    """What evaluate yields, by scores in float64: near ties are not left to rounding."""
    methods = {run.method: in_double(run.method) for run in runs}
    exact = [replace(run, method=methods[run.method]) for run in runs]
    return evaluate(features, exact, assets, CPU, ties)


def check_equal(found, expected):
    """Ranks of every positive in every view, ties and columns are those of the one gallery."""
    for own, other in zip(found, expected, strict=True):
        for name, ranking in other.views.items():
            mine = own.views[name]
            for part in ("row", "ranked", "count"):
                of_both = (getattr(each.positives, part) for each in (mine, ranking))
                np.testing.assert_array_equal(*of_both)
            np.testing.assert_array_equal(mine.ranks, ranking.ranks, own.run.variant)
            np.testing.assert_array_equal(mine.tied, ranking.tied, own.run.variant)
        assert own.columns == other.columns


def golden_runs(world, tmp_path):
    parsed = [
        run_retrieval.build_parser().parse_args(arguments(world, flags, tmp_path))
        for flags in FIGURES[world]
    ]
    return list(dict.fromkeys(run_retrieval.plan_of(args, "icir").runs[0] for args in parsed))


@pytest.mark.parametrize("ties", ["row", "worst"])
@pytest.mark.parametrize("world", list(GOLDEN))
def test_every_flag_set_ranks_as_in_one_gallery(tmp_path, world, ties):
    runs = golden_runs(world, tmp_path)
    features = load_features(GOLDEN[world] / "features", world, "icir")
    assets = golden_assets(world, features, runs)
    made = make_rows(features, ROWS, seed=1)
    alone, joined = two_ways(features, made)
    expected = evaluate_exactly(joined, runs, assets, ties)
    pool = open_pool([write_pool(tmp_path / "pool", made, [100, 5])])
    found = evaluate_among(alone, runs, assets, CPU, among(pool, tmp_path / "kept"), ties)
    check_equal(found, expected)


# The published runs of domain conversion: tests/test_domain_golden.py has them as flags.
OF_DOMAINS = [
    *((name, {}) for name in ("text", "image", "sum", "product", "freedom", "weicom", "basic")),
    ("product", {"clamp": False}),
    ("freedom", {"expand": False}),
    ("freedom", {"kappa": 5, "ni": 3, "miu": 5}),
    ("weicom", {"weicom_lambda": 0.3}),
    ("basic", {"do_query_expansion": False}),
    ("basic", {"num_principal_components_for_projection": 7}),
]


@pytest.fixture(scope="module")
def tiny_assets():
    """All that methods read beside features, of the tiny backbone."""
    encoder = load_encoder("tiny", CPU)
    paths = [DATA / f"{WORD_LIST}.csv", *(TINY / "corpora").glob("generic_*.csv")]
    prompts = {path.stem: read_prompts(path) for path in paths}

    def encode_words(texts):
        return unit_rows(torch.from_numpy(encoder.encode_texts(texts, 256)))

    synthetic = np.load(TINY / "synthetic/synthetic_tiny.npz")
    kinds = (torch.from_numpy(synthetic[f"{kind}_features"]) for kind in ("image", "text"))
    images, texts = map(unit_rows, kinds)
    return Assets(
        corpora={name: encode_words(words) for name, words in prompts.items()},
        image_mean=torch.from_numpy(np.load(TINY / "mean/mean_tiny.npz")["mean"]),
        synthetic_images=images,
        synthetic_texts=texts,
        prompts=prompts,
        encode_texts=encode_words,
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_published_run_of_domains_ranks_as_in_one_gallery(
    tmp_path, tiny_assets, monkeypatch, name
):
    gallery, queries = stored_features(name)
    files = {kind: ArrayRows(Path(kind), rows.numpy()) for kind, rows in queries.items()}
    database = {"image": ArrayRows(Path("image"), gallery.numpy())}
    features = Features("tiny", name, read_task(name), files, database, Path("manifest"), None)
    runs = [Setting(given, True, name, "tiny").run(method) for method, given in OF_DOMAINS]
    made = make_rows(features, 300, seed=2)
    alone, joined = two_ways(features, made)
    expected = evaluate_exactly(joined, runs, tiny_assets)
    pool = open_pool([write_pool(tmp_path / "pool", made, [70])])
    speaking = Overheard.speaking  # the gallery's own near ties are decided in float64 here too
    monkeypatch.setattr(Overheard, "speaking", lambda method: in_double(speaking(method)))
    found = evaluate_among(alone, runs, tiny_assets, CPU, among(pool, tmp_path / "kept"))
    check_equal(found, expected)


def test_counts_of_other_parameters_are_not_taken(tmp_path):
    """A row that resembles neither image nor text counts where product does not clamp, only."""
    queries = pd.DataFrame([("q.jpg", "x", "b")], columns=["image_path", "text", "instance"])
    labels = pd.DataFrame({"text": ["x", "y"], "instance": ["b", "b"]}).astype("category")
    task = task_of_labels("made", queries, labels, ["1.jpg", "2.jpg"], ["", ""])
    arrays = {
        "image": np.float32([[1, 0]]),
        "text": np.float32([[1, 0]]),
        "rows": np.float32([[1, 1], [0, 1]]),
    }
    files = {name: ArrayRows(Path(name), values) for name, values in arrays.items()}
    database = {"image": files.pop("rows")}
    features = Features("made", "tiny", task, files, database, Path("manifest"), None)
    pool = open_pool([write_pool(tmp_path / "pool", np.float32([[-1, 0], [0, 1]]), [1])])
    ranks = []
    for clamp in (True, False, True):
        run = Setting({"clamp": clamp}, True, "made", "tiny").run("product")
        found = evaluate_among(features, [run], Assets(), CPU, among(pool, tmp_path / "kept"))
        ranks.append(found[0].main.ranks.tolist())
    assert ranks == [[0], [1], [0]]


# ---------------------------------------------------------------------------------------------
# Every method, on a world of several pools and views
# ---------------------------------------------------------------------------------------------

DIM = 6
WORDS = [f"word{number}" for number in range(30)]
SETTINGS = {
    "basic": [
        {"standardize_features": True},
        {"standardize_features": True, "do_query_expansion": True, "qe_k": 3},
        {"do_query_expansion": True, "normalize_similarities": True},
        {"standardize_features": True, "project_features": True, "do_query_expansion": True},
        {"standardize_features": True, "use_laion_mean": True, "contextualize": True},
    ],
    "freedom": [{"kappa": 4, "ni": 2, "miu": 3}, {"expand": False, "ni": 2}],
    "weicom": [{}, {"contextualize": True, "weicom_lambda": 0.3}],
    "cvsi": [{}, {"cvsi_unit_caption": True, "cvsi_image": 0.4}],
    "product": [{}, {"clamp": False}],
}


def random_rows(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def encode(texts):
    return unit_rows(torch.cat([text_vector(text) for text in texts]))


def text_vector(text):
    return torch.from_numpy(random_rows(list(text.encode()), 1, DIM))


@pytest.fixture(scope="module")
def many():
    """(alone, joined, runs, assets, rows of the pool by kind): a world that has every input."""
    world = make_world(5, queries=40, rows=60)
    features, task = world.features, world.task
    queries = len(task.queries)
    of_text = np.arange(queries) % 7
    words = [f"text {text}" for text in of_text]
    task = replace(task, queries=replace(task.queries, text=words))
    files = dict(features.query_files)
    read = {name for method in list_methods().values() for name in method.reads}
    for seed, name in enumerate(sorted({*read, "context_text"} - {"image"})):
        values = random_rows(seed, queries, DIM)
        files[name] = ArrayRows(Path(name), values[of_text] if "text" in name else values)
    features = replace(features, task=task, query_files=files)
    made = {"image": make_rows(features, 300, 3)}
    _, first, of = np.unique(
        np.concatenate([world.gallery, made["image"]]),
        axis=0,
        return_index=True,
        return_inverse=True,
    )
    captions = random_rows(50, 360, DIM)[first[of.reshape(-1)]]  # copies have the same
    made["cvsi_caption"] = captions[60:]
    database = {"cvsi_caption": ArrayRows(Path("captions"), captions[:60])}
    features = replace(features, database_files=features.database_files | database)
    corpora = {
        name: unit_rows(torch.from_numpy(random_rows(60 + seed, 30, DIM)))
        for seed, name in enumerate(
            ("generic_subjects", "generic_styles", "open_image_v7_class_names")
        )
    }
    assets = Assets(
        corpora=corpora,
        image_mean=torch.from_numpy(random_rows(70, DIM) / 9),
        synthetic_images=unit_rows(torch.from_numpy(random_rows(71, 40, DIM))),
        synthetic_texts=unit_rows(torch.from_numpy(random_rows(72, 40, DIM))),
        prompts=dict.fromkeys(corpora, WORDS),
        encode_texts=encode,
    )
    runs = []
    served = {"image", "cvsi_caption"}
    for name, method in list_methods().items():
        if not served.issuperset(method.gallery_reads):
            continue
        for number, given in enumerate(SETTINGS.get(name, [{}])):
            runs.append(Run(method, method.parameters(**given), f"{name} {number}"))
    alone, joined = two_ways(features, made["image"], {"cvsi_caption": made["cvsi_caption"]})
    return alone, joined, runs, assets, made


def features_pool(folder, rows_by_kind, parts):
    """Features folders of this toolkit, of so many parts of the rows."""
    folders = [folder / f"features{number}" for number in range(parts)]
    for number, own in enumerate(folders):
        own.mkdir(parents=True)
        for kind, rows in rows_by_kind.items():
            np.save(own / f"database_{kind}.npy", np.array_split(rows, parts)[number])
    return open_pool(folders)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_method_ranks_as_in_one_gallery(tmp_path, many, monkeypatch, parts):
    """However the pool is cut into files, units and blocks, with room for what is shared or not."""
    monkeypatch.setattr(distractors.pool, "ROWS_OF_A_UNIT", [1 << 18, 70, 31][parts - 1])
    monkeypatch.setattr(distractors.pool, "MOST_ROWS", [2048, 70, 40][parts - 1])
    monkeypatch.setattr(distractors.among, "QUERIES_AT_ONCE", [512, 9, 5][parts - 1])
    monkeypatch.setattr(utils_retrieval, "BYTES_KEPT", [1 << 29, 1 << 11, 0][parts - 1])
    alone, joined, runs, assets, made = many
    expected = evaluate_exactly(joined, runs, assets)
    pool = features_pool(tmp_path, made, parts)
    check_equal(evaluate_among(alone, runs, assets, CPU, among(pool, tmp_path / "kept")), expected)


def with_bad_rows(rows, places, values=(0, np.nan, np.inf)):
    """The rows with bad ones before those at some places, and in what is then the second unit."""
    bad = [np.full(rows.shape[1], values[n % len(values)]) for n in range(len(places))]
    return np.insert(rows, places, bad, axis=0).astype(np.float32)


def test_bad_rows_are_left_out_on_demand(tmp_path, many, monkeypatch):
    """A whole unit of them and single ones; the others rank as if there were no such rows."""
    monkeypatch.setattr(distractors.pool, "ROWS_OF_A_UNIT", 40)
    monkeypatch.setattr(distractors.pool, "MOST_ROWS", 9)
    # As on a GPU, where several of those are copied together: 3, here.
    monkeypatch.setattr(distractors.pool, "_stretches", distractors.pool._copied)
    monkeypatch.setattr(distractors.pool, "BYTES_COPIED", 4 * 9 * 2 * 4 * DIM - 1)
    alone, joined, runs, assets, made = many
    places = [3, *[40 - 1] * 40, 150, 300]  # the second unit is bad, and the last row
    spoiled = {kind: with_bad_rows(rows, places) for kind, rows in made.items()}
    mended = np.isfinite(spoiled["cvsi_caption"]).all(1) & spoiled["cvsi_caption"].any(1)
    assert np.flatnonzero(~mended).tolist() == [3, *range(40, 80), 191, 342]
    spoiled["image"][3] = 1  # bad by its caption alone
    pool = features_pool(tmp_path, spoiled, 1)
    with pytest.raises(UserError, match=r"database_cvsi_caption.npy: row 4 is zero.*on_bad_row"):
        evaluate_among(alone, runs, assets, CPU, among(pool, tmp_path / "kept"))
    pool = replace(pool, skips_bad=True)
    found = evaluate_among(alone, runs, assets, CPU, among(pool, tmp_path / "kept"))
    check_equal(found, evaluate_exactly(joined, runs, assets))


def test_the_first_bad_row_is_named_whichever_thread_comes_first(tmp_path, monkeypatch):
    rows = random_rows(0, 20, DIM)
    rows[[3, 12]] = 0
    pool = open_pool([write_pool(tmp_path / "pool", rows, [10])])
    second_failed, chunks = threading.Event(), Pool.chunks

    def late_first(pool, unit, *rest):
        if unit.first == 0:
            assert second_failed.wait(60)
            time.sleep(0.2)  # whoever waits for it has seen it
        try:
            yield from chunks(pool, unit, *rest)
        finally:
            second_failed.set()

    monkeypatch.setattr(Pool, "chunks", late_first)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match=r"img_emb_0.npy: row 4 is zero"):
            run_pass(Asking({"image": False}), pool, ["image"], CPU, Kept(tmp_path), Group())
    finally:
        torch.set_num_threads(threads)


def test_a_method_that_compares_by_no_similarity(tmp_path, many):
    """Here by the lengths of rows, which no query's vector is compared with."""
    alone, joined, _, assets, made = many

    def by_length(points, queries, gallery):
        for _ in points:
            yield gallery.kinds["image"].length.expand(len(queries.number), -1)

    method = replace(list_methods()["image"], name="length", scores=by_length)
    runs = [Run(method, NoParameters(), "length")]
    pool = features_pool(tmp_path, made, 2)
    found = evaluate_among(alone, runs, assets, CPU, among(pool, tmp_path / "kept"))
    check_equal(found, evaluate_exactly(joined, runs, assets))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_products_of_rounded_factors(tmp_path, many, precision):
    """What is counted, and what is said of it, against products of rounded factors in float64."""
    alone, _, runs, assets, made = many
    runs = [run for run in runs if run.method.name in ("image", "text")]
    pool = open_pool([write_pool(tmp_path / "pool", made["image"], [70])])
    count = partial(run_pass, pool=pool, kept=Kept(tmp_path / "kept"), group=Group())
    asked = []

    def run_work(work, **options):
        asked.append((work, options))
        return count(work, **options)

    evaluate_among(alone, runs, assets, CPU, Distractors(pool, run_work))
    ((full, options),) = asked
    rough = replace(full, precision=precision)
    found, exact = count(rough, **options)["above"], count(full, **options)["above"]
    images = unit_rows(torch.from_numpy(made["image"]))
    factors = images.to(getattr(torch, precision)).double()
    gallery = unit_rows(torch.from_numpy(alone.database("image").read(slice(0, 60)))).double()
    for run, part, above in rough.split(found):
        vectors = part.queries[runs[run].method.name]
        scores = vectors.to(getattr(torch, precision)).double()[part.query] @ factors.T
        threshold = (vectors.double()[part.query] * gallery[part.row]).sum(1, keepdim=True)
        low, high = ((scores > threshold + slack).sum(1).numpy() for slack in (3e-6, -3e-6))
        assert (low <= above).all()
        assert (above <= high).all()
    apart = np.abs(found - exact)
    assert 0 < np.count_nonzero(apart) < len(apart)
    (line,) = describe_effect(rough, partial(count, **options), pool, runs, alone.task, "row")
    assert f"{np.count_nonzero(apart)} of {len(apart)} ranks differ, by {apart.mean():.3g}" in line
    worst = apart.argmax()
    assert f"and by {apart.max()} at most: {found[worst]} instead of {exact[worst]} rank" in line
    (same,) = describe_effect(full, partial(count, **options), pool, runs, alone.task, "row")
    assert same.startswith("note: ")
    assert same.endswith(f"0 of {len(apart)} ranks differ")


def test_methods_may_observe_the_gallery_alone(tmp_path, many):
    alone, joined, runs, assets, made = many

    def of_own_rows(method):
        def observe(states, queries, gallery):
            own = {n: Rows.of(rows.raw[:-300]) for n, rows in gallery.kinds.items()}
            return method.observe(states, queries, Gallery(own, gallery.number[:-300]))

        return replace(method, observe=observe)

    methods = {run.method: of_own_rows(run.method) for run in runs}
    expected = evaluate_exactly(
        joined, [replace(r, method=methods[r.method]) for r in runs], assets
    )
    pool = features_pool(tmp_path, made, 1)
    found = evaluate_among(
        alone, runs, assets, CPU, among(pool, tmp_path / "kept", neighbours="gallery")
    )
    check_equal(found, expected)


def test_units_end_at_files_and_at_the_points_of_a_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(distractors.pool, "ROWS_OF_A_UNIT", 40)
    pool = open_pool([write_pool(tmp_path, random_rows(0, 130, 4), [100])])
    assert [len(unit) for unit in pool.units()] == [40, 40, 20, 30]
    cut = replace(pool, cuts=(10, 110))
    assert [len(unit) for unit in cut.units()] == [10, 30, 40, 20, 10, 20]
    assert [unit.first for unit in cut.units()] == [0, 10, 40, 80, 100, 110]
    smaller = [cut.identity(unit) for unit in cut.first(110).units()]
    assert smaller == [cut.identity(unit) for unit in cut.units()][:5]
    assert cut.first(0).units() == []


def test_features_that_no_method_reads_may_have_another_width(tmp_path):
    features = load_features(GOLDEN["clip"] / "features", "clip", "icir")
    for kind, width in (("image", features.dim), ("tokens", 2 * features.dim)):
        np.save(tmp_path / f"database_{kind}.npy", random_rows(0, 3, width))
    pool = open_pool([tmp_path])
    assert len(check_pool(pool, features, ["image"])) == 1, "nothing says by which model"
    with pytest.raises(UserError, match="dimensions but"):
        check_pool(pool, features, ["image", "tokens"])


def test_tokens_are_not_compared_with_distractors():
    """Also where a pool's file of tokens is as wide as its images."""
    methods = list_methods()
    refuse_tokens([Run(methods["composed"], NoParameters(), "composed")])
    with pytest.raises(UserError, match="--method composed_tokens: it compares several tokens"):
        refuse_tokens([Run(methods["composed_tokens"], NoParameters(), "tokens")])
