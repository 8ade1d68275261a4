"""What a command that judges somebody else's results runs and writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks import read_task
from external.results import External, ExternalFiles, read_external
from utils import UserError, file_safe
from utils_backbones import Places
from utils_evaluation import Evaluation, Ranking, plan_columns
from utils_plans import Output, Plan, Tell, WhyNot, mean_of_draws
from utils_retrieval import NoParameters
from utils_runs import Run
from utils_storage import Features, features_folder, without_features

NOT_COVERED = math.nan  # a figure that depends on rows that no list names


@dataclass(frozen=True)
class ExternalPlan(Plan):
    """One row for results that were brought: of several draws their mean, of short lists what the
    lists decide."""

    files: ExternalFiles
    external: External | None = field(default=None, compare=False)

    @property
    def variant(self) -> str:
        """The name of the results' folder."""
        return file_safe("_".join([f"external_{self.files.name}", *self.setting.words]))

    @property
    def runs(self) -> list[Run]:
        methods = self.external.methods if self.external else ()
        return [Run(method, NoParameters(), self.variant) for method in methods]

    @property
    def folder(self) -> Path:
        return self.results / self.variant

    def read_features(self, places: Places, dataset: str) -> Features:
        """The data set's features; where there are none, its task from the annotations alone."""
        name, folder = self.setting.dataset, self.setting.backbone
        if features_folder(places.features, folder, name).is_dir():
            return super().read_features(places, dataset)
        return without_features(read_task(dataset, places.data))

    def ready(
        self, features: Features, places: Places, tell: Tell, why_not: WhyNot
    ) -> tuple[ExternalPlan, Features]:
        external = read_external(self.files, features)
        for line in external.lines:
            tell(line)
        return replace(self, external=external), external.features

    def write(self, evaluations: list[Evaluation], facts: Mapping, output: Output) -> None:
        evaluations = [without_missing(e, self.external.missing) for e in evaluations]
        if self.external.truncated is not None:
            _refuse_beyond(evaluations[0].main, self.external.truncated)
            judged, said = what_lists_decide(evaluations, self.external.truncated)
        else:
            judged, said = mean_of_draws(evaluations)
        for line in said:
            output.tell(line)
        self.write_one(judged, [*self.external.lines, *said], facts, output)


def without_missing(evaluation: Evaluation, missing: np.ndarray | None) -> Evaluation:
    """Queries without results score 0 in every measure, and stay in the means."""
    if missing is None or not missing.any():
        return evaluation
    values = {key: np.where(missing, 0.0, value) for key, value in evaluation.values.items()}
    views = {name: _emptied(ranking, missing) for name, ranking in evaluation.views.items()}
    columns = plan_columns(evaluation.task)(values)
    return replace(evaluation, values=values, views=views, columns=columns)


def _emptied(ranking: Ranking, missing: np.ndarray) -> Ranking:
    """A ranking that holds nothing of some queries: their positives come behind every gallery."""
    behind = ranking.positives.ranked.max(initial=0)
    return replace(
        ranking,
        ranks=np.where(missing[ranking.positives.query], behind, ranking.ranks),
        tied=ranking.tied & ~missing,
        top_rows=np.where(missing[:, None], -1, ranking.top_rows),
    )


def _refuse_beyond(ranking: Ranking, shortest: int) -> None:
    """Raise UserError where more best rows are to be written than the lists name."""
    wanted = ranking.top_rows.shape[1]
    if wanted > shortest:
        raise UserError(
            f"the lists end at rank {shortest}, before the {wanted} best rows of each query that "
            f"--top_k, --report or --export would write: add --top_k {shortest}, and to --export "
            f"--export_k {shortest}"
        )


def what_lists_decide(
    evaluations: Sequence[Evaluation], shortest: int
) -> tuple[Evaluation, list[str]]:
    """The figures that do not depend on rows that no list names, and the bounds of the others.

    evaluations: of the lists, and of the positives that are not listed right behind and last.
    """
    lists, best, worst = evaluations
    keys = [key for key in lists.values if np.array_equal(best.values[key], worst.values[key])]
    columns, said = {}, []
    for name, value in lists.columns.items():
        low, high = worst.columns[name], best.columns[name]
        columns[name] = value if low == high else NOT_COVERED
        if low != high:
            said.append(f"{name} lies between {low:.2f} and {high:.2f}")
    if said:
        said = [f"the lists end at rank {shortest}: {', '.join(said)}"]
    values = {key: lists.values[key] for key in keys}
    return replace(lists, values=values, columns=columns), said
