"""Pools of distractors on disk: shards of rows, as others publish them and as our own features.

Accepted is a .npy file; a folder of such files, or of img_emb/ with them, as clip-retrieval and
LAION write them (metadata beside them is not read); and a features folder of this toolkit.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError, read_json
from utils_assets import StoredAsset, check_same_model
from utils_copies import copied_ahead, shapes_of
from utils_metrics import slices
from utils_storage import MappedRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils_storage import Features

ROWS_OF_A_UNIT = 1 << 16  # what is counted, kept and dealt to ranks at once
# Rows of a unit that are scored together: a part's scores of them fit the caches, all vectors' the
# memory.
MOST_ROWS = 8192
ALIGNED = 256  # where there are as many, a multiple of it: products of others take up to 1.5 times
QUERIES_AT_ONCE = 512  # of a part, where a method leaves it open
SCORES_OF_A_PART = 1 << 21
SCORES_HELD = 1 << 25
LARGER = {"cpu": 1, "cuda": 16}  # by type of device, times as many rows: a GPU wants large steps
BYTES_COPIED = 64 << 20  # to a GPU together, which wants large copies; twice that is held
ROWS_SCALED = 512  # together on a CPU: they fit a core's caches


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows of a pool in one file, or in one for each kind of features: "image", and others."""

    files: Mapping[str, MappedRows]

    @property
    def path(self) -> Path:
        return self.files["image"].path

    @property
    def place(self) -> Path:
        """What messages call it: its file, or the folder of several."""
        return self.path if len(self.files) == 1 else self.path.parent

    def __len__(self) -> int:
        return self.files["image"].shape[0]


@dataclass(frozen=True)
class Unit:
    """Rows start to stop of a shard, of which the first is row `first` of the pool."""

    shard: int
    start: int
    stop: int
    first: int

    def __len__(self) -> int:
        return self.stop - self.start


class Buffers(threading.local):
    """Memory for float32 values that is used again and again: to touch new memory takes longer.

    Each thread has its own, as long as it lives.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Where the name's values were, which are lost."""
        import torch

        size = prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, device=device)
        return self._held[name][:size].view(*shape)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows that are scored together, by kind, on the device, until the next are asked for.

    number: the pool's numbers of the rows, increasing int64 (n,). raw: as they are stored, (n, D).
    length: |raw|, float32 (n,). unit: raw over length, float32 (n, D). bad: those of the rows among
    them that are left out, int64 (b,).
    """

    number: Tensor
    raw: Mapping[str, Tensor]
    length: Mapping[str, Tensor]
    unit: Mapping[str, Tensor]
    bad: np.ndarray


@dataclass(frozen=True, eq=False)
class Pool:
    """The first `rows` rows of some shards.

    name: what tables call it. cuts: further numbers of rows at which units end, so that what is
    counted of a smaller pool is part of a larger one. skips_bad: rows that are zero, infinite or
    NaN are left out, not refused.
    """

    name: str
    shards: Sequence[Shard]
    rows: int
    cuts: tuple[int, ...] = ()
    skips_bad: bool = False
    _buffers: Buffers = field(default_factory=Buffers, repr=False)

    def __len__(self) -> int:
        return self.rows

    def first(self, rows: int) -> Pool:
        """The pool of the first rows alone. Raises UserError if there are not as many."""
        if rows > self.rows:
            raise UserError(f"--distractors_limit {rows}: there are {self.rows} distractors")
        return replace(self, rows=rows)

    @property
    def row_bytes(self) -> int:
        """Of a row of images, as it is stored."""
        file = self.shards[0].files["image"]
        return file.dtype.itemsize * file.shape[1]

    @cached_property
    def starts(self) -> np.ndarray:
        """The pool's number of the first row of each shard, and the end: int64 (shards + 1,)."""
        return np.cumsum([0, *map(len, self.shards)])

    def units(self) -> list[Unit]:
        """The pool in units of at most ROWS_OF_A_UNIT, cut at the ends of shards and at `cuts`."""
        return [
            Unit(number, start, stop, int(first) + start)
            for number, first in enumerate(self.starts[:-1])
            for start, stop in pairwise(self._ends(int(first), len(self.shards[number])))
        ]

    def _ends(self, first: int, rows: int) -> list[int]:
        """Where the units of a shard begin and end; first: the pool's number of its first row."""
        stop = max(0, min(rows, self.rows - first))
        cuts = [cut - first for cut in self.cuts]
        return sorted({stop, *range(0, stop, ROWS_OF_A_UNIT), *(c for c in cuts if 0 < c < stop)})

    def identity(self, unit: Unit) -> str:
        """What tells a unit's content from any other's: file, size, time of change, rows."""
        digest = hashlib.sha256(f"{unit.start} {unit.stop} {unit.first}".encode())
        for name, file in self.shards[unit.shard].files.items():
            state = file.path.stat()
            place = f"{name} {file.path.resolve()} {state.st_size} {state.st_mtime_ns}"
            digest.update(place.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def chunks(
        self, unit: Unit, kinds: Sequence[str], device: torch.device, at_once: int
    ) -> Iterator[Chunk]:
        """The rows of a unit, so many at a time.

        Raises UserError for a row that is zero, infinite or NaN in one of the kinds, unless such
        rows are left out.
        """
        import torch

        files = {kind: self.shards[unit.shard].files[kind] for kind in kinds}
        for rows, stored in _stretches(files, unit, device, at_once):
            scaled = {n: self._buffers.of(n, own.shape, device) for n, own in stored.items()}
            length = {name: _scale(own, scaled[name]) for name, own in stored.items()}
            bad = {name: _bad_rows(own) for name, own in length.items()}
            for name, lost in bad.items():
                if len(lost) and not self.skips_bad:
                    raise UserError(_refusal(files[name].path, rows.start + int(lost[0])))
            number = np.arange(rows.start, rows.stop) + unit.first - unit.start
            lost = np.unique(np.concatenate([*bad.values()]))
            left = torch.from_numpy(np.delete(np.arange(len(number)), lost)).to(device)
            parts = (stored, length, scaled)
            if len(lost):
                parts = ({name: own[left] for name, own in part.items()} for part in parts)
            yield Chunk(left + int(number[0]), *parts, number[lost])

    def place(self, number: int) -> str:
        """What messages call a row: its number in its file, and this."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return f"row {number - self.starts[shard] + 1} of {self.shards[shard].place}"

    def gather(self, rows: np.ndarray, kind: str = "image") -> np.ndarray:
        """Rows of the pool by their numbers, increasing int64 (n,): float32 (n, D), as stored."""
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        parts = [
            self.shards[number].files[kind].read(rows[shard == number] - self.starts[number])
            for number in np.unique(shard)
        ]
        return np.concatenate(parts).astype(np.float32)


def rows_at_once(vectors: int, queries: int) -> int:
    """How many rows to score together for so many vectors, of parts of so many queries.

    A method that compares by no similarity has no vectors.
    """
    rows = max(1, min(MOST_ROWS, SCORES_OF_A_PART // queries, SCORES_HELD // max(1, vectors)))
    return rows - rows % ALIGNED if rows > ALIGNED else rows


def _stretches(
    files: Mapping[str, MappedRows], unit: Unit, device: torch.device, at_once: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The rows of a unit, so many at a time, as they are stored, on the device.

    The next are read while these are used.
    """
    import torch

    if device.type != "cpu":
        yield from _copied(files, unit, device, at_once)
        return
    stretches = list(slices(unit.start, unit.stop, at_once))
    for rows, following in zip_longest(stretches, stretches[1:]):
        mapped = {kind: torch.from_numpy(file.read(rows)) for kind, file in files.items()}
        if following:
            for file in files.values():
                file.read_ahead(following)
        yield rows, mapped


def _copied(
    files: Mapping[str, MappedRows], unit: Unit, device: torch.device, at_once: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """_stretches on a GPU, copied at least BYTES_COPIED at a time."""
    row_bytes = sum(file.dtype.itemsize * file.shape[1] for file in files.values())
    most = min(at_once * max(1, BYTES_COPIED // (row_bytes * at_once)), len(unit))

    def fill(rows: slice, buffers: Mapping[str, Tensor]) -> int:
        for kind, file in files.items():
            np.copyto(buffers[kind][: rows.stop - rows.start].numpy(), file.read(rows))
        return rows.stop - rows.start

    stretches = list(slices(unit.start, unit.stop, most))
    copies = copied_ahead(stretches, fill, shapes_of(files, most), device)
    for stretch, stored in zip(stretches, copies, strict=True):
        for rows in slices(stretch.start, stretch.stop, at_once):
            own = slice(rows.start - stretch.start, rows.stop - stretch.start)
            yield rows, {kind: values[own] for kind, values in stored.items()}


def _scale(raw: Tensor, unit: Tensor) -> Tensor:
    """Fill unit, float32 (n, D), with raw over the lengths of its rows, float32 (n,), and return
    these.
    """
    import torch

    length = unit.new_empty(len(unit))
    at_once = len(raw) if raw.is_cuda else ROWS_SCALED
    for own, into, by in zip(*(part.split(at_once) for part in (raw, unit, length)), strict=True):
        torch.linalg.vector_norm(into.copy_(own), dim=1, out=by)
        into.div_(by[:, None])
    return length


def _bad_rows(length: Tensor) -> np.ndarray:
    """The rows that have no direction: zero, infinite, NaN."""
    return (~((length > 0) & length.isfinite())).nonzero()[:, 0].cpu().numpy()


def _refusal(path: Path, row: int) -> str:
    return (
        f"{path}: row {row + 1} is zero or not finite; leave such rows out with --on_bad_row skip, "
        "or mend the file (what has been counted of the others is kept)"
    )


# ---------------------------------------------------------------------------------------------
# Finding them
# ---------------------------------------------------------------------------------------------


def open_pool(paths: Sequence[Path]) -> Pool:
    """The pool of all rows of some files and folders, in their order.

    Raises UserError for what is absent, holds no rows, or is no array of rows.
    """
    shards = [shard for path in paths for shard in _find_shards(path)]
    first = shards[0].files["image"]
    for file in (shard.files["image"] for shard in shards):
        if file.shape[1] != first.shape[1]:
            raise UserError(
                f"{file.path} has rows of {file.shape[1]} numbers, but {first.path} of "
                f"{first.shape[1]}: leave one of them out of --distractors"
            )
    names = dict.fromkeys(_name_of(path) for path in paths)
    rows = sum(map(len, shards))
    if not rows:
        raise UserError(f"--distractors {paths[0]} holds no row")
    return Pool("+".join(names), shards, rows)


def _name_of(path: Path) -> str:
    path = Path(path).resolve()
    return (path.parent if path.name == "img_emb" else path).name.removesuffix(".npy")


def _find_shards(path: Path) -> list[Shard]:
    if path.is_file():
        return [Shard({"image": MappedRows(path)})]
    if (path / "database_image.npy").is_file():
        return [_features_shard(path)]
    for folder in (path / "img_emb", path):
        files = sorted(folder.glob("*.npy"), key=_number)
        if files:
            return [Shard({"image": MappedRows(file)}) for file in files]
    problem = "holds no .npy file, nor img_emb/*.npy" if path.is_dir() else "does not exist"
    raise UserError(f"--distractors {path} {problem}; name a file or a folder of embeddings")


def _features_shard(folder: Path) -> Shard:
    files = {
        path.stem.removeprefix("database_"): MappedRows(path)
        for path in sorted(folder.glob("database_*.npy"))
    }
    counts = {file.shape[0] for file in files.values()}
    if len(counts) > 1:
        raise UserError(f"{folder}: the arrays database_*.npy differ in rows; extract them again")
    return Shard(files)


def _number(path: Path) -> tuple[int, str]:
    """Files in the order of the last number in their names, which need not be padded."""
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else -1, path.name


def check_pool(pool: Pool, features: Features, kinds: Sequence[str]) -> list[str]:
    """Hold a pool against the features it is ranked with; the lines that say what is not known.

    kinds: the database features that the runs read. Raises UserError for another width or model,
    and for kinds that a shard does not have.
    """
    unknown = []
    for shard in pool.shards:
        lost = [kind for kind in kinds if kind not in shard.files]
        if lost:
            raise UserError(
                f"{shard.path.parent} has no database_{lost[0]}.npy, which the method reads: name "
                "a features folder that has it, or another method"
            )
        manifest = shard.path.parent / "manifest.json"
        known = read_json(manifest) if manifest.is_file() else None
        read = {kind: shard.files[kind] for kind in kinds}
        check_same_model(features, [StoredAsset(read, shard.path, known)])
        if known is None:
            unknown.append(shard.path)
    if not unknown:
        return []
    return [
        f"note: nothing says by which model {len(unknown)} of {len(pool.shards)} files of "
        f"distractors were made (the first {unknown[0]}); it has to be that of the features"
    ]
