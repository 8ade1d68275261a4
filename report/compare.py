"""The comparison of two runs, query by query, with intervals of the differences."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas

from report.plots import draw_pair, new_figure, write_numbers
from report.render import render
from utils import MEANS, UserError, whole_folder

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
    with whole_folder(folder) as building:
        write_numbers(building / "means", means)
        write_numbers(building / "queries", paired)
        with new_figure(building / "ap_by_query", (3.8, 3.8)) as figure:
            axes = figure.subplots()
            draw_pair(axes, paired["a"].to_numpy(), paired["b"].to_numpy(), f"A: {a}")
            axes.set_ylabel(f"AP of B: {b} (%)")
        page = render(
            "compare.html",
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
