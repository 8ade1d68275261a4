#!/usr/bin/env python3
"""Time from a new query, and from a slider's move, to an answer of live search.

    python3 tests/speed/bench_live.py --rows 1000000 [--dtype float16] [--candidates N [--recall]]

Features of 768 dimensions in crowds, drawn once, and random assets; the encoder is left out, being
the backbone's. Each figure is the median of some runs, in milliseconds, with its parts; memory is
the process's largest resident set, and what of it is no mapped file. --recall tells instead how
many of the best 10 of all rows are among the best 10 of the candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")  # as search.py has it

import torch

from live.answers import describe_ranked
from live.gallery import LiveRows
from live.searcher import Searcher
from utils import UserError, write_csv, write_json
from utils_backbones import Places, backbone_folder
from utils_datasets import Dataset, ImageStore
from utils_storage import Features, MappedRows
from utils_task import Images, QueryTable, RowSets, Task, View, whole_gallery

DIM, RUNS, BACKBONE = 768, 9, "clip"
ASKED = 20  # questions of --recall
KNOBS = {"sum": "fusion_weight", "basic": "harris_lambda"}
products: list[float] = []  # seconds of each product of the latest question
CHUNK = 50_000
CROWDS, LATENT, NOISE = 5000, 64, 0.3  # rows lie in crowds in 64 dimensions, with noise in all
CORPORA = {"generic_subjects": 1803, "generic_styles": 1000}


def draw_features(draw: np.random.Generator, count: int) -> np.ndarray:
    """Rows of the one world that all are of: float32 (count, DIM)."""
    world = np.random.default_rng(7)
    centres = world.standard_normal((CROWDS, LATENT), np.float32)
    latent = centres[draw.integers(0, CROWDS, count)]
    latent += 0.5 * draw.standard_normal(latent.shape, np.float32)
    rows = latent @ world.standard_normal((LATENT, DIM), np.float32)
    return rows / LATENT**0.5 + NOISE * draw.standard_normal(rows.shape, np.float32)


def make_files(folder: Path, rows: int, dtype: str) -> Path:
    """Write the features and assets that are not there; gives the file of the rows."""
    draw = np.random.default_rng(0)
    file = folder / f"{rows}_{dtype}" / "database_image.npy"
    if not file.exists():
        file.parent.mkdir(parents=True)
        target = np.lib.format.open_memmap(file, "w+", dtype, (rows, DIM))
        for start in range(0, rows, CHUNK):
            part = target[start : start + CHUNK]
            part[:] = draw_features(draw, len(part))
        target.flush()
        write_json(file.with_name("manifest.json"), {"model": {}})
    corpora = folder / "features" / backbone_folder(BACKBONE) / "corpus"
    corpora.mkdir(parents=True, exist_ok=True)
    for name, count in CORPORA.items():
        np.save(corpora / f"{name}.npy", draw_features(draw, count))
        write_csv(corpora / f"{name}.csv", ["prompt"], ([f"{n}"] for n in range(count)))
        write_json(corpora / f"{name}.json", {})
    return file


def time_products() -> None:
    """Have the time of every product noted."""
    product = LiveRows.product

    def timed(self: LiveRows, vectors: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        found = product(self, vectors)
        products.append(time.perf_counter() - start)
        return found

    LiveRows.product = timed


def make_searcher(folder: Path, file: Path, candidates: int) -> Searcher:
    rows = MappedRows(file)
    task = Task(
        "bench",
        Images([f"{number:08d}.jpg" for number in range(rows.shape[0])]),
        QueryTable([], [], []),
        RowSets.of([]),
        whole_gallery(0),
        {"all": View(None)},
        (),
    )
    manifest = file.with_name("manifest.json")
    features = Features(BACKBONE, "bench", task, {}, {"image": rows}, manifest, {"model": {}})
    places = Places(folder / "features", folder / "data", folder / "synthetic")
    store = ImageStore(Dataset("bench", folder))
    words = UserError("no words here")
    device = torch.device("cpu")
    return Searcher(features, places, store, None, None, words, device, candidates)


def ask(searcher: Searcher, row: int, text: str, method: str, given: dict) -> dict[str, float]:
    """Milliseconds of one question, by part; of "method" and "columns" without their products."""
    products.clear()
    start = time.perf_counter()
    ranked = searcher.rank(searcher.of_gallery(row), text, method, given, 60)
    middle = time.perf_counter()
    content = json.dumps(describe_ranked(searcher, ranked))
    end = time.perf_counter()
    spent = {"products": sum(products), "answer": end - middle, "all": end - start}
    parts = {**ranked.seconds, **spent}
    parts["method"] -= spent["products"]
    parts = {name: 1000 * value for name, value in parts.items()}
    return parts | {"passes": len(products), "kB": len(content) / 1000}


def measure(name: str, times: list[dict[str, float]]) -> None:
    medians = {part: statistics.median(one[part] for one in times) for part in times[0]}
    print(f"{name:28}", "  ".join(f"{part} {value:.1f}" for part, value in medians.items()))


def measure_all(searcher: Searcher) -> None:
    for method, knob in KNOBS.items():
        changes = {
            "a new query": lambda n: (n, f"text {n}", {}),
            "a new text": lambda n: (1, f"text {RUNS + n}", {}),
            "a new image": lambda n: (RUNS + n, "text 0", {}),
            knob: lambda n, knob=knob: (1, "text 0", {knob: n / 50}),
        }
        for name, change in changes.items():
            searcher.gallery._kept.clear()
            searcher.gallery._nearest.clear()
            if searcher.candidates:
                searcher.candidates._kept.clear()
            row, text, given = change(0)  # assets are read, what is kept is there
            ask(searcher, row, text, method, given)
            asked = (change(number) for number in range(1, RUNS + 1))
            found = [ask(searcher, row, text, method, given) for row, text, given in asked]
            measure(f"{method}: {name}", found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    status = Path("/proc/self/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    print(f"memory: {peak:.2f} GB resident at most, {own / 1e6:.2f} GB of it no mapped file")


def tell_recall(searcher: Searcher, whole: Searcher) -> None:
    """How many of the best 10 rows of all are found, by column, on average and at least."""
    for method in KNOBS:
        shares: dict[str, list[float]] = {}
        for number in range(1, ASKED + 1):
            best = [
                one.rank(one.of_gallery(number), f"text {number}", method, {}, 10).columns
                for one in (searcher, whole)
            ]
            for name, column in best[1].items():
                same = {*column.rows} & {*best[0][name].rows}
                shares.setdefault(name, []).append(len(same) / 10)
        for name, own in shares.items():
            print(f"{method}: {name:9} recall {np.mean(own):.3f}, least {min(own):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/live_bench"))
    parser.add_argument(
        "--candidates", type=int, default=0, help="as search.py has it; 0: all rows"
    )
    parser.add_argument("--recall", action="store_true", help="of --candidates")
    parser.add_argument("--make", action="store_true", help="only write the files")
    args = parser.parse_args()
    file = make_files(args.folder, args.rows, args.dtype)
    if args.make:
        return
    time_products()
    start = time.perf_counter()
    searcher, draw = make_searcher(args.folder, file, args.candidates), np.random.default_rng(1)
    print(f"opened in {time.perf_counter() - start:.0f} s")
    others = [make_searcher(args.folder, file, 0)] if args.recall else []
    for number, vector in enumerate(draw_features(draw, max(4 * RUNS, ASKED + 1))):
        for one in (searcher, *others):
            one._texts.get_or(f"text {number}", partial(np.asarray, vector))
    print(f"{args.rows:,} rows of {args.dtype}, {torch.get_num_threads()} threads, milliseconds")
    if others:
        tell_recall(searcher, *others)
    else:
        measure_all(searcher)


if __name__ == "__main__":
    main()
