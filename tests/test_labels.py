"""Labels are text from the annotation to the page, whatever they look like."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from extraction_world import draw_image, encode_jpeg, output_folder, write_rows
from random_worlds import AWKWARD
from report_world import page_data

import create_features
import run_retrieval
from utils import UserError
from utils_storage import load_features
from utils_values import read_values

NUMBERS = ("7", "007", "7.0", "+7", "0x7", "True", "False", "12345678901234567890", "1e5", "inf")
MISSING = ("NA", "N/A", "None", "null", "NULL", "nan", "NaN", "<NA>", "#N/A", "-")
NAMES = ("7", "007", "NA", "True", "1e5", "null", "é.jpg", "猫", "-0", "nan.png", "a,b", "q'", '"')
KINDS = {"numbers": NUMBERS, "missing": MISSING, "awkward": AWKWARD, "unicode": ()}


def draw_text(rng: random.Random) -> str:
    """Random Unicode, without what cannot stand in a row: a carriage return, a zero, halves."""
    while True:
        text = "".join(
            chr(rng.choice((rng.randrange(1, 256), rng.randrange(1, 0x110000)))) for _ in "abc"
        )
        if text.strip() and "\r" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text):
            return text


def draw_rows(kind: str) -> dict[str, list[tuple[str, str, str]]]:
    """Rows of both splits; every label stands in both."""
    rng = random.Random(kind)
    labels = [*KINDS[kind]] or [draw_text(rng) for _ in range(12)]
    rng.shuffle(labels)
    instances, texts = labels[: len(labels) // 2], labels[-5:]
    names = [f"query/{name}" for name in NAMES]
    query = [(rng.choice(names), t, i) for i in instances for t in rng.sample(texts, 2)]
    database = [
        (f"database/{rng.choice(NAMES)}", rng.choice(["", *texts]), i)
        for i in instances
        for _ in range(6)
    ]
    database += [(f"database/{rng.choice(NAMES)}", text, i) for _, text, i in query]
    return {"query": list(dict.fromkeys(query)), "database": database}


@pytest.fixture(params=KINDS)
def world(request, tmp_path, monkeypatch) -> Iterator[tuple[Path, dict]]:
    """A data set of these labels, in the folder where the test works."""
    monkeypatch.chdir(tmp_path)
    rows = draw_rows(request.param)
    root = tmp_path / "data" / "shop"
    for split, own in rows.items():
        write_rows(root / f"{split}_files.csv", own)
        for number, name in enumerate(NAMES):
            path = root / split / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_jpeg(draw_image(number)))
    write_rows(tmp_path / "corpora/generic_subjects.csv", [(label,) for label in NUMBERS])
    return tmp_path, rows


def read_table(path: Path) -> list[tuple[str, ...]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def retrieve(clip: Path, *flags: str) -> None:
    places = ("--dataset", "shop", "--backbone", f"local-dir:{clip}", "--gpu", "-1")
    run_retrieval.main([*places, *flags])


def test_labels_come_through_the_whole_chain(world, small_clip):
    folder, rows = world
    flags = ("--backbone", f"local-dir:{small_clip}", "--gpu", "-1", "--workers", "0")
    create_features.main(["--dataset", "shop", "--format", "pkl", *flags])
    features = output_folder(folder, small_clip, "features")
    for split, own in rows.items():
        assert read_table(features / f"{split}.csv") == own
    for method in ("image", "sum"):
        retrieve(small_clip, "--method", method, "--top_k", "3", "--report")
    found = {path.parent.name: path.parent for path in folder.glob("results/shop/*/APs.csv")}
    image, fused = sorted(found.values())
    for run in (image, fused):
        assert [row[:3] for row in read_table(run / "APs.csv")] == rows["query"]
        assert [row[:3] for row in read_table(run / "top3.csv")] == rows["query"]
        values = read_values(run)
        assert list(zip(*values.labels.values(), strict=True)) == rows["query"]
        assert values.tags["instance"] == [row[2] for row in rows["query"]]
    words = json.dumps(page_data(image / "report/index.html"), ensure_ascii=False)
    for label in {label for row in rows["query"] for label in row[1:]}:
        assert json.dumps(label, ensure_ascii=False) in words, label
    run_retrieval.main(["--compare", str(image), str(fused)])
    (compared,) = folder.glob("results/shop/*/against_*/queries.csv")
    header, *_ = compared.read_text(encoding="utf-8").splitlines()
    places = [header.split(",").index(name) for name in ("Image Query", "Text Query", "Instance")]
    listed = [tuple(row[place] for place in places) for row in read_table(compared)]
    assert sorted(listed) == sorted(rows["query"])
    check_pickles(features, small_clip, rows, image)


def check_pickles(features: Path, clip: Path, rows: dict, image: Path) -> None:
    """The reference's pickles give the same table of APs, and the same rows when turned back."""
    old = Path("old") / features.parent.name / "shop"
    old.mkdir(parents=True)
    for path in features.glob("*.pkl"):
        shutil.move(path, old)
    places = ("--features_dir", "old", "--results_dir", "results_of_pickles")
    retrieve(clip, "--method", "image", *places)
    (run,) = Path("results_of_pickles").glob("shop/*/APs.csv")
    expected = [(f"./data/shop/{row[0]}", *row[1:]) for row in read_table(image / "APs.csv")]
    assert read_table(run) == expected
    flags = ("--dataset", "shop", "--from_pkl", "old", "--features_dir", "new")
    create_features.main([*flags, "--backbone", f"local-dir:{clip}"])
    task = load_features("new", f"local-dir:{clip}", "shop").task
    assert list(zip(*task.queries.labels().values(), strict=True)) == rows["query"]
    assert list(task.gallery.path) == [row[0] for row in rows["database"]]


@pytest.mark.parametrize("split", ["query", "database"])
def test_a_zero_byte_is_refused(tmp_path, split):
    """Which CSV readers take for the end of a value, or leave out."""
    from benchmarks.icir import read_annotation

    (tmp_path / f"{split}_files.csv").write_bytes(b"a.jpg,te\0xt,i\n")
    with pytest.raises(UserError, match=rf"{split}_files\.csv, row 1: .*zero byte"):
        read_annotation(tmp_path, split, "folder")
