"""NICO++'s size: run_retrieval.py against a plain program of the published code's structure.

    python3 tests/speed/bench_domains.py                    # 43,615 composed queries, 80,134 rows
    python3 tests/speed/bench_domains.py --only sum basic   # some methods: a few minutes each
    python3 tests/speed/bench_domains.py --gpu 0            # both on a GPU
    python3 tests/speed/bench_domains.py --scale 0.05       # a small world: does it all run?

Features are random, 768-d, counts of domains those of NICO++, of its 60 classes all about the same.
Both are whole processes, a method each, one after the other in one call; the last row is their sum.
The plain one does for every pair of domains a product of matrices and a full sort, looks up matches
for every rank, and loops over the positives in Python. It runs --pairs of the 30 pairs, those of
the largest source first, and its seconds are scaled to all queries, which is said (0: all of them).
With --gpu N both compute on that GPU; the plain one's loop over positives stays on the CPU.
Of FREEDOM, the features of its texts are on disk. The floor is what must be done: the products of
the distinct images with the gallery, for BASIC two, for FREEDOM more, and one pass over the scores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from baseline_semantic import EXPANSION_ROWS, EXPANSION_SLOPE, HARRIS_LAMBDA, Basic
from make_world import (
    CORPORA,
    Generator,
    WorldSpec,
    make_corpus,
    make_mean,
    make_synthetic,
    manifest_of,
    write_native_assets,
)

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
METHODS = {
    "image": [],
    "text": [],
    "sum": [],
    "product": ["--no-clamp"],
    "basic": ["--use_preset"],
    "freedom": [],
}
# Products as large as that of the images with the gallery, 1 where nothing is said. FREEDOM: of the
# images, of 43,615 fused queries, of the gallery, whose rows are proxies, with the words.
PRODUCTS = {"text": 0, "basic": 2, "freedom": 1 + 5 + 2.4}
WORDS, CORPUS = 20_931, "open_image_v7_class_names"
KAPPA, NI, MIU = 20, 7, 7


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
    make_assets(folder, texts, rng)
    places = [
        [key, own, texts.index(text)]
        for key, own, text in zip(task.queries.key, row, task.queries.text, strict=True)
    ]
    write_csv(target / "query.csv", ["key", "image_row", "text_row"], places)
    spec = WorldSpec(folder, dim=DIM)
    counts = {"query": len(task.queries), "database": len(task.gallery)}
    write_json(target / "manifest.json", manifest_of(spec, "dataset", "nico", counts))


def make_assets(folder: Path, texts: list[str], rng: np.random.Generator) -> None:
    """What BASIC and FREEDOM read beside the features; every word has its text with each domain."""
    spec, generator = WorldSpec(folder, dim=DIM), Generator(0, DIM)
    features = folder / "features" / "clip_features"
    for part in (features / "corpus", folder / "data/laion_mean", folder / "synthetic_data"):
        part.mkdir(parents=True)
    corpora = {name: make_corpus(generator, name) for name in CORPORA}
    corpora[CORPUS] = rng.standard_normal((WORDS, DIM), dtype=np.float32)
    assets = {
        "corpora": corpora,
        "mean": make_mean(generator),
        "synthetic": make_synthetic(generator),
    }
    write_native_assets(spec, features / "corpus", assets)
    words = (f"{CORPUS} {number} {text}" for number in range(WORDS) for text in texts)
    (features / "texts").mkdir()
    write_csv(features / "texts" / "texts.csv", ["text"], ([word] for word in words))
    values = rng.standard_normal((WORDS * len(texts), DIM), dtype=np.float32)
    np.save(features / "texts" / "texts.npy", values)
    model = manifest_of(spec, "dataset", "nico", {})["model"]
    write_json(features / "texts" / "manifest.json", {"kind": "texts", "model": model})


# ---------------------------------------------------------------------------------------------
# The plain program
# ---------------------------------------------------------------------------------------------


class Plain:
    """Scores (Q, N) of one pair of domains, written straight down."""

    def __init__(self, folder: Path, method: str, gallery) -> None:
        import torch

        self.gallery, self.method, self.device = gallery, method, gallery.device
        features = folder / "features" / "clip_features"
        read = {
            name: torch.from_numpy(np.load(features / "corpus" / f"{name}.npy"))
            for name in (*CORPORA, CORPUS)
        }
        self.words = torch.nn.functional.normalize(read[CORPUS]).to(self.device)
        self.texts = np.load(features / "texts" / "texts.npy", mmap_mode="r")
        if method == "basic":
            os.chdir(folder)
            self.basic = Basic(gallery.cpu())
            for name in ("image_mean", "text_mean", "rows", "projection"):
                setattr(self.basic, name, getattr(self.basic, name).to(self.device))

    def words_of(self, image):
        """FREEDOM's words of each image of a source, with their counts."""
        import torch

        found = torch.topk(image @ self.gallery.T, KAPPA)
        proxies = torch.cat([image[:, None], self.gallery[found.indices[:, :-1]]], dim=1)
        chosen = []
        for own in proxies:
            labels = torch.topk(own @ self.words.T, NI).indices.flatten().tolist()
            chosen.append(Counter(labels).most_common(MIU))
        return chosen

    def fused(self, words, domain: int):
        import torch

        rows = []
        for own in words:
            values = np.stack([self.texts[len(QUERIES) * word + domain] for word, _ in own])
            values = torch.from_numpy(values).to(self.device)
            weights = torch.tensor([count / own[0][1] for _, count in own], device=self.device)
            rows.append(weights @ torch.nn.functional.normalize(values))
        return torch.stack(rows)

    def basic_scores(self, image, text):
        import torch

        own, rows = self.basic, self.basic.rows
        image, text = image - own.image_mean, text - own.text_mean
        nearest = torch.topk(image @ own.projection @ rows.T, EXPANSION_ROWS)
        slots = torch.nn.functional.pad(nearest.values, (1, 0), value=1.0)
        weights = torch.exp(EXPANSION_SLOPE * slots)
        neighbours = torch.cat([image[:, None], rows[nearest.indices]], dim=1)
        expanded = ((weights / weights.sum(1, keepdim=True))[..., None] * neighbours).sum(1)
        a, b = own.lowest
        s_i = ((expanded @ own.projection @ rows.T - a) / a.abs()).clamp(min=0)
        s_t = ((text @ rows.T - b) / a.abs()).clamp(min=0)
        return s_i * s_t - HARRIS_LAMBDA * (s_i + s_t) ** 2

    def __call__(self, image, text, words, domain: int):

        if self.method == "image":
            return image @ self.gallery.T
        if self.method == "text":
            return text @ self.gallery.T
        if self.method == "freedom":
            return self.fused(words, domain) @ self.gallery.T
        if self.method == "basic":
            return self.basic_scores(image, text)
        by_image, by_text = image @ self.gallery.T, text @ self.gallery.T
        return by_image + by_text if self.method == "sum" else by_image * by_text


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


def run_plain(folder: Path, method: str, pairs: int, gpu: int) -> None:
    """One table, or some of its pairs; prints the seconds, scaled to all queries."""
    import torch

    device = torch.device("cpu" if gpu < 0 else f"cuda:{gpu}")
    target = folder / "features" / "clip_features" / "nico"
    task = load_task(target)
    labels = [note.rsplit(", ", 1) for note in task.gallery.note]
    number = {label: i for i, (label, _) in enumerate(labels)}
    rows_class = torch.tensor([number[label] for label, _ in labels], device=device)
    domain = {name: i for i, name in enumerate(dict.fromkeys(task.queries.text))}
    rows_domain = torch.tensor([domain[name] for _, name in labels], device=device)
    unit = torch.nn.functional.normalize
    arrays = {
        name: unit(torch.from_numpy(np.load(target / f"{name}.npy")).to(device))
        for name in ("query_image", "query_text", "database_image")
    }
    row = torch.tensor([int(key.partition("-")[0]) - 1 for key in task.queries.key])
    pair, source = (np.array(task.queries.tags[tag]) for tag in ("pair", "source"))
    largest = max(QUERIES, key=QUERIES.get)
    names = sorted(set(pair.tolist()), key=lambda name: not name.startswith(largest))
    score, words, once, done = Plain(folder, method, arrays["database_image"]), {}, 0.0, 0
    start = time.perf_counter()
    for name in names[: pairs or None]:
        own = np.flatnonzero(pair == name)
        kind = source[own[0]]
        if method == "freedom" and kind not in words:
            began = time.perf_counter()
            words[kind] = score.words_of(arrays["query_image"][row[own]])
            once += time.perf_counter() - began
        text = arrays["query_text"][[domain[task.queries.text[i]] for i in own]]
        image = arrays["query_image"][row[own]]
        target_domain = domain[task.queries.text[own[0]]]
        scores = score(image, text, words.get(kind), target_domain)
        ranks = torch.argsort(scores, descending=True)
        classes = torch.tensor([number[task.queries.tags["class"][i]] for i in own], device=device)
        same = (rows_class[ranks] == classes[:, None].expand_as(ranks)).float()
        there = (rows_domain[ranks] == target_domain).float()
        correct = same * there
        plain_ap(correct.cpu().numpy())
        for k in (50, 100):
            hits, total = correct[:, :k].sum(1), correct.sum(1)
            (hits / (total + 1e-5)).mean(), (hits / (total.clamp(max=k) + 1e-5)).mean()
        done += len(own)
    seconds = time.perf_counter() - start - once
    images = sum(np.count_nonzero(source == kind) for kind in words) / len(source) or 1.0
    print(seconds * len(pair) / done + once / images)


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def apart(work, *given):
    """work(*given) in a process of its own: a child reports a peak that starts at its parent's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def measure(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Wall seconds, peak resident MiB and the output of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output


def floor(folder: Path, gpu: int) -> tuple[float, float]:
    """Seconds of the products of the distinct images, and of one pass over all scores."""
    import torch

    device = torch.device("cpu" if gpu < 0 else f"cuda:{gpu}")
    target = folder / "features" / "clip_features" / "nico"
    gallery = torch.from_numpy(np.load(target / "database_image.npy")).to(device)
    images = torch.from_numpy(np.load(target / "query_image.npy")).to(device)
    queries, some = len(load_task(target).queries), images[:512]
    scores = some @ gallery.T
    scores.max().item()  # on a GPU, the end of all that was asked before
    start = time.perf_counter()
    torch.mm(some, gallery.T, out=scores)[0, 0].item()
    product = (time.perf_counter() - start) / len(some) * len(images)
    start = time.perf_counter()
    scores.max().item()
    return product, (time.perf_counter() - start) / len(scores) * queries


def compare(folder: Path, scale: float, pairs: int, methods: list[str], gpu: int) -> None:
    """Print the table: seconds and peak memory of both, their ratios, the ratio to the floor."""
    if not (folder / "features").exists():
        apart(make_world, folder, scale)
    program = [sys.executable, str(ROOT / "run_retrieval.py"), "--dataset", "nico"]
    program.append(f"--gpu={gpu}")
    product, one_pass = apart(floor, folder, gpu)
    total = np.zeros(2)
    columns = ("method", "here, s", "MiB", "plain, s", "MiB", "ratio", "of memory", "to the floor")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for method in methods:
        seconds, peak, _ = measure([*program, "--method", method, *METHODS[method]], folder)
        own = [sys.executable, __file__, "--plain", method, "--folder", str(folder)]
        _, other_peak, said = measure([*own, f"--pairs={pairs}", f"--gpu={gpu}"], folder)
        other, least = float(said), PRODUCTS.get(method, 1) * product + one_pass
        total += seconds, other
        cells = f"{seconds:.1f} | {peak:.0f} | {other:.1f} | {other_peak:.0f}"
        ratios = f"{other / seconds:.1f} | {peak / other_peak:.2f} | {seconds / least:.1f}"
        print(f"| {method} | {cells} | {ratios} |", flush=True)
    print(f"| each | {total[0]:.1f} | | {total[1]:.1f} | | {total[1] / total[0]:.1f} | | |")
    print(f"\nfloor: a product {product:.1f} s, a pass over the scores {one_pass:.1f} s")
    if pairs:
        print(f"plain: seconds of {pairs} of 30 pairs, scaled to all queries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--plain", choices=tuple(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the world is, or is made and left")
    parser.add_argument("--gpu", type=int, default=-1, help="CUDA device of both, -1 for the CPU")
    args = parser.parse_args()
    if args.plain:
        run_plain(args.folder, args.plain, args.pairs, args.gpu)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(
            (args.folder or Path(folder)).resolve(), args.scale, args.pairs, args.only, args.gpu
        )


if __name__ == "__main__":
    main()
