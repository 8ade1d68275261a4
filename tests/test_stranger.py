"""A stranger's method and a stranger's benchmark: one file each, and everything else knows them.

The product is copied to a folder of its own, the two files are added there, and the commands run.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extraction_world import draw_image, environment, write_rows
from plain_clip import image_features, text_features

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = (".py", ".html", ".css", ".js")
NOT_THE_PRODUCT = ("tests", "features", "results", "docs")

METHOD = '''"""The larger of both similarities, and a share of the smaller."""

from dataclasses import dataclass

from utils_retrieval import Method, TextParameters, flag


@dataclass(frozen=True)
class Parameters(TextParameters):
    leniency: float = flag(0.25, "share of the smaller", word="lenient", low=0, high=1)


def scores(points, queries, gallery):
    image = gallery.similarity(queries.image)
    for p in points:
        text = gallery.similarity(queries.texts(p.contextualize))
        yield image.maximum(text) + p.leniency * image.minimum(text)


METHOD = Method("stranger", Parameters, scores, preset={"leniency": 0.5})
'''

BENCHMARK = '''"""Holiday photos: answers.txt holds lines of day|image|text|answer|answer..."""

from pathlib import Path

import numpy as np

from benchmarks import Benchmark
from utils_task import Column, Group, Images, QueryTable, SetBuilder, Task, View, whole_gallery


def read(root: Path) -> Task:
    lines = [line.split("|") for line in (root / "answers.txt").read_text().splitlines()]
    paths = sorted(path.name for path in (root / "photos").iterdir())
    row, sets = {path: number for number, path in enumerate(paths)}, SetBuilder()
    right = np.array([sets(row[path] for path in line[3:]) for line in lines])
    itself = np.array([sets([row[line[1]]]) for line in lines])
    return Task(
        name="holiday",
        gallery=Images(paths),
        queries=QueryTable(
            key=[f"photo {number}" for number in range(len(lines))],
            images=[(line[1],) for line in lines],
            text=[line[2] for line in lines],
            tags={"day": [line[0] for line in lines]},
        ),
        sets=sets.done(),
        pool=whole_gallery(len(lines)),
        views={"others": View(right, excluded=itself)},
        columns=(
            Column("mAP@4", "AP-S@4", "others"),
            Column("worst day", "Hit@1", "others", (Group("day"), Group(None, "min"))),
        ),
    )


def locate(root: Path, path: str) -> Path:
    return root / "photos" / path


BENCHMARK = Benchmark({"holiday": read}, "take photos", locate=locate)
'''
DAYS = ("monday", "tuesday")
WORDS = ("at night", "in the snow, from above", "as a toy")
PHOTOS, QUERIES = 9, 6


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The product with two more files, and the pictures of the benchmark."""
    house = tmp_path_factory.mktemp("house")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix in PRODUCT and parts[0] not in NOT_THE_PRODUCT and parts[0][0] != ".":
            (house / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, house / path.relative_to(ROOT))
    for path in house.rglob("*"):
        if path.is_file():
            content = path.read_text(encoding="utf-8")
            assert not any(word in content for word in ("stranger", "leniency", "holiday"))
    (house / "methods/stranger.py").write_text(METHOD)
    (house / "benchmarks/holiday.py").write_text(BENCHMARK)
    write_rows(house / "corpora/generic_subjects.csv", [("mug",), ("kite",)])

    photos = house / "data/holiday/photos"
    photos.mkdir(parents=True)
    for number in range(PHOTOS):
        draw_image(number).save(photos / f"{number}.png")
    answers = "".join(
        f"{DAYS[n % 2]}|{n}.png|{WORDS[n % 3]}|{(n + 1) % PHOTOS}.png|{(n + 4) % PHOTOS}.png\n"
        for n in range(QUERIES)
    )
    (house / "data/holiday/answers.txt").write_text(answers)
    return house


def run(house: Path, command: str, *flags: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, f"{command}.py", *flags],
        cwd=house,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def flags(small_clip) -> list[str]:
    return ["--dataset", "holiday", "--backbone", f"local-dir:{small_clip}", "--gpu", "-1"]


@pytest.fixture(scope="module")
def extracted(house, flags) -> Path:
    """The folder of the features that the ordinary command makes of the stranger's benchmark."""
    said = run(house, "create_features", *flags, "--workers", "0")
    assert "holiday" in said
    (manifest,) = house.glob("features/*/holiday/manifest.json")
    return manifest.parent


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def similarities(house, small_clip) -> tuple[np.ndarray, np.ndarray]:
    """Of every query's image and text to every photo, (6, 9) each, straight from open_clip."""
    photos = [house / f"data/holiday/photos/{number}.png" for number in range(PHOTOS)]
    gallery = image_features(small_clip, photos)
    texts = text_features(small_clip, [WORDS[query % 3] for query in range(QUERIES)])
    return gallery[:QUERIES] @ gallery.T, texts @ gallery.T


def expected(similarities: tuple[np.ndarray, np.ndarray], leniency: float) -> tuple[float, float]:
    """mAP@4 and the worst day's Hit@1, in percent, of the stranger's method on their benchmark."""
    image, text = similarities
    score = np.maximum(image, text) + leniency * np.minimum(image, text)
    precision, hits = [], {day: [] for day in DAYS}
    for query, own in enumerate(score):
        order = [row for row in np.argsort(-own, kind="stable") if row != query]
        right = {(query + 1) % PHOTOS, (query + 4) % PHOTOS}
        places = [place for place, row in enumerate(order[:4]) if row in right]
        precision.append(sum((j + 1) / (place + 1) for j, place in enumerate(places)) / 2)
        hits[DAYS[query % 2]].append(order[0] in right)
    return 100 * np.mean(precision), 100 * min(np.mean(day) for day in hits.values())


def test_help_names_both(house):
    said = run(house, "run_retrieval", "--help")
    assert "stranger" in said
    assert "--leniency" in said
    assert "share of the smaller (default: 0.25)" in " ".join(said.split())
    assert "holiday" in run(house, "create_features", "--help")


def test_what_the_two_files_say_is_checked(house, flags, extracted):
    flags = [*flags, "--method", "stranger"]
    said = run(house, "run_retrieval", *flags, "--leniency", "2", status=2)
    assert said.startswith("error: --leniency 2")
    said = run(house, "run_retrieval", *flags, "--aa", "0.5", status=2)
    assert said.startswith("error: --aa has no effect")


def test_one_run_has_a_table_a_ranking_and_a_page(house, flags, extracted, similarities):
    run(house, "run_retrieval", *flags, "--method", "stranger", "--leniency", "1", "--report")
    (folder,) = (path.parent for path in house.glob("results/holiday/stranger*/APs.csv"))
    assert "lenient1" in folder.name
    (row,) = read_table(folder / "mAP_table.csv")
    assert (row["method"], row["leniency"], row["queries"]) == ("stranger", "1", "6")
    ap, worst = expected(similarities, 1)
    assert float(row["mAP@4"]) == pytest.approx(ap, abs=0.005)
    assert float(row["worst day"]) == pytest.approx(worst, abs=0.005)
    page = (folder / "report/index.html").read_text(encoding="utf-8")
    assert "in the snow, from above" in page
    assert "photo 5" in page
    assert "mAP@4" in page


def test_all_methods_and_a_sweep(house, flags, extracted, similarities):
    run(house, "run_retrieval", *flags, "--method", "all")
    (table,) = house.glob("results/holiday/all_*/mAP_table.csv")
    methods = {row["method"] for row in read_table(table)}
    assert {"stranger", "image", "text", "sum", "product"} <= methods
    sweep = [*flags, "--method", "stranger", "--use_preset", "--sweep", "leniency=0:1:0.5"]
    run(house, "run_retrieval", *sweep)
    tables = [read_table(path) for path in house.glob("results/holiday/*/mAP_table.csv")]
    (rows,) = (rows for rows in tables if len(rows) == 3)
    assert [float(row["leniency"]) for row in rows] == [0, 0.5, 1]
    for row in rows:
        ap, worst = expected(similarities, float(row["leniency"]))
        assert float(row["mAP@4"]) == pytest.approx(ap, abs=0.005)
        assert float(row["worst day"]) == pytest.approx(worst, abs=0.005)


def test_the_two_files_are_as_short_as_promised():
    assert len(METHOD.splitlines()) <= 20
    assert len(BENCHMARK.splitlines()) <= 40
