"""Ranks of positives: sorting a query's rows against comparing every positive with every row.

    python3 tests/speed/bench_ranks.py [--threads 1] [--repeats 3]

Prints milliseconds a query, by sorting and by comparing, for 1 to 2,000 positives among 4,000 to
80,000 rows, where positives score as other rows do (the hardest case: all rows are in play), and
where they score high; then NICO++'s size (230 positives of 80,134 rows, 100 queries) with scores
as they come, with high ones, with heavy ties and with scores cut off at 0. The faster one is bold:
`utils_metrics.positive_ranks` sorts on a CPU since comparing is nowhere faster. With one thread the
process's own time is taken, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils_metrics import ranks_by_comparing, ranks_by_sorting

ROWS = (4_000, 10_000, 20_000, 40_000, 80_000)
POSITIVES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_000, 2_000)
PAIRS_MEASURED = 40_000_000  # of one table cell: decides its number of queries
MOST_QUERIES = 200
HIGH = 3.0  # standard deviations by which positives score above other rows
NICO = (100, 80_134, 230)
LEVELS = 4  # distinct scores a standard deviation, where ties are heavy
PATHS = {"sorted": ranks_by_sorting, "compared": ranks_by_comparing}


def make_world(queries: int, rows: int, positives: int, high: float = 0.0) -> tuple:
    """Normal scores float32 (Q, N), and query and column of every positive, int64 (P,)."""
    generator = np.random.default_rng(rows + positives)
    scores = generator.standard_normal((queries, rows), dtype=np.float32)
    position = np.argpartition(generator.random((queries, rows)), positives - 1)[:, :positives]
    position.sort(1)
    query = np.repeat(np.arange(queries), positives)
    scores[query, position.ravel()] += np.float32(high)
    return tuple(map(torch.from_numpy, (scores, query, position.ravel())))


def measure_paths(world: tuple, repeats: int) -> dict[str, float]:
    """Milliseconds a query of each path: the least of the repeats, taken in turn."""
    scores, query, position = world
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = dict.fromkeys(PATHS, float("inf"))
    found = {}
    for _ in range(repeats):
        for path, find in PATHS.items():
            start = now()
            found[path] = find([scores], query, position, "row")
            seconds[path] = min(seconds[path], now() - start)
    for one, other in zip(*found.values(), strict=True):
        assert one.equal(other), "the two paths differ"
    return {path: 1_000 * value / len(scores) for path, value in seconds.items()}


def print_crossover(high: float, repeats: int) -> None:
    """One table: a line for each number of positives, a column for each number of rows."""
    print(f"\n### Positives {high:g} standard deviations high: {' / '.join(PATHS)}, ms a query\n")
    print("| positives |", *(f"{rows:,} rows |" for rows in ROWS))
    print("| ---: |", *("---: |" for _ in ROWS))
    for positives in POSITIVES:
        cells = []
        for rows in ROWS:
            queries = max(2, min(MOST_QUERIES, PAIRS_MEASURED // (rows * (positives + 10))))
            found = measure_paths(make_world(queries, rows, positives, high), repeats)
            least = min(found.values())
            shown = (f"**{v:.3f}**" if v == least else f"{v:.3f}" for v in found.values())
            cells.append(" / ".join(shown) + " |")
        print(f"| {positives:,} |", *cells, flush=True)


def print_nico(repeats: int) -> None:
    """NICO++'s size, with scores of several kinds."""
    kinds: dict[str, tuple[float, Callable]] = {
        "as they come": (0.0, lambda scores: scores),
        "positives high": (HIGH, lambda scores: scores),
        "heavy ties": (0.0, lambda scores: (LEVELS * scores).round()),
        "cut off at 0": (0.0, lambda scores: scores.clamp(min=0)),
    }
    queries, rows, positives = NICO
    print(f"\n### {queries} queries, {positives} positives of {rows:,} rows: ms a query\n")
    print("| scores | sorted | compared | ratio |\n| --- | ---: | ---: | ---: |")
    for name, (high, change) in kinds.items():
        scores, *index = make_world(*NICO, high)
        found = measure_paths((change(scores), *index), repeats)
        ratio = found["compared"] / found["sorted"]
        print(f"| {name} | {found['sorted']:.2f} | {found['compared']:.2f} | {ratio:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the sorting")
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many is shown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"numpy {np.__version__}, torch {torch.__version__}, {args.threads} thread(s)")
    for high in (0.0, HIGH):
        print_crossover(high, args.repeats)
    print_nico(args.repeats)


if __name__ == "__main__":
    main()
