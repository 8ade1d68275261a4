"""Features of tasks that are not in i-CIR's form: distinct images and texts, boxes, the task."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import domain_world
import numpy as np
import pytest
import torch
from extraction_world import ROOT, arguments, draw_image, write_rows
from PIL import Image
from semantic_world import GOLDEN, needs_golden, unit

import create_features
from utils import UserError
from utils_features import load_encoder
from utils_pixels import crop_box, decode_image
from utils_storage import Features, load_features
from utils_task import NO_SET, first_rows

TINY = ROOT / "data" / "tiny" / "clip"


def extract(clip: Path, dataset: str, *flags: str) -> None:
    create_features.main(arguments(clip, "--workers", "0", *flags, dataset=dataset)[1:])


def load(clip: Path, name: str, features: str | Path = "features") -> Features:
    return load_features(features, f"local-dir:{clip}", name)


def rows_of(features: Features, name: str = "image") -> np.ndarray:
    file = features.database(name)
    return file.read(slice(0, file.shape[0]))


def queries_of(features: Features, name: str) -> list[np.ndarray]:
    """The features (k, D) of each query's images or texts."""
    own = features.query(name)
    if own.of is not None:
        return [own.values[rows[rows >= 0]] for rows in own.of]
    rows = np.arange(len(own.values)) if own.row is None else own.row
    return [own.values[[row]] for row in rows]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a small corpus."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "corpora" / "generic_subjects.csv", [("mug",), ("hat",)])
    return tmp_path


# ---------------------------------------------------------------------------------------------
# Against published code
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet_r", "nico"])
def test_domain_conversion(name):
    """The features of FREEDOM's own code; the queries of one are gallery rows, the other's not."""
    extract(TINY, name, "--data_dir", str(domain_world.DATA))
    features = load(TINY, name)
    gallery, queries = domain_world.stored_features(name)
    np.testing.assert_allclose(unit(rows_of(features)), gallery, atol=2e-6)
    assert ("image" in features.query_files) == (name == "nico")
    for kind in ("image", "text"):
        found = np.concatenate(queries_of(features, kind))
        np.testing.assert_allclose(unit(found), queries[kind], atol=2e-6)
    assert features.query_files["text"].shape[0] == len(set(features.task.queries.text))


@needs_golden
def test_boxes_and_own_modes():
    """GeneCIS: dilated boxes on black squares; CIRR: an RGBA file resized before it is made RGB."""
    extract(TINY, "genecis", "--data_dir", str(GOLDEN))
    features = load(TINY, "genecis")
    rows, references = unit(rows_of(features)), queries_of(features, "image")
    labels = np.array(features.task.queries.tags["task"])
    for label in np.unique(labels):
        known = np.load(GOLDEN / "expected" / f"genecis_{label}.npz")
        for number, query in enumerate(np.flatnonzero(labels == label)):
            pool = rows[features.task.sets[features.task.pool[query]]]
            shown = known["candidates.plain"][number]
            distance = np.abs(pool[:, None] - shown[None]).max(axis=2)
            assert max(distance.min(axis=0).max(), distance.min(axis=1).max()) < 2e-6
            raw = known["reference.plain (raw)"][number]
            np.testing.assert_allclose(references[query][0], raw, rtol=1e-4, atol=2e-5)
    extract(TINY, "cirr", "--data_dir", str(GOLDEN))
    known = np.load(GOLDEN / "expected" / "cirr_val.npz")
    np.testing.assert_allclose(unit(rows_of(load(TINY, "cirr"))), known["gallery.plain"], atol=2e-6)


@needs_golden
def test_a_shared_gallery_is_encoded_once(capsys):
    extract(TINY, "fashioniq", "--data_dir", str(GOLDEN))
    capsys.readouterr()
    extract(TINY, "fashioniq_small_forward", "--data_dir", str(GOLDEN))
    printed = capsys.readouterr().out
    assert "fashioniq_images: already finished" in printed
    assert "database_image" not in printed.split("already finished")[1].replace("image.npy", "")
    several, one = load(TINY, "fashioniq"), load(TINY, "fashioniq_small_forward")
    np.testing.assert_array_equal(rows_of(several), rows_of(one))
    assert not (several.folder / "database_image.npy").exists()
    encoder = load_encoder(f"local-dir:{TINY}", torch.device("cpu"))
    for query in (0, 20):
        texts = several.task.queries.texts[query]
        assert len(texts) == 2
        expected = encoder.encode_texts(texts, 8)
        found = queries_of(several, "text")[query]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert [len(own) for own in queries_of(one, "text")] == [1] * len(one.task.queries)


# ---------------------------------------------------------------------------------------------
# A folder of one's own
# ---------------------------------------------------------------------------------------------

QUERIES = [
    {"id": "one", "image": "q/a.png", "text": "red", "positives": ["g/0.png", "g/1.png"]},
    {"id": "two", "images": ["q/a.png", "g/2.png"], "text": "on sand", "positives": ["g/2.png"]},
    {"id": "three", "image": "q/b.png", "text": "red", "positives": ["g/3.png"]},
    {"id": "four", "image": "q/c.png", "text": "blue", "positives": ["g/4.png"]},
]


def write_own(root: Path, name: str = "shop", queries: list[dict] = QUERIES) -> Path:
    """A benchmark of six gallery images and three query images that are none of them."""
    paths = [f"g/{i}.png" for i in range(6)]
    for seed, path in enumerate([*paths, *(f"q/{letter}.png" for letter in "abc")]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        draw_image(seed).save(root / path)
    write_rows(root / "gallery.csv", [(path,) for path in paths])
    text = "".join(json.dumps(query) + "\n" for query in queries)
    (root / "queries.jsonl").write_text(text, encoding="utf-8")
    (root / "benchmark.json").write_text(json.dumps({"name": name}), encoding="utf-8")
    return root


def expected_images(root: Path, clip: Path, paths: list[str]) -> np.ndarray:
    encoder = load_encoder(f"local-dir:{clip}", torch.device("cpu"))
    pixels = torch.stack([encoder.preprocess(decode_image(root / path)) for path in paths])
    return encoder.encode_images(pixels).numpy()


def table(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_query_of_several_images(place, small_clip):
    root = write_own(place / "mine")
    extract(small_clip, "mine", "--data_dir", ".")
    features = load(small_clip, "shop")
    assert table(features.folder / "query.csv") == [
        ["key", "image_row", "text_row"],
        ["one", "0", "0"],
        ["two", "0 1", "1"],
        ["three", "2", "0"],
        ["four", "3", "2"],
    ]
    assert table(features.folder / "database.csv")[:2] == [["image_path"], ["g/0.png"]]
    expected = expected_images(root, small_clip, ["q/a.png", "g/2.png"])
    np.testing.assert_allclose(queries_of(features, "image")[1], expected, rtol=1e-4, atol=1e-5)
    paths = [f"g/{i}.png" for i in range(6)]
    expected = expected_images(root, small_clip, paths)
    np.testing.assert_allclose(rows_of(features), expected, rtol=1e-4, atol=1e-5)
    assert features.manifest["counts"] == {"query": 4, "database": 6}
    assert set(features.manifest["sources"]) >= {"queries.jsonl", "generic_subjects.csv"}


def test_query_images_of_the_gallery_are_not_encoded_again(place, small_clip):
    queries = [QUERIES[0] | {"image": "g/5.png"}, QUERIES[3] | {"images": ["g/1.png", "g/0.png"]}]
    queries[1].pop("image")
    write_own(place / "mine", queries=queries)
    extract(small_clip, "mine", "--data_dir", ".")
    features = load(small_clip, "shop")
    assert not (features.folder / "query_image.npy").exists()
    assert [row[1] for row in table(features.folder / "query.csv")] == ["image_row", "5", "1 0"]
    np.testing.assert_array_equal(queries_of(features, "image")[1], rows_of(features)[[1, 0]])


def test_images_left_out_leave_the_task(place, small_clip, capsys):
    """Sets and rows are numbered anew; a query goes with its image or its last positive."""
    root = write_own(place / "mine")
    (root / "g/0.png").write_bytes(b"no image")  # one of the first query's two positives
    (root / "q/b.png").write_bytes(b"no image")  # the third query's own
    with pytest.raises(UserError, match=r"q/b\.png \(queries of shop, row 3\): .*on_bad_image"):
        extract(small_clip, "mine", "--data_dir", ".")
    (root / "g/4.png").unlink()  # the fourth query's only one
    with pytest.raises(
        UserError, match=r"1 of the 9 images of shop are missing.* g/4\.png; .*skip"
    ):
        extract(small_clip, "mine", "--data_dir", ".")
    extract(small_clip, "mine", "--data_dir", ".", "--on_bad_image", "skip", "--overwrite")
    assert "skipped database_image row 5: g/4.png: No such file" in capsys.readouterr().out
    features = load(small_clip, "shop")
    task = features.task
    left_out = "3 unreadable images left out: 2 of 6 gallery rows and 2 of 4 queries"
    assert task.notes[-1] == left_out
    assert task.queries.key == ["one", "two"]
    assert task.gallery.path == ["g/1.png", "g/2.png", "g/3.png", "g/5.png"]
    positives = task.views["all"].positives
    assert NO_SET not in positives
    assert [task.sets[number].tolist() for number in positives] == [[0], [1]]
    assert features.manifest["counts"] == {"query": 2, "database": 4}
    assert {entry["image_path"] for entry in features.manifest["skipped"]} == {
        *("g/0.png", "g/4.png", "q/b.png")
    }
    assert [row[1:] for row in table(features.folder / "query.csv")[1:]] == [
        ["0", "0"],
        ["0 1", "1"],
    ]
    expected = expected_images(root, small_clip, task.gallery.path)
    np.testing.assert_allclose(rows_of(features), expected, rtol=1e-4, atol=1e-5)
    expected = expected_images(root, small_clip, ["q/a.png", "g/2.png"])
    np.testing.assert_allclose(queries_of(features, "image")[1], expected, rtol=1e-4, atol=1e-5)
    (root / "g/4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="finished without 3 images"):
        extract(small_clip, "mine", "--data_dir", ".")


@pytest.mark.parametrize(
    ("path", "where"), [("q/b.png", "queries.jsonl, line 3"), ("g/4.png", "gallery.csv, line 5")]
)
def test_a_missing_image_is_named_with_the_line_that_names_it(place, small_clip, path, where):
    root = write_own(place / "mine")
    (root / path).unlink()
    said = f"images of shop are missing: {path}; mine/{where} names the first: put it there, or"
    with pytest.raises(UserError, match=said):
        extract(small_clip, "mine", "--data_dir", ".")


def test_a_task_that_is_judged_otherwise_is_written_anew(place, small_clip, monkeypatch, capsys):
    """Features stay; a reader that gives other columns is heeded, other rows are refused."""
    from benchmarks import own

    write_own(place / "mine")
    extract(small_clip, "mine", "--data_dir", ".")
    folder = load(small_clip, "shop").folder
    before = (folder / "query_text.npy").stat().st_mtime_ns
    extract(small_clip, "mine", "--data_dir", ".")
    assert "written anew" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(own, "COLUMNS", own.COLUMNS[:1])
        extract(small_clip, "mine", "--data_dir", ".")
    assert "the task was written anew" in capsys.readouterr().out
    assert (folder / "query_text.npy").stat().st_mtime_ns == before
    (place / "mine/g/9.png").write_bytes((place / "mine/g/1.png").read_bytes())
    with open(place / "mine/gallery.csv", "a", encoding="utf-8") as file:
        file.write("g/9.png\n")
    with pytest.raises(UserError, match=r"the gallery image 'g/9.png' has no feature"):
        extract(small_clip, "mine", "--data_dir", ".")


def test_the_first_rows_of_a_task(place, small_clip):
    """Trials keep the positives of the queries that they keep."""
    write_own(place / "mine")
    extract(small_clip, "mine", "--data_dir", ".", "--limit", "2")
    features = load(small_clip, "shop_first2")
    assert features.task.queries.key == ["one", "two"]
    assert features.task.gallery.path == ["g/0.png", "g/1.png", "g/2.png"]
    assert features.task.notes[-1] == "the first 2 queries and 3 gallery rows of shop"
    assert features.manifest["limit"] == 2
    whole = domain_world.read_task("nico")
    assert len(first_rows(whole, 10**9).gallery) == len(whole.gallery)


def test_from_raw_images_to_a_table(place, small_clip):
    """Both commands on a folder of one's own without code, as the shell runs them."""
    write_own(place / "mine")
    backbone = ("--backbone", f"local-dir:{small_clip}", "--gpu", "-1", "--dataset", "mine")
    for program, *flags in (
        ("create_features.py", "--data_dir", ".", "--workers", "0"),
        ("run_retrieval.py", "--data_dir", ".", "--method", "sum"),
    ):
        command = [sys.executable, str(ROOT / program), *backbone, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (folder,) = (place / "results" / "shop").glob("sum*")
    header, row = table(folder / "mAP_table.csv")
    values = dict(zip(header, row, strict=True))
    assert values["queries"] == "4"
    assert {"mAP", "R@1", "R@5"} <= set(values)


MISTAKES = {
    "shards": (("--icir_source", "wds"), "--icir_source has no effect with --dataset mine"),
    "pickles": (("--format", "pkl"), "--format pkl: the reference's files cannot hold shop"),
    "no images": ((), "images of shop are missing: g/0.png, "),
    "no data set": ((), "no data set 'mine': neither mine nor mine is a folder"),
    "no form": ((), "mine is no data set: "),
    "not there": (("--dataset", "circo"), "published ones: circo, circo_test"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(place, small_clip, name):
    flags, words = MISTAKES[name]
    if name != "no data set":
        (place / "mine").mkdir()
    if name not in ("no data set", "no form"):
        write_own(place / "mine")
    if name == "no images":
        for path in (place / "mine").glob("?/*.png"):
            path.unlink()
    with pytest.raises(UserError) as caught:
        extract(small_clip, "mine", "--data_dir", ".", *flags)
    assert words in str(caught.value)
    assert not (place / "features").exists()


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def test_boxes():
    image = draw_image(3, (50, 40))
    assert crop_box(image, (0, 0, 0, 0)) is image
    part = crop_box(image, (10, 5, 90, 20))  # wider than the image: cut to 40 x 15
    assert part.size == (40, 40)
    pixels = np.asarray(part)
    np.testing.assert_array_equal(pixels[12:27], np.asarray(image)[5:20, 10:50])
    assert not pixels[:12].any()
    assert not pixels[27:].any()
    with pytest.raises(ValueError, match=r"the box \(60, 0, 70, 9\) shows nothing of it"):
        crop_box(image, (60, 0, 70, 9))


def test_own_mode(tmp_path):
    """An image with transparency, resized as it is and then made RGB, or the other way round."""
    clear = np.zeros((40, 40, 4), np.uint8)
    clear[:, :20] = (255, 0, 0, 255)
    Image.fromarray(clear, "RGBA").save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").mode == "RGB"
    assert decode_image(tmp_path / "a.png", own_mode=True).mode == "RGBA"
    assert decode_image(tmp_path / "a.png", (0, 0, 9, 5), own_mode=True).size == (9, 9)
