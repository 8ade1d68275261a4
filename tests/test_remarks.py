"""Texts that are encoded otherwise than they read, or match nothing by a hair: said with counts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extraction_world import draw_image, encode_jpeg, environment, write_rows

from create_features import main
from extraction.remarks import remark_texts
from extraction.stage import Rows
from utils_features import load_encoder

ROOT = Path(__file__).resolve().parents[1]
LONG = "a red mug on " + "very " * 80 + "old wood"
LONGER = LONG.replace("old wood", "new marble")  # the same where the model has stopped reading
QUERIES = [
    *(("q.jpg", "at night", "i"), ("q.jpg", LONG, "i"), ("q.jpg", LONGER, "i")),
    *(("q.jpg", "in  the Cafe\u0301 ", "i"), ("q.jpg", LONG, "j")),
]
DATABASE = [
    *(("a.jpg", "At night", "i"), ("b.jpg", LONG, "i"), ("a.jpg", "in the café", "i")),
    *(("b.jpg", LONGER, "i"), ("b.jpg", LONG, "j")),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_clip) -> tuple[Path, str]:
    """A folder of features whose texts are odd, and what the extraction said."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate("qab"):
        path = folder / f"photos/{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_jpeg(draw_image(seed)))
    write_rows(folder / "photos/query_files.csv", QUERIES)
    write_rows(folder / "photos/database_files.csv", DATABASE)
    words = [("mug",), ("hat " * 74,), (" ",)]
    write_rows(folder / "corpora/generic_subjects.csv", words)
    said = run(folder, small_clip, "create_features.py", "--dataset", "photos", "--workers", "0")
    return folder, said


def run(folder: Path, clip: Path, command: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / command, "--backbone", f"local-dir:{clip}", "--gpu", "-1", *flags],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


CUT = (
    "warning: 2 of 4 distinct query texts are longer than the backbone's 77 tokens: what is behind "
    "them was not read; the first, row 2: 'a red mug on very"
)
ALIKE = (
    "warning: 1 query texts are cut to what another one of the same image is cut to, and encoded "
    "alike; the first, rows 2 and 3"
)


def test_texts_that_are_cut_are_said_at_extraction_and_in_the_manifest(world):
    folder, said = world
    for line in (CUT, ALIKE, "warning: 4 of 4 distinct query texts are too long for the words"):
        assert line in said
    (path,) = folder.glob("features/*/photos/manifest.json")
    texts = json.loads(path.read_text())["texts"]["query"]
    assert (texts["cut"]["count"], texts["cut"]["row"]) == (2, 2)
    assert texts["alike"] == {"count": 1, "rows": [2, 3]}
    assert (texts["context_length"], texts["count"]) == (77, 4)


def test_run_retrieval_says_it_again_and_names_near_matches(world, small_clip):
    said = run(world[0], small_clip, "run_retrieval.py", "--dataset", "photos", "--method", "sum")
    assert CUT in said
    assert ALIKE in said
    assert (
        "warning: 2 queries have no positive, though a row of their gallery has their text but for "
        "case, blanks or the Unicode form of accents; the first: query 1, 'at night', and row 1, "
        "'At night'; write them alike"
    ) in said


def test_what_was_mended_is_not_warned_of_again(world, small_clip, tmp_path):
    """Labels that are read anew: of the texts that are asked still, and the rows that are there."""
    folder = shutil.copytree(world[0], tmp_path / "mended")
    flags = ("run_retrieval.py", "--dataset", "photos", "--method", "sum")
    repeated = "gallery rows list an image that their instance has already"
    said = run(folder, small_clip, *flags)
    assert f"warning: 2 {repeated}" in said
    write_rows(folder / "photos/query_files.csv", [QUERIES[2], QUERIES[0]])
    write_rows(folder / "photos/database_files.csv", [DATABASE[0], DATABASE[1]])
    said = run(folder, small_clip, *flags)
    assert repeated not in said
    assert "encoded alike" not in said
    assert "warning: 1 of 2 distinct query texts are longer than" in said
    assert "the first, row 1: 'a red mug on very" in said


def test_prompts_of_a_corpus(world, small_clip):
    said = run(world[0], small_clip, "create_features.py", "--dataset", "corpus")
    begin = "warning: 1 of 3 distinct generic_subjects texts are"
    assert f"{begin} longer than the backbone's 77 tokens" not in said  # 76 are not too long
    assert f"{begin} empty; the first, row 3: ' '" in said


def test_short_texts_have_no_remarks(small_clip):
    encoder = load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))
    rows = Rows.of(["a", "b", "a"], "table", [1, 2, 3])
    assert remark_texts(encoder, rows, ["mug"], ["q", "q", "q"]) == {}


def test_queries_of_a_task(world, small_clip, tmp_path, monkeypatch, capsys):
    """Also without labels, in the form of queries.jsonl."""
    for name in "qab":
        path = tmp_path / f"shop/{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((world[0] / f"photos/{name}.jpg").read_bytes())
    rows = [{"image": "q.jpg", "text": text, "positives": ["a.jpg"]} for text in (LONG, LONGER)]
    (tmp_path / "shop/queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_rows(tmp_path / "corpora/generic_subjects.csv", [("mug",)])
    monkeypatch.chdir(tmp_path)
    main(["--backbone", f"local-dir:{small_clip}", "--gpu", "-1", "--dataset", "shop"])
    said = capsys.readouterr().out
    assert "warning: 2 of 2 distinct query texts are longer than" in said
    assert "encoded alike; the first, rows 1 and 2" in said
