"""The comparison of two runs, query by query, with intervals of the differences."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas

from report.bootstrap import RESAMPLES, compare_means
from report.plots import draw_pair, drawable, new_figure, write_numbers
from report.render import render
from report.side_by_side import PAGE, write_side_by_side
from utils import UserError, say, whole_folder
from utils_values import QueryValues, read_values

LISTED = 20  # queries listed as won and as lost
PRINTED = 5


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same queries.

    means: a row an average of the task's, in percent (see compare_means).
    queries: a row a query, falling by difference: the labels that name it, a, b, difference (of the
    task's first measure, in percent) and the rows row_a, row_b (0-based) of the query in the runs.
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

    folder: takes index.html, means.csv, queries.csv, the plot by_query (.png, .svg) and, where both
    runs have a report, rankings.html with both rankings of every query; written whole or not at
    all, and a comparison that is there is replaced.
    Raises UserError if a file is absent or not what read_values expects, if the runs differ in
    their queries or in how these are judged, or if the ground truth is hidden.
    """
    run_a, run_b, folder = Path(run_a), Path(run_b), Path(folder)
    own_a, own_b = read_values(run_a), read_values(run_b)
    _require_alike(run_a, run_b, own_a, own_b)
    place = _find_queries(run_a, run_b, own_a, own_b)
    moved = {header: values[place] for header, values in own_b.values.items()}
    averages, tags, outer = own_a.averages, own_a.tags, own_a.outer_tag
    means = compare_means(own_a.values, moved, averages, tags, outer, resamples, seed)
    queries = _pair_queries(own_a, moved[own_a.main], place)
    a, b = _run_names(run_a, run_b)
    won, lost = _won_and_lost(queries)
    with whole_folder(folder) as building:
        write_numbers(building / "means", means)
        write_numbers(building / "queries", queries)
        with new_figure(building / "by_query", (3.8, 3.8)) as figure:
            axes = figure.subplots()
            up = queries["b"].to_numpy()
            draw_pair(axes, queries["a"].to_numpy(), up, f"{own_a.main} of A: {a}")
            axes.set_ylabel(drawable(f"{own_a.main} of B: {b} (%)"))
        shown = write_side_by_side(building, folder, (run_a, run_b), place)
        page = render(
            "compare.html",
            title=f"{a} against {b}",
            a=a,
            b=b,
            measure=own_a.main,
            means=means.to_dict("records"),
            outer=outer,
            group_count=len(set(tags[outer])) if outer else 0,
            without_interval=", ".join(means["mean"][means["queries_low"].isna()]),
            resamples=resamples,
            seed=seed,
            query_count=len(queries),
            won=int((queries["difference"] > 0).sum()),
            lost=int((queries["difference"] < 0).sum()),
            equal=int((queries["difference"] == 0).sum()),
            headers=own_a.named_by,
            image=own_a.image,
            sections=[
                {"id": "won", "title": f"Most won by B: {b}", "rows": won},
                {"id": "lost", "title": f"Most won by A: {a}", "rows": lost},
            ],
            rankings=PAGE if shown else None,
            pictures=[query["images"][0][2] for query in shown["queries"]] if shown else None,
            report_a=_find_report(run_a, folder),
            report_b=_find_report(run_b, folder),
        )
        (building / "index.html").write_text(page, encoding="utf-8")
    comparison = Comparison(a, b, means, queries, folder / "index.html")
    _print_comparison(comparison, own_a)
    return comparison


def _require_alike(run_a: Path, run_b: Path, a: QueryValues, b: QueryValues) -> None:
    """Raise UserError unless the queries of two runs are named and judged in the same way."""
    if run_a.resolve() == run_b.resolve():
        raise UserError(f"{run_a} is named twice; name two result folders")
    for run, own in ((run_a, a), (run_b, b)):
        if not own.averages:
            raise UserError(f"{run}: the ground truth is hidden, there is nothing to compare by")
    names_a, names_b = ([own.name for own in run.averages] for run in (a, b))
    for what, of_a, of_b, advice in (
        ("tasks: the labels", list(a.labels), list(b.labels), "compare runs over one data set"),
        ("columns: the averages", names_a, names_b, "run them with the same --metrics"),
    ):
        if of_a != of_b:
            raise UserError(
                f"{run_a} and {run_b} are of different {what} are {', '.join(of_a)} and "
                f"{', '.join(of_b)}; {advice}"
            )
    if a.averages != b.averages:
        name = next(x.name for x, y in zip(a.averages, b.averages, strict=True) if x != y)
        raise UserError(
            f"{run_a} and {run_b} do not average {name} in the same way; run the older one again"
        )


def _find_queries(run_a: Path, run_b: Path, a: QueryValues, b: QueryValues) -> np.ndarray:
    """For each query of A its row in B, int64 (Q,). The same query twice pairs in order.

    Raises UserError if one run has a query that the other has not, or with another tag.
    """
    rows_a, rows_b = _number_queries(a), _number_queries(b)
    for run, other, own, others in (
        (run_a, run_b, rows_a, rows_b),
        (run_b, run_a, rows_b, rows_a),
    ):
        alone = [key for key in own if key not in others]
        if alone:
            named = ", ".join(f"{h} {v!r}" for h, v in zip(a.labels, alone[0], strict=False))
            raise UserError(
                f"{run / 'APs.csv'} and {other / 'APs.csv'} are not over the same queries: row "
                f"{own[alone[0]] + 2} of the first ({named}) is not in the second "
                f"({len(alone)} such rows); compare runs over one data set"
            )
    place = np.array([rows_b[key] for key in rows_a])
    for name, labels in a.tags.items():
        others = [b.tags[name][row] for row in place]
        if list(labels) != others:
            row = next(i for i, label in enumerate(labels) if label != others[i])
            raise UserError(
                f"query {row + 1} of {run_a} has the {name} {labels[row]!r}, that of {run_b} has "
                f"{others[row]!r}; compare runs over one data set"
            )
    return place


def _number_queries(own: QueryValues) -> dict[tuple, int]:
    """The labels of each query, and how many had the same before it -> its row."""
    before, rows = Counter(), {}
    for row, labels in enumerate(zip(*own.labels.values(), strict=True)):
        rows[(*labels, before[labels])] = row
        before[labels] += 1
    return rows


def _pair_queries(a: QueryValues, values_b: np.ndarray, place: np.ndarray) -> pandas.DataFrame:
    """The table of Comparison.queries."""
    table = pandas.DataFrame(a.labels)
    table["a"], table["b"] = 100 * a.values[a.main], 100 * values_b
    table["difference"] = table["b"] - table["a"]
    table["row_a"], table["row_b"] = np.arange(len(table)), place
    return table.sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def _run_names(run_a: Path, run_b: Path) -> tuple[str, str]:
    """The two folders' names, with as many parents as it takes to tell them apart."""
    parts_a, parts_b = (Path(os.path.abspath(run)).parts for run in (run_a, run_b))
    for depth in range(1, max(len(parts_a), len(parts_b)) + 1):
        a, b = "/".join(parts_a[-depth:]), "/".join(parts_b[-depth:])
        if a != b:
            break
    return a, b


def _won_and_lost(queries: pandas.DataFrame) -> tuple[list[dict], list[dict]]:
    """The queries that B wins and those that A wins, most first: the first LISTED of each."""
    won, lost = queries[queries["difference"] > 0], queries[queries["difference"] < 0][::-1]
    return won[:LISTED].to_dict("records"), lost[:LISTED].to_dict("records")


def _find_report(run: Path, folder: Path) -> str | None:
    """The way from a comparison's page to a run's own report, where there is one."""
    index = run / "report" / "index.html"
    if not index.is_file():
        return None
    return Path(os.path.relpath(index, folder)).as_posix()


def _print_comparison(comparison: Comparison, own: QueryValues) -> None:
    means, outer = comparison.means, own.outer_tag
    say(f"A: {comparison.a}")
    say(f"B: {comparison.b}")
    width = max(8, *means["mean"].map(len))
    by_group = f"   {'by ' + outer:>18}" if outer else ""
    print(f"{'':{width}}{'A':>8}{'B':>8}{'B - A':>8}   {'95 % over queries':>18}{by_group}")
    for row in means.itertuples():
        ends = [(row.queries_low, row.queries_high), (row.groups_low, row.groups_high)]
        intervals = "".join(f"   {_interval(*pair):>18}" for pair in ends[: 2 if outer else 1])
        numbers = f"{row.a:8.2f}{row.b:8.2f}{row.difference:+8.2f}"
        print(f"{row.mean:{width}}{numbers}{intervals}")
    won, lost = _won_and_lost(comparison.queries)
    for title, rows in (("B wins most", won), ("A wins most", lost)):
        print(f"{title}:" if rows else f"{title}: no query")
        for row in rows[:PRINTED]:
            named = ", ".join(row[header] for header in own.others)
            text = f"{row[own.text]!r}, " if own.text else ""
            image = f" ({row[own.image]})" if own.image else ""
            say(f"  {row['difference']:+7.2f}  {text}{named}{image}")


def _interval(low: float, high: float) -> str:
    return "none" if np.isnan(low) else f"[{low:+.2f}, {high:+.2f}]"
