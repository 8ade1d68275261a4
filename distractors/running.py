"""A command with distractors: what its results are called, its pass and its curve."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distractors.alike import Alike, describe_alike, find_images
from distractors.among import Distractors, evaluate_among, ranked_views
from distractors.counting import Counting
from distractors.passes import LEFT_OUT, Found, Kept, Work, run_pass
from distractors.pool import Pool, check_pool
from distractors.precision import FULL, check_precision, describe_effect
from utils import UserError, file_safe, say
from utils_evaluation import evaluate
from utils_ranks import Group
from utils_tables import read_results, write_rows

if TYPE_CHECKING:
    import torch

    from utils_evaluation import Evaluation
    from utils_plans import Plan
    from utils_retrieval import Assets, Method
    from utils_runs import Run
    from utils_storage import Features
    from utils_task import Task

KEPT = "distractor_counts"  # folder below a data set's results
TOKENS = "it compares several tokens of every row, and distractors have one vector each"


@dataclass(frozen=True)
class Judged:
    """What comes of runs among distractors: facts for the rows of tables, and lines to be said."""

    evaluations: list[Evaluation]
    facts: dict[str, str]
    lines: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """The lines as tables have them."""
        return [line.partition(": ")[2] for line in self.lines]


@dataclass(frozen=True)
class Added:
    """Distractors that are added to a run, whose results go below `results`.

    neighbours: see Distractors. alike: the cosine from which they are said to look like a positive,
    or None. precision: of the products that count. fresh: what earlier passes found is forgotten.
    is_largest: it is the last point of a curve, or all there is. said: see tell; all points share
    it.
    """

    pool: Pool
    results: Path
    neighbours: str
    group: Group
    alike: float | None = None
    precision: str = FULL
    fresh: bool = False
    is_largest: bool = True
    said: set[tuple[str, str]] = field(default_factory=set, compare=False)

    def tell(self, dataset: str, line: str) -> None:
        """Say a line on a data set on stderr: of several ranks the first one does, and once of all
        points of a curve, though a run is named after each.
        """
        same = dataset, line.replace("_".join(self.words), "")
        if self.is_first and same not in self.said:
            self.said.add(same)
            say(line, error=True)

    def why_not(self, method: Method) -> str:
        """Why a method cannot rank them, in words; "" if it can."""
        if "tokens" in method.gallery_reads:
            return TOKENS
        for shard in self.pool.shards:
            for kind in method.gallery_reads:
                if kind not in shard.files:
                    return f"no database_{kind}.npy of the distractors in {shard.path.parent}"
        return ""

    @property
    def words(self) -> tuple[str, ...]:
        """What the names of results say of them."""
        return self._words(str(len(self.pool)))

    def _words(self, rows: str) -> tuple[str, ...]:
        words = [f"distractors-{file_safe(self.pool.name)}-{rows}"]
        words += ["neighbours_gallery"] if self.neighbours == "gallery" else []
        words += [self.precision] if self.precision != FULL else []
        return tuple(words)

    def curve_folder(self, folder: Path) -> Path:
        """Where the curve of a run goes, whose own folder is named with the words above."""
        own, curve = ("_".join(self._words(rows)) for rows in (str(len(self.pool)), "curve"))
        return folder.with_name(folder.name.replace(own, curve))

    def _facts(self, ranked: int) -> dict[str, str]:
        """What the rows of tables say of them. ranked: how many there were."""
        return {
            "distractors": str(ranked),
            "pool": self.pool.name,
            "neighbours": self.neighbours,
            **({"products": self.precision} if self.precision != FULL else {}),
        }

    def evaluate(
        self,
        features: Features,
        runs: Sequence[Run],
        assets: Assets,
        device: torch.device,
        ties: str,
    ) -> Judged:
        """The runs among the distractors.

        Raises UserError for a pool that does not fit, for a method that pools cannot be scored by,
        and for a task without known positives.
        """
        refuse_tokens(runs)
        kinds = list(dict.fromkeys(kind for run in runs for kind in run.method.gallery_reads))
        refuse_own_rows(self.pool, features)
        notes = check_pool(self.pool, features, kinds)
        for note in notes if self.is_first and self.is_largest else ():
            say(note, error=True)
        if not ranked_views(features.task):
            raise UserError(
                f"{features.task.name} has no known positives that distractors could rank before: "
                "leave --distractors"
            )
        if not len(self.pool):
            return Judged(evaluate(features, runs, assets, device, ties), self._facts(0))
        folder = self.results / features.dataset / KEPT
        check_precision(self.precision, device)
        if self.fresh:
            forget(folder, self.group)
        run_whole = partial(
            run_pass,
            pool=self.pool,
            kept=Kept(folder),
            group=self.group,
            progress=self._show if self.is_first else lambda rows, count, work: rows,
        )
        passes = Passes(self, run_whole, features, runs, ties)
        distractors = Distractors(self.pool, passes.run, self.neighbours)
        evaluations = evaluate_among(features, runs, assets, device, distractors, ties)
        facts = self._facts(len(self.pool) - passes.left_out)
        return Judged(evaluations, facts, passes.lines)

    def _show(self, rows: Iterator[int], count: int, work: Work) -> Iterator[int]:
        """A progress bar of rows; those of other ranks count when all are done."""
        from tqdm import tqdm

        what = "distractors" if isinstance(work, Counting) else "their mean and neighbours"
        bar = tqdm(total=count, unit="row", unit_scale=True, desc=what, disable=None, leave=False)
        start = time.perf_counter()
        with bar:
            for done in rows:
                bar.update(done)
                read = bar.n * self.pool.row_bytes / (time.perf_counter() - start)
                bar.set_postfix_str(f"{read / 1e9:.2f} GB/s")
                yield done

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.group.ranks.rank == 0


@dataclass(eq=False)
class Passes:
    """The passes of an evaluation, and the lines on what the counting one found.

    run_whole: run_pass with all but the work, its kinds and the device. ties: see positive_ranks.
    """

    added: Added
    run_whole: Callable[..., Found]
    features: Features
    runs: Sequence[Run]
    ties: str
    left_out: int = 0
    lines: list[str] = field(default_factory=list)

    def run(self, work: Work, **options) -> Found:
        """What run_pass finds, in the precision that was asked for."""
        if not isinstance(work, Counting):
            return self.run_whole(work, **options)
        added, task = self.added, self.features.task
        counting = replace(work, precision=added.precision)
        images = [] if added.alike is None else find_images(self.features, positive_rows(task))
        looking = [Alike.of(images, added.alike, options["device"])] if images else []
        found = self.run_whole(counting, also=looking, **options)
        self.left_out = int(found[LEFT_OUT][0])
        self.lines += describe_left_out(found, added.pool)
        if images:
            self.lines += describe_alike(found, images, added.alike, added.pool)
        if added.precision != FULL:
            count = partial(self.run_whole, **options)
            self.lines += describe_effect(counting, count, added.pool, self.runs, task, self.ties)
        return found


def refuse_own_rows(pool: Pool, features: Features) -> None:
    """Raise UserError if the data set's own gallery is among the distractors."""
    own = {file.path.resolve() for file in features.database_files.values()}
    for shard in pool.shards:
        if shard.path.resolve() in own:
            raise UserError(
                f"--distractors {shard.path}: these are the rows of {features.dataset} itself, "
                "right answers among them; --gallery all ranks every query against all of them"
            )


def refuse_tokens(runs: Sequence[Run]) -> None:
    """Raises UserError for a method that compares tokens: rows of pools are one vector each."""
    for run in runs:
        if "tokens" in run.method.gallery_reads:
            raise UserError(
                f"--distractors with --method {run.method.name}: {TOKENS}; take another method"
            )


def positive_rows(task: Task) -> np.ndarray:
    """The gallery's rows that are positives among which distractors are ranked: int64, increasing.

    Of copies the first.
    """
    views = ranked_views(task).values()
    rows = np.concatenate([task.sets.gather(view.positives)[1] for view in views])
    copy_of = task.gallery.copy_of
    return np.unique(rows if copy_of is None else np.asarray(copy_of)[rows])


def describe_left_out(found: Found, pool: Pool) -> list[str]:
    """The line on rows that were left out, if there are any."""
    count, first = found[LEFT_OUT].tolist()
    if not count:
        return []
    return [
        f"warning: {count} of {len(pool)} distractors are zero or not finite and were left out; "
        f"the first: {pool.place(first)}"
    ]


def forget(folder: Path, group: Group) -> None:
    """Remove what earlier passes found, before any rank looks for it."""
    if group.ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    group.gather(None)


# ---------------------------------------------------------------------------------------------
# The curve
# ---------------------------------------------------------------------------------------------


def write_curves(plans: Mapping[tuple[str, Added], Plan]) -> None:
    """Of each data set, the runs' rows in one table, and a plot of each method's first figure.

    plans: those that were run, by data set and what was added, whose tables are there.
    """
    for dataset in dict.fromkeys(dataset for dataset, _ in plans):
        own = {added: plan for (name, added), plan in plans.items() if name == dataset}
        rows = []
        for plan in own.values():
            rows += read_results(plan.folder / "mAP_table.csv")[-len(plan.runs) :]
        added, plan = next(iter(own.items()))
        if added.is_first:
            paths = _write_curve(added.curve_folder(plan.folder), rows)
            say(f"the curve: {', '.join(map(str, paths))}")


def _write_curve(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    import pandas as pd

    from report import plot_sweep

    table = folder / "mAP_table.csv"
    write_rows(table, rows)
    names = list(rows[0])
    column = names[names.index("variant") + 1]
    paths = [table]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        points = [{"distractors": int(r["distractors"]), column: float(r[column])} for r in own]
        paths += plot_sweep(folder / method, pd.DataFrame(points), ["distractors"], None, column)
    return paths
