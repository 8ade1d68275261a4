"""Measure run_retrieval.py against a plain implementation and against what the machine allows.

Run by hand, with nothing else on the machine; everything is made, measured and removed in one call
(about 14 GB of disk, 6 GB of memory, half an hour on two cores):

    python3 tests/speed/bench_retrieval.py --output results/bench.md results/bench.csv
    python3 tests/speed/bench_retrieval.py --quick      # a small world: does it all run?

Whole processes are measured, features on disk (in the page cache) to tables on disk, and figures
are medians. The retrieval part is the `seconds` column of mAP_table.csv: from tables and assets in
memory to the ranks. Its floor is one read of the features at the speed of memory and the three
matrix products of every instance at the speed of this machine's matrix products, on the same
threads. The peak memory is that of the resident set, mapped files included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ICIR = "features/clip_features/icir"
POLL_SECONDS = 0.02
WORLD = ("--dim", "768")
QUICK_WORLD = ("--dim", "96", "--instances", "12", "--rows", "100", "900")
BASIC = ("--method", "basic", "--use_preset")
LAMBDA_SWEEP = ("--sweep", "harris_lambda=0:0.19:0.01")
GRID_SWEEP = (
    "--sweep",
    "aa=0,0.1,0.2,0.3,0.4",
    "num_principal_components_for_projection=50,100,150,200,250",
)
# what run_retrieval.py imports before it can start, in its order, and how it ends
IMPORTS = """
from utils_startup import quick_exit, quick_imports
with quick_imports():
    import tqdm, utils_storage, torch, utils_evaluation, utils_tables
quick_exit()
"""
BANDWIDTH_BYTES = 1 << 30
FLOOR_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """One process, or the median of several.

    wall: s. retrieval: s, of the part between features and ranks. peak, private: MiB, the largest
    resident set, with mapped files and without. mean_ap: percent.
    """

    wall: float
    peak: float
    private: float
    retrieval: float = float("nan")
    mean_ap: float = float("nan")
    runs: int = 1


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure and, where it has one, its ratio and what was asked for."""

    what: str
    figure: str
    ratio: float | None = None
    ratio_of: str = ""
    asked: str = ""
    runs: int | None = None


@dataclass(frozen=True)
class Setting:
    """How to measure: where worlds lie, their size, threads of every process, repetitions."""

    folder: Path
    world: tuple[str, ...]
    threads: int
    runs: int
    baseline_runs: int
    keep: bool

    @property
    def environment(self) -> dict[str, str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return os.environ | dict.fromkeys(names, str(self.threads))


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def measure_process(setting: Setting, command: Iterable[object], folder: Path) -> Measured:
    """Run a command to its end in a folder. Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=setting.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        private, done = 0.0, 0
        try:
            while not done:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not done:
                    private = max(private, private_memory(process.pid))
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            process.kill()
            raise
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{process.args} failed:\n{output.read().decode()}")
    # ru_maxrss starts at the parent's own peak, so this process holds nothing large itself
    return Measured(wall=wall, peak=usage.ru_maxrss / 1024, private=private)


def private_memory(pid: int) -> float:
    """The resident memory of a process without mapped files, MiB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def median(results: list[Measured]) -> Measured:
    """The median of every figure."""
    names = ("wall", "peak", "private", "retrieval", "mean_ap")
    figures = {name: statistics.median(getattr(r, name) for r in results) for name in names}
    return Measured(**figures, runs=len(results))


def run_retrieval(setting: Setting, world: Path, *flags: str, gpu: int = -1) -> Measured:
    """run_retrieval.py on a world, tables written anew."""
    shutil.rmtree(world / "results", ignore_errors=True)
    command = [sys.executable, ROOT / "run_retrieval.py", *BASIC, "--gpu", gpu, *flags]
    measured = measure_process(setting, command, world)
    (table,) = (world / "results" / "icir").glob("*/mAP_table.csv")
    return with_results(measured, table)


def repeat(times: int, measure: Callable[[], Measured]) -> Measured:
    """The median of several measurements, after one that does not count (it fills the cache)."""
    return take_turns(times, measure)[0]


def take_turns(times: int, *measures: Callable[[], Measured]) -> list[Measured]:
    """repeat() of each of several, in turn: what slows the machine for a while slows them all."""
    rounds = [[measure() for measure in measures] for _ in range(times + 1)][1:]
    return [median(list(results)) for results in zip(*rounds, strict=True)]


def run_baseline(setting: Setting, world: Path) -> Measured:
    """The plain implementation on the same world, in the reference's pickles."""
    command = [sys.executable, HERE / "baseline.py", "--output", "results_baseline"]
    measured = measure_process(setting, command, world)
    return with_results(measured, world / "results_baseline" / "mAP_table.csv")


def with_results(measured: Measured, table: Path) -> Measured:
    """The same with the figures of the tables; mAP from the APs, where it is not rounded."""
    seconds_taken = float(read_table(table)[-1]["seconds"])
    aps = table.with_name("APs.csv")
    if not aps.exists():  # a sweep
        return replace(measured, retrieval=seconds_taken)
    mean_ap = 100 * statistics.fmean(float(row["AP"]) for row in read_table(aps))
    return replace(measured, retrieval=seconds_taken, mean_ap=mean_ap)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_world(setting: Setting, name: str, *flags: str) -> Path:
    """Make a world beside the others."""
    print(f"making the world {name}", file=sys.stderr, flush=True)
    folder = setting.folder / name
    command = [sys.executable, HERE / "make_world.py", folder, *setting.world, *flags]
    measure_process(setting, command, setting.folder)
    return folder


def remove(setting: Setting, world: Path) -> None:
    if not setting.keep:
        shutil.rmtree(world)


# ---------------------------------------------------------------------------------------------
# The floor
# ---------------------------------------------------------------------------------------------


def measure_floor(world: Path, threads: int) -> dict[str, float]:
    """Seconds of what cannot be avoided: reading the features once, and the matrix products.

    Memory is read by a sum over 1 GiB; the products are those of every instance (its queries
    against its rows, three times) with the rows already in the cache where they fit, as reading
    them has been counted. Of both the better of two ways: for the products one after the other, or
    as many at once as there are threads. `cached` is a plain copy of the file out of the page
    cache, which the floor leaves out.
    """
    import torch

    torch.set_num_threads(threads)
    sizes = {
        split: count_instances(world / ICIR / f"{split}.csv") for split in ("query", "database")
    }
    features = world / ICIR / "database_image.npy"
    dim = np.load(features, mmap_mode="r").shape[1]
    bandwidth = read_bandwidth(torch.ones(BANDWIDTH_BYTES // 4))
    pairs = [(count, sizes["database"][name]) for name, count in sizes["query"].items()]
    rows = torch.randn(max(size for _, size in pairs), dim)
    queries = torch.randn(max(count for count, _ in pairs), dim)

    def products(pair: tuple[int, int]) -> None:
        count, size = pair
        for _ in range(3):
            queries[:count] @ rows[:size].T

    in_turn = best_of(lambda: list(map(products, pairs)))
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        at_once = best_of(lambda: list(pool.map(products, pairs)))
    bytes_read = features.stat().st_size
    operations = sum(3 * 2 * count * size * dim for count, size in pairs)
    seconds = {
        "read": bytes_read / bandwidth,
        "products": min(in_turn, at_once),
        "cached": best_of(lambda: read_through(features)),
    }
    speed = {"bandwidth": bandwidth / 1e9, "flops": operations / seconds["products"] / 1e9}
    return seconds | speed | {"floor": seconds["read"] + seconds["products"]}


def read_bandwidth(memory) -> float:
    """Bytes a second at which a float32 tensor far larger than the caches is read."""
    readers = (lambda: memory.sum(), lambda: memory @ memory)
    return 4 * len(memory) / min(best_of(reader) for reader in readers)


def best_of(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few repetitions, after one that warms up."""
    work()
    times = []
    for _ in range(FLOOR_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def read_through(path: Path) -> None:
    """Read a file once through one small buffer."""
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def count_instances(path: Path) -> Counter:
    """Rows per instance of a table."""
    with open(path, newline="", encoding="utf-8") as file:
        return Counter(row[2] for row in csv.reader(file) if row[2] != "instance")


def floor_of(setting: Setting, world: Path) -> dict[str, float]:
    """measure_floor in a process of its own, so that this one stays small."""
    command = [sys.executable, __file__, "--measure_floor", world, "--threads", setting.threads]
    output = subprocess.run(
        [str(part) for part in command],
        env=setting.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(output.stdout)


# ---------------------------------------------------------------------------------------------
# The table's sections
# ---------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def mebibytes(value: float) -> str:
    return f"{value:.0f} MiB"


def compare_with_baseline(setting: Setting, world: Path) -> list[Line]:
    """Time, memory and agreement against the plain implementation.

    One after the other, not in turn: half a minute of the baseline with its 5 GB leaves caches
    behind that a user who runs ours again and again does not meet.
    """
    baseline = repeat(setting.baseline_runs, partial(run_baseline, setting, world))
    ours = repeat(setting.runs, partial(run_retrieval, setting, world))
    differences = ap_differences(
        world / "results/icir/basic/APs.csv", world / "results_baseline/APs.csv"
    )
    close = np.mean(differences <= 1e-6)
    return [
        Line("baseline, whole process", seconds(baseline.wall), runs=baseline.runs),
        Line(
            "run_retrieval, whole process",
            seconds(ours.wall),
            baseline.wall / ours.wall,
            "baseline / ours",
            ">= 10",
            ours.runs,
        ),
        Line("baseline, peak memory", mebibytes(baseline.peak), runs=baseline.runs),
        Line(
            "run_retrieval, peak memory",
            f"{mebibytes(ours.peak)} ({mebibytes(ours.private)} private)",
            ours.peak / baseline.peak,
            "ours / baseline",
            "<= 0.33",
            ours.runs,
        ),
        Line("baseline, mAP", f"{baseline.mean_ap:.2f}"),
        Line("run_retrieval, mAP", f"{ours.mean_ap:.2f}"),
        Line(
            "APs against the baseline",
            f"{100 * close:.2f} % within 1e-6, largest {differences.max():.1e}",
            asked=">= 99 %, <= 0.01",
        ),
    ]


def ap_differences(ours: Path, baseline: Path) -> np.ndarray:
    """|AP - AP| of every composed query; paths differ by the reference's prefix."""

    def values(path: Path) -> dict[tuple[str, str], float]:
        names = ("Image Query", "Text Query")
        rows = read_table(path)
        keys = [("/".join(row[names[0]].split("/")[-3:]), row[names[1]]) for row in rows]
        return dict(zip(keys, (float(row["AP"]) for row in rows), strict=True))

    left, right = values(ours), values(baseline)
    if left.keys() != right.keys():
        raise RuntimeError(f"{ours} and {baseline} hold different queries")
    return np.array([abs(left[key] - right[key]) for key in left])


def compare_with_floor(setting: Setting, world: Path) -> list[Line]:
    """Our run, the floor measured between its repetitions, and what start-up takes."""
    run_retrieval(setting, world)
    runs, floors = [], []
    for _ in range(setting.runs):
        floors.append(floor_of(setting, world))
        runs.append(run_retrieval(setting, world))
    ours = median(runs)
    floor = {name: statistics.median(f[name] for f in floors) for name in floors[0]}
    python = (sys.executable, "-c", IMPORTS)
    start = repeat(setting.runs, lambda: measure_process(setting, python, ROOT))
    script = (sys.executable, ROOT / "run_retrieval.py", "--help")
    help_text = repeat(setting.runs, lambda: measure_process(setting, script, ROOT))
    speeds = f"{floor['bandwidth']:.1f} GB/s, {floor['flops']:.0f} GFLOP/s"
    return [
        Line("floor: one read of the features", seconds(floor["read"]), runs=setting.runs),
        Line("floor: three products an instance", seconds(floor["products"]), runs=setting.runs),
        Line("floor", f"{seconds(floor['floor'])} ({speeds})", runs=setting.runs),
        Line(
            "retrieval part",
            seconds(ours.retrieval),
            ours.retrieval / floor["floor"],
            "ours / floor",
            "<= 2",
            ours.runs,
        ),
        Line(
            "features copied out of the page cache",
            seconds(floor["cached"]),
            runs=setting.runs,
        ),
        Line("start-up and imports", seconds(start.wall), runs=start.runs),
        Line("  their memory", mebibytes(start.peak), runs=start.runs),
        Line(
            "tables read, assets, tables written",
            seconds(ours.wall - ours.retrieval - start.wall),
            runs=ours.runs,
        ),
        Line("run_retrieval.py --help", seconds(help_text.wall), runs=help_text.runs),
    ]


def measure_sweeps(setting: Setting, world: Path) -> list[Line]:
    """Sweeps against one run, whole process, in turn."""
    lines = []
    sweeps = (("20 values of harris_lambda", LAMBDA_SWEEP, "<= 1.3"),)
    sweeps += (("5 x 5 of aa and components", GRID_SWEEP, "<= 4"),)
    flags = ((), *(flags for _, flags, _ in sweeps))
    run = partial(run_retrieval, setting, world)
    one, *measured = take_turns(setting.runs, *(partial(run, *each) for each in flags))
    for (name, _, asked), swept in zip(sweeps, measured, strict=True):
        figure = f"{seconds(swept.wall)} ({seconds(swept.retrieval)} retrieval)"
        ratio = swept.wall / one.wall
        lines.append(Line(f"sweep: {name}", figure, ratio, "sweep / one run", asked, swept.runs))
    return lines


def measure_growth(setting: Setting, world: Path) -> list[Line]:
    """Time and memory on worlds of two and four times the database rows, in turn with the one."""
    lines = []
    worlds = [("2x", "2", "instances"), ("4x", "4", "instances"), ("4x per instance", "4", "rows")]
    for name, scale, grow in worlds:
        larger = make_world(setting, f"grown_{scale}_{grow}", "--scale", scale, "--grow", grow)
        lines.append(growth_line(name, *compare_worlds(setting, larger, world)))
        remove(setting, larger)
    return lines


def compare_worlds(setting: Setting, other: Path, world: Path) -> list[Measured]:
    """A run on another world and one on the first, in turn."""
    runs = (partial(run_retrieval, setting, folder) for folder in (other, world))
    return take_turns(setting.runs, *runs)


def growth_line(name: str, grown: Measured, one: Measured) -> Line:
    memory = f"{mebibytes(grown.peak)} ({mebibytes(grown.private)} private)"
    return Line(
        f"rows {name}: retrieval part, process, memory",
        f"{seconds(grown.retrieval)}, {seconds(grown.wall)}, {memory}",
        grown.retrieval / one.retrieval,
        f"retrieval / 1x (process {grown.wall / one.wall:.2f}, memory {grown.peak / one.peak:.2f})",
        "linear, flat",
        grown.runs,
    )


def measure_variants(setting: Setting, world: Path) -> list[Line]:
    """The same features as float16, with scattered rows, and as pickles, in turn with the one."""
    lines = []
    for name, what, flags, asked in (
        ("half", "float16 on disk", ("--dtype", "float16"), "mAP within 0.02"),
        ("scattered", "rows of an instance scattered", ("--shuffle",), ""),
    ):
        other = make_world(setting, name, *flags)
        lines.append(variant_line(what, *compare_worlds(setting, other, world), asked))
        remove(setting, other)
    pickles = link_pickles(world, setting.folder / "pickles")
    lines.append(variant_line("the reference's pickles", *compare_worlds(setting, pickles, world)))
    remove(setting, pickles)
    return lines


def variant_line(what: str, measured: Measured, one: Measured, asked: str = "") -> Line:
    difference = f"mAP {measured.mean_ap - one.mean_ap:+.3f}"
    figure = f"{seconds(measured.retrieval)}, {seconds(measured.wall)}, {difference}"
    return Line(
        f"{what}: retrieval part, process, mAP",
        figure,
        measured.wall / one.wall,
        f"process / native (retrieval {measured.retrieval / one.retrieval:.2f})",
        asked,
        measured.runs,
    )


def link_pickles(world: Path, target: Path) -> Path:
    """A world that has only the reference's files of another one, as links."""
    for path in [*world.rglob("*.pkl"), *world.rglob("*.pkl.npy")]:
        link = target / path.relative_to(world)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    return target


def measure_cuda(setting: Setting, world: Path) -> list[Line]:
    """The same world on the first GPU, its loading included, where there is one."""
    found = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    if subprocess.run([sys.executable, "-c", found], check=False).returncode:
        return [Line("CUDA", "no GPU on this machine: not measured")]
    run = partial(run_retrieval, setting, world)
    one, measured, sweep = take_turns(
        setting.runs, run, partial(run, gpu=0), partial(run, *GRID_SWEEP, gpu=0)
    )
    difference = f"mAP {measured.mean_ap - one.mean_ap:+.3f}"
    figure = f"{seconds(measured.retrieval)}, {seconds(measured.wall)}, {difference}"
    return [
        Line(
            "CUDA: retrieval part with loading, process, mAP",
            figure,
            one.wall / measured.wall,
            f"CPU / CUDA process (retrieval {one.retrieval / measured.retrieval:.2f})",
            runs=measured.runs,
        ),
        Line(
            "CUDA sweep: 5 x 5 of aa and components",
            seconds(sweep.wall),
            sweep.wall / measured.wall,
            "sweep / one run",
            runs=sweep.runs,
        ),
    ]


# ---------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------


def measure_all(setting: Setting, sections: set[str]) -> tuple[str, list[Line]]:
    """The size of the world, and every section that was asked for, in order."""
    world = make_world(setting, "world", "--format", "both")
    parts = {
        "baseline": lambda: compare_with_baseline(setting, world),
        "floor": lambda: compare_with_floor(setting, world),
        "growth": lambda: measure_growth(setting, world),
        "sweeps": lambda: measure_sweeps(setting, world),
        "variants": lambda: measure_variants(setting, world),
        "cuda": lambda: measure_cuda(setting, world),
    }
    size, lines = describe_world(world), []
    for name, part in parts.items():
        if name in sections:
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            lines += (measured := part())
            for line in measured:  # a call that is cut short has shown what it had
                print("  " + "  ".join(filter(None, cells(line))), file=sys.stderr, flush=True)
    remove(setting, world)
    return size, lines


def describe_world(world: Path) -> str:
    manifest = json.loads((world / ICIR / "manifest.json").read_text(encoding="utf-8"))
    counts, dim = manifest["counts"], manifest["model"]["embed_dim"]
    instances = len(count_instances(world / ICIR / "query.csv"))
    return (
        f"{instances} instances, {counts['query']:,} queries, {counts['database']:,} database rows "
        f"of {dim} {manifest['save_dtype']}"
    )


SECTIONS = ("baseline", "floor", "growth", "sweeps", "variants", "cuda")


def describe_machine(setting: Setting) -> str:
    """What it was measured on, in a line."""
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = names[0].split(":")[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores ({setting.threads} threads used), {memory:.0f} GiB, load "
        f"{load:.1f} at the start; Python {platform.python_version()}, torch {version('torch')}, "
        f"numpy {np.__version__}"
    )


def format_ratio(line: Line) -> str:
    return "" if line.ratio is None else f"{line.ratio:.2f}"


HEADER = ("what", "figure", "ratio", "ratio of", "asked", "runs")


def cells(line: Line) -> tuple[str, ...]:
    runs = "" if line.runs is None else str(line.runs)
    return (line.what, line.figure, format_ratio(line), line.ratio_of, line.asked, runs)


def as_markdown(lines: list[Line], machine: str) -> str:
    """The table with its columns aligned, under a line about the machine."""
    rows = [HEADER, *(cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    rows.insert(1, tuple("-" * width for width in widths))
    padded = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
    return f"{machine}\n\n" + "\n".join(padded) + "\n"


def write_output(path: Path, lines: list[Line], machine: str) -> None:
    """Write the table as CSV or, under any other suffix, as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".csv":
        path.write_text(as_markdown(lines, machine), encoding="utf-8")
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([HEADER, *(cells(line) for line in lines)])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where worlds are made (default: a temporary)")
    parser.add_argument("--keep", action="store_true", help="leave the worlds in --folder")
    parser.add_argument("--output", type=Path, nargs="+", default=[], help="files: .md, .csv")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of ours (default: 3)")
    parser.add_argument("--baseline_runs", type=int, default=3, help="of the baseline (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="a small world, one run of each")
    parser.add_argument("--measure_floor", type=Path, help="print a world's floor as JSON, and end")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    if options.measure_floor:
        print(json.dumps(measure_floor(options.measure_floor, options.threads)))
        return
    if options.keep and not options.folder:
        sys.exit("--keep needs --folder")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_retrieval_") as temporary:
        setting = Setting(
            folder=(options.folder or Path(temporary)).resolve(),
            world=QUICK_WORLD if options.quick else WORLD,
            threads=options.threads,
            runs=1 if options.quick else options.runs,
            baseline_runs=options.baseline_runs,
            keep=options.keep,
        )
        machine = describe_machine(setting)
        size, lines = measure_all(setting, set(options.sections))
        machine = f"{machine}; {size}"
    print(as_markdown(lines, machine))
    for path in options.output:
        write_output(path, lines, machine)


if __name__ == "__main__":
    main()
