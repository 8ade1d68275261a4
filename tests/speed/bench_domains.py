"""NICO++'s size: run_retrieval.py against a plain program of the published code's structure.

    python3 tests/speed/bench_domains.py                # 43,615 composed queries, 80,134 rows
    python3 tests/speed/bench_domains.py --scale 0.05   # a small world: does it all run?

Features are random, 768-d, counts of domains those of NICO++, of its 60 classes all about the same.
Both are whole processes, a method each, one after the other in one call. The plain one does for
every pair of domains a product of matrices and a full sort, looks up matches for every rank, and
loops over the positives in Python. --pairs N runs N of its 30 pairs and scales the seconds, which
is said. The floor is what must be done: the products of the distinct images with the gallery, and
one pass over the scores of every method.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.domains import read
from utils import write_csv, write_json
from utils_task import load_task, save_task

ROOT = Path(__file__).resolve().parents[2]
QUERIES = {
    "grass": 2006,
    "water": 1897,
    "outdoor": 1637,
    "dim": 1221,
    "rock": 1079,
    "autumn": 883,
}
GALLERY = {
    "grass": 18_321,
    "water": 17_305,
    "outdoor": 15_044,
    "dim": 11_268,
    "rock": 9_985,
    "autumn": 8_211,
}
CLASSES, DIM = 60, 768
METHODS = {"image": [], "text": [], "sum": [], "product": ["--no-clamp"]}


def make_world(folder: Path, scale: float) -> None:
    """Lists and random features of NICO++'s counts, times scale."""
    rng, data = np.random.default_rng(0), folder / "data" / "nico"
    data.mkdir(parents=True)
    for file, counts in (("query_files.csv", QUERIES), ("database_files.csv", GALLERY)):
        rows = [
            f"nico/{domain}/c{i % CLASSES:02d}/{file[0]}{i}.jpg {domain} c{i % CLASSES:02d}"
            for domain, count in counts.items()
            for i in range(max(CLASSES, int(count * scale)))
        ]
        (data / file).write_text("\n".join(rows))
    task = read(data, "nico")
    target = folder / "features" / "clip_features" / "nico"
    target.mkdir(parents=True)
    save_task(task, target)
    texts = list(dict.fromkeys(task.queries.text))
    row = [int(key.partition("-")[0]) - 1 for key in task.queries.key]
    for name, count in (
        ("query_image", 1 + max(row)),
        ("query_text", len(texts)),
        ("query_context_text", len(texts)),
        ("database_image", len(task.gallery)),
    ):
        np.save(target / f"{name}.npy", rng.standard_normal((count, DIM), dtype=np.float32))
    places = [
        [key, own, texts.index(text)]
        for key, own, text in zip(task.queries.key, row, task.queries.text, strict=True)
    ]
    write_csv(target / "query.csv", ["key", "image_row", "text_row"], places)
    write_json(target / "manifest.json", {"model": {"name": "random"}, "sources": {}})


# ---------------------------------------------------------------------------------------------
# The plain program
# ---------------------------------------------------------------------------------------------


def plain_scores(method: str, image, text, gallery):
    """The scores of one pair of domains, (Q, N)."""
    if method == "image":
        return image @ gallery.T
    if method == "text":
        return text @ gallery.T
    by_image, by_text = image @ gallery.T, text @ gallery.T
    return by_image + by_text if method == "sum" else by_image * by_text


def plain_ap(matches: np.ndarray) -> list[float]:
    """AP of every query, from its matches in the order of the ranks."""
    found = []
    for row in matches:
        ranks, ap = np.where(row != 0)[0], 0.0
        for j, rank in enumerate(ranks):
            before = 1.0 if rank == 0 else j / rank
            ap += (before + (j + 1) / (rank + 1)) / 2 / (len(ranks) + 1e-5)
        found.append(ap)
    return found


def run_plain(folder: Path, method: str, pairs: int) -> None:
    """One table, or its first pairs; prints the share of the queries and the seconds."""
    import torch

    target = folder / "features" / "clip_features" / "nico"
    task = load_task(target)
    labels = [note.rsplit(", ", 1) for note in task.gallery.note]
    kind = {label: i for i, (label, _) in enumerate(labels)}
    rows_class = torch.tensor([kind[label] for label, _ in labels])
    domain = {name: i for i, name in enumerate(dict.fromkeys(task.queries.text))}
    rows_domain = torch.tensor([domain[name] for _, name in labels])
    unit = torch.nn.functional.normalize
    arrays = {
        name: unit(torch.from_numpy(np.load(target / f"{name}.npy")))
        for name in ("query_image", "query_text", "database_image")
    }
    row = torch.tensor([int(key.partition("-")[0]) - 1 for key in task.queries.key])
    pair = np.array(task.queries.tags["pair"])
    names = list(dict.fromkeys(pair.tolist()))[: pairs or None]
    start, done = time.perf_counter(), 0
    for name in names:
        own = np.flatnonzero(pair == name)
        text = arrays["query_text"][[domain[task.queries.text[i]] for i in own]]
        image = arrays["query_image"][row[own]]
        scores = plain_scores(method, image, text, arrays["database_image"])
        ranks = torch.argsort(scores, descending=True)
        classes = torch.tensor([kind[task.queries.tags["class"][i]] for i in own])
        same = (rows_class[ranks] == classes[:, None].expand_as(ranks)).float()
        there = (rows_domain[ranks] == domain[task.queries.text[own[0]]]).float()
        correct = same * there
        plain_ap(correct.numpy())
        for k in (50, 100):
            hits, total = correct[:, :k].sum(1), correct.sum(1)
            (hits / (total + 1e-5)).mean(), (hits / (total.clamp(max=k) + 1e-5)).mean()
        done += len(own)
    print(done / len(pair), time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def measure(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Wall seconds, peak resident MiB and the output of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output


def floor(folder: Path) -> float:
    """Seconds of the products of distinct images and texts, and of one pass over all scores."""
    import torch

    target = folder / "features" / "clip_features" / "nico"
    gallery = torch.from_numpy(np.load(target / "database_image.npy"))
    images = torch.from_numpy(np.load(target / "query_image.npy"))
    queries = len(load_task(target).queries)
    start = time.perf_counter()
    for part in images.split(64):
        scores = part @ gallery.T
    product = time.perf_counter() - start
    start = time.perf_counter()
    scores.max()
    one_pass = (time.perf_counter() - start) / len(scores) * queries
    return product + len(METHODS) * one_pass


def compare(folder: Path, scale: float, pairs: int) -> None:
    """Print the table: seconds and peak memory of both, their ratios, the ratio to the floor."""
    make_world(folder, scale)
    program = [sys.executable, str(ROOT / "run_retrieval.py"), "--dataset", "nico", "--gpu=-1"]
    ours = plain = ours_peak = plain_peak = 0.0
    print("| method | here, s | MiB | plain, s | MiB | ratio |\n|---|---|---|---|---|---|")
    for method, flags in METHODS.items():
        seconds, peak, _ = measure([*program, "--method", method, *flags], folder)
        own = [sys.executable, __file__, "--plain", method, "--folder", str(folder)]
        _, other_peak, said = measure([*own, "--pairs", str(pairs)], folder)
        share, other = map(float, said.split())
        ours, plain = ours + seconds, plain + other / share
        ours_peak, plain_peak = max(ours_peak, peak), max(plain_peak, other_peak)
        cells = f"{seconds:.1f} | {peak:.0f} | {other / share:.1f} | {other_peak:.0f}"
        print(f"| {method} | {cells} | {other / share / seconds:.1f} |", flush=True)
    print(f"| all | {ours:.1f} | {ours_peak:.0f} | {plain:.1f} | {plain_peak:.0f} | ", end="")
    print(f"{plain / ours:.1f} |\nfloor: {floor(folder):.1f} s")
    if pairs:
        print(f"plain: seconds of {pairs} of 30 pairs, scaled to all queries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--plain", choices=tuple(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        run_plain(args.folder, args.plain, args.pairs)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args.scale, args.pairs)


if __name__ == "__main__":
    main()
