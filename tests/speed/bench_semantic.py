"""Measure `run_retrieval.py --method all` on CIRCO's and CIRR's sizes against a plain one.

Run by hand, with nothing else on the machine; everything is made, measured and removed in one call
(1 GB of disk, 3 GB of memory, an hour on two cores, nearly all of it the plain implementation's):

    python3 tests/speed/bench_semantic.py --output results/semantic.md
    python3 tests/speed/bench_semantic.py --quick      # small worlds: does it all run?

Whole processes are measured, features on disk (in the page cache) to tables on disk; ours is the
median of a few, the plain one is measured once, for the same methods, and its figures are compared.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench_retrieval import (
    HERE,
    ROOT,
    Line,
    Measured,
    Setting,
    as_markdown,
    describe_machine,
    measure_process,
    mebibytes,
    read_table,
    repeat,
    seconds,
    write_output,
)
from semantic_world import FRACTION, SIZES

ASKED = {"circo": ">= 10", "cirr": ""}
METHODS = ("image", "text", "sum", "product", "basic")  # that the plain implementation has
SAME = 0.005  # percent: how far a figure of the table, which has two decimals, may be off


def run_ours(setting: Setting, world: Path, name: str) -> Measured:
    """All methods on a world, as one process."""
    shutil.rmtree(world / "results", ignore_errors=True)
    flags = ("--dataset", name, "--method", "all", "--use_preset", "--gpu", "-1")
    return measure_process(setting, (sys.executable, ROOT / "run_retrieval.py", *flags), world)


def run_plain(setting: Setting, world: Path, name: str, sample: int) -> Measured:
    """The plain implementation on the same world; of a sample of queries, scaled to all."""
    command = (sys.executable, HERE / "baseline_semantic.py", name, *METHODS, "--sample", sample)
    measured = measure_process(setting, command, world)
    rows = read_table(world / "results_baseline/table.csv")
    left = sum(float(row["seconds_left"]) for row in rows)
    return replace(measured, wall=measured.wall + left)


def largest_difference(world: Path, name: str) -> float:
    """The largest difference between two figures of both tables, in percent."""
    plain = {row.pop("method"): row for row in read_table(world / "results_baseline/table.csv")}
    ours = {row["method"]: row for row in read_table(world / f"results/{name}/all/mAP_table.csv")}
    return max(
        abs(float(ours[method][column]) - float(value))
        for method, row in plain.items()
        for column, value in row.items()
        if not column.startswith("seconds")
    )


def measure_world(setting: Setting, name: str, fraction: int, sample: int) -> list[Line]:
    """One benchmark: both implementations, their time, memory and, of all queries, agreement."""
    print(f"making {name}", file=sys.stderr, flush=True)
    world = setting.folder / name
    command = (HERE / "semantic_world.py", world, name, "--fraction", fraction)
    subprocess.run([sys.executable, *map(str, command)], check=True)
    queries, images = (size // fraction for size in SIZES[name])
    ours = repeat(setting.runs, partial(run_ours, setting, world, name))
    methods = [row["method"] for row in read_table(world / f"results/{name}/all/mAP_table.csv")]
    print(f"measuring {name}, the plain implementation", file=sys.stderr, flush=True)
    plain = run_plain(setting, world, name, sample)
    difference = float("nan") if sample else largest_difference(world, name)
    if not setting.keep:
        shutil.rmtree(world)
    size = f"{name}: {queries:,} queries, {images:,} images"
    size += f"; of {sample} queries, scaled to all" if sample else ""
    return [
        Line(f"{size}; plain, {len(METHODS)} methods", seconds(plain.wall), runs=1),
        Line(
            f"{name}: run_retrieval --method all, {len(methods)} methods",
            seconds(ours.wall),
            plain.wall / ours.wall,
            "plain / ours",
            ASKED[name],
            ours.runs,
        ),
        Line(
            f"{name}: peak memory",
            f"{mebibytes(ours.peak)} ({mebibytes(ours.private)} private)",
            ours.peak / plain.peak,
            "ours / plain",
        ),
        Line(
            f"{name}: largest difference of a figure",
            f"{difference:.4f} %",
            asked=f"<= {SAME} %",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, nargs="+", default=[], help="files: .md, .csv")
    parser.add_argument("--folder", type=Path, help="where worlds are made (default: a temporary)")
    parser.add_argument("--keep", action="store_true", help="leave the worlds in --folder")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of ours (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="of every process (default: 2)")
    parser.add_argument("--only", choices=SIZES, help="one of the two")
    parser.add_argument("--sample", type=int, default=0, help="queries the plain one does, scaled")
    parser.add_argument("--quick", action="store_true", help="small worlds, one run of each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_semantic_") as temporary:
        setting = Setting(
            folder=(options.folder or Path(temporary)).resolve(),
            world=(),
            threads=options.threads,
            runs=1 if options.quick else options.runs,
            baseline_runs=1,
            keep=options.keep,
        )
        machine = describe_machine(setting)
        names = (options.only,) if options.only else SIZES
        fraction = FRACTION if options.quick else 1
        sizes = (fraction, options.sample)
        lines = [line for name in names for line in measure_world(setting, name, *sizes)]
    print(as_markdown(lines, machine))
    for path in options.output:
        write_output(path, lines, machine)


if __name__ == "__main__":
    main()
