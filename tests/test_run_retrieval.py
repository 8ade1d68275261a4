"""The retrieval command: what it writes, and one clear line for every mistake."""

import csv
import hashlib
import json
import pickle
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command
from native import copy_world, world_arguments, write_native_world

import run_retrieval
import utils_evaluation
import utils_running
from methods import list_methods
from utils import UserError
from utils_assets import mean_path, synthetic_path
from utils_evaluation import evaluate
from utils_protocol import describe_short
from utils_retrieval import Assets
from utils_runs import Setting
from utils_storage import load_features
from utils_tables import read_results, write_results

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A golden world in native files; tests that spoil it take a copy."""
    return write_native_world(tmp_path_factory.mktemp("world"))


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    synthetic = str(folder / "synthetic_data")
    preset = "--use_preset" in flags and "basic" in flags
    places = ["--path_to_synthetic_data", synthetic] if preset else []
    return run_command("run_retrieval.py", *world_arguments(folder), *places, *flags)


def succeed(folder: Path, *flags: str) -> str:
    done = run(folder, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- results -----------------------------------------------------------------------------------


def test_a_run_adds_a_row_and_native_files_agree_with_the_reference(world, tmp_path):
    results = tmp_path / "icir" / "basic"
    flags = ("--method", "basic", "--use_preset", "--top_k", "7", "--results_dir", str(tmp_path))
    for _ in range(2):
        output = succeed(world, *flags)
    rows = read(results / "mAP_table.csv")
    assert [row["mAP"] for row in rows] == ["40.18", "40.18"]
    assert rows[0]["num_principal_components_for_projection"] == "250"
    assert {"timestamp", "backbone", "seconds", "features", "version"} <= rows[0].keys()
    assert "40.18" in output
    assert len(read(results / "APs.csv")) == 70
    top = read(results / "top7.csv")
    assert len(top) == 70
    database = read(world / "features/clip_features/icir/database.csv")
    positives = {(r["image_path"], r["instance"], r["text"]) for r in database}
    for row in top:
        matches = [int(row[f"match_{i}"]) for i in range(1, 8)]
        for i, match in enumerate(matches, start=1):
            key = (row[f"path_{i}"], row["Instance"], row["Text Query"])
            assert (key in positives) == bool(match)
        assert float(row["P@7"]) == pytest.approx(sum(matches) / 7)
    assert sum(float(row["R@7"]) for row in top) > 0


def test_top_k_begins_with_the_first_positive_where_the_ap_is_perfect(world):
    results = world / "results" / "icir" / "text"
    succeed(world, "--method", "text", "--top_k", "3")
    aps = [float(row["AP"]) for row in read(results / "APs.csv")]
    top = read(results / "top3.csv")
    first = [row["match_1"] == "1" for row in top]
    assert any(first)
    assert not all(first)
    assert all(hit for hit, ap in zip(first, aps, strict=True) if ap > 0.99)


def test_all_methods_run_on_one_load_and_are_compared(world):
    done = run(world, "--method", "all", "--use_preset", *_synthetic(world))
    assert done.returncode == 0, done.stderr
    rows = read(world / "results" / "icir" / "all" / "mAP_table.csv")
    names = ["image", "text", "sum", "product", "basic", "weicom"]
    assert [row["method"] for row in rows] == names
    assert [row["mAP"] for row in rows[:5]] == ["7.51", "24.71", "24.81", "25.32", "40.18"]
    _check_left_out(done.stderr, set(list_methods()) - set(names))
    for row in rows:
        assert row["mAP"] in done.stdout
        assert read(world / "results" / "icir" / row["variant"] / "mAP_table.csv")


def _check_left_out(text: str, wanted: set[str]) -> None:
    """Every method that is left out is named once, those that lack the same in one line."""
    lines = [line for line in text.splitlines() if line.startswith("left out: ")]
    inputs, systems, corpus = lines
    assert re.search(r": cirevl, cvsi, .*\(no query_cirevl.npy and 7 more files in ", inputs)
    assert "--inputs NAME: cirevl --captions ..., cvsi --captions ... --phi ..., pic" in inputs
    assert ": composed, composed_tokens (no query_composed.npy, query_tokens.npy, dat" in systems
    assert ": freedom (no features of the corpus 'open_image_v7" in corpus
    named = [line.removeprefix("left out: ").split(" (")[0].split(", ") for line in lines]
    assert sorted(chain(*named)) == sorted(wanted)


def _synthetic(folder: Path) -> list[str]:
    return ["--path_to_synthetic_data", str(folder / "synthetic_data")]


def test_a_sweep_writes_a_row_a_point_equal_to_single_runs_and_a_plot(world):
    axes = ["harris_lambda=0,0.1,0.2", "aa=0.2,0.5"]
    output = succeed(world, "--method", "basic", "--use_preset", "--sweep", *axes)
    folder = world / "results" / "icir" / "basic_sweep"
    rows = read(folder / "mAP_table.csv")
    at = {(row["harris_lambda"], row["aa"]): row["mAP"] for row in rows}
    assert len(at) == 6
    # The reference's own figures at these points.
    assert (at["0", "0.2"], at["0.1", "0.2"]) == ("41.49", "40.18")
    assert (at["0.2", "0.2"], at["0.1", "0.5"]) == ("42.73", "39.79")
    assert "best: " in output
    for suffix in ("png", "svg"):
        assert (folder / f"harris_lambda_aa.{suffix}").stat().st_size > 1000


def test_a_sweep_of_fusion_weight_shows_both_ends_and_the_gain(world):
    output = succeed(world, "--method", "sum", "--sweep", "fusion-weight=0:1:0.25")
    folder = world / "results" / "icir" / "sum_sweep"
    mean = {row["fusion_weight"]: float(row["mAP"]) for row in read(folder / "mAP_table.csv")}
    assert (mean["0"], mean["0.5"], mean["1"]) == (7.51, 24.81, 24.71)
    gain = float(output.split("composition gain: ")[1].split()[0])
    assert gain == pytest.approx(max(mean.values()) - 24.71, abs=0.011)  # of means not yet rounded
    assert (folder / "fusion_weight.png").exists()


def test_the_ablation_is_one_table(world):
    output = succeed(world, "--method", "basic", "--use_preset", "--ablation")
    rows = read(world / "results" / "icir" / "basic_ablation" / "mAP_table.csv")
    at = {row["components"]: row["mAP"] for row in rows}
    assert at["+ Harris (full)"] == "40.18"
    assert at["full - query expansion"] == "40.86"
    assert at["full - projection"] == "41.97"
    assert at["full - contextualization"] == "40.83"
    assert at["full - normalisation"] == "41.98"
    assert all(label in output for label in at)


def test_a_sweep_names_the_points_that_were_asked_for(world):
    """Also those at which a parameter has no effect, which are the same computation."""
    axes = ["project_features=off,on", "aa=0.1,0.3"]
    output = succeed(world, "--method", "basic", "--use_preset", "--sweep", *axes)
    rows = read(world / "results" / "icir" / "basic_sweep" / "mAP_table.csv")
    at = [(row["project_features"], row["aa"]) for row in rows]
    assert at == [("False", "0.1"), ("False", "0.3"), ("True", "0.1"), ("True", "0.3")]
    assert rows[0]["mAP"] == rows[1]["mAP"] == "41.97"
    assert rows[2]["mAP"] != rows[3]["mAP"]
    assert "best: project_features " in output
    assert not list((world / "results" / "icir" / "basic_sweep").glob("*.png"))


def test_the_gain_is_over_the_better_text(world):
    axes = ["fusion_weight=0:1:0.5", "contextualize=off,on"]
    output = succeed(world, "--method", "sum", "--sweep", *axes)
    rows = read(world / "results" / "icir" / "sum_sweep" / "mAP_table.csv")
    means = {(row["fusion_weight"], row["contextualize"]): float(row["mAP"]) for row in rows}
    ends = (means["0", "False"], means["1", "False"], means["1", "True"])
    gain = float(output.split("composition gain: ")[1].split()[0])
    assert gain == pytest.approx(max(means.values()) - max(ends), abs=0.011)
    assert "text_contextualization" in output


def test_what_an_earlier_run_left_of_rankings_goes(world):
    results = world / "results" / "icir" / "image"
    (results / "mAP_table.csv").unlink(missing_ok=True)
    succeed(world, "--method", "image", "--top_k", "4")
    succeed(world, "--method", "image", "--top_k", "1000000")
    assert {path.name for path in results.iterdir()} == {
        *("mAP_table.csv", "APs.csv", "APs.json", "top164.csv")  # the largest gallery
    }
    succeed(world, "--method", "image")
    assert {path.name for path in results.iterdir()} == {"mAP_table.csv", "APs.csv", "APs.json"}
    assert len(read(results / "mAP_table.csv")) == 3


def test_an_earlier_table_that_is_none_is_left_alone(world):
    results = world / "results" / "icir" / "product_contextualization"
    results.mkdir(parents=True)
    (results / "mAP_table.csv").write_bytes(b"m\xe4P\n1\n")
    done = run(world, "--method", "product", "--contextualize")
    assert (done.returncode, done.stdout) == (2, "")
    assert "mAP_table.csv is not a table of UTF-8" in done.stderr
    assert [path.name for path in results.iterdir()] == ["mAP_table.csv"]


def test_results_that_cannot_be_written_are_said_before_the_work(world, tmp_path):
    (tmp_path / "taken").write_text("a file")
    done = run(world, "--method", "text", "--results_dir", str(tmp_path / "taken" / "here"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --results_dir ")
    assert done.stderr.endswith("taken is not a folder; name another folder\n")


@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        (("--method", "text"), "text"),
        (("--method", "sum", "--sweep", "fusion_weight=0,1"), "sum_sweep"),
        (("--method", "basic", "--use_preset", "--ablation"), "basic_ablation"),
    ],
)
def test_each_folder_that_is_written_is_looked_at_before_the_work(world, tmp_path, flags, taken):
    (tmp_path / "icir").mkdir()
    (tmp_path / "icir" / taken).write_text("a file")
    (tmp_path / "icir" / "basic").write_text("not needed")
    done = run(world, *flags, "--results_dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --results_dir ")
    assert done.stderr.endswith(f"{taken} is not a folder; name another folder\n")


def test_too_little_memory_on_a_gpu_is_said(world, monkeypatch):
    def evaluate(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nand more")

    monkeypatch.setattr(utils_evaluation, "evaluate", evaluate)
    monkeypatch.setattr(utils_running, "quick_imports", nullcontext)  # is for a process's start
    with pytest.raises(UserError, match=r"Tried to allocate 20 GiB\.\); sweep fewer values"):
        run_retrieval.main([*world_arguments(world), "--method", "image"])


def test_float16_features_give_nearly_the_same(world, tmp_path):
    half = write_native_world(tmp_path / "half", dtype=np.float16)
    succeed(half, "--method", "basic", "--use_preset")
    (row,) = read(half / "results" / "icir" / "basic" / "mAP_table.csv")
    assert float(row["mAP"]) == pytest.approx(40.18, abs=0.1)


def test_ties_are_bounded_and_reported(world):
    means = {}
    for ties in ("worst", "row", "best"):
        done = run(world, "--method", "product", "--ties", ties)
        folder = "product" if ties == "row" else f"product_ties_{ties}"
        means[ties] = read(world / "results" / "icir" / folder / "mAP_table.csv")[-1]
        assert "in 43 queries a positive ties with a negative, the first: query " in done.stderr
    assert {row["tied_queries"] for row in means.values()} == {"43"}
    worst, row, best = (float(means[ties]["mAP"]) for ties in ("worst", "row", "best"))
    assert worst < row < best


def test_queries_without_positives_stay_in_the_means_and_are_counted(world, tmp_path):
    folder = copy_world(world, tmp_path / "copy")
    table = folder / "features/clip_features/icir/query.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].replace(",at night,", ",at no time,")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    swept = run(folder, "--method", "text", "--sweep", "contextualize=on,off")
    assert "warning: 1 of 70 queries have no positive; each scores 0" in swept.stderr
    done = run(folder, "--method", "text")
    said = "1 of 70 queries have no positive; each scores 0, the first: query 1, 'at no time'"
    assert said in done.stderr
    assert read(folder / "results" / "icir" / "text" / "APs.csv")[0]["AP"] == "0.0"


def test_an_instance_without_any_positive_scores_0(world, tmp_path):
    folder = copy_world(world, tmp_path / "copy")
    table = folder / "features/clip_features/icir/query.csv"
    rows = read(table)
    for row in rows:
        row["text"] = "as nothing" if row["instance"] == "stone_lion" else row["text"]
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    succeed(folder, "--method", "sum", "--sweep", "fusion_weight=0:1:0.5")
    succeed(folder, "--method", "sum")
    aps = read(folder / "results" / "icir" / "sum" / "APs.csv")
    assert {row["AP"] for row in aps if row["Instance"] == "stone_lion"} == {"0.0"}


# --- mistakes ----------------------------------------------------------------------------------


def spoil_instance(folder: Path) -> None:
    table = folder / "features/clip_features/icir/query.csv"
    table.write_text(table.read_text("utf-8").replace("temple_of_poseidon\n", "nowhere\n"))


def spoil_corpus_dimension(folder: Path) -> None:
    path = folder / "features/clip_features/corpus/generic_styles.npy"
    np.save(path, np.ones((9, 5), dtype=np.float32))


def spoil_corpus_model(folder: Path) -> None:
    path = folder / "features/clip_features/corpus/generic_styles.json"
    path.write_text(json.dumps({"model": {"model": "another"}}))


def spoil_database_row(folder: Path) -> None:
    path = folder / "features/clip_features/icir/database_image.npy"
    rows = np.load(path)
    rows[41] = 0
    np.save(path, rows)


def spoil_with_pickle(folder: Path) -> None:
    data = folder / "features/clip_features/icir"
    (data / "manifest.json").unlink()
    for split in ("query", "database"):
        content = pickle.dumps({"image_feats": Path})
        (data / f"{split}_icir_features.pkl").write_bytes(content)


def spoil_styles(rows: slice, value: float = 0.0):
    def spoil(folder: Path) -> None:
        path = folder / "features/clip_features/corpus/generic_styles.npy"
        features = np.load(path)
        features[rows] = value
        np.save(path, features)

    return spoil


def spoil_archive(path_of, name: str, value: float):
    """Set the first number or row of an array of the mean's or the normalisation's archive."""

    def spoil(folder: Path) -> None:
        path = path_of(folder)
        with np.load(path) as content:
            arrays = dict(content)
        arrays[name][0] = value
        np.savez(path, **arrays)

    return spoil


def keep_one_style(folder: Path) -> None:
    path = folder / "features/clip_features/corpus/generic_styles.npy"
    np.save(path, np.load(path)[:1])


def drop_queries(folder: Path) -> None:
    data = folder / "features/clip_features/icir"
    table = data / "query.csv"
    table.write_text(table.read_text("utf-8").splitlines()[0] + "\n")
    for path in data.glob("query_*.npy"):
        np.save(path, np.load(path)[:0])


def swap_formats(folder: Path) -> None:
    array = folder / "features/clip_features/icir/query_text.npy"
    np.savez(array.with_suffix(".npz"), rows=np.load(array))
    array.with_suffix(".npz").rename(array)


def write_array_as_archive(folder: Path) -> None:
    path = mean_path(folder / "data", "clip")
    np.save(path.with_suffix(".npy"), np.ones(96, np.float32))
    path.with_suffix(".npy").rename(path)


def cut_table(folder: Path) -> None:
    table = folder / "features/clip_features/icir/database.csv"
    table.write_text(table.read_text("utf-8").rstrip("\n").rpartition(",")[0] + "\n")


def edit_table(name: str, row: int, cells: str):
    """Write other cells in a row (from 0, the header) of a table of the features."""

    def edit(folder: Path) -> None:
        path = folder / "features/clip_features/icir" / name
        lines = path.read_text().splitlines()
        lines[row] = cells
        path.write_text("\n".join(lines) + "\n")

    return edit


def edit_manifest(content: str):
    return lambda f: (f / "features/clip_features/icir/manifest.json").write_text(content)


def lengthen_database(folder: Path) -> None:
    with open(folder / "features/clip_features/icir/database_image.npy", "ab") as file:
        file.write(b"more")


def mean_of_nothing(folder: Path) -> None:
    """Normalisation features at right angles to one another: their lowest similarity is 0."""
    path = synthetic_path(folder / "synthetic_data", "clip")
    with np.load(path) as content:
        arrays = dict(content)
    dim = arrays["image_features"].shape[1]
    arrays["image_features"], arrays["text_features"] = np.eye(dim)[:3], np.eye(dim)[3:6]
    np.savez(path, **arrays)


MISTAKES = {
    "a zero row of a corpus": (spoil_styles(slice(2, 3)), [], "feats: row 3 is zero or not finite"),
    "a corpus of one prompt": (keep_one_style, [], "has 1 of the 2 prompts that are needed"),
    "a mean that is no number": (
        spoil_archive(lambda f: mean_path(f / "data", "clip"), "mean", np.nan),
        [],
        "mean_clip.npz: the mean is not finite",
    ),
    "a zero row of the normalisation features": (
        spoil_archive(lambda f: synthetic_path(f / "synthetic_data", "clip"), "text_features", 0),
        [],
        "text_features: row 1 is zero or not finite",
    ),
    "no queries": (drop_queries, [], "holds no query"),
    "an archive for an array": (swap_formats, [], "query_text.npy is not a .npy file"),
    "an array for an archive": (write_array_as_archive, [], "mean_clip.npz cannot be read"),
    "a manifest that is no object": (
        lambda f: (f / "features/clip_features/icir/manifest.json").write_text("[1]"),
        [],
        "manifest.json holds no JSON object",
    ),
    "a table that is cut": (cut_table, [], "no instance; extract it again"),
    "a cell too many": (
        edit_table("database.csv", 7, "a.jpg,on sand, at night,it"),
        [],
        "database.csv: Error tokenizing data. C error: Expected 3 fields in line 8, saw 4",
    ),
    "a cell too many at first": (
        edit_table("query.csv", 1, "a.jpg,on sand, at night,it"),
        [],
        "query.csv, row 2: more than 3 columns",
    ),
    "other columns": (edit_table("query.csv", 0, "path,text,instance"), [], "the columns are not"),
    "bytes behind the last row": (lengthen_database, [], "has bytes behind its last row"),
    "an empty manifest": (edit_manifest("{}"), [], "is not the manifest of the files beside it"),
    "a manifest of other rows": (
        edit_manifest('{"model": "some", "counts": {"query": 1, "database": 2}}'),
        [],
        "is not the manifest of the files beside it",
    ),
    "nothing to divide by": (
        mean_of_nothing,
        ["--no-standardize_features", "--no-use_laion_mean"],
        "a lowest similarity of the normalisation features is 0",
    ),
    "no number": (None, ["--top_k", "1.5"], "argument --top_k/--top-k: invalid int value: '1.5'"),
    "no folder": (None, ["--dataset", "nowhere/icir"], "'nowhere/icir' is no folder"),
    "no data set": (None, ["--dataset", ""], "--dataset '' is no folder"),
    "endless components": (
        None,
        ["--num_principal_components_for_projection", "inf"],
        "a whole number of components",
    ),
    "an endless lambda": (None, ["--harris_lambda", "1e39"], "between -1e+06 and 1e+06"),
    "an endless sweep": (
        None,
        ["--sweep", "aa=0:1:0.001", "harris_lambda=0:1:0.001"],
        "1002001 points",
    ),
    "a flag beside a comparison": (
        None,
        ["--compare", "a", "b", "--no-contextualize"],
        "has no effect with --compare",
    ),
    "no features": (
        lambda f: (f / "features/clip_features/icir/manifest.json").unlink(),
        [],
        "holds no finished features",
    ),
    "no such data set": (None, ["--dataset", "other"], "--dataset other --backbone clip"),
    "no such backbone": (None, ["--backbone", "RN50/openai"], "RN50-openai_features"),
    "unknown corpus": (
        None,
        ["--specified_corpus", "nonsense"],
        "no features of the corpus 'nonsense'",
    ),
    "corpus of another dimension": (
        spoil_corpus_dimension,
        [],
        "generic_styles.json has 5 dimensions but",
    ),
    "corpus of another model": (spoil_corpus_model, [], "come from different models: model is"),
    "queries without a database": (spoil_instance, [], "the instance 'nowhere' has queries but no"),
    "no image mean": (
        lambda f: mean_path(f / "data", "clip").unlink(),
        [],
        "no image mean for clip",
    ),
    "no normalisation features": (
        lambda f: synthetic_path(f / "synthetic_data", "clip").unlink(),
        [],
        "no normalisation features for clip",
    ),
    "no contextualised texts": (
        lambda f: (f / "features/clip_features/icir/query_context_text.npy").unlink(),
        [],
        "has no contextualised query texts",
    ),
    "a zero row": (spoil_database_row, [], "database_image.npy: row 42 is zero or not finite"),
    "a hostile pickle": (spoil_with_pickle, [], "is refused"),
    "a flag without effect": (None, ["--fusion_weight", "0.3"], "--fusion_weight has no effect"),
    "all with a sweep": (None, ["--method", "all", "--sweep", "aa=0,1"], "needs one method"),
    "top_k with bounds": (None, ["--ties", "best", "--top_k", "3"], "rankings need --ties row"),
    "negative top_k": (None, ["--top_k", "-3"], "--top_k -3"),
    "too many axes named twice": (None, ["--sweep", "aa=0", "aa=1"], "names a parameter twice"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_line_with_status_2_and_writes_nothing(world, tmp_path, name):
    spoil, flags, message = MISTAKES[name]
    folder = world
    if spoil:
        folder = copy_world(world, tmp_path / "copy")
        spoil(folder)
    done = run(
        folder, "--method", "basic", "--use_preset", *flags, "--results_dir", str(tmp_path / "out")
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_data_set_of_that_name_is_refused(world, tmp_path):
    folder = copy_world(world, tmp_path / "copy")
    (tmp_path / "icir").mkdir()
    annotation = tmp_path / "icir" / "query_files.csv"
    annotation.write_text("a.jpg,red,it\n")
    (tmp_path / "icir" / "database_files.csv").write_text("b.jpg,red,it\n")
    flags = ("--method", "image", "--dataset", tmp_path / "icir")
    digest = hashlib.sha256(annotation.read_bytes()).hexdigest()
    for named, status in (("0" * 64, 2), (digest, 0)):
        content = json.dumps({"model": "some", "sources": {"query_files.csv": named}})
        edit_manifest(content)(folder)
        done = run(folder, *map(str, flags))
        assert done.returncode == status, done.stderr
        refused = "query_files.csv, row 1: the query image 'a.jpg' has no feature in" in done.stderr
        assert refused == (status == 2)


def test_no_method_is_written_where_one_cannot_be(world, tmp_path):
    results = tmp_path / "results" / "icir"
    results.mkdir(parents=True)
    (results / "sum").write_text("in the way")
    done = run(world, "--method", "all", "--results_dir", str(tmp_path / "results"))
    assert done.returncode == 2
    assert f"{results / 'sum'} is not a folder" in done.stderr
    assert [path.name for path in results.iterdir()] == ["sum"]


def test_runs_at_once_lose_no_row(tmp_path, world):
    """Threads lock like processes: each opens the folder for itself."""
    features = load_features(world / "features", "clip", "icir")
    run = Setting({}, False, "icir", "clip").run("image")
    (evaluation,) = evaluate(features, [run], Assets(), torch.device("cpu"))

    def write(number: int) -> None:
        write_results(tmp_path, evaluation, {"number": str(number)}, 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    rows = read_results(tmp_path / "mAP_table.csv")
    assert sorted(int(row["number"]) for row in rows) == list(range(40))


# --- protocols ---------------------------------------------------------------------------------


def test_rows_of_no_querys_gallery_are_counted_and_can_be_ranked(world, tmp_path):
    folder = copy_world(world, tmp_path / "copy")
    table = folder / "features/clip_features/icir/query.csv"
    rows = read(table)
    lost = sum(r["instance"] == "stone_lion" for r in read(table.with_name("database.csv")))
    kept = [number for number, row in enumerate(rows) if row["instance"] != "stone_lion"]
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[number] for number in kept)
    for path in table.parent.glob("query_*.npy"):
        np.save(path, np.load(path)[kept])
    done = run(folder, "--method", "text")
    message = f"warning: {lost} of {len(read(table.with_name('database.csv')))} gallery rows are in"
    assert message in done.stderr
    done = run(folder, "--method", "text", "--gallery", "all")
    assert "gallery rows are in" not in done.stderr
    results = folder / "results" / "icir"
    own, whole = (
        read(results / name / "mAP_table.csv")[-1] for name in ("text", "text_gallery_all")
    )
    assert whole["gallery"] == "all"
    assert "every query is ranked against the whole gallery" in whole["notes"]
    assert float(whole["mAP"]) < float(own["mAP"])


def test_query_images_in_the_gallery_can_be_left_out(world, tmp_path):
    folder = copy_world(world, tmp_path / "copy")
    done = run(folder, "--method", "image", "--exclude_query_image")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no query image is a gallery row" in done.stderr
    data = folder / "features/clip_features/icir"
    queries, rows = read(data / "query.csv"), read(data / "database.csv")
    features, vectors = np.load(data / "database_image.npy"), np.load(data / "query_image.npy")
    row = next(i for i, r in enumerate(rows) if r["instance"] == queries[0]["instance"])
    rows[row]["image_path"], rows[row]["text"] = queries[0]["image_path"], "as no query asks"
    features[row] = vectors[0]
    np.save(data / "database_image.npy", features)
    with open(data / "database.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    succeed(folder, "--method", "image", "--top_k", "1")
    flags = ("--exclude_query_image", "--metrics", "Hit@1", "mAP@5", "AP-S")
    succeed(folder, "--method", "image", "--top_k", "1", *flags)
    results = folder / "results" / "icir"
    with_it = read(results / "image" / "top1.csv")[0]
    without = read(results / "image_no_query_image" / "top1.csv")[0]
    assert with_it["path_1"] == queries[0]["image_path"] != without["path_1"]
    (table,) = read(results / "image_no_query_image" / "mAP_table.csv")
    assert "left out of the rankings of" in table["notes"]
    assert {"Hit@1", "mAP@5", "AP-S"} <= table.keys()
    assert {"AP", "Hit@1", "AP@5", "AP-S"} <= read(results / "image_no_query_image" / "APs.csv")[
        0
    ].keys()


def test_what_extraction_left_out_stays_visible(world, tmp_path):
    folder = copy_world(world, tmp_path / "copy")
    path = folder / "features/clip_features/icir/manifest.json"
    manifest = json.loads(path.read_text())
    rows = len(read(path.with_name("database.csv")))
    manifest["counts"] = {"query": 70, "database": rows}
    manifest["skipped"] = [{"split": "database", "image_path": "a.jpg", "cause": "it is cut"}] * 2
    path.write_text(json.dumps(manifest))
    done = run(folder, "--method", "image")
    words = f"2 of {rows + 2} database rows"
    assert f"warning: extraction left out {words}, the first 'a.jpg' (it is cut)" in done.stderr
    row = read(folder / "results" / "icir" / "image" / "mAP_table.csv")[-1]
    assert row["left_out"] == words


def test_what_asks_for_more_than_there_is_is_said(world, tmp_path, capsys):
    task = load_features(world / "features", "clip", "icir").task
    few = np.flatnonzero(task.pool_sizes < 120)
    assert 0 < len(few) < len(task.queries)
    notes = [
        f"note: --qe_k 120 takes all there are: {len(few)} of 70 queries search fewer images, the "
        f"first, {task.queries.key[few[0]]!r}, {task.pool_sizes[few[0]]} of them",
        "note: --num_principal_components_for_projection 250 takes all there are: 72 components "
        "with a positive eigenvalue",
    ]
    flags = ("--method", "basic", "--use_preset", "--results_dir", str(tmp_path))
    command = [*world_arguments(world), *_synthetic(world), *flags]
    for more, runs in (
        (("--qe_k", "120"), ("", "")),
        (
            ("--sweep", "qe_k=5,120,150"),
            (" (2 of 3 runs, the first basic_k120)", " (3 of 3 runs, the first basic_k5)"),
        ),
        (("--qe_k", "5", "--num_principal_components_for_projection", "72"), None),
    ):
        run_retrieval.main([*command, *more])
        said = [line for line in capsys.readouterr().err.splitlines() if " takes all " in line]
        assert set(said) == {note + own for note, own in zip(notes, runs or (), strict=False)}
    many = Setting({"qe_k": 120, "do_query_expansion": True}, False, "icir", "clip").run("basic")
    assert len(describe_short(task, [many], Assets())) == 1
    assert describe_short(task, [many], Assets(), more=19) == []
    settings = ({"miu": 141}, {"miu": 140}, {"miu": 8, "expand": False})
    runs = [Setting(given, False, "icir", "clip").run("freedom") for given in settings]
    (line,) = describe_short(task, runs, Assets())
    assert line == (
        "note: --miu 141 takes all there are: 140 words of the images that stand for a query (2 of "
        f"3 runs, the first {runs[0].variant})"
    )


def test_a_lambda_that_turns_the_ranking_over_is_said(world):
    flags = ("--method", "basic", "--use_preset", "--sweep", "harris_lambda=0.1,0.25,0.3")
    done = run(world, *flags)
    assert "harris_lambda 0.25 and above no score is above zero" in done.stderr
    assert "(2 of 3 runs, the first basic_lambda0.25)" in done.stderr
    assert "no score" not in run(world, *flags[:-1], "harris_lambda=0.1,0.2").stderr
