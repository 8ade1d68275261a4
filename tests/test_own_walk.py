"""A benchmark without code, from raw images to table, rankings and page, through both commands."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extraction_world import environment
from plain_clip import image_features, text_features
from test_own_benchmark import FIRST, lines, write
from test_own_dataset import PLACES, THINGS, draw_photo, run

ROOT = Path(__file__).resolve().parents[1]
COPIES = 3
WALK_COLUMNS = ["mAP = AP-T", "mAP@5 = AP-S@5", "R@1 = Hit@1", "by thing = AP-T", "worst = AP-T"]


def walk_queries() -> list[dict]:
    """A query for every thing and place; one of two images, two with galleries of their own."""
    queries = []
    for number, (thing, place) in enumerate((t, p) for t in THINGS for p in PLACES):
        query = {"id": f"{thing} {place}", "image": f"q/{thing} {number % 2}.png", "text": place}
        right = [f"g/{thing}/{place} {copy}.jpg" for copy in range(COPIES)]
        queries.append(query | {"positives": right, "tags": {"thing": thing}})
    shared = {"text": "at night", "tags": {"thing": "mug"}}
    two = {
        "id": "two",
        "images": ["q/mug 0.png", "q/mug 1.png"],
        "positives": ["g/mug/at night 1.jpg"],
    }
    few = ["g/mug/at night 0.jpg", "g/mug/on sand 0.jpg", "g/kite/at night 0.jpg"]
    few = {"id": "few", "image": "q/mug 1.png", "positives": few[:1], "gallery": few}
    listed = {"id": "listed", "image": "q/mug 0.png", "gallery": "mugs", "related": []}
    listed |= {"positives": ["g/mug/at night 2.jpg"], "excluded": ["g/mug/at night 1.jpg"]}
    return [*queries, *(query | shared for query in (two, few, listed))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, small_clip) -> Path:
    """A folder with the benchmark `photos`, extracted and run with every method."""
    folder = tmp_path_factory.mktemp("walk")
    root, gallery = folder / "photos", []
    for seed, (thing, place) in enumerate((t, p) for t in THINGS for p in PLACES):
        draw_photo(root / f"q/{thing} {seed % 2}.png", thing, "on sand", seed)
        for copy in range(COPIES):
            gallery.append(f"g/{thing}/{place} {copy}.jpg")
            draw_photo(root / gallery[-1], thing, place, 10 * seed + copy)
    (root / "queries.jsonl").write_text(lines(*walk_queries()))
    (root / "gallery.csv").write_text("\n".join([*gallery, gallery[0]]))
    settings = {
        "name": "walk",
        "columns": WALK_COLUMNS,
        "groups": {"by thing": "thing", "worst": {"tag": "thing", "how": "min"}},
        "lists": {"mugs": [path for path in gallery if "mug" in path]},
    }
    (root / "benchmark.json").write_text(json.dumps(settings))
    (folder / "corpora").mkdir()
    (folder / "corpora/generic_subjects.csv").write_text("mug\nkite\n")
    for program, *flags in (
        ("create_features.py", "--workers", "0"),
        ("run_retrieval.py", "--method", "all", "--top_k", "4", "--report"),
    ):
        done = run(folder, program, small_clip, "--dataset", "photos", *flags)
        assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "lines that repeat an image, which counts once: 1" in said
    return folder


def results(folder: Path, method: str, dataset: str = "walk") -> Path:
    """The results' folder of a method, or of all; its name ends in the backbone's."""
    (found,) = folder.glob(f"results/{dataset}/{method}_local-dir-*")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rankings(folder: Path, clip: Path) -> dict[str, list[list[str]]]:
    """Each query's paths, best first, by method: straight from open_clip and queries.jsonl."""
    root = folder / "photos"
    gallery = list(dict.fromkeys((root / "gallery.csv").read_text().split("\n")))
    queries = walk_queries()
    rows = image_features(clip, [root / path for path in gallery])
    images = [query.get("images") or [query["image"]] for query in queries]
    mean = [image_features(clip, [root / path for path in own]).mean(0) for own in images]
    image = np.stack([own / np.linalg.norm(own) for own in mean]) @ rows.T
    text = text_features(clip, [query["text"] for query in queries]) @ rows.T
    lists = {"mugs": [path for path in gallery if "mug" in path]}
    found = {}
    for method, scores in {"image": image, "text": text, "sum": image + text}.items():
        found[method] = []
        for query, own in zip(queries, scores, strict=True):
            pool = query.get("gallery", gallery)
            pool = set(lists[pool] if isinstance(pool, str) else pool)
            searched = pool - set(query.get("excluded", []))
            order = [gallery[row] for row in np.argsort(-own, kind="stable")]
            found[method].append([path for path in order if path in searched])
    return found


def trapezoid(ranking: list[str], right: set[str]) -> float:
    places = [place for place, path in enumerate(ranking) if path in right]
    before = [j / place if place else 1 for j, place in enumerate(places)]
    after = [(j + 1) / (place + 1) for j, place in enumerate(places)]
    return sum(before + after) / 2 / (len(right) + 1e-5)


def standard(ranking: list[str], right: set[str], k: int) -> float:
    places = [place for place, path in enumerate(ranking[:k]) if path in right]
    return sum((j + 1) / (place + 1) for j, place in enumerate(places)) / min(len(right), k)


def test_the_table_is_what_the_files_say(photos, small_clip):
    rows = {row["method"]: row for row in read_table(results(photos, "all") / "mAP_table.csv")}
    queries = walk_queries()
    right = [set(query["positives"]) for query in queries]
    things = [query["tags"]["thing"] for query in queries]
    for method, ranked in rankings(photos, small_clip).items():
        ap = np.array([trapezoid(*pair) for pair in zip(ranked, right, strict=True)])
        ap5 = [standard(*pair, 5) for pair in zip(ranked, right, strict=True)]
        hit = [ranking[0] in own for ranking, own in zip(ranked, right, strict=True)]
        grouped = [ap[[thing == own for own in things]] for thing in THINGS]
        by_thing, worst = ([how(own) for own in grouped] for how in (np.mean, np.min))
        expected = map(np.mean, (ap, ap5, hit, by_thing, worst))
        names = ("mAP", "mAP@5", "R@1", "by thing", "worst")
        for name, value in zip(names, expected, strict=True):
            assert float(rows[method][name]) == pytest.approx(100 * value, abs=0.006), (
                method,
                name,
            )
        assert rows[method]["queries"] == str(len(queries))


def test_the_best_images_are_of_the_gallery_that_a_query_searches(photos, small_clip):
    queries = walk_queries()
    for method, ranked in rankings(photos, small_clip).items():
        table = read_table(results(photos, method) / "top4.csv")
        for query, ranking, row in zip(queries, ranked, table, strict=True):
            paths = [row[f"path_{place}"] for place in range(1, 5)]
            assert [path for path in paths if path] == ranking[:4]
            match = [row[f"match_{place}"] == "1" for place in range(1, 5)]
            assert match == [path in query["positives"] for path in paths]
    named = [row["Image Query"] for row in table]
    assert named[-3:] == ["q/mug 0.png + q/mug 1.png", "q/mug 1.png", "q/mug 0.png"]


def test_the_page_shows_the_queries(photos):
    report = results(photos, "all") / "report"
    page = (report / "index.html").read_text(encoding="utf-8")
    for text in ("mAP@5", "by thing", "kite on grass", "at night"):
        assert text in page
    assert list((report / "thumbnails").iterdir())


def test_a_changed_file_needs_features_for_what_is_new_alone(photos, small_clip, tmp_path):
    """A query of an image and a text that have their features is judged; a new text is refused."""
    folder = shutil.copytree(photos, tmp_path / "copy")
    flags = (small_clip, "--dataset", "photos", "--workers", "0")
    with open(folder / "photos/queries.jsonl", "a") as file:
        file.write(lines(walk_queries()[0] | {"id": "again"}))
    done = run(folder, "create_features.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "run_retrieval.py reads the labels anew" in done.stdout
    with open(folder / "photos/queries.jsonl", "a") as file:
        file.write("\n" + lines(walk_queries()[0] | {"id": "new", "text": "under water"}))
    done = run(folder, "create_features.py", *flags)
    assert done.returncode == 2
    assert "walk, query new: the query text 'under water' has no feature" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_mistake_ends_both_commands_with_one_line(tmp_path, small_clip):
    root = write(tmp_path, queries=[FIRST | {"positives": ["e.jpg"]}])
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/generic_subjects.csv").write_text("mug\n")
    done = run(tmp_path, "create_features.py", small_clip, "--dataset", root.name)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: shop/queries.jsonl, line 1: \"positives\": 'e.jpg' is not"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "features").exists()


def commands_of(page: str, beginning: str) -> str:
    """The block of commands of a page that holds this beginning, without its remarks."""
    blocks = re.findall("```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (block,) = (block for block in blocks if beginning in block)
    return re.sub(" +#.*", "", block)


def run_commands(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands of a page or of a message in a folder, on the CPU."""
    commands = re.sub(r"python3 (\S+)", f"{sys.executable} {ROOT}/\\1 --gpu -1", commands)
    return subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )


WALK_NOTES = """\
note: gallery: the 4 images below the folder, as there is no gallery.csv
note: queries whose own image is in the gallery as a negative, unless "excluded" or \
--exclude_query_image leaves it out: 2 of 2, the first '1' (queries.jsonl, line 1)
"""

BASIC_NOTES = """\
note: --qe_k 25 takes all there are: 2 of 2 queries search fewer images, the first, '1', 4 of them
note: --num_principal_components_for_projection 250 takes all there are: 30 components with a \
positive eigenvalue
"""


def test_the_walk_of_the_readme(tmp_path, small_clip):
    """Its own commands, but for the backbone, with every line that may be a warning; then basic."""
    commands = commands_of("README.md", "mkdir -p mugs")
    assert commands == commands_of("docs/own.md", "mkdir -p mugs")
    assert len(commands.strip().split("\n")) <= 10
    commands = re.sub("BACKBONE=.*", f"BACKBONE={shlex.quote(f'local-dir:{small_clip}')}", commands)
    for seed, name in enumerate(("red", "a", "b", "c")):
        draw_photo(tmp_path / f"mugs/{name}.jpg", "mug", "on sand", seed)
    done = run_commands(tmp_path, commands)
    assert done.returncode == 0, done.stderr
    assert done.stderr == WALK_NOTES
    folder = results(tmp_path, "sum", "mugs")
    (row,) = read_table(folder / "mAP_table.csv")
    assert all(0 <= float(row[name]) <= 100 for name in ("mAP", "R@1", "R@5", "R@10"))
    assert row["queries"] == "2"
    assert (folder / "report/index.html").exists()
    flags = ("--dataset", "mugs", "--method", "basic", "--use_preset")
    done = run(tmp_path, "run_retrieval.py", small_clip, *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    commands = re.findall(r"python3 create_features\.py [^;()]*", done.stderr)
    kinds = [re.search(r"--dataset (\w+) --backbone (\S+)", own).groups() for own in commands]
    backbone = f"local-dir:{small_clip}"
    assert sorted(set(kinds)) == [(n, backbone) for n in ("corpus", "mean", "synthetic")]
    rows = "".join(f"{name}.jpg,a mug\n" for name in ("red", "a", "b", "c"))
    (tmp_path / "captions.csv").write_text(rows)
    given = {"PATH": "mugs", "DIR": "mugs", "FILE": "captions.csv"}
    for command in dict.fromkeys(commands):
        done = run_commands(tmp_path, re.sub("PATH|DIR|FILE", lambda word: given[word[0]], command))
        assert done.returncode == 0, done.stderr
    done = run(tmp_path, "run_retrieval.py", small_clip, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == WALK_NOTES + BASIC_NOTES
    (row,) = read_table(results(tmp_path, "basic", "mugs") / "mAP_table.csv")
    assert (row["method"], row["queries"]) == ("basic", "2")
