"""What people look at: pages of ranked images, plots, and the comparison of two runs.

Pillow, matplotlib and jinja2 are imported inside the functions that need them; torch is not.
An `Evaluation` here is what utils_evaluation yields for one method's run over a data set.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas

import utils_page
from utils import MEANS, UserError, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils_datasets import ImageStore
    from utils_evaluation import Evaluation

# One colour a method, in the order given (Okabe and Ito's set: told apart by colour-blind readers).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
PLOT_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.hashsalt": "report",  # the same numbers give the same bytes
}
PNG_DPI = 200
CELLS_WITH_NUMBERS = 144  # a heat map with more cells than this is read by colour alone

# Sizes of thumbnails: the longest side in pixels, and the most bytes one may take. With ten results
# and at most MISSED_SHOWN missed positives for each of i-CIR's 1,883 queries, a report can
# never pass 1,883 * (16 * 8,000 + 16,000) bytes = 271 MB; in practice it stays far below.
THUMBNAILS = {"query": (240, 16_000), "database": (160, 8_000)}
QUALITIES = (78, 60, 40, 20, 0)  # of WebP, tried in turn until the bytes suffice (noise needs 0)
MISSED_SHOWN = 6
MAX_WORKERS = 16


# ---------------------------------------------------------------------------------------------
# The page of ranked images
# ---------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    evaluations: list[Evaluation],
    queries: pandas.DataFrame,
    database: pandas.DataFrame,
    images: ImageStore,
    dataset: str,
    top_k: int,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> Path:
    """Write a page of every query's ranked images, one method or several side by side.

    folder: takes index.html, thumbnails/ and plots/, and nothing outside it is needed to read them.
    It is written whole or not at all; a report that is there is replaced.
    evaluations: one for each method, all over the same queries and database, in columns' order.
    queries, database: columns image_path, text, instance (str), row i = row i of the features.
    images: `.read(split, image_path)` gives an image's bytes or raises FileNotFoundError.
    top_k: images shown for each query (fewer where the evaluations hold fewer).
    cache: folder of thumbnails that outlives the report and that several reports share (files are
    linked from it, or copied); `thumbnails` beside the report's folder by default.
    workers: threads that make thumbnails (Pillow lets go of the interpreter lock); by default one a
    core, at most 16.
    Returns the path of index.html. An image that cannot be read is shown as a box with its name;
    how many there are is said on stderr.
    """
    folder = Path(folder)
    cache = folder.parent / "thumbnails" if cache is None else Path(cache)
    with _whole_folder(folder) as building:
        shown = collect_report(evaluations, queries, database, top_k)
        pictures = make_thumbnails(images, shown.wanted(), cache, building / "thumbnails", workers)
        _say_what_is_missing(pictures)
        write_plots(building / "plots", evaluations, queries)
        page = _render_report(shown, pictures, evaluations, dataset, len(database), top_k)
        (building / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


@dataclass(frozen=True)
class Shown:
    """What the page shows, before any picture is made.

    labels: a distinct name for each method.
    query_items: (image path, text, instance) of each query.
    row_items: (image path, text) of each database row that is shown anywhere.
    runs: for each query a list with one dict for each method (see `_collect_run`), whose `rows`
    and `missed` point into row_items.
    positives: the number of positives of each query.
    """

    labels: list[str]
    query_items: list[tuple[str, str, str]]
    row_items: list[tuple[str, str]]
    runs: list[list[dict]]
    positives: list[int]

    def wanted(self) -> list[tuple[str, str]]:
        """The distinct (split, image path) whose thumbnails the page shows, in a fixed order."""
        paths = {("query", path) for path, _, _ in self.query_items}
        return sorted(paths | {("database", path) for path, _ in self.row_items})


def collect_report(
    evaluations: list[Evaluation],
    queries: pandas.DataFrame,
    database: pandas.DataFrame,
    top_k: int,
) -> Shown:
    """Choose what a report shows: for each query and method the best rows and missed positives.

    A row's kind is "p", positive: instance and text equal the query's; "s", same instance, other
    text: the row's instance is the query's and its text is another text asked of that instance, so
    that it shows the object in another condition; "o", other: the rest. A database row names the
    instance to whose database it belongs, also where it is a negative that does not show the
    object: that "s" rows show it is inferred from their text.
    """
    instances, texts = _strings(queries["instance"]), _strings(queries["text"])
    row_instances, row_texts = _strings(database["instance"]), _strings(database["text"])
    row_paths = _strings(database["image_path"])
    asked = set(zip(instances, texts, strict=True))

    def kind(query: int, row: int) -> str:
        if row_instances[row] != instances[query]:
            return "o"
        if row_texts[row] == texts[query]:
            return "p"
        return "s" if (row_instances[row], row_texts[row]) in asked else "o"

    numbers: dict[int, int] = {}  # database row -> its place in row_items

    def place(row: int) -> int:
        return numbers.setdefault(row, len(numbers))

    runs = [
        [_collect_run(evaluation, query, top_k, kind, place) for evaluation in evaluations]
        for query in range(len(queries))
    ]
    return Shown(
        labels=_labels(evaluations),
        query_items=list(zip(_strings(queries["image_path"]), texts, instances, strict=True)),
        row_items=[(row_paths[row], row_texts[row]) for row in numbers],
        runs=runs,
        positives=[len(ranks) for ranks in evaluations[0].positive_ranks],
    )


def _collect_run(evaluation: Evaluation, query: int, top_k: int, kind, place) -> dict:
    """One method on one query: its AP, the rank of its first positive, best rows, missed rows.

    Ranks are 1-based here, as people count. `kinds` is a string with a letter for each of `rows`;
    `missedRanks` holds the ranks of all missed positives, `missed` the first few of their rows.
    """
    rows = [int(row) for row in evaluation.top_rows[query][:top_k] if row >= 0]
    ranks, positives = evaluation.positive_ranks[query], evaluation.positive_rows[query]
    missed = np.flatnonzero(ranks >= len(rows))
    return {
        "ap": round(float(evaluation.ap[query]), 9),
        "first": int(ranks[0]) + 1 if len(ranks) else None,
        "found": len(ranks) - len(missed),
        "tied": bool(evaluation.tied[query]),
        "rows": [place(row) for row in rows],
        "scores": [float(f"{s:.5g}") for s in evaluation.top_scores[query][: len(rows)]],
        "kinds": "".join(kind(query, row) for row in rows),
        "missed": [place(int(positives[j])) for j in missed[:MISSED_SHOWN]],
        "missedRanks": [int(ranks[j]) + 1 for j in missed],
    }


def _labels(evaluations: list[Evaluation]) -> list[str]:
    """The variant of each method, with its backbone where variants repeat."""
    variants = [evaluation.variant for evaluation in evaluations]
    if len(set(variants)) == len(variants):
        return variants
    return [f"{evaluation.variant} ({evaluation.backbone})" for evaluation in evaluations]


def _strings(column: pandas.Series) -> list[str]:
    return column.fillna("").astype(str).tolist()


def _render_report(
    shown: Shown,
    pictures: dict[tuple[str, str], Picture],
    evaluations: list[Evaluation],
    dataset: str,
    database_count: int,
    top_k: int,
) -> str:
    instances = sorted({instance for _, _, instance in shown.query_items})
    data = {
        "methods": [{"label": label} for label in shown.labels],
        "instances": instances,
        "rows": [[path, text, pictures["database", path].name] for path, text in shown.row_items],
        "queries": [
            {
                "text": text,
                "instance": instance,
                "positives": shown.positives[i],
                "item": [path, text, pictures["query", path].name],
                "runs": shown.runs[i],
            }
            for i, (path, text, instance) in enumerate(shown.query_items)
        ],
    }
    methods = [
        {
            "label": label,
            "backbone": evaluation.backbone,
            "means": evaluation.means(),
            "seconds": evaluation.seconds,
            "config": evaluation.config,
        }
        for label, evaluation in zip(shown.labels, evaluations, strict=True)
    ]
    return _render(
        utils_page.REPORT,
        script=utils_page.SCRIPT,
        title=f"{dataset}: {', '.join(shown.labels)}",
        data=data,
        methods=methods,
        plots=_list_plots(len(evaluations)),
        query_count=len(shown.query_items),
        instance_count=len(instances),
        database_count=database_count,
        top_k=top_k,
    )


def _render(template: str, *, script: str = "", data: dict | None = None, **values) -> str:
    """Fill a template; every value is escaped, and the page's one script is named by its hash."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        style=Markup(utils_page.STYLE),
        script=Markup(script),
        script_hash=Markup(f"'sha256-{digest}'"),
        data=Markup(_json_for_html(data)),
        **values,
    )


def _json_for_html(data: dict | None) -> str:
    """JSON that may stand inside a script element: no text of it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ---------------------------------------------------------------------------------------------
# Thumbnails
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A thumbnail's file name or, where there is none, the cause."""

    name: str | None
    cause: str = ""


def make_thumbnails(
    images: ImageStore,
    wanted: Iterable[tuple[str, str]],
    cache: Path,
    folder: Path,
    workers: int | None = None,
) -> dict[tuple[str, str], Picture]:
    """Put the thumbnails of (split, image path) pairs into a folder, making those not in the cache.

    A thumbnail is named by its size and the hash of the image's bytes, so that one is made once
    however often the image is named, and a changed image never shows its old thumbnail.
    """
    from tqdm import tqdm

    wanted = list(wanted)
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    make = partial(_make_thumbnail, images, cache, folder)
    # One image of each split comes before the threads: a store that indexes shards when it is
    # first asked does it once then, not once in every thread.
    done = {pair: make(pair) for pair in {split: (split, path) for split, path in wanted}.values()}
    rest = [pair for pair in wanted if pair not in done]
    with ThreadPoolExecutor(workers or min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(make, rest), total=len(rest), desc="thumbnails", disable=None)
        return done | dict(zip(rest, bar, strict=True))


def _make_thumbnail(
    images: ImageStore, cache: Path, folder: Path, wanted: tuple[str, str]
) -> Picture:
    split, path = wanted
    side, most_bytes = THUMBNAILS[split]
    try:
        content = images.read(split, path)
        name = f"{hashlib.sha1(content).hexdigest()[:20]}-{side}.webp"
        known = (cache / name).exists()
        thumbnail = b"" if known else shrink(content, side, most_bytes)
    # Whatever is wrong with one image (Pillow raises many kinds), the page must not fail for it.
    except Exception as error:
        return Picture(None, f"{type(error).__name__}: {error}")
    if not known:
        with atomic_path(cache / name) as temporary:
            temporary.write_bytes(thumbnail)
    _link(cache / name, folder / name)
    return Picture(name)


def shrink(content: bytes, side: int, most_bytes: int) -> bytes:
    """Encode an image as WebP of at most `side` pixels a side, of at most `most_bytes` bytes.

    The picture is turned as the model saw it: what the camera says of its orientation is not
    applied. Raises what Pillow raises on bytes that are not an image.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (2 * side, 2 * side))  # JPEG: decoded at a fraction of its size
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=quality, method=4)
        if buffer.tell() <= most_bytes:
            break
    return buffer.getvalue()


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        shutil.copyfile(source, target)


def _say_what_is_missing(pictures: dict[tuple[str, str], Picture]) -> None:
    missing = [(path, picture) for (_, path), picture in pictures.items() if not picture.name]
    if missing:
        path, picture = missing[0]
        print(
            f"warning: {len(missing)} of {len(pictures)} images have no picture in the report, "
            f"the first is {path} ({picture.cause})",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------------------
# Plots of one run or several
# ---------------------------------------------------------------------------------------------

AP_BINS = 20
NAMED_BARS = 40  # with more instances than this, a bar has no room for its name


def write_plots(
    folder: Path, evaluations: list[Evaluation], queries: pandas.DataFrame
) -> list[Path]:
    """Draw the histogram of AP, the mAP of every instance and, of several methods, AP against AP.

    Each is written as PNG, SVG and, with the numbers drawn (AP in percent), CSV:
    ap_histogram, instance_map, and ap_by_query, in which the method of the best mAP is drawn
    against each other method. Returns the paths.
    """
    folder = Path(folder)
    labels = _labels(evaluations)
    ap = {
        label: 100 * np.asarray(evaluation.ap)
        for label, evaluation in zip(labels, evaluations, strict=True)
    }
    paths = _plot_histogram(folder / "ap_histogram", ap)
    paths += _plot_instances(folder / "instance_map", ap, queries)
    if len(evaluations) > 1:
        paths += _plot_pairs(folder / "ap_by_query", ap, queries)
    return paths


def _list_plots(methods: int) -> list[dict[str, str]]:
    plots = [
        {"name": "ap_histogram", "caption": "Queries by AP"},
        {"name": "instance_map", "caption": "mAP of each instance, sorted"},
        {"name": "ap_by_query", "caption": "AP of each query, the best method against the others"},
    ]
    return plots if methods > 1 else plots[:2]


def _plot_histogram(stem: Path, ap: dict[str, np.ndarray]) -> list[Path]:
    edges = np.linspace(0, 100, AP_BINS + 1)
    counts = {label: np.histogram(values, edges)[0] for label, values in ap.items()}
    table = pandas.DataFrame({"AP from": edges[:-1], "AP to": edges[1:], **counts})
    with _figure(stem, (max(3.6, 2.3 * len(ap)), 2.6)) as figure:
        panels = figure.subplots(1, len(ap), sharey=True, squeeze=False)[0]
        for axes, color, (label, values) in zip(panels, _colors(len(ap)), ap.items(), strict=True):
            axes.stairs(counts[label], edges, fill=True, color=color, alpha=0.85)
            axes.set_title(f"{label}, mAP {values.mean():.2f}", fontsize=9, loc="left")
            axes.set_xlabel("AP (%)")
            axes.set_xlim(0, 100)
            axes.set_xticks(range(0, 101, 25 if len(ap) == 1 else 50))
            _rule(axes)
        panels[0].set_ylabel("queries")
    return [*_picture_paths(stem), _write_table(stem, table)]


def _plot_instances(stem: Path, ap: dict[str, np.ndarray], queries: pandas.DataFrame) -> list[Path]:
    frame = pandas.DataFrame({"instance": _strings(queries["instance"]), **ap})
    table = frame.groupby("instance", sort=True).mean()
    table.insert(0, "queries", frame["instance"].value_counts())
    first = next(iter(ap))
    table = table.sort_values(first, ascending=False, kind="stable")
    with _figure(stem, (6.4, 3.0)) as figure:
        axes = figure.subplots()
        if len(ap) == 1:
            axes.bar(range(len(table)), table[first], width=0.86, color=COLORS[0])
        else:
            for color, label in zip(_colors(len(ap)), ap, strict=True):
                values = np.sort(table[label])[::-1]
                axes.plot(range(len(values)), values, color=color, linewidth=1.4, label=label)
            axes.legend(fontsize=8)
        if len(ap) == 1 and len(table) <= NAMED_BARS:
            names = [name if len(name) <= 18 else f"{name[:17]}\u2026" for name in table.index]
            axes.set_xticks(range(len(table)), names, rotation=60, ha="right", fontsize=7)
        else:
            order = "each method in its own order" if len(ap) > 1 else "sorted"
            axes.set_xlabel(f"instances, {order}")
        axes.set_ylabel("mAP of the instance (%)")
        axes.set_ylim(0, 100)
        axes.margins(x=0.01)
        _rule(axes)
    return [*_picture_paths(stem), _write_table(stem, table.reset_index())]


def _plot_pairs(stem: Path, ap: dict[str, np.ndarray], queries: pandas.DataFrame) -> list[Path]:
    best = max(ap, key=lambda label: ap[label].mean())
    others = [label for label in ap if label != best]
    table = queries[["image_path", "text", "instance"]].assign(**ap)
    with _figure(stem, (max(3.6, 2.7 * len(others)), 3.1)) as figure:
        panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
        for axes, label in zip(panels, others, strict=True):
            _draw_pair(axes, ap[label], ap[best], label)
        panels[0].set_ylabel(f"AP of {best} (%)")
    return [*_picture_paths(stem), _write_table(stem, table)]


def _draw_pair(axes: Axes, across: np.ndarray, up: np.ndarray, label: str) -> None:
    """A point a query; the points above the diagonal are those that the upward method wins."""
    axes.plot([0, 100], [0, 100], color="#AAAAAA", linewidth=0.8, zorder=0)
    size, strength = (14, 0.6) if len(up) <= 300 else (6, 0.3)
    axes.scatter(across, up, s=size, color=COLORS[0], alpha=strength, linewidths=0, clip_on=False)
    won, lost = int((up > across).sum()), int((up < across).sum())
    axes.set_title(f"above {won}, below {lost}", fontsize=9, loc="left")
    axes.set_xlabel(f"AP of {label} (%)")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(0, 101, 25))
    axes.set_aspect("equal")


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _rule(axes: Axes) -> None:
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _write_table(stem: Path, table: pandas.DataFrame) -> Path:
    path = stem.with_name(f"{stem.name}.csv")
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return path


# ---------------------------------------------------------------------------------------------
# Comparison of two runs
# ---------------------------------------------------------------------------------------------

RESAMPLES = 10_000
CHUNK = 250  # resamples held in memory at once
LISTED = 20  # queries listed as won and as lost
KEY = ["Image Query", "Text Query", "Instance"]


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same queries.

    means: a row for mAP, mmAP and minmAP (percent): mean, a, b, difference (b - a), and the ends of
    the 95 % intervals queries_low, queries_high, instances_low, instances_high.
    queries: a row a query, falling by difference: image, text, instance, a, b, difference (percent)
    and the rows row_a, row_b (0-based) of the query in the two runs.
    page: the page that shows both.
    """

    a: str
    b: str
    means: pandas.DataFrame
    queries: pandas.DataFrame
    page: Path


def compare_runs(
    run_a: Path, run_b: Path, folder: Path, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare two result folders by their APs.csv, print the table and write it with a page.

    folder: takes index.html, means.csv, queries.csv and the plot ap_by_query (.png, .svg); written
    whole or not at all, and a comparison that is there is replaced.
    Raises UserError if a file is absent or not APs.csv, or the runs differ in their queries.
    """
    run_a, run_b, folder = Path(run_a), Path(run_b), Path(folder)
    paired = _pair_runs(run_a, run_b)
    a, b = _run_names(run_a, run_b)
    ap_a, ap_b = paired["a"].to_numpy() / 100, paired["b"].to_numpy() / 100
    means = compare_means(ap_a, ap_b, paired["instance"].tolist(), resamples, seed)
    paired["difference"] = paired["b"] - paired["a"]
    paired = paired.sort_values("difference", ascending=False, kind="stable", ignore_index=True)
    with _whole_folder(folder) as building:
        _write_table(building / "means", means)
        _write_table(building / "queries", paired)
        with _figure(building / "ap_by_query", (3.8, 3.8)) as figure:
            axes = figure.subplots()
            _draw_pair(axes, paired["a"].to_numpy(), paired["b"].to_numpy(), f"A: {a}")
            axes.set_ylabel(f"AP of B: {b} (%)")
        page = _render(
            utils_page.COMPARISON,
            title=f"{a} against {b}",
            a=a,
            b=b,
            means=means.to_dict("records"),
            resamples=resamples,
            seed=seed,
            query_count=len(paired),
            instance_count=paired["instance"].nunique(),
            won=int((paired["difference"] > 0).sum()),
            lost=int((paired["difference"] < 0).sum()),
            equal=int((paired["difference"] == 0).sum()),
            plot="ap_by_query",
            sections=_won_and_lost(paired, a, b),
            report_a=_find_report(run_a, folder),
            report_b=_find_report(run_b, folder),
        )
        (building / "index.html").write_text(page, encoding="utf-8")
    comparison = Comparison(a, b, means, paired, folder / "index.html")
    _print_comparison(comparison)
    return comparison


def compare_means(
    ap_a: np.ndarray,
    ap_b: np.ndarray,
    instances: list[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pandas.DataFrame:
    """The three means of two runs in percent, and 95 % intervals of their differences.

    ap_a, ap_b: float64 (Q,), row i of both is the same query. instances: Q names.
    Intervals are the 2.5 and 97.5 percentiles of a paired bootstrap: each resample draws Q queries
    (or, as clusters, all queries of as many instances as there are) with replacement, the same for
    both runs, and computes the means anew. An instance that a draw of queries leaves out is
    left out of its mmAP. minmAP has no interval over queries (NaN): the lowest AP of an instance
    can only rise when its queries are drawn, so the draws do not lie around the mean.
    Returns the columns of Comparison.means.
    """
    names, groups = np.unique(np.asarray(instances, dtype=str), return_inverse=True)
    order = np.argsort(groups, kind="stable")
    ap = np.stack([ap_a, ap_b])[:, order]  # (2, Q), the queries of an instance side by side
    starts = np.searchsorted(groups[order], np.arange(len(names)))
    generator = np.random.default_rng(seed)
    by_query = _resample(_means_of_drawn_queries, ap, starts, ap.shape[1], generator, resamples)
    by_instance = _resample(_means_of_drawn_instances, ap, starts, len(names), generator, resamples)
    each = np.ones((1, len(names)), dtype=np.int64)
    exact = 100 * _means_of_drawn_instances(ap, starts, each)[:, 0]  # (2, 3)
    ends = np.full((2, 2, 3), np.nan)  # queries or instances, low or high, mean
    for i, drawn in enumerate((by_query, by_instance)):
        difference = 100 * (drawn[1] - drawn[0])
        ends[i, :, : drawn.shape[2]] = np.percentile(difference, [2.5, 97.5], axis=0)
    return pandas.DataFrame(
        {
            "mean": MEANS,
            "a": exact[0],
            "b": exact[1],
            "difference": exact[1] - exact[0],
            "queries_low": ends[0, 0],
            "queries_high": ends[0, 1],
            "instances_low": ends[1, 0],
            "instances_high": ends[1, 1],
        }
    )


def _resample(means_of, ap, starts, size, generator, resamples) -> np.ndarray:
    """The means of both runs in every resample, float64 (2, resamples, 2 or 3)."""
    chunks = []
    for first in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - first)
        drawn = generator.integers(size, size=(count, size))
        shifted = (drawn + size * np.arange(count)[:, None]).ravel()
        times = np.bincount(shifted, minlength=count * size).reshape(count, size)
        chunks.append(means_of(ap, starts, times))
    return np.concatenate(chunks, axis=1)


def _means_of_drawn_queries(ap: np.ndarray, starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """times: (R, Q), how often each query is drawn. Returns mAP and mmAP as (2, R, 2)."""
    drawn = np.add.reduceat(times, starts, axis=1)  # (R, I) queries drawn of each instance
    sums = np.stack([np.add.reduceat(times * run, starts, axis=1) for run in ap])  # (2, R, I)
    by_query = sums.sum(axis=2) / times.sum(axis=1)
    by_instance = (sums / np.maximum(drawn, 1)).sum(axis=2) / (drawn > 0).sum(axis=1)
    return np.stack([by_query, by_instance], axis=2)


def _means_of_drawn_instances(ap: np.ndarray, starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """times: (R, I), how often each instance is drawn. Returns mAP, mmAP, minmAP as (2, R, 3)."""
    sizes = np.diff(np.append(starts, ap.shape[1]))
    sums, lowest = np.add.reduceat(ap, starts, axis=1), np.minimum.reduceat(ap, starts, axis=1)
    drawn = times.sum(axis=1)
    columns = [times @ sums.T / (times @ sizes)[:, None]]
    columns += [times @ (sums / sizes).T / drawn[:, None], times @ lowest.T / drawn[:, None]]
    return np.stack(columns, axis=2).transpose(1, 0, 2)


def _pair_runs(run_a: Path, run_b: Path) -> pandas.DataFrame:
    """Join the queries of two runs: image, text, instance, a, b (AP in percent), row_a, row_b."""
    frames = []
    for run, side in ((run_a, "a"), (run_b, "b")):
        frame = _read_aps(run)
        frame[f"row_{side}"] = np.arange(len(frame))
        frame["repeat"] = frame.groupby(KEY).cumcount()  # the same query twice pairs in order
        frames.append(frame.rename(columns={"AP": side}))
    joined = frames[0].merge(frames[1], on=[*KEY, "repeat"], how="outer", indicator=True)
    for run, other, side, only in (
        (run_a, run_b, "a", "left_only"),
        (run_b, run_a, "b", "right_only"),
    ):
        alone = joined[joined["_merge"] == only].sort_values(f"row_{side}")
        if len(alone):
            first = alone.iloc[0]
            raise UserError(
                f"{run / 'APs.csv'} and {other / 'APs.csv'} are not over the same queries: row "
                f"{int(first[f'row_{side}']) + 2} of the first ({first['Image Query']}, "
                f"{first['Text Query']!r}, instance {first['Instance']}) is not in the second "
                f"({len(alone)} such rows); compare runs over one data set"
            )
    joined = joined.sort_values("row_a", ignore_index=True)
    names = {"Image Query": "image", "Text Query": "text", "Instance": "instance"}
    joined = joined.rename(columns=names)
    joined[["a", "b"]] *= 100
    joined[["row_a", "row_b"]] = joined[["row_a", "row_b"]].astype(int)
    return joined[["image", "text", "instance", "a", "b", "row_a", "row_b"]]


def _read_aps(run: Path) -> pandas.DataFrame:
    path = run / "APs.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a result folder of run_retrieval.py")
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
        frame = frame[[*KEY, "AP"]].astype({"AP": float})
    except (ValueError, KeyError, pandas.errors.ParserError) as error:
        raise UserError(
            f"{path} is not a table with the columns {','.join([*KEY, 'AP'])} ({error}); "
            "run run_retrieval.py again"
        ) from None
    if frame.empty:
        raise UserError(f"{path} has no queries; run run_retrieval.py again")
    bad = ~frame["AP"].between(0, 1).to_numpy()
    if bad.any():
        raise UserError(f"{path}, row {int(bad.argmax()) + 2}: AP is not from 0 to 1; run again")
    return frame


def _run_names(run_a: Path, run_b: Path) -> tuple[str, str]:
    """The two folders' names, with as many parents as it takes to tell them apart."""
    parts_a, parts_b = (Path(os.path.abspath(run)).parts for run in (run_a, run_b))
    for depth in range(1, max(len(parts_a), len(parts_b)) + 1):
        a, b = "/".join(parts_a[-depth:]), "/".join(parts_b[-depth:])
        if a != b:
            break
    return a, b


def _won_and_lost(paired: pandas.DataFrame, a: str, b: str) -> list[dict]:
    won, lost = paired[paired["difference"] > 0], paired[paired["difference"] < 0][::-1]
    return [
        {"id": "won", "title": f"Most won by B: {b}", "rows": won[:LISTED].to_dict("records")},
        {"id": "lost", "title": f"Most won by A: {a}", "rows": lost[:LISTED].to_dict("records")},
    ]


def _find_report(run: Path, folder: Path) -> str | None:
    """The way from a comparison's page to a run's own report, where there is one."""
    index = run / "report" / "index.html"
    if not index.is_file():
        return None
    return Path(os.path.relpath(index, folder)).as_posix()


def _print_comparison(comparison: Comparison) -> None:
    print(f"A: {comparison.a}\nB: {comparison.b}")
    print(
        f"{'':8}{'A':>8}{'B':>8}{'B - A':>8}   {'95 % over queries':>18}   {'over instances':>18}"
    )
    for row in comparison.means.itertuples():
        queries = f"[{row.queries_low:+.2f}, {row.queries_high:+.2f}]"
        queries = "none" if np.isnan(row.queries_low) else queries
        instances = f"[{row.instances_low:+.2f}, {row.instances_high:+.2f}]"
        numbers = f"{row.a:8.2f}{row.b:8.2f}{row.difference:+8.2f}"
        print(f"{row.mean:8}{numbers}   {queries:>18}   {instances:>18}")
    for title, rows in (
        ("B wins most", comparison.queries[:5]),
        ("A wins most", comparison.queries[::-1][:5]),
    ):
        print(f"{title}:")
        for row in rows.itertuples():
            print(f"  {row.difference:+7.2f}  {row.text!r} of {row.instance} ({row.image})")


# ---------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------


def plot_sweep(
    path_stem: Path,
    table: pandas.DataFrame,
    axes: list[str],
    ends: dict[str, float] | None = None,
) -> list[Path]:
    """Draw a sweep's mAP over its one or two axes and mark the best point.

    path_stem: where to write, without suffix; PATH_STEM.png and PATH_STEM.svg are written.
    table: a row a point of the sweep; a column for each axis (numbers, or words, which are
    placed in the order of their first row) and a column `mAP` in percent.
    axes: one name gives a line, two a heat map (first axis down, second across).
    ends: label -> mAP in percent, drawn as horizontal reference lines (one axis only). Where it is
    None and the axis is `fusion_weight`, the points at 0 and at 1 are the two ends.
    Returns the two paths. Raises ValueError with another number of axes or an empty table.
    """
    if len(axes) not in (1, 2) or table.empty:
        raise ValueError(f"a sweep is drawn over one or two axes and some points, not over {axes}")
    size = (5.2, 3.4) if len(axes) == 1 else (5.6, 4.2)
    with _figure(Path(path_stem), size) as figure:
        if len(axes) == 1:
            _draw_line(figure.subplots(), table, axes[0], _sweep_ends(table, axes[0], ends))
        else:
            _draw_heat_map(figure, table, axes[0], axes[1])
    return _picture_paths(Path(path_stem))


def _sweep_ends(
    table: pandas.DataFrame, axis: str, ends: dict[str, float] | None
) -> dict[str, float]:
    if ends is not None or axis != "fusion_weight":
        return ends or {}
    weights = table[axis].astype(float)
    at = {end: table.loc[weights == end, "mAP"] for end in (0, 1)}
    return {f"{axis} = {end}": float(rows.iloc[0]) for end, rows in at.items() if len(rows)}


def _draw_line(axes: Axes, table: pandas.DataFrame, axis: str, ends: dict[str, float]) -> None:
    numeric = pandas.api.types.is_numeric_dtype(table[axis])
    table = table.sort_values(axis) if numeric else table
    labels = [str(value) for value in table[axis]]
    x = table[axis].to_numpy(float) if numeric else np.arange(len(table))
    y = table["mAP"].to_numpy(float)
    best = int(np.nanargmax(y))
    for (label, value), dashes in zip(ends.items(), ((5, 2), (1, 1.5), (5, 2, 1, 2)), strict=False):
        axes.axhline(
            value, color="#777777", linewidth=0.9, dashes=dashes, label=f"{label}: {value:.2f}"
        )
    axes.plot(x, y, color=COLORS[0], marker="o", markersize=3.5, linewidth=1.4)
    axes.plot(x[best], y[best], marker="o", markersize=8, color=COLORS[1], zorder=3)
    axes.set_title(f"best: mAP {y[best]:.2f} at {axis} = {labels[best]}", fontsize=9, loc="left")
    if not numeric:
        axes.set_xticks(x, labels, rotation=30, ha="right")
    if ends:
        axes.legend(fontsize=8, handlelength=3.2)
    axes.margins(y=0.12)
    axes.set_xlabel(axis)
    axes.set_ylabel("mAP (%)")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_heat_map(figure: Figure, table: pandas.DataFrame, down: str, across: str) -> None:
    rows, columns = _axis_values(table[down]), _axis_values(table[across])
    grid = np.full((len(rows), len(columns)), np.nan)
    for row, column, value in zip(table[down], table[across], table["mAP"], strict=True):
        grid[rows.index(row), columns.index(column)] = value
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    best_row, best_column = np.unravel_index(np.nanargmax(grid), grid.shape)
    if grid.size <= CELLS_WITH_NUMBERS:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value < middle else "black"
                weight = "bold" if (row, column) == (best_row, best_column) else "normal"
                text = f"{value:.1f}"
                axes.text(
                    column, row, text, ha="center", va="center", color=color, size=7, weight=weight
                )
    # Drawn white under red, so that the mark shows on either end of the colour scale.
    for color, width in (("white", 4.5), ("#D00000", 2.2)):
        corner = (best_column - 0.5, best_row - 0.5)
        axes.add_patch(_rectangle(corner, edgecolor=color, linewidth=width))
    axes.set_xticks(range(len(columns)), [str(value) for value in columns])
    axes.set_yticks(range(len(rows)), [str(value) for value in rows])
    if max(len(str(value)) for value in columns) * len(columns) > 60:
        axes.tick_params(axis="x", rotation=45)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    best = f"{down} = {rows[best_row]}, {across} = {columns[best_column]}"
    axes.set_title(f"best: mAP {np.nanmax(grid):.2f} at {best}", fontsize=9, loc="left")
    figure.colorbar(image, label="mAP (%)").outline.set_visible(False)


def _axis_values(column: pandas.Series) -> list:
    """The distinct values of an axis: numbers sorted, words in the order of their first row."""
    values = list(dict.fromkeys(column))
    return sorted(values) if pandas.api.types.is_numeric_dtype(column) else values


def _rectangle(corner: tuple[float, float], **style):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, clip_on=False, **style)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


@contextmanager
def _figure(path_stem: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Give an empty figure (inches) to draw on; write it as PNG and SVG, whole or not at all."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)  # its own canvas: no pyplot, no state that outlives the call
        yield figure
        for path in _picture_paths(path_stem):
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else None
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


def _picture_paths(path_stem: Path) -> list[Path]:
    return [path_stem.with_name(f"{path_stem.name}.{kind}") for kind in ("png", "svg")]


# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder` to build in; it takes the final name only on success."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        building, old = Path(temporary) / "new", Path(temporary) / "old"
        building.mkdir()
        yield building
        if folder.exists():
            folder.rename(old)
        try:
            building.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
