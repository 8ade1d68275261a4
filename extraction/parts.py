"""Parts on the disk: what a job has done so far, and arrays put together from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError, atomic_path

if TYPE_CHECKING:
    from extraction.stage import Stage


@dataclass(frozen=True)
class Unit:
    """A piece of a stage that one rank does: a range of its items, or shards."""

    name: str
    start: int = 0
    stop: int = 0
    shards: tuple[Path, ...] = ()


def cut_ranges(count: int, size: int) -> list[Unit]:
    """Units of `size` items, the last one shorter."""
    starts = range(0, count, size)
    return [Unit(f"{i:06d}", start, min(start + size, count)) for i, start in enumerate(starts)]


def shard_units(shards: Sequence[Path], together: bool) -> list[Unit]:
    """A unit for each shard; or one of all, where an image recurs in several of them."""
    if together:
        return [Unit(f"all-{len(shards)}", shards=tuple(shards))]
    return [Unit(shard.stem.replace("+", "-"), shards=(shard,)) for shard in shards]


def shard_sizes(units: list[Unit]) -> dict[str, list[int]]:
    """The bytes of the shards of every unit."""
    return {unit.name: [shard.stat().st_size for shard in unit.shards] for unit in units}


@dataclass
class Part:
    """What a part file holds: features (k, D) of items ids (k,), and what went wrong.

    bad: (item, name, cause) of images that cannot be read. covered: rows whose sample was met in
    the shards; unmatched: samples that belong to no row. odd: (item, name, fact) of images that not
    every program shows alike, a fact of utils_pixels.FACTS each.
    """

    ids: np.ndarray
    features: np.ndarray
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    covered: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    unmatched: int = 0
    odd: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """The folder in which a job keeps what is done.

    suffix: ends the names of the stages' folders, where a stage has a name of the user's, which
    might be that of another file of the job's.
    """

    folder: Path
    suffix: str = ""

    def _of(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name}{self.suffix}"

    def write(self, stage: Stage, name: str, part: Part) -> None:
        """Write one part, whole or not at all."""
        notes = json.dumps({"bad": part.bad, "unmatched": part.unmatched, "odd": part.odd})
        with (
            atomic_path(self._of(stage) / f"{name}.npz") as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez(file, ids=part.ids, features=part.features, covered=part.covered, notes=notes)

    def names(self, stage: Stage) -> set[str]:
        """The names of the parts there are."""
        folder = self._of(stage)
        files = os.listdir(folder) if folder.is_dir() else ()
        return {name.removesuffix(".npz") for name in files if _is_part(name)}

    def missing(self, stage: Stage) -> list[Unit]:
        """The units that are not finished."""
        done = self.names(stage)
        return [unit for unit in stage.units if unit.name not in done]

    def files(self, stage: Stage) -> Iterator[Path]:
        """The parts of a stage's units in order, a unit's batches before its last part."""
        batches: dict[str, list[str]] = {}
        for name in sorted(self.names(stage)):
            batches.setdefault(name.partition("+")[0], []).append(name)
        for unit in stage.units:
            names = batches.get(unit.name, [])
            for name in sorted(names, key=lambda name: (name == unit.name, name)):
                yield self._of(stage) / f"{name}.npz"

    def read(self, stage: Stage, features: bool = True) -> Iterator[Part]:
        """The parts of a stage in order, one in memory at a time."""
        for path in self.files(stage):
            try:
                with np.load(path, allow_pickle=False) as content:
                    notes = json.loads(str(content["notes"]))
                    values = content["features"] if features else np.empty(0)
                    part = Part(content["ids"], values, notes["bad"], content["covered"])
                    part.unmatched, part.odd = notes["unmatched"], notes.get("odd", [])
            except OSError:
                raise
            except Exception as error:  # a disk that lost bytes: zip, header and JSON errors
                self.drop(stage, path.stem.partition("+")[0])
                raise UserError(
                    f"{path} is damaged ({error}); it was removed with its unit, which the same "
                    "command encodes again"
                ) from None
            yield part

    def drop(self, stage: Stage, unit: str) -> None:
        """Remove the parts of a unit."""
        for name in self.names(stage):
            if name.partition("+")[0] == unit:
                (self._of(stage) / f"{name}.npz").unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    return name.endswith(".npz") and not name.startswith(".")


def drop_parts(folder: Path) -> None:
    """Remove a folder of parts, what other ranks may still be writing there included."""
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# Putting parts together
# ---------------------------------------------------------------------------------------------


def write_arrays(folder: Path, stage: Stage, parts: Parts, dim: int, keep: np.ndarray) -> None:
    """Write a stage's rows (those to keep) to the .npy files of its arrays, side by side in them.

    dim: the width of the one array of a stage that names none.
    """
    first = 0
    for name, width in (stage.columns or {stage.name: dim}).items():
        write_array(folder / f"{name}.npy", stage, parts, width, keep, first)
        first += width


def write_array(
    path: Path, stage: Stage, parts: Parts, dim: int, keep: np.ndarray, first: int = 0
) -> None:
    """Write a stage's rows (those to keep) to a .npy file, one part in memory at a time.

    Of their numbers those from `first` on, `dim` of them.
    """
    item_of_row, items = stage.rows.item_of_row, len(stage.rows.items)
    rows_by_item = np.argsort(item_of_row, kind="stable")
    starts = np.searchsorted(item_of_row[rows_by_item], np.arange(items + 1))
    target = np.cumsum(keep) - 1
    filled = np.zeros(items, bool)
    dtype = np.dtype(stage.dtype)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (int(keep.sum()), dim)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + int(keep.sum()) * dim * dtype.itemsize)
        for part in parts.read(stage):
            fresh = ~filled[part.ids]
            ids, features = part.ids[fresh], part.features[fresh, first : first + dim]
            filled[ids] = True
            counts = starts[ids + 1] - starts[ids]
            source = np.repeat(np.arange(len(ids)), counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            rows = rows_by_item[np.repeat(starts[ids], counts) + within]
            kept = keep[rows]
            _write_rows(file, offset, target[rows[kept]], features, source[kept])


def _write_rows(
    file, offset: int, target: np.ndarray, features: np.ndarray, source: np.ndarray
) -> None:
    """Write features[source[i]] to row target[i] of an open array, runs of rows at a time."""
    order = np.argsort(target)
    target, source = target[order], source[order]
    ends = np.flatnonzero(np.diff(target) != 1) + 1
    row_bytes = features.shape[1] * features.itemsize
    for run in np.split(np.arange(len(target)), ends):
        if len(run):
            file.seek(offset + int(target[run[0]]) * row_bytes)
            file.write(np.ascontiguousarray(features[source[run]]).tobytes())
