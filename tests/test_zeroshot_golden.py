"""SEARLE, Pic2Word, CIReVL and CVSI from images, checkpoints and caption files to their figures.

The published programs' features, scores, metrics and submission files, see the golden world's
README.md. Most pad their images: here that is done to the files beforehand, so that the command's
plain preprocessing follows.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from semantic_world import GOLDEN, needs_golden
from torchvision.transforms.functional import pad

import create_features
import run_retrieval
from methods import find_method
from utils_retrieval import Gallery, Queries, Rows
from utils_storage import Features, load_features

pytestmark = needs_golden
ASSETS = GOLDEN / "assets"
FASHION = ("fashioniq_dress_val", "fashioniq_shirt_val", "fashioniq_toptee_val")
GENECIS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
# Task -> the files of expected figures that it is made of.
TASKS = {
    "cirr": ("cirr_val",),
    "cirr_test": ("cirr_test",),
    "circo": ("circo_val",),
    "circo_test": ("circo_test",),
    "fashioniq": FASHION,
    "fashioniq_small": FASHION,
    "genecis": tuple(f"genecis_{task}" for task in GENECIS),
}


class Case(NamedTuple):
    """A row of the expected figures: the method, its input with flags, and the images' world."""

    row: str
    method: str
    inputs: tuple[object, ...]
    place: str


WORD = ("pic2word", "--phi", ASSETS / "pic2word_module.pt")
CVSI = ("cvsi", "--captions", ASSETS / "cvsi", "--phi", ASSETS / "cvsi_phi.pt")
TEXT = ("pic2word_text",)
SEARLE = Case("searle", "searle", ("searle", "--phi", ASSETS / "searle_phi.pt"), "padded")
CIREVL = Case("cirevl", "cirevl", ("cirevl", "--captions", ASSETS / "cirevl"), "padded")
PADDED = (SEARLE, CIREVL, Case("cvsi", "cvsi", CVSI, "padded"))
COMPOSED = Case("pic2word.composed", "pic2word", WORD, "plain")
PIC2WORD = (
    COMPOSED,
    Case("pic2word.text", "pic2word_text", TEXT, "plain"),
    Case("pic2word.mixture", "pic2word_mixture", TEXT, "plain"),
    Case("pic2word.image", "image", TEXT, "plain"),
)
CASES = [
    *((task, case) for task in TASKS if task != "genecis" for case in PADDED),
    ("genecis", CIREVL),
    *(
        (t, case)
        for t in ("cirr", "cirr_test", "fashioniq", "fashioniq_small")
        for case in PIC2WORD
    ),
    ("cirr", COMPOSED._replace(row="pic2word.composed+pad", place="padded")),
]


def pad_to_ratio(image: Image.Image, ratio: float = 1.25) -> Image.Image:
    """Zeros at both short sides, where the long one is at least 1.25 times as long."""
    long, short = max(image.size), min(image.size)
    if long / short < ratio:
        return image
    width, height = (max(int((long / ratio - side) / 2), 0) for side in image.size)
    return pad(image, [width, height, width, height], 0)


def pad_files(source: Path, target: Path) -> None:
    """A copy of a data set with its images padded, losslessly, under the names they had."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            with Image.open(path) as image:
                pad_to_ratio(image).save(copy, "PNG")
        elif path.is_file():
            shutil.copy(path, copy)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The golden data sets as they are (plain) and with padded images, and a short corpus."""
    folder = tmp_path_factory.mktemp("zeroshot")
    (folder / "corpora").mkdir()
    (folder / "corpora" / "generic_subjects.csv").write_text("mug\n")
    (folder / "plain").symlink_to(GOLDEN)
    for name in ("cirr", "circo", "fashioniq"):
        pad_files(GOLDEN / name, folder / "padded" / name)
    # Boxes are cut out before anything is padded, and what is cut out is square.
    pad_files(GOLDEN / "genecis" / "coco2017", folder / "padded" / "genecis" / "coco2017")
    for name in ("genecis", "Visual_Genome"):
        (folder / "padded" / "genecis" / name).symlink_to(GOLDEN / "genecis" / name)
    return folder


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def extract(world: Path, task: str, case: Case, *flags: object) -> Features:
    """The features of a task with the case's inputs."""
    fixed = ("--dataset", task, "--backbone", "tiny", "--gpu", "-1", "--workers", "0")
    fixed += ("--data_dir", world / case.place, "--features_dir", world / f"features_{case.place}")
    fixed += ("--corpora_dir", world / "corpora", "--inputs")
    create_features.main([str(word) for word in (*fixed, *case.inputs, *flags)])
    return load_features(world / f"features_{case.place}", "tiny", task)


def retrieve(world: Path, task: str, case: Case) -> Path:
    """The folder of results of a method."""
    command = ["--dataset", task, "--backbone", "tiny", "--method", case.method, "--use_preset"]
    command += ["--gpu", "-1", "--features_dir", str(world / f"features_{case.place}")]
    run_retrieval.main([*command, "--results_dir", str(world / f"results_{case.place}")])
    return world / f"results_{case.place}" / task / f"{case.method}_tiny"


def expected(task: str, case: Case) -> list[dict]:
    """The expected figures of a method, file by file."""
    files = [json.loads((GOLDEN / "expected" / f"{f}.json").read_text()) for f in TASKS[task]]
    return [content[case.row] for content in files]


def arrays(task: str, key: str) -> list[np.ndarray]:
    found = []
    for file in TASKS[task]:
        with np.load(GOLDEN / "expected" / f"{file}.npz") as content:
            found.append(content[key])
    return found


# ---------------------------------------------------------------------------------------------
# Features and scores
# ---------------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def query_vectors(features: Features, case: Case, preset) -> np.ndarray:
    """The vectors that a method searches with."""
    image = features.query("image")
    images = unit(image.values if image.row is None else image.values[image.row])
    if case.method == "image":
        return images
    if case.method == "pic2word_mixture":
        return unit(images + unit(features.query("pic2word_text").values))
    if case.method != "cvsi":
        return unit(features.query(case.method).values)
    parts = {
        "cvsi_text": features.query("cvsi_text").values,
        "cvsi_word": unit(features.query("cvsi_word").values),
        "cvsi_image": images,
    }
    return sum(getattr(preset, name) * part for name, part in parts.items())


def preset_of(task: str, method: str):
    found = find_method(method)
    return found.parameters(**{**found.preset, **found.presets.get(task, {})})


def scores_of(features: Features, method: str, parameters) -> np.ndarray:
    """Every query against every gallery row, (Q, N)."""
    found = find_method(method)
    values = {}
    for name in found.reads:
        rows = features.query(name)
        own = rows.values if rows.row is None else rows.values[rows.row]
        values[name] = torch.from_numpy(unit(own) if rows.is_unit else own)
    gallery = {}
    for name in found.gallery_reads:
        file = features.database(name)
        gallery[name] = Rows.of(torch.from_numpy(np.array(file.read(slice(0, file.shape[0])))))
    states = found.prepare([parameters], None)
    return next(iter(found.scores(states, Queries(values), Gallery(gallery)))).numpy()


@pytest.mark.parametrize(("task", "case"), CASES, ids=lambda value: getattr(value, "row", value))
def test_features_scores_and_figures(world, task, case, capsys):
    features = extract(world, task, case)
    said = capsys.readouterr().out
    golden = arrays(task, f"query.{case.row}")
    parameters = preset_of(task, case.method)
    vectors = query_vectors(features, case, parameters)
    assert np.abs(vectors - np.concatenate(golden)).max() < 1e-5
    scores = scores_of(features, case.method, parameters)
    starts = np.cumsum([0, *map(len, golden)])
    for number, own in enumerate(arrays(task, f"scores.{case.row}")):
        queries = range(starts[number], starts[number + 1])
        for query, theirs in zip(queries, own, strict=True):
            rows = _searched_rows(features, query, number, task, own.shape[1])
            assert np.abs(scores[query][rows] - theirs).max() < 1e-5
    if case.method != "image":
        check_cut_texts(features.folder / f"{case.inputs[0]}.json", said, expected(task, case))
    check_figures(retrieve(world, task, case), task, case)


def check_cut_texts(manifest: Path, said: str, files: list[dict]) -> None:
    """Cut texts are in the manifest, and said when they are encoded."""
    cut = any(file.get("texts longer than 24 tokens (cut)") for file in files)
    counts = json.loads(manifest.read_text())["cut_texts"].values()
    assert any(counts) == cut
    if "already finished" not in said.splitlines()[-1]:
        assert ("tokens and were cut" in said) == cut


def _searched_rows(features: Features, query: int, file: int, task: str, count: int) -> np.ndarray:
    """The gallery rows that a query's golden scores are of, in their order."""
    if task == "genecis":  # the target first, then the others as they are listed
        return _candidates(features, query)
    if task.startswith("fashioniq"):
        return np.arange(file * count, (file + 1) * count)
    return np.arange(count)


def _candidates(features: Features, query: int) -> np.ndarray:
    from benchmarks.genecis import TASKS as PICTURES
    from benchmarks.genecis import read_entries

    key = features.task.queries.key[query]
    name, _, number = key.rpartition("-")
    entry = read_entries(GOLDEN / "genecis" / "genecis" / f"{name}.json")[int(number)]
    shown = [PICTURES[name](image) for image in [entry.of("target"), *entry.entries("gallery")]]
    box = features.task.gallery.box
    pool = features.task.sets[features.task.pool[query]]
    found = [(features.task.gallery.path[row], tuple(box[row].tolist())) for row in pool]
    taken: list[int] = []
    for picture in shown:  # a picture that is listed twice is two rows
        places = [place for place, own in enumerate(found) if own == picture]
        taken.append(next(place for place in places if place not in taken))
    return pool[taken]


# ---------------------------------------------------------------------------------------------
# Figures and files
# ---------------------------------------------------------------------------------------------


def check_figures(folder: Path, task: str, case: Case) -> None:
    """Every figure of the table, as it is printed, and the files for the servers."""
    files = expected(task, case)
    if task.endswith("_test"):
        check_submissions(folder, task, case.row)
        return
    with open(folder / "mAP_table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    wanted = FIGURES[task](files)
    assert len(wanted) > 5
    for name, value in wanted.items():
        assert row[name] == f"{value:.2f}", name


def _cirr_figures(files: list[dict]) -> dict[str, float]:
    return files[0]["metrics"]


def _circo_figures(files: list[dict]) -> dict[str, float]:
    found = {name.replace("/", " "): value for name, value in files[0]["metrics"].items()}
    left_out = files[0]["metrics, reference removed"].items()
    out = {
        f"{n} reference out": value for n, value in left_out if n.startswith("mAP") and "/" not in n
    }
    return found | out


def _fashioniq_figures(files: list[dict], key: str = "metrics") -> dict[str, float]:
    categories, found = ("dress", "shirt", "toptee"), {}
    for k in (10, 50):
        own = [file[key][f"Recall@{k}"] for file in files]
        found |= {f"{c} R@{k}": value for c, value in zip(categories, own, strict=True)}
        found[f"R@{k}"] = float(np.mean(own))
        if key == "metrics":
            out = [file["metrics, reference removed"][f"Recall@{k}"] for file in files]
            found[f"R@{k} reference out"] = float(np.mean(out))
    return found


def _genecis_figures(files: list[dict]) -> dict[str, float]:
    key, found = "metrics with ties against the positive", {}
    for k in (1, 2, 3):
        own = [file[key][f"R@{k}"] for file in files]
        found |= {f"{task} R@{k}": value for task, value in zip(GENECIS, own, strict=True)}
        found[f"R@{k}"] = float(np.mean(own))
    return found


FIGURES = {
    "cirr": _cirr_figures,
    "circo": _circo_figures,
    "fashioniq": _fashioniq_figures,
    "fashioniq_small": lambda files: _fashioniq_figures(files, "metrics, VAL gallery"),
    "genecis": _genecis_figures,
}


def check_submissions(folder: Path, task: str, row: str) -> None:
    """The files are equal but for the order of rows whose scores all but agree."""
    golden = sorted((GOLDEN / "expected" / "submissions").glob(f"{task}_{row}*.json"))
    assert golden
    (scores,), (names,) = arrays(task, f"scores.{row}"), arrays(task, "gallery_names")
    (queries,) = arrays(task, "query_ids")
    place = {str(name): number for number, name in enumerate(names)}
    for path in golden:
        kind = path.stem.removeprefix(f"{task}_{row}").lstrip("_")
        own = json.loads((folder / f"{kind or 'submission'}.json").read_text())
        wanted = json.loads(path.read_text())
        assert own.keys() == wanted.keys()
        for key, listed in wanted.items():
            if isinstance(listed, str):
                assert own[key] == listed
                continue
            score = scores[[str(query) for query in queries].index(key)]
            assert len(own[key]) == len(listed)
            for a, b in zip(own[key], listed, strict=True):
                assert abs(score[place[str(a)]] - score[place[str(b)]]) < 1e-6


def test_pic2words_network_is_the_same_in_its_other_form(world):
    """Without "module." before the names of its tensors, and stored in half precision."""
    features = extract(world, "cirr", COMPOSED)
    vectors = unit(features.query("pic2word").values)
    other = ("--phi", ASSETS / "pic2word_plain.pt", "--overwrite")
    again = extract(world, "cirr", COMPOSED, *other)
    assert np.abs(unit(again.query("pic2word").values) - vectors).max() < 1e-5


def test_all_stand_in_one_table(world, capsys):
    """With the baselines and BASIC's name, from one load of the features."""
    for case in PADDED:
        extract(world, "circo", case)
    command = ["--dataset", "circo", "--backbone", "tiny", "--method", "all", "--gpu", "-1"]
    command += ["--features_dir", str(world / "features_padded")]
    run_retrieval.main([*command, "--results_dir", str(world / "results_all")])
    said = capsys.readouterr().out
    for method in ("image", "text", "sum", "product", "basic", *(case.method for case in PADDED)):
        assert f"\n{method} " in said
