"""A data set and a backbone of one's own, from raw images to a table, through both commands."""

import csv
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import run_command
from extraction_world import draw_image, write_rows
from PIL import Image

THINGS = {"mug": (200, 40, 40), "kite": (40, 160, 60)}
PLACES = {"on grass": (60, 120, 30), "on sand": (220, 200, 140), "at night": (10, 10, 40)}


def draw_photo(path: Path, thing: str, place: str, seed: int) -> None:
    """A patch of the thing's colour on a ground of the place's, with some noise."""
    image = Image.blend(Image.new("RGB", (50, 40), PLACES[place]), draw_image(seed), 0.2)
    image.paste(THINGS[thing], (10 + seed % 10, 8, 30 + seed % 10, 30))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_photos(root: Path) -> None:
    """Two instances, three texts each; the database holds both things in all places."""
    rows = {"query": [], "database": []}
    for number, thing in enumerate(THINGS):
        draw_photo(root / f"images/{thing} query.png", thing, "on sand", number)
        rows["query"] += [(f"images/{thing} query.png", place, thing) for place in PLACES]
        for seed, (other, place) in enumerate((o, p) for o in THINGS for p in PLACES):
            for copy in range(3):
                path = f"images/{thing}/{other} {place} {copy}.jpg"
                draw_photo(root / path, other, place, 10 * seed + copy)
                rows["database"].append((path, place if other == thing else "", thing))
    for split, content in rows.items():
        write_rows(root / f"{split}_files.csv", content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one's own: photos, two corpora, captions."""
    folder = tmp_path_factory.mktemp("own")
    make_photos(folder / "photos")
    subjects = ["mug", "kite", "teapot", "a red cup", "dog", "tree"]
    write_rows(folder / "corpora/generic_subjects.csv", [(word,) for word in subjects])
    write_rows(folder / "corpora/generic_styles.csv", [(place,) for place in PLACES])
    captions = [(f"{t}/{t} {p} 0.jpg", f"a {t} {p}") for t in THINGS for p in PLACES]
    write_rows(folder / "captions.csv", captions)
    return folder


def run(folder: Path, program: str, clip: Path, *flags: str) -> subprocess.CompletedProcess:
    backbone = ["--backbone", f"local-dir:{clip}", "--gpu", "-1"]
    return run_command(program, *backbone, *flags, folder=folder)


@pytest.fixture(scope="module")
def extracted(folder, small_clip):
    """The folder after the four extractions that the README lists."""
    images = ["--images", "photos/images", "--workers", "0"]
    for flags in (
        ["--dataset", "photos", "--workers", "0"],
        ["--dataset", "corpus"],
        ["--dataset", "mean", *images],
        ["--dataset", "synthetic", *images, "--captions", "captions.csv"],
    ):
        done = run(folder, "create_features.py", small_clip, *flags)
        assert done.returncode == 0, done.stderr
    return folder


def test_from_raw_images_to_a_table(extracted, small_clip):
    flags = ["--dataset", "photos", "--method", "all", "--use_preset", "--top_k", "3", "--report"]
    done = run(extracted, "run_retrieval.py", small_clip, *flags)
    assert done.returncode == 0, done.stderr
    (table,) = extracted.glob("results/photos/all_*/mAP_table.csv")
    with open(table, newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["image", "text", "sum", "product", "basic", "weicom"]
    assert all(row["queries"] == "6" and row["instances"] == "2" for row in rows.values())
    # Random weights still see colours: the image alone beats chance (3 positives of 18 rows).
    assert float(rows["image"]["mAP"]) > 25
    assert (table.parent / "report/index.html").exists()
    assert "warning" not in done.stderr


def test_features_of_two_models_are_not_mixed(extracted, make_clip, small_clip, tmp_path):
    """The corpora of another model, put where this model's are looked for, are refused."""
    from conftest import SMALL_CLIP

    extracted = shutil.copytree(extracted, tmp_path / "copy")
    other = make_clip("other", SMALL_CLIP | {"quick_gelu": False}, seed=3)
    done = run(
        extracted, "create_features.py", other, "--dataset", "corpus", "--features_dir", "others"
    )
    assert done.returncode == 0, done.stderr
    (theirs,) = (extracted / "others").glob("*/corpus")
    (ours,) = (path for path in (extracted / "features").glob("*/corpus"))
    for path in theirs.glob("generic_styles.*"):
        (ours / path.name).write_bytes(path.read_bytes())
    done = run(extracted, "run_retrieval.py", small_clip, "--dataset", "photos", "--use_preset")
    assert done.returncode == 2
    assert "generic_styles.json and" in done.stderr
    assert "come from different models" in done.stderr
