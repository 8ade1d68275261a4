"""Helpers of the tests: a drawn data set with features made to order, and a report's own data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import semantic_files
from extraction_world import draw_image
from PIL import Image, ImageDraw
from semantic_world import save_features

from benchmarks import list_benchmarks
from utils import write_csv
from utils_datasets import Dataset, ImageStore
from utils_task import (
    Column,
    Group,
    Images,
    Mean,
    QueryTable,
    SetBuilder,
    Task,
    View,
    save_task,
    whole_gallery,
)

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>&amp;\u2028"
)
INSTANCES = ("mug", "<b>clock</b>", "teddy bear")
TEXTS = ("at night", HOSTILE, "in the snow, seen from above")
NEGATIVES = ("on a beach", "")  # texts of hard negatives, which no query asks
UNANSWERED = "underwater"  # the text of a query that has no positives
STYLES = (*TEXTS, *NEGATIVES, UNANSWERED)
COLORS = {"mug": "#c03020", "<b>clock</b>": "#2060c0", "teddy bear": "#a07030"}
GROUNDS = ("#202040", "#f0e0a0", "#e8f0ff", "#d0b080", "#909090", "#205070")
LOST = "world/database/mug/hn/lost & <i>gone</i>.png"


@dataclass(frozen=True)
class World:
    """folder holds data/world (annotations, images) and features/clip_features/world."""

    folder: Path
    queries: pandas.DataFrame
    database: pandas.DataFrame

    @property
    def data(self) -> Path:
        return self.folder / "data" / "world"

    def flags(self) -> list[str]:
        """The flags that point run_retrieval.py at this world; results go beside it."""
        places = {"features_dir": "features", "data_dir": "data", "results_dir": "results"}
        flags = [text for name, at in places.items() for text in (f"--{name}", self.folder / at)]
        return [*map(str, flags), "--dataset", "world", "--backbone", "clip", "--gpu", "-1"]


def make_world(folder: Path, seed: int = 0) -> World:
    """Draw a data set of three instances and write its features; one image is left out (LOST)."""
    generator = np.random.default_rng(seed)
    queries, database = [], []
    for instance in INSTANCES:
        stem = re.sub("[^a-z]", "", instance)
        queries += [
            (f"world/query/{stem}/{n}.png", text, instance) for n in range(2) for text in TEXTS
        ]
        for style, text in enumerate((*TEXTS, *NEGATIVES)):
            for n in range(4):
                database.append((f"world/database/{stem}/{style}_{n}.png", text, instance))
    queries.append(("world/query/mug/0.png", UNANSWERED, "mug"))
    database.append((LOST, "", "mug"))
    world = World(folder, _table(queries), _table(database))
    _draw_images(world, generator)
    _write_features(world, generator)
    return world


def evaluate_world(world: World, methods: Sequence[str], top_k: int, dataset: str = "world"):
    """Evaluations of methods, at their defaults, over a world's features."""
    import torch

    from methods import find_method
    from utils_evaluation import evaluate
    from utils_retrieval import Assets
    from utils_runs import Run
    from utils_storage import load_features

    features = load_features(world.folder / "features", "clip", dataset)
    found = [find_method(name) for name in methods]
    runs = [Run(method, method.parameters(), method.name) for method in found]
    tops = {features.task.main_view: top_k}
    return evaluate(features, runs, Assets(), torch.device("cpu"), tops=tops, explain=True)


def make_rooms(folder: Path, seed: int = 0) -> World:
    """A task of no benchmark, "rooms": boxes, queries of two images, views, tags, left-out rows."""
    generator = np.random.default_rng(seed)
    gallery, images = [f"db/{n}.png" for n in range(12)], [f"q/{n}.png" for n in range(4)]
    for path in (*gallery, *images):
        picture = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(_made(folder / "data" / "rooms" / path))
    box = np.zeros((12, 4), np.int64)
    box[3] = (4, 4, 20, 20)
    sets = SetBuilder()
    positives = [sets(rows) for rows in ((1, 2), (3,), (4, 5, 6), ())]
    excluded = [sets(rows) for rows in ((), (), (0,), (7, 8))]
    targets = [sets(rows) for rows in ((1,), (3,), (4,), ())]
    candidates = [sets(range(6))] * 4
    related = [sets(rows) for rows in ((3, 4), (), (4, 7), ())]
    columns = (
        Column("mAP@5", "AP-S@5"),
        Column("R@1 subset", "Hit@1", "subset"),
        Column("kitchen", "Recall@5", groups=(Group("room", only="kitchen"),)),
        Column("rooms", "AP-S@5", groups=(Group("room", digits=2),)),
        Column("aspects", "AP-S@5", groups=(Group("aspect"),)),
    )
    task = Task(
        name="rooms",
        gallery=Images(gallery, box=box),
        queries=QueryTable(
            key=["a", "b", "c", "d"],
            images=[(images[0],), (images[1], images[2]), ("db/0.png",), (images[3],)],
            text=["with a lamp", "in $blue$", "larger", "without a rug"],
            tags={
                "room": ["kitchen", "bath", "kitchen", "bath"],
                "aspect": [("color", "size"), ("color",), (), ("size",)],
            },
        ),
        sets=sets.done(),
        pool=whole_gallery(4),
        views={
            "all": View(np.array(positives), np.array(excluded)),
            "subset": View(np.array(targets), candidates=np.array(candidates)),
        },
        columns=columns,
        means=(Mean("mean", ("mAP@5", "R@1 subset")),),
        related=np.array(related),
        notes=("References are <left> out.",),
    )
    features = folder / "features" / "clip_features" / "rooms"
    save_task(task, _made(features / "task.json").parent)
    rows = [["a", "0", "0"], ["b", "1 2", "1"], ["c", "3", "2"], ["d", "4", "3"]]
    write_csv(features / "query.csv", ["key", "image_row", "text_row"], rows)
    for name, count in (("database_image", 12), ("query_image", 5), ("query_text", 4)):
        np.save(features / f"{name}.npy", generator.normal(size=(count, 8)).astype(np.float32))
    (features / "manifest.json").write_text(json.dumps({"model": {"model": "some-model"}}))
    return World(folder, pandas.DataFrame(), pandas.DataFrame())


def make_semantic(folder: Path, name: str) -> tuple[World, ImageStore]:
    """One of the semantic benchmarks, small, with drawn images and drawn features."""
    benchmark, random = list_benchmarks()[name], np.random.default_rng(0)
    root = folder / "data" / benchmark.folder.get(name, name)
    semantic_files.write(root, getattr(semantic_files, root.name)())
    task = benchmark.tasks[name](root)
    paths = [*task.gallery.path, *(path for own in task.queries.images for path in own)]
    for number, path in enumerate(dict.fromkeys(paths)):
        draw_image(number, (160, 120)).save(_made(benchmark.locate(root, path)))
    sizes = (len(task.gallery), len(task.queries), len(task.queries))
    rows = (random.normal(size=(size, 16)) for size in sizes)
    save_features(folder / "features/clip_features" / name, task, *rows)
    empty = pandas.DataFrame()
    return World(folder, empty, empty), ImageStore(Dataset(name, root), benchmark.locate)


def page_data(index: Path) -> dict:
    """The data inside a written page."""
    page = index.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script', page)[1]
    )


def _table(rows: list[tuple[str, str, str]]) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=["image_path", "text", "instance"])


def _draw_images(world: World, generator: np.random.Generator) -> None:
    for split, table in (("query", world.queries), ("database", world.database)):
        rows = table.itertuples(index=False)
        table.to_csv(_made(world.data / f"{split}_files.csv"), header=False, index=False)
        for path, text, instance in rows:
            if path == LOST:
                continue
            image = Image.new("RGB", (64, 48), GROUNDS[STYLES.index(text)])
            x, y = generator.integers(4, 30, size=2)
            ImageDraw.Draw(image).ellipse([x, y, x + 20, y + 16], fill=COLORS[instance])
            image.save(_made(world.folder / "data" / path))


def _write_features(world: World, generator: np.random.Generator) -> None:
    """Objects and styles as one-hot halves of a vector, under noise that makes rankings fail."""
    folder = world.folder / "features" / "clip_features" / "world"
    tables = {"query": world.queries, "database": world.database}
    for split, table in tables.items():
        table.to_csv(_made(folder / f"{split}.csv"), index=False)
        objects = np.eye(len(INSTANCES))[[INSTANCES.index(name) for name in table["instance"]]]
        styles = np.eye(len(STYLES))[[STYLES.index(text) for text in table["text"]]]
        shown = 0.6 * styles if split == "database" else 0 * styles
        image = np.hstack([objects, shown])
        image = image + 0.45 * generator.normal(size=image.shape)
        np.save(folder / f"{split}_image.npy", image.astype(np.float32))
        if split == "query":
            text = np.hstack([0 * objects, styles])
            np.save(folder / "query_text.npy", text.astype(np.float32))
    manifest = {"model": {"model": "some-model"}, "name": "world", "backbone": "clip"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
