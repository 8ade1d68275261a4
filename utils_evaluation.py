"""One pass over a data set: gallery blocks to ranks of the positives, for any number of runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import chain, islice, starmap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from utils import UserError, summarise
from utils_metrics import measure, positive_ranks
from utils_retrieval import METHODS, Assets, Gallery, Queries, unit_rows
from utils_runs import Run, show_value
from utils_storage import ArrayRows, Features, MappedRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# (query, row) pairs of a block that are scored together: fits the caches; fills a GPU
PAIRS_SCORED = {"cpu": 1 << 19, "cuda": 1 << 24}
SCORES_RANKED = 1 << 22  # of several runs, together
BLOCKS_AT_ONCE = 8  # at most, on a CPU; memory grows with them
PINNED_BYTES = 256 << 20  # size of each of the two buffers through which rows go to the GPU


# ---------------------------------------------------------------------------------------------
# Gallery blocks
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A gallery and the composed queries that search it: in i-CIR, one instance.

    queries: int64 (q,), rows of the query table. rows: the database rows, a slice where they are
    contiguous, else increasing int64 (n,). positive_query, positive_row: int64 (p,), the positives
    as indices into queries and into rows, sorted by query, then row.
    """

    name: str
    queries: np.ndarray
    rows: slice | np.ndarray
    positive_query: np.ndarray
    positive_row: np.ndarray

    def database_rows(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the block as rows of the database; -1 stays -1."""
        if isinstance(self.rows, slice):
            return np.where(positions < 0, -1, positions + self.rows.start)
        return np.where(positions < 0, -1, self.rows[positions])

    def split(self, pairs: int) -> Iterator[Block]:
        """Blocks of consecutive queries and all rows, of at most that many pairs or one query."""
        size = max(1, pairs // len(self))
        for first in range(0, len(self.queries), size):
            start, stop = np.searchsorted(self.positive_query, (first, first + size))
            yield replace(
                self,
                queries=self.queries[first : first + size],
                positive_query=self.positive_query[start:stop] - first,
                positive_row=self.positive_row[start:stop],
            )

    def __len__(self) -> int:
        is_slice = isinstance(self.rows, slice)
        return self.rows.stop - self.rows.start if is_slice else len(self.rows)


def instance_blocks(queries: pd.DataFrame, labels: pd.DataFrame) -> list[Block]:
    """One block per instance with queries; a row is positive if instance and text are both equal.

    queries: str columns text, instance; labels: the same, categorical, for the database.
    Raises UserError for an instance that has queries but no database rows.
    """
    instances, texts = labels["instance"].cat, labels["text"].cat
    by_instance = np.argsort(instances.codes.to_numpy(), kind="stable")
    size = np.bincount(instances.codes, minlength=len(instances.categories))
    start = np.cumsum(size) - size
    row_text = texts.codes.to_numpy()
    query_text = texts.categories.get_indexer(queries["text"])
    blocks: list[Block] = []
    for name, members in queries.groupby("instance", sort=False).indices.items():
        code = instances.categories.get_indexer([name])[0]
        if code < 0 or not size[code]:
            raise UserError(
                f"query row {members[0] + 1}: the instance {name!r} has queries but no database "
                "rows; add rows to database_files.csv or remove its queries, and extract again"
            )
        rows = by_instance[start[code] : start[code] + size[code]]
        wanted = query_text[members][:, None]  # -1: a text that no database row has
        positive = np.nonzero((wanted == row_text[rows]) & (wanted >= 0))
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        rows = slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows
        blocks.append(Block(str(name), members, rows, *positive))
    return blocks


def _copied_blocks(
    database: MappedRows | ArrayRows, blocks: Sequence[Block], device: torch.device
) -> Iterator[tuple[Block, Tensor]]:
    """Each block with its raw rows (n, D) on a GPU, through two pinned buffers, in large copies.

    Every row is read once. A thread reads the next group of blocks into one of them while the other
    is copied and searched.
    """
    import torch

    dtype = torch.float16 if database.dtype == np.float16 else torch.float32
    groups = _groups(blocks, PINNED_BYTES // (database.dtype.itemsize * database.shape[1]))
    most, pin = max(sum(map(len, group)) for group in groups), device.type == "cuda"
    shape = (most, database.shape[1])
    buffers = [torch.empty(shape, dtype=dtype, pin_memory=pin) for _ in range(2)]
    copied = [torch.cuda.Event() if pin else None for _ in buffers]

    def read(turn: int) -> Tensor:
        """A group's rows in its buffer."""
        start = 0
        for block in groups[turn]:
            target = buffers[turn % 2][start : start + len(block)]
            np.copyto(target.numpy(), database.read(block.rows))
            start += len(block)
        return buffers[turn % 2][:start]

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for turn, group in enumerate(groups):
            rows = ahead.result().to(device, non_blocking=True, copy=True)
            if pin:
                copied[turn % 2].record(torch.cuda.current_stream(device))
                copied[(turn + 1) % 2].synchronize()  # the buffer that is read into next is free
            if turn + 1 < len(groups):
                ahead = reader.submit(read, turn + 1)
            yield from zip(group, rows.split([len(block) for block in group]), strict=True)


def _groups(blocks: Sequence[Block], most: int) -> list[list[Block]]:
    """Blocks in order, in groups of at most that many rows (a larger block is its own group)."""
    groups: list[list[Block]] = []
    room = 0
    for block in blocks:
        if not groups or len(block) > room:
            groups.append([])
            room = most
        groups[-1].append(block)
        room -= len(block)
    return groups


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positives:
    """The positives of all queries: int64 (P,) each, sorted by query, then database row."""

    query: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What one run of a method over a data set yields.

    ranks: int32 (P,), 0-based, of the positives. ap: float64 (Q,). tied: bool (Q,), a positive ties
    with a negative. top_rows: int64 (Q, K) database rows, best first, -1 past the end of a small
    block; top_scores: float32 (Q, K). seconds: of the pass, which all its runs share.
    """

    run: Run
    backbone: str
    instance: np.ndarray
    positives: Positives
    ranks: np.ndarray
    ap: np.ndarray
    tied: np.ndarray
    top_rows: np.ndarray
    top_scores: np.ndarray
    seconds: float

    def means(self) -> dict[str, float]:
        """mAP, mmAP, minmAP in percent."""
        return summarise(self.ap, self.instance)

    @property
    def method(self) -> str:
        return self.run.method

    @property
    def variant(self) -> str:
        return self.run.variant

    @property
    def config(self) -> dict[str, str]:
        """The parameters that the method reads, by name."""
        reads = METHODS[self.method].reads
        return {name: show_value(getattr(self.run.parameters, name)) for name in reads}

    @property
    def positive_count(self) -> np.ndarray:
        """How many positives each query has, int64 (Q,)."""
        return np.bincount(self.positives.query, minlength=len(self.ap))

    @cached_property
    def positive_ranks(self) -> list[np.ndarray]:
        """For each query the 0-based ranks of its positives, int32, rising."""
        return self._by_query(self.ranks)

    @cached_property
    def positive_rows(self) -> list[np.ndarray]:
        """For each query the database rows of its positives, int64, in the order of their ranks."""
        return self._by_query(self.positives.row)

    def _by_query(self, values: np.ndarray) -> list[np.ndarray]:
        order = np.lexsort((self.ranks, self.positives.query))
        return np.split(values[order], np.cumsum(self.positive_count)[:-1])


@dataclass(frozen=True)
class _Found:
    """What one run finds in one block (or in a part of it, of fewer queries), on the device.

    ranks int32, tied bool: (p,), of the positives. top: scores float32 and positions int64 (q, K),
    best first, or None.
    """

    ranks: Tensor
    tied: Tensor
    top: tuple[np.ndarray, np.ndarray] | None


def _batches(pairs: Iterator, size: int) -> Iterator[list]:
    """Pairs in order, at most `size` at a time, at least one."""
    while batch := list(islice(pairs, max(1, size))):
        yield batch


def _find(
    block: Block, queries: Queries, gallery: Gallery, prepared: Sequence, ties: str, top_k: int
) -> dict[int, _Found]:
    """Score a gallery for a block's queries in all runs; what each finds, by number.

    queries: of the block. prepared: see _by_method.
    """
    import torch

    positive = tuple(
        torch.from_numpy(index).to(gallery.raw.device)
        for index in (block.positive_query, block.positive_row)
    )
    found = {}
    for method, points, numbers in prepared:
        pairs = zip(numbers, METHODS[method].scores(queries, gallery, points), strict=True)
        for some in _batches(pairs, SCORES_RANKED // (len(block) * len(block.queries))):
            ranked = positive_ranks([scores for _, scores in some], *positive, ties)
            for (number, scores), ranks, tied in zip(some, *ranked, strict=True):
                found[number] = _Found(ranks.int(), tied, _best(scores, top_k) if top_k else None)
    return found


def _best(scores: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best scores of every query and their positions: (Q, N) -> twice (Q, min(k, N))."""
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return tuple(part[:, :k].clone().cpu().numpy() for part in ordered)


def _in_blocks(
    search: Callable[[Block, Tensor], list],
    database: MappedRows | ArrayRows,
    blocks: Sequence[Block],
    device: torch.device,
) -> Iterator[list]:
    """search(block, raw rows (n, D) on the device) of every block, in order; rows are read once.

    On a CPU several blocks are searched at once, the rows being the mapped file itself, and the
    threads of torch shared among them: a product of a few queries gains little from more threads.
    """
    import torch

    if device.type != "cpu":
        yield from starmap(search, _copied_blocks(database, blocks, device))
        return
    threads = torch.get_num_threads()
    work = [len(block) * len(block.queries) for block in blocks]
    share = -(-threads // min(BLOCKS_AT_ONCE, sum(work) // max(work)))  # of a large block, more
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(threads // share) as pool:
            yield from pool.map(
                lambda block: search(block, torch.from_numpy(database.read(block.rows))), blocks
            )
    finally:
        torch.set_num_threads(threads)


def evaluate(
    features: Features,
    runs: Sequence[Run],
    assets: Assets,
    device: torch.device,
    ties: str = "row",
    top_k: int = 0,
    progress=lambda blocks, count: blocks,
) -> list[Evaluation]:
    """Run methods over a data set in one pass.

    assets: on the device. ties: see positive_ranks. top_k: how many best rows to keep per query.
    progress: wraps what the blocks yield, whose number it is told (tqdm). Raises UserError if there
    are no queries, for an instance without database rows, and for a row that is zero, infinite or
    NaN.
    """
    import torch

    start = time.perf_counter()
    blocks = instance_blocks(features.queries, features.labels)
    if not blocks:
        raise UserError(f"{features.source.parent} holds no query; extract the features again")
    queries = _queries(features, device)
    top_k = min(top_k, max(map(len, blocks)))
    prepared = list(_by_method(runs, assets))

    @torch.inference_mode()
    def search(block: Block, raw: Tensor) -> list[tuple[Block, dict[int, _Found]]]:
        """Every part of a block with what the runs find in it."""
        gallery = Gallery.of(raw)
        _check_rows(gallery, block, features)
        parts = []
        for part in block.split(PAIRS_SCORED[device.type]):
            own = _select(queries, torch.from_numpy(part.queries).to(device))
            parts.append((part, _find(part, own, gallery, prepared, ties, top_k)))
        return parts

    with contextlib.closing(_in_blocks(search, features.database, blocks, device)) as searches:
        searched = chain.from_iterable(progress(searches, len(blocks)))
        parts, found = zip(*searched, strict=True)
    positives, order = _positives(parts)
    count = len(features.queries)
    n = np.bincount(positives.query, minlength=count)
    evaluations = []
    for number, run in enumerate(runs):
        own = [by_run.pop(number) for by_run in found]  # of many runs, not all are kept twice
        ranks = torch.cat([part.ranks for part in own]).cpu().numpy()[order]
        tied = torch.cat([part.tied for part in own]).cpu().numpy()[order]
        top_rows, top_scores = _top(parts, [part.top for part in own], count, top_k)
        evaluations.append(
            Evaluation(
                run=run,
                backbone=features.backbone,
                instance=features.queries["instance"].to_numpy(),
                positives=positives,
                ranks=ranks,
                ap=measure("AP-T", ranks, positives.query, n, n),
                tied=np.bincount(positives.query[tied], minlength=count) > 0,
                top_rows=top_rows,
                top_scores=top_scores,
                seconds=0.0,
            )
        )
    seconds = time.perf_counter() - start
    return [replace(evaluation, seconds=seconds) for evaluation in evaluations]


def _by_method(runs: Sequence[Run], assets: Assets):
    """For each method its prepared points and the numbers of their runs.

    Runs are put in the order of their parameters, so that those that differ in the last ones alone
    (harris_lambda) lie side by side and share most.
    """
    for method in dict.fromkeys(run.method for run in runs):
        numbers = [number for number, run in enumerate(runs) if run.method == method]
        numbers.sort(key=lambda number: astuple(runs[number].parameters))
        parameters = [runs[number].parameters for number in numbers]
        yield method, METHODS[method].prepare(parameters, assets), numbers


def _queries(features: Features, device: torch.device) -> Queries:
    def unit(array: np.ndarray | None, name: str) -> Tensor | None:
        place = f"{features.source.parent}: {name} features of the queries"
        return None if array is None else unit_features(array, device, place)

    return Queries(
        unit(features.query_image, "image"),
        unit(features.query_text, "text"),
        unit(features.query_context_text, "contextualised text"),
    )


def unit_features(array: np.ndarray, device: torch.device, place: str) -> Tensor:
    """Feature rows at unit length on the device: (rows, D) float32 -> the same.

    Raises UserError, with the place and the row, for a row that is zero, infinite or NaN.
    """
    import torch

    rows = unit_rows(torch.from_numpy(array).to(device))
    bad = (~rows.isfinite().all(1)).nonzero()
    if len(bad):
        raise UserError(f"{place}: row {int(bad[0]) + 1} is zero or not finite; make them again")
    return rows


def _select(queries: Queries, rows: torch.Tensor) -> Queries:
    parts = (queries.image, queries.text, queries.context_text)
    return Queries(*(None if part is None else part.index_select(0, rows) for part in parts))


def _check_rows(gallery: Gallery, block: Block, features: Features) -> None:
    usable = (gallery.length > 0) & gallery.length.isfinite()
    if not usable.all():
        row = block.database_rows((~usable).nonzero()[0].cpu().numpy())[0]
        raise UserError(
            f"{features.database.path}: row {row + 1} is zero or not finite; extract it again"
        )


def _positives(blocks: Sequence[Block]) -> tuple[Positives, np.ndarray]:
    """All positives in query order, and the order that brings the blocks' to it."""
    query = np.concatenate([block.queries[block.positive_query] for block in blocks])
    row = np.concatenate([block.database_rows(block.positive_row) for block in blocks])
    order = np.lexsort((row, query))
    return Positives(query[order], row[order]), order


def _top(blocks: Sequence[Block], top: list, queries: int, k: int):
    """Top rows int64 (Q, K) and scores float32 (Q, K) from the blocks' (scores, positions)."""
    rows = np.full((queries, k), -1, dtype=np.int64)
    scores = np.full((queries, k), -np.inf, dtype=np.float32)
    for block, (value, position) in zip(blocks, top, strict=True) if k else ():
        rows[block.queries, : position.shape[1]] = block.database_rows(position)
        scores[block.queries, : value.shape[1]] = value
    return rows, scores
