"""Counting distractors: rows/s, as a share of the machine's own products, and memory.

    python3 tests/speed/bench_distractors.py make --rows 2000000
    python3 tests/speed/bench_distractors.py run --method product --rows 2000000
    python3 tests/speed/bench_distractors.py faiss --rows 500000      (pip install faiss-cpu)

`make` writes a world of i-CIR's queries with small galleries, and a pool of float16 rows like its
images, to --folder. `run` measures one method, in this process: the passes over the pool, from
files on disk (read before, as far as they fit), which are interrupted and continued every
--stretch units; and before and after each stretch the products of blocks of rows with all distinct
vectors that the pass compares them with, alone, as fast as they are with any of some sizes of
blocks. So both see the same machine, however its speed drifts. The share is the time that the
products take, of the time that the passes take. It may be started by torchrun, with --stretch 0.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from make_world import WorldSpec, make_world

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils_ranks import Group  # noqa: E402

BLOCK = 1 << 16
BLOCKS = {  # of rows, of products that are timed alone
    "cpu": (1024, 2048, 4096),
    "cuda": (1 << 13, 1 << 15, 1 << 17),
}
REPEATS = 7
METHODS = {
    "image": ("image",),
    "text": ("text",),
    "product": ("product",),
    "basic": ("basic", "--use_preset"),
    "basic_no_expansion": ("basic", "--use_preset", "--no-do_query_expansion"),
    "weicom": ("weicom",),
}


def make(folder: Path, rows: int) -> None:
    """The world, and rows that are gallery rows with as much noise."""
    shutil.rmtree(folder, ignore_errors=True)
    make_world(WorldSpec(folder, rows=(951, 2000)))
    (database,) = folder.rglob("database_image.npy")
    gallery = np.load(database)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    pool = np.lib.format.open_memmap(
        folder / "pool.npy", "w+", np.float16, (rows, gallery.shape[1])
    )
    random = np.random.default_rng(0)
    noise = random.normal(0, gallery.shape[1] ** -0.5, (BLOCK, gallery.shape[1])).astype(np.float32)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        own = gallery[random.integers(len(gallery), size=count)]
        own += 0.8 * noise[random.permutation(BLOCK)[:count]]
        pool[start : start + count] = own / np.linalg.norm(own, axis=1, keepdims=True)
    pool.flush()


def run(folder: Path, name: str, rows: int, at_once: int | None, gpu: int, stretch: int) -> None:
    import resource

    import distractors.pool
    import distractors.running as running
    import run_retrieval
    from distractors.flags import adding, asked_for
    from utils import select_device
    from utils_assets import load_assets
    from utils_backbones import Places
    from utils_storage import load_features

    method, *flags = METHODS[name]
    places = [f"--{part}_dir={folder / part}" for part in ("features", "data", "results")]
    command = [*places, "--method", method, *flags, "--gpu", str(gpu)]
    if method == "basic":
        command += ["--path_to_synthetic_data", str(folder / "synthetic_data")]
    command += ["--distractors", str(folder / "pool.npy"), "--distractors_limit", str(rows)]
    args = run_retrieval.build_parser().parse_args([*command, "--fresh"])
    plan = run_retrieval.plan_of(args, "icir")
    features = load_features(folder / "features", "clip", "icir")
    place = Places(folder / "features", folder / "data", args.path_to_synthetic_data)
    device = select_device(gpu)
    assets = load_assets(place, features, plan.runs, device)

    if at_once:
        distractors.pool.SCORES_OF_A_PART, distractors.pool.MOST_ROWS = 1 << 40, at_once
    passes = []
    inner = running.run_pass

    def timed(work, pool, group, **options):
        compared = getattr(work, "compared", None)
        vectors = [work.vectors] if compared is None else [*compared.vectors.values()]
        products, seconds = [sum(map(time_product, vectors))], []
        for some in stretches(len(pool.units()), stretch):
            start = time.perf_counter()
            found = inner(work, pool=pool, group=some or group, **options)
            seconds.append(time.perf_counter() - start)
            products.append(sum(map(time_product, vectors)))
        if stretch:
            found = inner(work, pool=pool, group=group, **options)  # what is kept, together
        of_row = np.convolve(products, (0.5, 0.5), "valid")
        shares = of_row * rows_of(pool, stretch) / seconds
        product = float(of_row @ rows_of(pool, stretch))
        passes.append((product, sum(seconds)))
        rate = 2 * sum(own.numel() for own in vectors) * rows / product / 1e9
        print(
            f"{type(work).__name__}: {sum(map(len, vectors))} vectors, {sum(seconds):.1f} s, of "
            f"which products {product:.1f} s ({rate:.0f} GFLOP/s); share in each of {len(shares)} "
            f"stretches {np.quantile(shares, (0, 0.25, 0.5, 0.75, 1)).round(2).tolist()}"
        )
        return found

    running.run_pass = timed
    with adding(asked_for(vars(args), True), args.results_dir) as (added,):
        judged = added.evaluate(features, plan.runs, assets, device, "row")
        (evaluation,) = judged.evaluations

    needed = sum(product for product, _ in passes)
    total = sum(seconds for _, seconds in passes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name}: {rows} rows, {total:.1f} s, {rows / total:.0f} rows/s, share of the products "
        f"{needed / total:.2f}, whole evaluation {evaluation.seconds:.1f} s, peak {peak:.0f} MB, "
        f"mAP {evaluation.columns['mAP']:.2f}"
    )


@dataclass(frozen=True)
class Some(Group):
    """A process alone that is dealt some of the units."""

    units: range

    def deal(self, units: int) -> Iterator[int]:
        yield from self.units


def stretches(units: int, stretch: int) -> list[Some | None]:
    """So many units each; None: all at once, as they are dealt."""
    if not stretch:
        return [None]
    starts = range(0, units, stretch)
    return [Some(range(start, min(start + stretch, units))) for start in starts]


def rows_of(pool, stretch: int) -> np.ndarray:
    """The rows of each stretch."""
    rows = np.array(list(map(len, pool.units())))
    return np.add.reduceat(rows, range(0, len(rows), stretch or len(rows)))


def time_product(vectors) -> float:
    """Seconds that a row's products with the vectors take, with the best size of blocks."""
    import torch

    found = []
    for size in BLOCKS[vectors.device.type]:
        block = torch.randn(size, vectors.shape[1], device=vectors.device)
        out = torch.empty(len(vectors), size, device=vectors.device)
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch.mm(vectors, block.T, out=out)
            if vectors.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        found.append(statistics.median(taken) / size)
    return min(found)


def search(folder: Path, rows: int, vectors: int, k: int) -> None:
    """The same rows by faiss: an exact search for the k best, one inner product a query."""
    import faiss

    pool = np.load(folder / "pool.npy", mmap_mode="r")[:rows]
    index = faiss.IndexFlatIP(pool.shape[1])
    start = time.perf_counter()
    for first in range(0, rows, BLOCK):
        index.add(pool[first : first + BLOCK].astype(np.float32))
    filled = time.perf_counter()
    queries = np.random.default_rng(0).normal(size=(vectors, pool.shape[1])).astype(np.float32)
    index.search(queries, k)
    found = time.perf_counter()
    print(
        f"faiss IndexFlatIP: {rows} rows, {vectors} vectors, k {k}: filled in {filled - start:.1f} "
        f"s, searched in {found - filled:.1f} s, {rows / (found - start):.0f} rows/s with both"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "run", "faiss"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_distractors"))
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--gpu", type=int, default=-1, help="CUDA device, -1 for the CPU")
    parser.add_argument("--at_once", type=int, help="rows scored together")
    parser.add_argument("--stretch", type=int, default=4, help="units, 0: the whole at once")
    parser.add_argument("--vectors", type=int, default=1082, help="faiss: queries")
    parser.add_argument("--k", type=int, default=100, help="faiss: rows that are returned")
    parser.add_argument("--method", choices=METHODS, default="product")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.rows)
    elif args.what == "faiss":
        search(args.folder, args.rows, args.vectors, args.k)
    else:
        run(args.folder, args.method, args.rows, args.at_once, args.gpu, args.stretch)


if __name__ == "__main__":
    main()
