"""A pass over a pool: units of rows on several threads, each result kept until all are there."""

from __future__ import annotations

import hashlib
import threading
import zipfile
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from distractors.pool import LARGER, Chunk, Pool, Unit
from utils import UserError, atomic_path
from utils_ranks import Group

if TYPE_CHECKING:
    import torch

Found = Mapping[str, np.ndarray]

# How many rows were left out, and the pool's number of the first, int64 (2,).
LEFT_OUT = "left_out"
NONE_LEFT_OUT = np.array([0, np.iinfo(np.int64).max])


class AllLeftOut(UserError):
    """A pool has no row that is ranked."""


class UnitWork(Protocol):
    """Takes in the rows of a unit, a few at a time, and says what it found."""

    def add(self, chunk: Chunk) -> None: ...

    def result(self) -> Found: ...


class Work(Protocol):
    """What a pass does with every unit, and how what it finds in several is joined."""

    @property
    def rows_at_once(self) -> int: ...

    def counter(self) -> UnitWork: ...

    def content(self) -> Iterator[bytes]: ...

    def join(self, found: Sequence[Found]) -> Found: ...


@dataclass(frozen=True)
class Kept:
    """A folder with what passes found in each unit: {digest of the work}/{identity of a unit}.npz.

    The names are all that decides the content, so that a changed file, query or parameter finds
    nothing that is not its own.
    """

    folder: Path

    def load(self, work: str, unit: str) -> dict[str, np.ndarray] | None:
        """What was found, None where it was not looked for, or the file was spoiled."""
        try:
            with np.load(self._path(work, unit), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def save(self, work: str, unit: str, found: Found) -> None:
        with atomic_path(self._path(work, unit)) as part, open(part, "wb") as file:
            np.savez_compressed(file, **found)

    def _path(self, work: str, unit: str) -> Path:
        return self.folder / work / f"{unit}.npz"


def run_pass(
    work: Work,
    pool: Pool,
    kinds: Sequence[str],
    device: torch.device,
    kept: Kept,
    group: Group,
    also: Sequence[Work] = (),
    progress: Callable[[Iterator[int], int, Work], Iterable] = lambda rows, count, work: rows,
) -> Found:
    """What a work finds in a pool, in all units, whoever of the group reads which.

    kinds: the features of rows that it reads. progress: wraps the numbers of rows that are done,
    one after the other, and is told how many there are, and the work. also: works that take part in
    the same reading, each kept by itself. What is found is that of all works, and LEFT_OUT. Raises
    UserError for a row that is zero, infinite or NaN, unless the pool leaves these out, AllLeftOut
    if it has no others, and UserError if the group falls apart; what was found before is kept.
    """
    works = [work, *also]
    names = [_digest(own, kinds) for own in works]
    units = pool.units()
    total: list[Found] | None = None
    interrupted = threading.Event()

    def find(unit: Unit) -> tuple[int, list[Found]]:
        identity = pool.identity(unit)
        known = {name: kept.load(name, identity) for name in names}
        lost = [name for name, own in known.items() if own is None or _is_refused(own, pool)]
        if lost:
            some = [works[names.index(name)] for name in lost]
            at_once = LARGER[device.type] * min(own.rows_at_once for own in some)
            chunks = _until(interrupted, pool.chunks(unit, kinds, device, at_once))
            for name, found in zip(lost, _read(chunks, some, len(unit)), strict=True):
                known[name] = found
                kept.save(name, identity, found)
        return len(unit), list(known.values())

    def done() -> Iterator[int]:
        nonlocal total
        mine = (units[number] for number in group.deal(len(units)))
        for rows, found in _in_threads(find, mine, len(units), device, interrupted):
            total = found if total is None else join([total, found])
            yield rows

    def join(found: Sequence[list[Found]]) -> list[Found]:
        return [_joined(*own) for own in zip(works, zip(*found, strict=True), strict=True)]

    for _ in progress(done(), len(pool), work):
        pass
    told, found = zip(*group.gather((tuple(names), total)), strict=True)
    if len(set(told)) > 1:
        raise UserError(
            "the ranks do not count against the same scores: their features, flags or processors "
            "differ; run them on equal machines with one --features_dir"
        )
    everything = dict(ChainMap(*join([own for own in found if own is not None])))
    if everything[LEFT_OUT][0] == len(pool):
        raise AllLeftOut(f"--distractors: all {len(pool)} rows are zero or not finite")
    return everything


def _digest(work: Work, kinds: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (*work.content(), repr((LEFT_OUT, *kinds)).encode()):
        digest.update(part)
    return digest.hexdigest()[:16]


def _is_refused(found: Found, pool: Pool) -> bool:
    """Whether something was found without rows that the pool does not leave out."""
    return bool(found[LEFT_OUT][0]) and not pool.skips_bad


def _until(interrupted: threading.Event, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        if interrupted.is_set():
            raise KeyboardInterrupt
        yield chunk


def _read(chunks: Iterable[Chunk], works: Sequence[Work], rows: int) -> list[Found]:
    """What each work finds in a unit of so many rows; where all are left out, LEFT_OUT alone."""
    counters, left_out = [work.counter() for work in works], [NONE_LEFT_OUT]
    for chunk in chunks:
        if len(chunk.bad):
            left_out.append(np.array([len(chunk.bad), chunk.bad[0]]))
        for counter in counters if len(chunk.number) else ():
            counter.add(chunk)
    lost = {LEFT_OUT: _left_out(left_out)}
    is_empty = lost[LEFT_OUT][0] == rows
    return [lost if is_empty else {**counter.result(), **lost} for counter in counters]


def _joined(work: Work, found: Sequence[Found]) -> Found:
    """What a work found in some parts of a pool together."""
    lost = {LEFT_OUT: _left_out([own[LEFT_OUT] for own in found])}
    told = [own for own in found if len(own) > 1]  # the others had no row
    return {**work.join(told), **lost} if told else lost


def _left_out(parts: Sequence[np.ndarray]) -> np.ndarray:
    """What LEFT_OUT is of some parts together."""
    count, first = np.stack(parts).T
    return np.array([count.sum(), first.min()])


def _in_threads(
    find: Callable[[Unit], tuple[int, list[Found]]],
    units: Iterator[Unit],
    count: int,
    device: torch.device,
    interrupted: threading.Event,
) -> Iterator[tuple[int, list[Found]]]:
    """find of every unit, as they come: several at once, with the threads of torch shared.

    A unit is taken when a thread is free for it; of a GPU there are two, so that the first rows of
    one are read while the last ones of the other are scored. Where one fails, the others that are
    at work are ended first, and the first of the pool that failed is raised; but not by the user's
    interrupt, of which they are told.
    """
    import torch

    threads = torch.get_num_threads()
    at_once = max(1, min(threads if device.type == "cpu" else 2, count))
    torch.set_num_threads(max(1, threads // at_once))
    try:
        with ThreadPoolExecutor(at_once) as pool:
            running = [pool.submit(find, unit) for unit in islice(units, at_once)]
            try:
                while running:
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    if any(one.exception() for one in ended):
                        ended, _ = wait(running)
                    for one in (one for one in running if one in ended):
                        yield one.result()
                    running = [one for one in running if one not in ended]
                    running += [pool.submit(find, unit) for unit in islice(units, len(ended))]
            except KeyboardInterrupt:
                interrupted.set()
                raise
    finally:
        torch.set_num_threads(threads)
