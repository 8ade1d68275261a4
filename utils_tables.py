"""Results as tables: mAP_table.csv, APs.csv, top{K}.csv and the console."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils import MEANS, UserError, atomic_path, locked
from utils_evaluation import Evaluation

CONSOLE_COLUMNS = ["method", "variant", *MEANS, "queries", "instances", "tied_queries", "seconds"]


def result_row(evaluation: Evaluation, facts: dict[str, str]) -> dict[str, str]:
    """One run as a row of mAP_table.csv, every value as it is printed (means in percent).

    facts: dataset, ties, features (hash of the manifest), version and other constants of the run;
    they follow the method's own parameters.
    """
    return {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "dataset": facts["dataset"],
        "backbone": evaluation.backbone,
        "method": evaluation.method,
        "variant": evaluation.variant,
        **{name: f"{value:.2f}" for name, value in evaluation.means().items()},
        "queries": str(len(evaluation.ap)),
        "instances": str(len(set(evaluation.instance))),
        "seconds": f"{evaluation.seconds:.2f}",
        "tied_queries": str(int(evaluation.tied.sum())),
        **evaluation.config,
        **{name: value for name, value in facts.items() if name != "dataset"},
    }


def write_results(
    folder: Path,
    evaluation: Evaluation,
    row: dict[str, str],
    queries: pd.DataFrame,
    database: pd.DataFrame | None,
    top_k: int,
) -> None:
    """Write a run's folder: a row added to mAP_table.csv, APs.csv, and top{K}.csv if K is not 0.

    queries: str columns image_path, text, instance; database: the same, needed where K is not 0.
    What an earlier run left of rankings is removed. One process writes at a time. Raises UserError,
    with nothing changed, if its table cannot be read.
    """
    with locked(folder):
        earlier = read_rows(folder / "mAP_table.csv")
        write_csv(
            folder / "APs.csv",
            ["Image Query", "Text Query", "Instance", "AP"],
            _aps(evaluation, queries),
        )
        for path in folder.glob("top[0-9]*.csv"):
            path.unlink()
        shutil.rmtree(folder / "report", ignore_errors=True)
        if top_k:
            columns = ["Image Query", "Text Query", "Instance", f"P@{top_k}", f"R@{top_k}"]
            numbers = range(1, top_k + 1)
            columns += [f"{name}_{number}" for number in numbers for name in ("path", "match")]
            rows = _top_rows(evaluation, queries, database, top_k)
            write_csv(folder / f"top{top_k}.csv", columns, rows)
        write_table(folder / "mAP_table.csv", [*earlier, row])


def _aps(evaluation: Evaluation, queries: pd.DataFrame) -> Iterable[list]:
    labels = queries[["image_path", "text", "instance"]].itertuples(index=False)
    for label, ap in zip(labels, evaluation.ap.tolist(), strict=True):
        yield [*label, repr(ap)]


def _top_rows(
    evaluation: Evaluation, queries: pd.DataFrame, database: pd.DataFrame, k: int
) -> Iterable[list]:
    """The K best paths and whether they match, P@K = hits / K and R@K = hits / positives.

    A query with no positive has R@K 0; places past the end of a small gallery stay empty.
    """
    paths = database["image_path"].to_numpy()
    labels = queries[["image_path", "text", "instance"]].itertuples(index=False)
    for query, label in enumerate(labels):
        top = evaluation.top_rows[query]
        matches = np.isin(top, evaluation.positive_rows[query])
        hits = int(matches.sum())
        recall = hits / max(1, len(evaluation.positive_rows[query]))
        cells = [
            cell
            for row, match in zip(top, matches, strict=True)
            for cell in ((paths[row], int(match)) if row >= 0 else ("", ""))
        ]
        cells += [""] * (2 * (k - len(top)))
        yield [*label, repr(hits / k), repr(recall), *cells]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV with a header, quoted where needed, whole or not at all."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as CSV; a row without a value for a column leaves it empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(path, columns, ([row.get(name, "") for name in columns] for row in rows))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table that write_table wrote, none where there is no such file.

    Raises UserError if it is not such a table.
    """
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of UTF-8 ({error}); move it away") from None
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path}: a row has not as many values as its header; move it away")
    return rows


def format_table(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> str:
    """Rows for the console, numbers to the right; columns that no row fills are left out."""
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    table = pd.DataFrame([[row.get(name, "") for name in columns] for row in rows], columns=columns)
    words = [name for name in columns if not table[name].map(_is_number).all()]
    width = {name: max(len(name), *table[name].map(len)) for name in words}
    formatters = {name: f"{{:<{width[name]}}}".format for name in words}
    return table.to_string(index=False, formatters=formatters, justify="left")


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit()


def describe_empty(evaluation: Evaluation) -> list[str]:
    """The line that warns of queries without positives, if there are any."""
    empty, queries = int((evaluation.positive_count == 0).sum()), len(evaluation.ap)
    if not empty:
        return []
    return [f"warning: {empty} of {queries} queries have no positive; each scores 0"]


def describe_ties(evaluations: Sequence[Evaluation], ties: str) -> list[str]:
    """The lines that say how ties were ranked."""
    lines = []
    for evaluation in evaluations:
        tied = int(evaluation.tied.sum())
        if tied:
            rule = {"row": "database order", "best": "positives first", "worst": "positives last"}
            lines.append(
                f"{evaluation.variant}: in {tied} queries a positive ties with a negative; "
                f"ties rank by {rule[ties]}"
            )
    return lines
