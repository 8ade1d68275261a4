"""The published figures of domain conversion, through both commands, from images to tables."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from domain_world import (
    DATA,
    GOLDEN,
    NAMES,
    WORDS,
    golden,
    read_prompts,
    save_words_clip,
    write_corpora,
)
from refusals import refusal

import create_features
import run_retrieval
from utils import UserError, write_csv, write_json
from utils_backbones import backbone_folder
from utils_features import load_encoder

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny"

# The published methods by the flags that give them, the run of --method all first.
FEW_WORDS = ("--kappa", "5", "--ni", "3", "--miu", "5")
SEVEN = ("--num_principal_components_for_projection", "7")
RUNS = {
    ("all",): {
        "text": "text",
        "image": "image",
        "sum": "sum",
        "product": "product_clamped",
        "freedom": "freedom",
        "weicom": "weicom_0.5",
        "basic": "basic",
    },
    ("product", "--no-clamp"): {"product_no_clamp": "product"},
    ("freedom", "--no-expand"): {"freedom_no_expansion": "freedom_dagger"},
    ("freedom", *FEW_WORDS): {"freedom_kappa5_n3_m5": "freedom_k5_n3_m5"},
    ("weicom", "--weicom_lambda", "0.3"): {"weicom_lambda0.3": "weicom_0.3"},
    ("basic", "--no-do_query_expansion"): {"basic_no_query_expansion": "basic_dagger"},
    ("basic", *SEVEN): {"basic_components7": "basic_k7"},
    ("basic", *SEVEN, "--no-do_query_expansion"): {
        "basic_components7_no_query_expansion": "basic_dagger_k7"
    },
}
PUBLISHED = {variant: name for runs in RUNS.values() for variant, name in runs.items()}


@dataclass(frozen=True)
class World:
    """Results of all runs on all data sets, with a backbone."""

    folder: Path
    words: bool
    suffix: str
    said: str

    def run_folder(self, name: str, variant: str) -> Path:
        return self.folder / "results" / name / f"{variant}{self.suffix}"

    def figures(self, name: str) -> dict:
        """Published figures by method: AP, mAP, near, and for the first backbone R@k and P@k."""
        if not self.words:
            return golden(name)["methods"]
        path = GOLDEN / "expected" / f"{name}_words.json"
        return json.loads(path.read_text(encoding="utf-8"))["methods"]


@pytest.fixture(scope="module", params=["tiny", "words"])
def world(request, tmp_path_factory):
    """Features, extracted from the images, and every run over all four data sets at once."""
    folder = tmp_path_factory.mktemp("golden")
    words = request.param == "words"
    clip = save_words_clip(TINY / "clip", folder / "clip") if words else TINY / "clip"
    backbone = f"local-dir:{clip}"
    encoder = load_encoder(backbone, torch.device("cpu"))
    own = folder / "features" / backbone_folder(backbone)
    for name in NAMES:
        extract(name, backbone, folder)
    write_corpora(own, encoder)
    short = backbone_folder(backbone).removesuffix("_features")
    for kind, place in (("mean", "data/laion_mean"), ("synthetic", "synthetic_data")):
        (folder / place).mkdir(parents=True)
        array = dict(np.load(TINY / kind / f"{kind}_tiny.npz"))
        manifest = json.loads(str(array.pop("manifest"))) | {"model": encoder.identity}
        np.savez(folder / place / f"{kind}_{short}.npz", **array, manifest=json.dumps(manifest))
    places = [f"--{place}_dir={folder / place}" for place in ("features", "data", "results")]
    synthetic = ["--path_to_synthetic_data", str(folder / "synthetic_data")]
    said = []
    for method, *flags in RUNS:
        common = ["--dataset", *NAMES, "--backbone", backbone, "--gpu=-1", "--use_preset", *places]
        said.append(run_captured([*common, "--method", method, *flags], method, synthetic))
    yield World(folder, words, f"_{short}", "".join(said))
    shutil.rmtree(folder)


def extract(name: str, backbone: str, folder: Path) -> None:
    """Images and lists to features, by create_features.py in this process."""
    flags = ["--dataset", name, "--backbone", backbone, "--data_dir", str(DATA), "--workers", "0"]
    places = ["--features_dir", str(folder / "features"), "--corpora_dir", str(TINY / "corpora")]
    create_features.main([*flags, *places, "--gpu", "-1"])


def run_captured(command: list[str], method: str, synthetic: list[str]) -> str:
    """Run the command in this process; what it says on stderr."""
    reads = synthetic if method in ("all", "basic") else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as e:
        run_retrieval.main([*command, *reads])
    return e.getvalue()


def read_table(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("name", NAMES)
def test_every_ap_and_every_cell(world, name, variant):
    figures, folder = world.figures(name)[PUBLISHED[variant]], world.run_folder(name, variant)
    header, *rows = read_table(folder / "APs.csv")
    ap = np.array([float(row[header.index("AP")]) for row in rows])
    expected, near = np.array(figures["AP"]), figures["near"]
    difference = np.abs(ap - expected)
    for query, (lowest, highest) in near.items():
        assert lowest - 1e-6 <= ap[int(query)] <= highest + 1e-6
        difference[int(query)] = 0
    assert (difference <= 1e-6).mean() >= 0.99
    assert difference.max() <= 0.01
    moved = {int(query) for query in near if abs(ap[int(query)] - expected[int(query)]) > 1e-6}
    for column in ("mAP", *(name for name in figures if "@" in name)):
        compare_cells(read_table(folder / f"{column}_matrix.csv"), figures[column], moved)
    if not moved:
        means, values = read_table(folder / "mAP_table.csv")
        assert float(values[means.index("mAP")]) == figures["mAP"]["mean"]


def compare_cells(table: list[list[str]], figures: dict, moved: set[int]) -> None:
    """Every cell as published; where the last bit decided an AP, within 0.02."""
    (corner, *columns), *rows = table
    assert corner == ""
    assert columns == [*sorted(figures["columns"]), "average"]
    assert [row[0] for row in rows] == [*sorted(figures["rows"]), "average"]
    for source, *cells in rows:
        for target, cell in zip(columns, cells, strict=True):
            if source == target != "average":
                assert cell == ""
            else:
                allowed = 0.02 if moved else 0
                assert abs(float(cell) - published_cell(figures, source, target)) <= allowed


def published_cell(figures: dict, source: str, target: str) -> float:
    if source == "average":
        return figures["mean"] if target == "average" else figures["columns"][target]
    return figures["rows"][source] if target == "average" else figures["matrix"][source][target]


@pytest.mark.parametrize("name", NAMES)
def test_distinct_images_and_texts_are_kept_once(world, name):
    (folder,) = world.folder.glob(f"features/*/{name}")
    figures = golden(name)
    texts = np.load(folder / "query_text.npy")
    assert len(texts) == len(figures["texts"])
    gallery = np.load(folder / "database_image.npy")
    assert len(gallery) == figures["gallery_rows"]
    both = name in ("imagenet_r", "ltll")
    assert (folder / "query_image.npy").exists() != both
    with np.load(GOLDEN / "expected" / f"{name}_features.npz") as expected:
        unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
        assert np.abs(unit - expected["gallery"]).max() < 1e-5


def test_texts_are_encoded_once_each_and_said(world):
    """Four data sets and three settings of FREEDOM share their texts."""
    lines = [line for line in world.said.splitlines() if line.startswith("encoding ")]
    encoded = sum(int(line.split()[1]) for line in lines)
    (store,) = world.folder.glob("features/*/texts")
    texts = [text for (text,) in read_table(store / "texts.csv")[1:]]
    assert len(texts) == len(set(texts)) == encoded > 100
    assert len(np.load(store / "texts.npy")) == encoded


def test_queries_without_positives_are_counted(world):
    assert "warning: 88 of 408 queries have no positive; each scores 0" in world.said


# ---------------------------------------------------------------------------------------------
# Beyond the published runs
# ---------------------------------------------------------------------------------------------


def flags_of(world: World, *datasets: str, results: Path) -> list[str]:
    backbone = ["--backbone", f"local-dir:{TINY / 'clip'}", "--gpu=-1"]
    places = [f"--features_dir={world.folder / 'features'}", f"--results_dir={results}"]
    return ["--dataset", *datasets, *backbone, *places, "--method", "freedom"]


def test_a_gallery_smaller_than_kappa_ends_the_command(world, tmp_path):
    if world.words:
        pytest.skip("one backbone is enough")
    with pytest.raises(UserError, match=r"--kappa 60: a gallery has 49 images only"):
        run_retrieval.main([*flags_of(world, "ltll", results=tmp_path), "--kappa", "60"])
    assert not list(tmp_path.rglob("*.csv"))


def test_nothing_runs_where_one_of_several_data_sets_has_no_features(world, tmp_path):
    if world.words:
        pytest.skip("one backbone is enough")
    with pytest.raises(UserError, match=r"circo holds no features; run: .*--dataset circo"):
        run_retrieval.main(flags_of(world, "ltll", "circo", results=tmp_path))
    assert not list(tmp_path.rglob("*.csv"))


def test_freedom_on_instances_takes_the_text_in_the_domain_s_place(world, tmp_path):
    """Features in i-CIR's form: LTLL's classes as instances, with a gallery each."""
    if world.words:
        pytest.skip("one backbone is enough")
    (source,) = world.folder.glob("features/*/ltll")
    target, task = source.with_name("buildings"), golden("ltll")
    target.mkdir()
    gallery = np.load(source / "database_image.npy")
    texts = np.load(source / "query_text.npy")
    paths = [row[0] for row in read_table(source / "database.csv")[1:]]
    kind = {query[0]: (query[1], query[3]) for query in task["queries"]}
    rows = [[path, kind[path][0].lower(), kind[path][1]] for path in paths]
    asked = [[path, query[2].lower(), query[3]] for query in task["queries"] for path in query[:1]]
    header = ["image_path", "text", "instance"]
    write_csv(target / "database.csv", header, rows)
    write_csv(target / "query.csv", header, asked)
    np.save(target / "database_image.npy", gallery)
    np.save(target / "query_image.npy", gallery[[paths.index(path) for path, *_ in asked]])
    np.save(target / "query_text.npy", texts[[0] * len(asked)])
    write_json(target / "manifest.json", json.loads((source / "manifest.json").read_text()))
    run_retrieval.main([*flags_of(world, "buildings", results=tmp_path), "--kappa", "3"])
    (folder,) = (tmp_path / "buildings").glob("freedom_*")
    aps = read_table(folder / "APs.csv")[1:]
    assert len(aps) == len(asked)
    assert any(float(row[-1]) > 0 for row in aps)
    (store,) = world.folder.glob("features/*/texts")
    kept = {text for (text,) in read_table(store / "texts.csv")[1:]}
    assert any(text.endswith(" today") for text in kept)
    assert any(text.endswith(" archive") for text in kept)


# What is wrong -> the words of FREEDOM's corpus that are put in others' place, flags, what is said.
REFUSED = {
    "kappa": ({}, ("--kappa", "5000"), "--kappa 5000: a gallery has "),
    "a word twice": ({2: "first"}, (), "rows 1 and 3 are both 'first'"),
    "a blank word": ({1: " "}, (), "row 2: a blank"),
}


@pytest.mark.parametrize("world", ["tiny"], indirect=True)
@pytest.mark.parametrize("fault", REFUSED)
def test_what_freedom_cannot_work_with_is_one_line(world, tmp_path, monkeypatch, capsys, fault):
    changed, flags, said = REFUSED[fault]
    features = tmp_path / "features"
    shutil.copytree(world.folder / "features", features)
    (corpus,) = features.glob(f"*/corpus/{WORDS}.csv")
    words = dict(enumerate(read_prompts(corpus)[1:])) | {0: "first"} | changed
    write_csv(corpus, ["prompt"], [[word] for word in words.values()])
    backbone = f"local-dir:{TINY / 'clip'}"
    common = ("--dataset", "ltll", "--method", "freedom", "--backbone", backbone, "--gpu=-1")
    folders = (f"--features_dir={features}", f"--data_dir={world.folder / 'data'}")
    found = refusal(
        *(monkeypatch, capsys, tmp_path / "empty", *common, *folders, *flags),
        main=run_retrieval.main,
    )
    assert said in found
