"""What a command is to run, and what it writes of it: one run, all methods, a sweep, an ablation.

A plan has `runs`, in the order of its tables, `folders`, which it will write, and `write`, which
turns their evaluations into files and console lines.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from methods import find_method, flags_of, list_methods
from utils import UserError, warn
from utils_backbones import Places
from utils_runs import (
    Run,
    Setting,
    ablation_points,
    backbone_suffix,
    check_effects,
    parse_axis,
    show_value,
    sweep_points,
)
from utils_startup import quick_imports

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from utils_evaluation import Evaluation
    from utils_retrieval import Method
    from utils_storage import Features

Tell = Callable[[str], None]  # says a line that warns
WhyNot = Callable[["Method"], str]  # why a method cannot be run, "" if it can
FILES_NAMED = 4  # in a message


@dataclass(frozen=True)
class Output:
    """How results are written.

    ties: the rule that ranks them, None for the task's own. top_k: rankings of that length, 0 for
    none. page: writes the page of ranked images of some evaluations into a folder and gives its
    path, or None. painter: what the plan's `painter` gave. export: the kind of files of other
    evaluators, or None; export_k: their rows of each query, None for the usual number; spelled: a
    gallery path -> another one that names the same file. tell: says a line that warns.
    """

    ties: str | None = None
    top_k: int = 0
    page: Callable[[Path, Sequence[Evaluation]], Path] | None = None
    painter: Executor | None = None
    export: str | None = None
    export_k: int | None = None
    spelled: Mapping[str, str] = field(default_factory=dict)
    tell: Tell = warn


def make_plan(
    method: str,
    setting: Setting,
    results: Path,
    sweep: Sequence[str] | None = None,
    ablation: bool = False,
) -> Plan:
    """The plan of a command. method: a name, or "all"; results: the data set's results folder.

    Raises UserError for flags without effect or sense.
    """
    if sweep:
        return SweepPlan(results, setting, method, tuple(sweep))
    if ablation:
        return AblationPlan(results, setting, method)
    if method == "all":
        return AllPlan(results, setting)
    return SinglePlan(results, setting, method)


@dataclass(frozen=True)
class Plan:
    """What the four plans share. results: the data set's folder of results."""

    results: Path
    setting: Setting
    compares: ClassVar[bool] = False  # points by a column, which hidden ground truth has not

    @property
    def runs(self) -> list[Run]:
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where the plan's own table goes."""
        raise NotImplementedError

    @property
    def folders(self) -> list[Path]:
        """All folders that are written."""
        return [self.results, self.folder]

    def check(self) -> None:
        """Raise UserError for a given parameter that changes nothing."""
        check_effects(self.setting.given, self.runs)

    def read_features(self, places: Places, dataset: str) -> Features:
        """The data set's features. dataset: its name or folder, as given."""
        from utils_storage import load_features

        return load_features(places.features, self.setting.backbone, self.setting.dataset)

    def ready(
        self, features: Features, places: Places, tell: Tell, why_not: WhyNot
    ) -> tuple[Plan, Features]:
        """The plan and the features once these are read: of all, those without their inputs go.

        tell: says which these are. why_not: further reasons to leave a method out. Raises UserError
        for a method without its inputs, and if there is nothing to compare points by: hidden ground
        truth.
        """
        for run in self.runs:
            if run.method.inputs and _missing_files(features, run.method):
                lost = _describe_missing(features, [run.method])
                raise UserError(f"--method {run.method.name}: {lost}")
        if self.compares and not features.task.columns:
            raise UserError(
                f"the ground truth of {features.task.name} is hidden: points cannot be compared; "
                "run one with --method and send its files to the evaluation server"
            )
        return self, features

    @contextlib.contextmanager
    def painter(self) -> Iterator[Executor | None]:
        """A process that draws what `write` has drawn, None where it draws nothing."""
        yield None

    def write(self, evaluations: list[Evaluation], facts: Mapping, output: Output) -> None:
        """Write tables, print them, warn."""
        raise NotImplementedError

    def write_one(
        self, judged: Evaluation, notes: Sequence[str], facts: Mapping, output: Output
    ) -> None:
        """Write the one run of a plan that has no more. notes: further ones than in the facts."""
        notes = [facts.get("notes"), *notes]
        facts = {**facts, "notes": "; ".join(filter(None, notes))}
        write_runs(self.results, [judged], facts, output)
        print(f"written to {self.folder}")
        if output.page:
            print(output.page(self.folder, [judged]))


# ---------------------------------------------------------------------------------------------
# One run, or all methods
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinglePlan(Plan):
    """One run of one method."""

    method: str
    names: tuple[str, ...] = ()  # of the query features, once these are read

    @cached_property
    def runs(self) -> list[Run]:
        run = self.setting.run(self.method)
        return [replace(run, method=own) for own in run.method.draws(run.method, self.names)]

    @property
    def folder(self) -> Path:
        return self.results / self.runs[0].variant

    def ready(
        self, features: Features, places: Places, tell: Tell, why_not: WhyNot
    ) -> tuple[SinglePlan, Features]:
        super().ready(features, places, tell, why_not)
        return replace(self, names=tuple(features.query_files)), features

    def write(self, evaluations: list[Evaluation], facts: Mapping, output: Output) -> None:
        judged, said = mean_of_draws(evaluations)
        for line in said:
            output.tell(line)
        self.write_one(judged, said, facts, output)


@dataclass(frozen=True)
class AllPlan(Plan):
    """Every method, on one load of the features, and their comparison."""

    left_out: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def runs(self) -> list[Run]:
        return [self.setting.run(name) for name in list_methods() if name not in self.left_out]

    @property
    def folder(self) -> Path:
        return self.results / f"all{backbone_suffix(self.setting.backbone)}"

    @property
    def folders(self) -> list[Path]:
        return [*super().folders, *(self.results / run.variant for run in self.runs)]

    def ready(
        self, features: Features, places: Places, tell: Tell, why_not: WhyNot
    ) -> tuple[AllPlan, Features]:
        from utils_assets import missing_asset

        why: dict[str, list[str]] = {}  # the methods that lack the same, in a line
        bare = [run.method for run in self.runs if _missing_files(features, run.method)]
        for some in ([m for m in bare if m.inputs], [m for m in bare if not m.inputs]):
            if some:
                why[_describe_missing(features, some)] = [method.name for method in some]
        for run in self.runs:
            if run.method in bare:
                continue
            if reason := missing_asset(places, features, run) or why_not(run.method):
                why.setdefault(reason, []).append(run.method.name)
        for reason, names in why.items():
            tell(f"left out: {', '.join(names)} ({reason})")
        left_out = frozenset(chain(*why.values()))
        if len(left_out) == len(self.runs):
            raise UserError("no method has its inputs; the lines above say what is missing")
        return replace(self, left_out=left_out), features

    def write(self, evaluations: list[Evaluation], facts: Mapping, output: Output) -> None:
        from utils_tables import write_rows

        rows = write_runs(self.results, evaluations, facts, output)
        write_rows(self.folder / "mAP_table.csv", rows)
        shutil.rmtree(self.folder / "report", ignore_errors=True)
        print(f"written to {self.folder} and {len(rows)} folders beside it")
        if output.page:
            print(output.page(self.folder, evaluations))


def mean_of_draws(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, list[str]]:
    """The mean over the draws of a system that draws, and the spread (N - 1) of each figure."""
    first = evaluations[0]
    if len(evaluations) == 1:
        return first, []
    import numpy as np

    values = {k: np.mean([e.values[k] for e in evaluations], axis=0) for k in first.values}
    of = {name: [e.columns[name] for e in evaluations] for name in first.columns}
    columns = {name: float(np.mean(found)) for name, found in of.items()}
    spread = ", ".join(f"{name} +- {np.std(found, ddof=1):.2f}" for name, found in of.items())
    said = [f"mean of {len(evaluations)} draws: {spread}; rankings are the first draw's"]
    return replace(first, values=values, columns=columns), said


def _missing_files(features: Features, method: Method) -> list[str]:
    """The files of features that a method reads and that are not there."""
    lost = [f"query_{name}.npy" for name in method.reads if not features.has_query(name)]
    there = features.database_files
    return lost + [f"database_{name}.npy" for name in method.gallery_reads if name not in there]


def _describe_missing(features: Features, methods: Sequence[Method]) -> str:
    """Which of these files are not there, in words, and what makes them."""
    lost = list(dict.fromkeys(file for own in methods for file in _missing_files(features, own)))
    made = {
        name + "".join(f" --{need} ..." for need in source.needs): None
        for own in methods
        for name, source in own.inputs.items()
    }
    command = f"create_features.py --dataset {features.dataset} --backbone {features.backbone}"
    how = ""
    if len(made) == 1:
        how = f"; make it with python3 {command} --inputs {', '.join(made)}"
    elif made:
        how = f"; make them with python3 {command} --inputs NAME: {', '.join(made)}"
    files = (
        f"{lost[0]} and {len(lost) - 1} more files" if len(lost) > FILES_NAMED else ", ".join(lost)
    )
    return f"no {files} in {features.folder}{how}"


def write_runs(
    results: Path, evaluations: Sequence[Evaluation], facts: Mapping, output: Output
) -> list[dict[str, str]]:
    """Write each run's folder, print the table and the warnings; the rows of the table."""
    from utils_tables import (
        console_columns,
        describe_cautions,
        describe_task,
        describe_ties,
        format_table,
        result_row,
        write_results,
    )

    rows = [result_row(evaluation, facts, output.top_k) for evaluation in evaluations]
    submissions = [_submissions(evaluation) for evaluation in evaluations]  # checked, all of them
    for evaluation, row, files in zip(evaluations, rows, submissions, strict=True):
        write_results(results / evaluation.variant, evaluation, row, output.top_k, files)
    task = evaluations[0].task
    print(format_table(rows, console_columns(task, output.top_k)))
    for evaluation in evaluations if output.export else ():
        _export(results / evaluation.variant, evaluation, output)
    if submissions[0]:
        where = "each folder" if len(rows) > 1 else results / evaluations[0].variant
        print(f"for the evaluation server: {' and '.join(submissions[0])} in {where}")
    ties = describe_ties(evaluations, facts["ties"])
    cautions = describe_cautions([evaluation.run for evaluation in evaluations])
    for line in (*describe_task(task), *ties, *cautions):
        output.tell(line)
    return rows


def _export(folder: Path, evaluation: Evaluation, output: Output) -> None:
    from external.export import write_export

    print("exported:", *write_export(folder, evaluation, output.export, output.spelled))


def _submissions(evaluation: Evaluation) -> dict[str, str]:
    """The files that a run submits: name -> text."""
    if not evaluation.task.submitted:
        return {}
    from utils_submissions import submission_files

    top_rows = {name: ranking.top_rows for name, ranking in evaluation.views.items()}
    return submission_files(evaluation.task, top_rows, evaluation.task.submitted)


# ---------------------------------------------------------------------------------------------
# Ablation
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblationPlan(Plan):
    """The table of a method's components, in one go."""

    method: str
    compares: ClassVar[bool] = True

    @cached_property
    def full(self) -> Run:
        if not find_method(self.method).steps:
            able = ", ".join(name for name, m in list_methods().items() if m.steps)
            raise UserError(
                f"--ablation has no effect on --method {self.method}: only {able} has steps"
            )
        return self.setting.run(self.method)

    @cached_property
    def points(self) -> list[tuple[str, Any]]:
        return ablation_points(self.full)

    @cached_property
    def runs(self) -> list[Run]:
        return [self.setting.named(self.full.method, point) for _, point in self.points]

    @property
    def folder(self) -> Path:
        return self.results / f"{self.full.variant}_ablation"

    def write(self, evaluations: list[Evaluation], facts: Mapping, output: Output) -> None:
        from utils_tables import describe_task, format_table, result_row, write_rows

        rows = [
            {"components": label, **result_row(evaluation, facts)}
            for (label, _), evaluation in zip(self.points, evaluations, strict=True)
        ]
        table = self.folder / "mAP_table.csv"
        write_rows(table, rows)
        means = [column.name for column in evaluations[0].task.columns]
        print(format_table(rows, ["components", *means]))
        for line in describe_task(evaluations[0].task):
            output.tell(line)
        print(f"written to {table}")


# ---------------------------------------------------------------------------------------------
# Sweep
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepPlan(Plan):
    """A grid over parameters: a row a point, and a plot over one or two axes of numbers."""

    method: str
    sweep: tuple[str, ...]
    compares: ClassVar[bool] = True

    @cached_property
    def axes(self) -> dict[str, list]:
        axes = dict(parse_axis(text) for text in self.sweep)
        if len(axes) < len(self.sweep):
            raise UserError("--sweep names a parameter twice: give all its values at once")
        both = sorted(set(axes) & set(self.setting.given))
        if both:
            raise UserError(f"--{both[0]} is swept and given: leave one of the two")
        return axes

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        return sweep_points(self.axes)

    @cached_property
    def swept(self) -> list[Run]:
        return [self.setting.run(self.method, point) for point in self.points]

    @cached_property
    def ends(self) -> list[Run]:
        """The runs that the method wants its sweep of a parameter compared with."""
        compared = find_method(self.method).compared
        names = dict.fromkeys(name for axis in self.axes for name in compared.get(axis, ()))
        ends = []
        for method in map(find_method, names):
            for run in self.swept:
                given = {n: getattr(run.parameters, n, d) for n, (d, _) in flags_of(method).items()}
                ends.append(replace(self.setting, given=given, use_preset=False).run(method.name))
        return list(dict.fromkeys(ends))

    @property
    def runs(self) -> list[Run]:
        return [*self.swept, *self.ends]

    @property
    def folder(self) -> Path:
        return self.results / f"{self.setting.run(self.method).variant}_sweep"

    def check(self) -> None:
        check_effects(self.setting.given, self.swept, swept=list(self.axes))

    @property
    def is_drawn(self) -> bool:
        """Whether the sweep has one or two axes, of numbers only."""
        is_switch = any(isinstance(values[0], bool) for values in self.axes.values())
        return len(self.axes) <= 2 and not is_switch

    @contextlib.contextmanager
    def painter(self) -> Iterator[Executor | None]:
        """It imports matplotlib while this process imports torch and evaluates."""
        if not self.is_drawn:
            yield None
            return
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as painter:
            painter.submit(_prepare_to_draw)
            yield painter

    def write(self, evaluations: list[Evaluation], facts: Mapping, output: Output) -> None:
        from utils_tables import (
            describe_cautions,
            describe_task,
            format_table,
            result_row,
            write_rows,
        )

        points, ends = evaluations[: len(self.points)], evaluations[len(self.points) :]
        first, *_ = columns = [column.name for column in evaluations[0].task.columns]
        rows = [
            {**result_row(e, facts), **{name: show_value(at) for name, at in point.items()}}
            for e, point in zip(points, self.points, strict=True)
        ]
        means = [evaluation.means()[first] for evaluation in points]
        end_means = {evaluation.variant: evaluation.means()[first] for evaluation in ends}
        for old in (*self.folder.glob("*.png"), *self.folder.glob("*.svg")):
            old.unlink()
        write_rows(self.folder / "mAP_table.csv", rows)
        stem = self.folder / "_".join(self.axes)
        table = [{**point, first: mean} for point, mean in zip(self.points, means, strict=True)]
        drawing = output.painter and output.painter.submit(
            _draw, stem, table, list(self.axes), end_means or None, first
        )
        best = max(range(len(rows)), key=means.__getitem__)
        print(format_table(rows, [*self.axes, *columns]))
        for line in (*describe_task(evaluations[0].task), *describe_cautions(self.swept)):
            output.tell(line)
        print(f"best: {_values(self.points[best])} with {first} {rows[best][first]}")
        if ends:
            print(
                "composition gain: "
                f"{means[best] - max(end_means.values()):+.2f} {first} over the better of "
                + ", ".join(f"{name} {value:.2f}" for name, value in end_means.items())
            )
        print(f"written to {self.folder / 'mAP_table.csv'}")
        for path in drawing.result() if drawing else []:
            print(f"written to {path}")


def _prepare_to_draw() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for it says so
    with quick_imports():
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401

        import report  # noqa: F401


def _draw(
    path_stem: Path, table: list[dict], axes: list[str], ends: dict[str, float] | None, value: str
) -> list[Path]:
    import pandas as pd

    from report import plot_sweep

    return plot_sweep(path_stem, pd.DataFrame(table), axes, ends, value)


def _values(label: dict) -> str:
    return ", ".join(f"{name} {show_value(value)}" for name, value in label.items())
