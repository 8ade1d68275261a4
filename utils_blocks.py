"""Gallery blocks: the rows that some queries search together, and the pairs that are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import starmap
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import UserError
from utils_copies import copied_ahead, shapes_of
from utils_task import NO_SET, RowSets, Task, unique_in_order

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from utils_storage import ArrayRows, MappedRows

    Arrays = Mapping[str, MappedRows | ArrayRows]

BLOCKS_AT_ONCE = 8  # or parts of one, at most, on a CPU; memory grows with them
PINNED_BYTES = 256 << 20  # size of each of the two buffers through which rows go to the GPU


# ---------------------------------------------------------------------------------------------
# Which queries search which rows
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cells:
    """(query, row) pairs of a block, int64 (p,) both, sorted by query, then row."""

    query: np.ndarray
    row: np.ndarray

    def of_queries(self, first: int, stop: int) -> Cells:
        """Those of some consecutive queries, which are numbered from 0."""
        start, end = np.searchsorted(self.query, (first, stop))
        return Cells(self.query[start:end] - first, self.row[start:end])


@dataclass(frozen=True, eq=False)
class Judged:
    """The pairs of a view: positives, and rows excluded or, alone, candidates (None: no such)."""

    positives: Cells
    excluded: Cells | None = None
    candidates: Cells | None = None

    def of_queries(self, first: int, stop: int) -> Judged:
        parts = (self.positives, self.excluded, self.candidates)
        return Judged(*(part and part.of_queries(first, stop) for part in parts))


@dataclass(frozen=True, eq=False)
class Block:
    """A gallery and the composed queries that search it: in i-CIR, one instance.

    queries: int64 (q,), rows of the task; those of one image lie side by side where the gallery is
    all there is. rows: the database rows, a slice where they are contiguous, else increasing int64
    (n,). views: the judged pairs of each view, as indices into queries and rows. copies: rows that
    show what an earlier one shows, and that one, as indices into rows, int64 (2, c), or None.
    per_image: how many of the queries have the same image, and lie side by side, on the average,
    rounded down.
    """

    queries: np.ndarray
    rows: slice | np.ndarray
    views: Mapping[str, Judged]
    copies: np.ndarray | None = None
    per_image: int = 1

    def database_rows(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the block as rows of the database; -1 stays -1."""
        if isinstance(self.rows, slice):
            return np.where(positions < 0, -1, positions + self.rows.start)
        return np.where(positions < 0, -1, self.rows[positions])

    def split(self, size: int) -> Iterator[Block]:
        """Blocks of at most `size` consecutive queries and all rows."""
        for first in range(0, len(self.queries), size):
            yield replace(
                self,
                queries=self.queries[first : first + size],
                views={n: v.of_queries(first, first + size) for n, v in self.views.items()},
            )

    def __len__(self) -> int:
        is_slice = isinstance(self.rows, slice)
        return self.rows.stop - self.rows.start if is_slice else len(self.rows)


def make_blocks(task: Task, together: str | None = None) -> list[Block]:
    """One block for the queries of each pool, in the order of their first query.

    together: a tag whose queries are not to be parted: then one block for each pool and label, or
    for each pool where the task has no such tag.
    Raises UserError if a positive or candidate of a query is not in its pool.
    """
    key = task.pool
    if together in task.queries.tags:
        _, label = np.unique(np.asarray(task.queries.tags[together], str), return_inverse=True)
        key = task.pool * (label.max(initial=0) + 1) + label
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    members = RowSets.grouped(number, len(first))
    return [_make_block(task, members[group]) for group in np.argsort(first)]


def _make_block(task: Task, queries: np.ndarray) -> Block:
    pool, per_image = int(task.pool[queries[0]]), 1
    rows = np.arange(0) if pool == NO_SET else task.sets[pool]
    if pool == NO_SET:
        rows = slice(0, len(task.gallery))
        queries, per_image = _by_image(task, queries)
    elif len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
    block = Block(queries, rows, {}, find_copies(task, rows), per_image)
    views = {}
    for name, view in task.views.items():
        excluded = _cells(task, block, view.excluded, "excluded", must_be_there=False)
        candidates = _cells(task, block, view.candidates, "candidate")
        positives = _cells(task, block, view.positives, "positive")
        views[name] = Judged(positives or _no_cells(), excluded, candidates)
    return replace(block, views=views)


def _by_image(task: Task, queries: np.ndarray) -> tuple[np.ndarray, int]:
    """The queries with those of one image side by side, and how many these are, on the average."""
    distinct, code = unique_in_order(task.queries.images[query] for query in queries.tolist())
    return queries[np.argsort(code, kind="stable")], len(queries) // len(distinct)


def find_copies(task: Task, rows: slice | np.ndarray) -> np.ndarray | None:
    """Rows that show what an earlier one of these does, and that one: Block.copies."""
    if task.gallery.copy_of is None:
        return None
    _, first, number = np.unique(task.gallery.copy_of[rows], return_index=True, return_inverse=True)
    copy = np.flatnonzero(first[number] != np.arange(len(number)))
    return np.stack([copy, first[number][copy]]) if len(copy) else None


def _no_cells() -> Cells:
    return Cells(np.empty(0, np.int64), np.empty(0, np.int64))


def _cells(
    task: Task, block: Block, sets: np.ndarray | None, what: str, must_be_there: bool = True
) -> Cells | None:
    """The cells of a per-query array of set numbers; rows outside the pool are an error or go."""
    if sets is None:
        return None
    query, row = task.sets.gather(sets[block.queries])
    if isinstance(block.rows, slice):
        position = row - block.rows.start
        there = (position >= 0) & (position < len(block))
    else:
        position = np.searchsorted(block.rows, row).clip(max=len(block) - 1)
        there = block.rows[position] == row
    if must_be_there and not there.all():
        lost = int(np.argmin(there))
        raise UserError(
            f"{task.name}: the {what} image {task.gallery.path[int(row[lost])]!r} of query "
            f"{task.queries.key[int(block.queries[query[lost]])]!r} is not in its gallery"
        )
    return Cells(query, position) if there.all() else Cells(query[there], position[there])


# ---------------------------------------------------------------------------------------------
# Their rows, read once
# ---------------------------------------------------------------------------------------------


def search_blocks(
    search: Callable[[Block, dict[str, Tensor]], list],
    database: Arrays,
    blocks: Sequence[Block],
    device: torch.device,
) -> Iterator[list]:
    """search(block, raw rows (n, D) by name, on the device) of every block, in order.

    Rows are read once. On a CPU several blocks are searched at once, the rows being the mapped file
    itself, and the threads of torch shared among them: a product of a few queries gains little from
    more threads.
    """
    import torch

    if device.type != "cpu":
        yield from starmap(search, _copied_blocks(database, blocks, device))
        return
    threads = torch.get_num_threads()
    work = [len(block) * len(block.queries) for block in blocks]
    share = -(-threads // min(BLOCKS_AT_ONCE, sum(work) // max(work)))  # of a large block, more
    torch.set_num_threads(share)

    def read(rows: slice | np.ndarray) -> dict[str, Tensor]:
        return {name: torch.from_numpy(file.read(rows)) for name, file in database.items()}

    first = blocks[0].rows
    same = all(isinstance(block.rows, slice) and block.rows == first for block in blocks)
    shared = read(first) if same else None  # mapped pages count as often as they are mapped

    def search_own(block: Block) -> list:
        return search(block, shared or read(block.rows))

    try:
        if threads == share:
            yield from map(search_own, blocks)
            return
        with _pool(threads // share, share) as pool:
            yield from pool.map(search_own, blocks)
    finally:
        torch.set_num_threads(threads)


def search_parts(search: Callable[[Block], Any], parts: Sequence[Block], device: torch.device):
    """search(part) of every part of a block, in order: a list.

    On a CPU each of the threads of torch that the block has works on a part of its own: they need
    not wait for each other after every step.
    """
    import torch

    threads = min(torch.get_num_threads(), BLOCKS_AT_ONCE, len(parts))
    if device.type != "cpu" or threads == 1:
        return list(map(search, parts))
    whole = torch.get_num_threads()
    try:
        with _pool(threads, 1) as pool:
            return list(pool.map(search, parts))
    finally:
        torch.set_num_threads(whole)


def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads for work with torch, each of which has so many threads of torch's."""
    import torch

    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))


def _copied_blocks(
    database: Arrays, blocks: Sequence[Block], device: torch.device
) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """Each block with its raw rows on a GPU, through the buffers of copied_ahead, in large copies.

    Where the device is the CPU, the rows are those of a buffer, until the next group of blocks.
    """
    row_bytes = sum(file.dtype.itemsize * file.shape[1] for file in database.values())
    groups = _groups(blocks, PINNED_BYTES // row_bytes)
    most = max(sum(map(len, group)) for group in groups)

    def fill(group: Sequence[Block], buffers: Mapping[str, Tensor]) -> int:
        start = 0
        for block in group:
            for name, file in database.items():
                target = buffers[name][start : start + len(block)]
                np.copyto(target.numpy(), file.read(block.rows))
            start += len(block)
        return start

    copies = copied_ahead(groups, fill, shapes_of(database, most), device)
    for group, rows in zip(groups, copies, strict=True):
        sizes = [len(block) for block in group]
        parts = {name: part.split(sizes) for name, part in rows.items()}
        for i, block in enumerate(group):
            yield block, {name: part[i] for name, part in parts.items()}


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
