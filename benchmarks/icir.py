"""i-CIR (NeurIPS 2025, arXiv 2510.25387), and data sets of one's own in its two-CSV form.

Every instance has a database of its own. A row of it is positive for a query of the instance if
its text is the query's; rows with another text that is asked of the instance are related.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError
from utils_task import NO_SET, Column, Group, Images, QueryTable, RowSets, Task, View

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    Column("mAP", "AP-T"),
    Column("mmAP", "AP-T", groups=(Group("instance"),)),
    Column("minmAP", "AP-T", groups=(Group("instance", "min"),)),
)


def task_of_labels(
    name: str, queries: pd.DataFrame, labels: pd.DataFrame, paths: Sequence[str], notes: Sequence
) -> Task:
    """The task of labelled rows.

    queries: str columns image_path, text, instance. labels: categorical columns text and instance,
    a row a database image; paths: those of the images, notes: their texts (both may be read late).
    Raises UserError for an instance that has queries but no database rows.
    """
    texts, instances = labels["text"].cat, labels["instance"].cat
    row_instance, row_text = (c.codes.to_numpy().astype(np.int64) for c in (instances, texts))
    instance = instances.categories.get_indexer(queries["instance"])
    text = texts.categories.get_indexer(queries["text"])  # -1: a text that no row has
    pools = RowSets.grouped(row_instance, len(instances.categories))
    _check_pools(queries, np.where(instance >= 0, pools.sizes(instance), 0))

    width = len(texts.categories) + 1
    asked, number = np.unique(instance * width + text + 1, return_inverse=True)
    pair = row_instance * width + row_text + 1
    place = np.searchsorted(asked, pair)
    is_asked = np.append(asked, -1)[place] == pair
    positives = RowSets.grouped(np.where(is_asked, place, -1), len(asked))
    related = RowSets.grouped(np.where(is_asked, row_instance, -1), len(instances.categories))
    sets = RowSets.joined([pools, positives, related])
    has_positives = (positives.sizes(number) > 0) & (text >= 0)
    strings = {column: queries[column].tolist() for column in queries}
    return Task(
        name=name,
        gallery=Images(path=paths, note=notes),
        queries=QueryTable(
            key=[str(row) for row in range(1, len(queries) + 1)],
            images=[(path,) for path in strings["image_path"]],
            text=strings["text"],
            tags={"instance": strings["instance"]},
            shown={
                "Image Query": strings["image_path"],
                "Text Query": strings["text"],
                "Instance": strings["instance"],
            },
        ),
        sets=sets,
        pool=instance.astype(np.int64),
        views={"all": View(np.where(has_positives, len(pools) + number, NO_SET))},
        columns=COLUMNS,
        related=len(pools) + len(positives) + instance,
    )


def _check_pools(queries: pd.DataFrame, sizes: np.ndarray) -> None:
    """Raise UserError for the first query whose instance has no database row."""
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        name = queries["instance"].iloc[empty[0]]
        raise UserError(
            f"query row {empty[0] + 1}: the instance {name!r} has queries but no database "
            "rows; add rows to database_files.csv or remove its queries, and extract again"
        )
