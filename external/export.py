"""Rankings in the files of other evaluators: TREC runs and qrels, ranx, CSV with scores."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from external.ids import gallery_ids, query_ids
from external.results import rows_to_rank
from utils import UserError, say, write_csv, write_text
from utils_evaluation import Evaluation
from utils_task import Submission, Task

WHOLE_BELOW = 10_000  # rows of a gallery that are exported all of them; of a larger one the first
LARGE_K = 1_000


SUBMITTED = ("cirr", "circo")  # kinds that are the files of a benchmark's evaluation server


def exported_submissions(task: Task, kind: str, k: int | None) -> tuple[Submission, ...]:
    """The submissions that a kind of export is of, none of another kind.

    Raises UserError for a data set without such files, and for a number of rows, which is theirs.
    """
    if kind not in SUBMITTED:
        return ()
    if task.prompts != kind or not task.submissions:
        raise UserError(f"--export {kind} is for the queries of {kind}, not of {task.name}")
    if k is not None:
        counts = " and ".join(str(submission.k) for submission in task.submissions)
        raise UserError(f"--export_k has no effect with --export {kind}: its lists have {counts}")
    return tuple(task.submissions)


def export_rows(task: Task, k: int | None) -> int:
    """How many rows of each query are exported: k, or all of galleries that are not large."""
    largest = int(rows_to_rank(task).max(initial=0))
    return k or (largest if largest < WHOLE_BELOW else LARGE_K)


def write_export(
    folder: Path, evaluation: Evaluation, kind: str, spelled: Mapping[str, str] | None = None
) -> list[Path]:
    """Write a run's main ranking; the paths written.

    trec: run.trec with scores that fall strictly (the number of rows behind, so that no tie rule of
    an evaluator matters), qrels.txt, ids.csv, and no_positives.txt where queries have none, which
    qrels cannot say. ranx: run.json and qrels.json. csv: run.csv with the method's own scores.
    cirr, circo: the files of the evaluation server. Rows that are not ranked are left out; an image
    that a query's gallery lists again is listed once, as positive if any of its rows is, and how
    many rows that concerns is said. spelled: see find_same.
    """
    if kind in SUBMITTED:
        return _write_submissions(folder, evaluation)
    same = find_same(evaluation.task, spelled or {})
    _tell_same(evaluation.task, same)
    if kind == "csv":
        columns = ["query_id", "gallery_id", "score"]
        write_csv(folder / "run.csv", columns, _scored(evaluation, same))
        return [folder / "run.csv"]
    if evaluation.task.views[evaluation.task.main_view].positives is None:
        raise UserError(f"--export {kind}: the ground truth of {evaluation.task.name} is hidden")
    written = [_write_ids(folder, evaluation)]
    ranked = [list(_ranked(evaluation, q, same)) for q in range(len(evaluation.task.queries))]
    positives = [once(rows.tolist(), same) for rows in evaluation.positive_rows]
    if kind == "ranx":
        run = {f"q{q:06d}": dict(own) for q, own in enumerate(ranked)}
        qrels = {
            f"q{q:06d}": {_row_id(r): 1 for r in own} for q, own in enumerate(positives) if own
        }
        for name, content in (("run.json", run), ("qrels.json", qrels)):
            write_text(folder / name, json.dumps(content))
            written.append(folder / name)
    else:
        lines = [
            f"q{query:06d} Q0 {name} {rank} {score} {evaluation.variant}"
            for query, own in enumerate(ranked)
            for rank, (name, score) in enumerate(own, 1)
        ]
        judged = [f"q{q:06d} 0 {_row_id(row)} 1" for q, own in enumerate(positives) for row in own]
        for name, content in (("run.trec", lines), ("qrels.txt", judged)):
            write_text(folder / name, "".join(f"{line}\n" for line in content))
            written.append(folder / name)
    empty = [f"q{query:06d}\n" for query, own in enumerate(positives) if not own]
    (folder / "no_positives.txt").unlink(missing_ok=True)
    if empty:
        write_text(folder / "no_positives.txt", "".join(empty))
        written.append(folder / "no_positives.txt")
    return written


def find_same(task: Task, spelled: Mapping[str, str]) -> dict[int, str]:
    """What the gallery rows show whose image stands in another row too.

    spelled: a path -> another one that names the same file.
    """
    if task.gallery.box is not None:
        return {}
    paths = (posixpath.normpath(spelled.get(path, path)) for path in task.gallery.path)
    shown = [unicodedata.normalize("NFC", path) for path in paths]
    count = Counter(shown)
    return {row: own for row, own in enumerate(shown) if count[own] > 1}


def _tell_same(task: Task, same: Mapping[int, str]) -> None:
    first = {shown: row for row, shown in reversed(same.items())}
    again = [row for row, shown in same.items() if first[shown] != row]
    if again:
        say(
            f"the export lists an image once in a ranking: {len(again)} gallery rows list one "
            f"again, the first {task.gallery.path[again[0]]!r} (row {again[0] + 1})",
            error=True,
        )


def once(
    rows: Sequence[int], same: Mapping[int, str], positives: Collection[int] = ()
) -> list[int]:
    """Rows without those that show what an earlier one does.

    Of alike ones a positive stands in the place of the first, or else the lowest.
    """
    chosen: dict[str | int, int] = {}
    for row in rows:
        shown = same.get(row, row)
        alike = (row, chosen.get(shown, row))
        chosen[shown] = min(alike, key=lambda own: (own not in positives, own))
    return list(chosen.values())


def _write_submissions(folder: Path, evaluation: Evaluation) -> list[Path]:
    from utils_submissions import submission_files

    task, written = evaluation.task, []
    tops = {name: ranking.top_rows for name, ranking in evaluation.views.items()}
    for name, text in submission_files(task, tops, task.submissions).items():
        write_text(folder / name, text)
        written.append(folder / name)
    return written


def _row_id(row: int) -> str:
    return f"d{row:07d}"


def _listed(evaluation: Evaluation, query: int, same: Mapping[int, str]) -> list[int]:
    """A query's rows, best first, an image once."""
    rows = evaluation.main.top_rows[query]
    positives = set(evaluation.positive_rows[query].tolist()) if same else ()
    return once(rows[rows >= 0].tolist(), same, positives)


def _ranked(
    evaluation: Evaluation, query: int, same: Mapping[int, str]
) -> Iterator[tuple[str, int]]:
    """Ids of a query's rows, best first, each with the number of ranked rows behind it."""
    ranked = int(evaluation.main.positives.ranked[query])
    for rank, row in enumerate(_listed(evaluation, query, same), 1):
        yield _row_id(row), ranked - rank


def _scored(evaluation: Evaluation, same: Mapping[int, str]) -> Iterator[tuple[str, str, str]]:
    queries, gallery = query_ids(evaluation.task), gallery_ids(evaluation.task)
    for number, query in enumerate(queries):
        rows, scores = (
            own[number].tolist() for own in (evaluation.main.top_rows, evaluation.main.top_scores)
        )
        score_of = dict(zip(rows, scores, strict=True))
        for row in _listed(evaluation, number, same):
            yield query, gallery[row], repr(score_of[row])


def _write_ids(folder: Path, evaluation: Evaluation) -> Path:
    """ids.csv: what the row ids of queries and gallery stand for."""
    task = evaluation.task
    queries = ((f"q{q:06d}", name) for q, name in enumerate(query_ids(task)))
    gallery = ((_row_id(row), name) for row, name in enumerate(gallery_ids(task)))
    write_csv(folder / "ids.csv", ["id", "name"], (*queries, *gallery))
    return folder / "ids.csv"
