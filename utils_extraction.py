"""Extraction: images and texts to feature files, in parts that survive a kill, by many processes.

A job has stages (the images of a split, its texts, ...); a stage is cut into units: fixed ranges of
its distinct images or texts, or a shard. What is encoded is kept in part files, at most one unit's
work (in shards: one batch a worker) behind. Batches are cut from the units, never across them, so
that a row's arithmetic does not depend on who computes it, or when; the finished files are put
together from the parts, and the manifest is written last.

    PARTS/run.json                     what may not change between two runs
    PARTS/todo.json                    the units that this launch's ranks deal among themselves
    PARTS/STAGE/UNIT.npz               a finished unit; before it, for shards, UNIT+BATCH.npz
    PARTS/ranks/RANK.json              signs of life of the ranks
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from utils import UserError, atomic_path, read_json, write_json
from utils_datasets import IMAGE_SUFFIXES, Dataset, relative_image_path
from utils_features import BadImage, decode_image

if TYPE_CHECKING:
    from utils_features import Encoder

IMAGES_AT_ONCE = 32  # images that a worker hands over together, whatever the batch size
BEAT_SECONDS = 1.0  # between two signs of life of a rank
FIRST_SIGN_FACTOR = 5  # a rank's first sign may take longer than the others: it loads the model
POLL_SECONDS = 0.5  # between two looks at what other ranks have done


# ---------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------

# Variables of rank, world size and local rank. SLURM's count inside an srun step only: a batch
# script itself runs once, however many tasks it was given.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is; `local` numbers those of one machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def find_ranks(environment: dict[str, str]) -> Ranks:
    """The place of this process as torchrun or srun tell it; alone if neither does."""
    for names in LAUNCHERS:
        if all(name in environment for name in names):
            return Ranks(*(int(environment[name]) for name in names))
    return Ranks()


class Beat:
    """A rank's sign of life: a file rewritten every second by a thread, with a word on its state.

    No collective operation is needed, and a rank that died is known by its silence.
    """

    def __init__(self, folder: Path, rank: int):
        self._path = folder / f"{rank}.json"
        self._content = {"launch": uuid.uuid4().hex, "beat": 0, "state": "preparing", "text": ""}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._run, daemon=True).start()

    def say(self, state: str, text: str = "") -> None:
        """Tell the other ranks: ready, encoded, failed (why), finished."""
        self._content |= {"state": state, "text": text}
        self._write()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._content["beat"] += 1
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._content), encoding="utf-8")
            os.replace(temporary, self._path)


class Watch:
    """Another rank's signs of life, judged by this machine's clock."""

    def __init__(self, folder: Path, rank: int, timeout: float):
        self.rank = rank
        self._path, self._timeout = folder / f"{rank}.json", timeout
        self._first = self._last = self._read()
        self._changed = time.monotonic()

    def _read(self) -> dict:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def look(self) -> str:
        """The rank's state in this launch, "" before its first sign.

        Raises UserError if it failed, or has been silent for longer than the timeout.
        """
        now = self._read()
        if now and now != self._last:
            self._last, self._changed = now, time.monotonic()
        state = "" if self._last == self._first else self._last["state"]
        if state == "failed":
            raise UserError(f"rank {self.rank} stopped: {self._last['text']}")
        timeout = self._timeout if state else FIRST_SIGN_FACTOR * self._timeout
        if time.monotonic() - self._changed > timeout and state != "encoded":
            raise UserError(
                f"rank {self.rank} has shown no sign of life for {timeout:g} s; what is "
                "done is safe, and the same command continues, with any number of ranks"
            )
        return state


# ---------------------------------------------------------------------------------------------
# Stages and jobs
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A piece of a stage that one rank does: a range of its items, or shards."""

    name: str
    start: int = 0
    stop: int = 0
    shards: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Rows of features to make, and the distinct images or texts ("items") they show.

    name: of its folder of parts and of its array; encode: the function that encodes its units;
    items: in order of first appearance; item_of_row: (rows,) int64; table: the file the rows come
    from; fingerprint: what its parts depend on, with the sizes of each unit's shards under
    "shards". Items are None where only the shards know them.
    """

    name: str
    encode: Callable[[Stage, list[Unit], Extraction], None]
    units: list[Unit]
    items: list[str] | None
    item_of_row: np.ndarray
    table: Path
    fingerprint: dict
    dtype: str = "float32"
    locate: Callable[[str], Path] | None = None  # images in folders
    samples: SampleIndex | None = None  # images in shards
    words: tuple[str, ...] = ()  # contextualised texts
    whole: bool = True  # False: the rows are not all there are (--limit)

    @property
    def rows(self) -> int:
        return len(self.item_of_row)

    def first_row(self, item: int) -> int:
        return int(np.flatnonzero(self.item_of_row == item)[0])


def share_items(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values in order of first appearance, and for each row (n,) int64 which it is."""
    numbers: dict[str, int] = {}
    item_of_row = [numbers.setdefault(value, len(numbers)) for value in values]
    return list(numbers), np.array(item_of_row, np.int64)


def cut_ranges(count: int, size: int) -> list[Unit]:
    """Units of `size` items, the last one shorter."""
    starts = range(0, count, size)
    return [Unit(f"{i:06d}", start, min(start + size, count)) for i, start in enumerate(starts)]


@dataclass(frozen=True)
class Settings:
    """How a job is run. batch: images or texts; timeout: seconds."""

    batch: int
    workers: int
    skip_bad: bool
    overwrite: bool
    timeout: float


@dataclass(frozen=True)
class Job:
    """What one command makes. identity: what may not change between two runs of it.

    finish writes the finished files from the parts, outputs are the files that --overwrite drops,
    in this order: each after the manifest that vouches for it.
    """

    title: str
    parts: Parts
    stages: list[Stage]
    identity: dict
    outputs: list[Path]
    finish: Callable[[dict[str, Summary]], None]


# ---------------------------------------------------------------------------------------------
# Parts on disk
# ---------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What a part file holds: features (k, D) of items ids (k,), and what went wrong.

    bad: (item, name, cause) of images that cannot be read. covered: rows whose sample was met in
    the shards; unmatched: samples that belong to no row.
    """

    ids: np.ndarray
    features: np.ndarray
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    covered: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    unmatched: int = 0


@dataclass(frozen=True)
class Parts:
    """The folder in which a job keeps what is done."""

    folder: Path

    def write(self, stage: Stage, name: str, part: Part) -> None:
        """Write one part, whole or not at all."""
        notes = json.dumps({"bad": part.bad, "unmatched": part.unmatched})
        with (
            atomic_path(self.folder / stage.name / f"{name}.npz") as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez(file, ids=part.ids, features=part.features, covered=part.covered, notes=notes)

    def names(self, stage: Stage) -> set[str]:
        """The names of the parts there are."""
        folder = self.folder / stage.name
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
                yield self.folder / stage.name / f"{name}.npz"

    def read(self, stage: Stage, features: bool = True) -> Iterator[Part]:
        """The parts of a stage in order, one in memory at a time."""
        for path in self.files(stage):
            try:
                with np.load(path, allow_pickle=False) as content:
                    notes = json.loads(str(content["notes"]))
                    values = content["features"] if features else np.empty(0)
                    part = Part(content["ids"], values, notes["bad"], content["covered"])
                    part.unmatched = notes["unmatched"]
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
                (self.folder / stage.name / f"{name}.npz").unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    return name.endswith(".npz") and not name.startswith(".")


@dataclass(frozen=True)
class Summary:
    """What the parts of a stage say. keep: bool (rows,), the rows that have features (without a
    table of rows, the images that have).

    skipped: {"row" (from 1), "image_path", "cause"} of the others; unmatched: samples of no row.
    """

    keep: np.ndarray
    skipped: list[dict]
    unmatched: int


def summarise(stage: Stage, parts: Parts, skip_bad: bool) -> Summary:
    """Read what the parts of a finished stage say.

    Raises UserError for a row without a sample, and for a bad image unless those are skipped.
    """
    if stage.items is None:
        bad, count = [], 0
        for part in parts.read(stage, features=False):
            bad += part.bad
            count += len(part.ids)
        if bad and not skip_bad:
            _, name, cause = bad[0]
            raise UserError(
                f"{name}: {cause}; mend it and start afresh with --overwrite, or leave it out with "
                "--on_bad_image skip"
            )
        skipped = [{"row": None, "image_path": name, "cause": cause} for _, name, cause in bad]
        return Summary(np.ones(count, bool), skipped, 0)
    good = np.zeros(len(stage.items), bool)
    covered = np.full(stage.rows, stage.samples is None)
    causes: dict[int, str] = {}
    unmatched = 0
    for part in parts.read(stage, features=False):
        good[part.ids] = True
        covered[part.covered] = True
        causes |= {item: cause for item, _, cause in part.bad}
        unmatched += part.unmatched
    if not covered.all():
        _refuse_uncovered(stage, np.flatnonzero(~covered))
    keep = good[stage.item_of_row]
    skipped = [
        {"row": int(row) + 1, "image_path": stage.items[item], "cause": causes[int(item)]}
        for row, item in zip(np.flatnonzero(~keep), stage.item_of_row[~keep], strict=True)
    ]
    if skipped and not skip_bad:
        first = skipped[0]
        raise UserError(
            f"{first['image_path']} ({stage.table}, row {first['row']}): {first['cause']}; mend "
            "it and start afresh with --overwrite, or leave it out with --on_bad_image skip"
        )
    if not keep.any():
        raise UserError(f"{stage.table}: none of its images can be read")
    return Summary(keep, skipped, unmatched if stage.whole else 0)


def _refuse_uncovered(stage: Stage, rows: np.ndarray) -> None:
    row = int(rows[0])
    more = f" (and {len(rows) - 1} rows more)" if len(rows) > 1 else ""
    raise UserError(
        f"{stage.table}, row {row + 1}{more}: no sample of the shards has the image path "
        f"{stage.items[stage.item_of_row[row]]!r} with this row's text and instance; complete the "
        "shards and run the same command again"
    )


# ---------------------------------------------------------------------------------------------
# Reading images
# ---------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Some images of one unit, preprocessed. images: (k, 3, H, W), or None if k is 0.

    batch: the number of their batch in the unit; full: that batch ends here; last: the unit does.
    covered, unmatched: see Part. error: a reason to stop.
    """

    unit: Unit
    batch: int = 0
    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    images: torch.Tensor | list[torch.Tensor] | None = None
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    full: bool = False
    last: bool = False
    covered: list[int] = field(default_factory=list)
    unmatched: int = 0
    error: str | None = None


def _add_image(chunk: Chunk, item: int, name: str, read: Callable, preprocess: Callable) -> None:
    """Decode and preprocess one image into a chunk, or note why it cannot be."""
    try:
        image = preprocess(decode_image(read()))
    except FileNotFoundError:
        chunk.bad.append((item, name, "no such file"))
    except BadImage as error:
        chunk.bad.append((item, name, error.cause))
    except Exception as error:  # a decoder's or transform's own; the image is at fault
        chunk.bad.append((item, name, f"{type(error).__name__}: {error}"))
    else:
        chunk.ids.append(item)
        chunk.names.append(name)
        chunk.images = [*(chunk.images or []), image]


def _close(chunk: Chunk) -> Chunk:
    if chunk.images:
        chunk.images = torch.stack(chunk.images)
    return chunk


class FileChunks:
    """Reads the images that each work order names: what the loader's workers run on folders."""

    def __init__(self, locate: Callable[[str], Path], preprocess: Callable):
        self.locate, self.preprocess = locate, preprocess

    def __getitem__(self, order: tuple[Chunk, int, list[str]]) -> Chunk:
        chunk, first, names = order
        for item, name in enumerate(names, first):
            _add_image(chunk, item, name, lambda name=name: self.locate(name), self.preprocess)
        return _close(chunk)


class FileOrders:
    """The work orders of a folder's units, in order, as the loader's sampler."""

    def __init__(self, stage: Stage, units: list[Unit], batch: int):
        self.stage, self.units, self.batch = stage, units, batch

    def __iter__(self) -> Iterator[tuple[Chunk, int, list[str]]]:
        for unit in self.units:
            for start in range(unit.start, unit.stop, self.batch):
                end = min(start + self.batch, unit.stop)
                for first in range(start, end, IMAGES_AT_ONCE):
                    stop = min(first + IMAGES_AT_ONCE, end)
                    chunk = Chunk(unit, full=stop == end, last=stop == unit.stop)
                    yield chunk, first, self.stage.items[first:stop]


@dataclass(frozen=True)
class SampleIndex:
    """Finds the rows of a shard's sample by (image path, text, instance), or by the path alone.

    Held as sorted hashes, 24 bytes a row, because every worker has one. relative: strips what two
    spellings of a path may differ in.
    """

    hashes: np.ndarray  # (rows,) uint64, sorted
    row_of_hash: np.ndarray  # (rows,) int64
    item_of_row: np.ndarray  # (rows,) int64
    relative: Callable[[str], str]
    by_path: bool = False

    def find(self, image_path: str, text: str, instance: str) -> np.ndarray:
        """The rows that this sample is for, (k,) int64."""
        key = _hash_key(self.relative(image_path), *(() if self.by_path else (text, instance)))
        start, stop = (np.searchsorted(self.hashes, key, side) for side in ("left", "right"))
        return self.row_of_hash[start:stop]


def index_samples(
    rows: Iterable[tuple[str, ...]], item_of_row: np.ndarray, relative: Callable[[str], str]
) -> SampleIndex:
    """Index rows (image_path, text, instance), or (image_path,), by their hashes."""
    keys, by_path = [], False
    for image_path, *rest in rows:
        by_path = not rest
        keys.append(_hash_key(relative(image_path), *rest))
    hashes = np.array(keys, np.uint64)
    order = np.argsort(hashes, kind="stable")
    return SampleIndex(hashes[order], order, item_of_row, relative, by_path)


def _hash_key(*parts: str) -> np.uint64:
    data = json.dumps(parts).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: its image's bytes, and its key if the json member gives one."""

    name: str
    data: bytes | None
    image_path: str
    text: str = ""
    instance: str = ""


def read_samples(shards: Sequence[Path], need_json: bool) -> Iterator[Sample]:
    """The samples of shards, in order, through webdataset.

    Raises UserError, naming the shard, if it is damaged or a sample is not as it should be.
    """
    from webdataset.tariterators import tarfile_samples

    for shard in shards:
        try:
            for content in tarfile_samples([{"url": str(shard)}]):
                yield _parse_sample(content, shard, need_json)
        except UserError:
            raise
        except Exception as error:  # tarfile, the disk and webdataset each raise their own
            reason = str(error.args[0]) if error.args else type(error).__name__
            reason = getattr(error, "strerror", None) or reason
            raise UserError(f"{shard} cannot be read ({reason}); fetch it again") from None


def _parse_sample(content: dict, shard: Path, need_json: bool) -> Sample:
    key = content["__key__"]
    members = [name for name in content if not name.startswith("__")]
    images = [name for name in members if f".{_suffix(name)}" in IMAGE_SUFFIXES]
    labels = [name for name in members if _suffix(name) == "json"]
    for kind, names in (("images", images), ("json members", labels)):
        if len(names) > 1:
            raise UserError(
                f"{shard}: the sample {key} has {len(names)} {kind} ({', '.join(names)}); a name "
                "belongs to the sample that it shares all before its first dot with"
            )
    data = content[images[0]] if images else None
    name = f"{key}.{images[0]}" if images else key
    if not need_json:
        return Sample(f"{shard.name}:{name}", data, name)
    if not labels:
        raise UserError(f"{shard}: the sample {key} has no json member")
    try:
        label = json.loads(content[labels[0]])
        path, instance = str(label["img_path"]), str(label["instance"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{shard}: the json member of the sample {key} does not hold img_path, text and "
            f"instance ({type(error).__name__}: {error})"
        ) from None
    return Sample(f"{shard.name}:{name}", data, path, str(label.get("text") or ""), instance)


def _suffix(member: str) -> str:
    return member.rpartition(".")[2]


class ShardChunks(IterableDataset):
    """Reads shards, each worker a unit of its own: what the loader's workers run on shards.

    A unit's distinct images are numbered as they come and cut into batches; those in `done`
    (unit name -> batch numbers) are passed over undecoded.
    """

    def __init__(
        self,
        units: list[Unit],
        samples: SampleIndex | None,
        preprocess: Callable,
        batch: int,
        done: dict[str, set[int]],
    ):
        self.units, self.samples, self.preprocess = units, samples, preprocess
        self.batch, self.done = batch, done

    def __iter__(self) -> Iterator[Chunk]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for unit in self.units[first::step]:
            try:
                yield from self._read(unit)
            except UserError as error:
                yield Chunk(unit, error=str(error))
                return

    def _read(self, unit: Unit) -> Iterator[Chunk]:
        done = self.done.get(unit.name, set())
        chunk, seen = Chunk(unit), set()
        for sample in read_samples(unit.shards, need_json=_has_labels(self.samples)):
            item = self._take(sample, chunk, len(seen), done)
            if item is None or item in seen:
                continue
            chunk.batch = len(seen) // self.batch
            seen.add(item)
            if chunk.batch not in done:
                name = sample.image_path if self.samples else sample.name
                _add_image(chunk, item, name, lambda data=sample.data: data, self.preprocess)
            chunk.full = len(seen) % self.batch == 0
            if chunk.batch in done:
                chunk.full = False
            elif chunk.full or len(chunk.ids) + len(chunk.bad) == IMAGES_AT_ONCE:
                yield _close(chunk)
                chunk = Chunk(unit, batch=chunk.batch)
        chunk.full = chunk.last = True
        yield _close(chunk)

    def _take(self, sample: Sample, chunk: Chunk, count: int, done: set[int]) -> int | None:
        """The item that a sample shows, its rows noted; None if it has no image or no row."""
        if self.samples is None:
            return None if sample.data is None else count
        rows = self.samples.find(sample.image_path, sample.text, sample.instance)
        if sample.data is None:
            return None
        if not len(rows):
            chunk.unmatched += count // self.batch not in done  # else its part has counted it
            return None
        chunk.covered.extend(rows.tolist())
        return int(self.samples.item_of_row[rows[0]])


def _has_labels(samples: SampleIndex | None) -> bool:
    return samples is not None and not samples.by_path


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds by activity, images encoded, and the rows of each stage that is finished."""

    seconds: dict[str, float] = field(
        default_factory=lambda: {"waiting for data": 0.0, "encoding": 0.0, "writing": 0.0}
    )
    images: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    image_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] += time.monotonic() - start


@dataclass
class Extraction:
    """One process's share of a job."""

    encoder: Encoder
    parts: Parts
    settings: Settings
    clock: Clock
    quiet: bool = False  # no progress bar: every rank but the first
    alone: bool = True  # the only rank

    def bar(self, stage: Stage, total: int | None, unit: str) -> tqdm:
        disable = self.quiet or None  # None: where stderr is no terminal
        return tqdm(total=total, desc=stage.name, unit=unit, disable=disable)

    def save(self, stage: Stage, name: str, part: Part) -> None:
        with self.clock.measure("writing"):
            self.parts.write(stage, name, part)


@dataclass
class OpenUnit:
    """A unit under way: the batch being filled, and what waits to be written."""

    buffer: torch.Tensor | None = None  # (batch, 3, H, W), pinned where there is a GPU
    filled: int = 0
    names: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    covered: list[int] = field(default_factory=list)
    unmatched: int = 0

    def fill(self, images: torch.Tensor, names: list[str], batch: int, pin: bool) -> None:
        if self.buffer is None:
            shape = (batch, *images.shape[1:])
            self.buffer = torch.empty(shape, dtype=images.dtype, pin_memory=pin)
        self.buffer[self.filled : self.filled + len(images)] = images
        self.filled += len(images)
        self.names += names

    def take_part(self, dim: int, dtype: str) -> Part:
        """What waits to be written, which then waits no more."""
        features = np.concatenate([np.empty((0, dim), dtype), *self.features])
        covered = np.array(self.covered, np.int64)
        part = Part(np.array(self.ids, np.int64), features, self.bad, covered, self.unmatched)
        self.ids, self.features, self.bad, self.covered, self.unmatched = [], [], [], [], 0
        return part


def encode_files(stage: Stage, units: list[Unit], run: Extraction) -> None:
    """Encode images of folders: a part for each unit."""
    dataset = FileChunks(stage.locate, run.encoder.preprocess)
    orders = FileOrders(stage, units, run.settings.batch)
    loader = _make_loader(dataset, run.settings.workers, sampler=orders)
    total = sum(unit.stop - unit.start for unit in units)
    _encode_chunks(stage, loader, run, total)


def encode_shards(stage: Stage, units: list[Unit], run: Extraction) -> None:
    """Encode images of shards: a part for each batch of a unit, the last one completes it."""
    done: dict[str, set[int]] = {}
    for name in run.parts.names(stage):
        unit, _, batch = name.partition("+")
        if batch:
            done.setdefault(unit, set()).add(int(batch))
    dataset = ShardChunks(units, stage.samples, run.encoder.preprocess, run.settings.batch, done)
    loader = _make_loader(dataset, min(run.settings.workers, len(units)))
    total = None if stage.items is None else len(stage.items) * len(units) // len(stage.units)
    _encode_chunks(stage, loader, run, total)


def _make_loader(dataset: object, workers: int, **options) -> DataLoader:
    if workers:
        options |= {"prefetch_factor": 4}
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


def _encode_chunks(stage: Stage, loader: DataLoader, run: Extraction, total: int | None) -> None:
    """Put chunks together to batches, encode them and write the parts."""
    opened: dict[str, OpenUnit] = {}
    covered = np.zeros(stage.rows, bool)
    start, clock = time.monotonic(), run.clock
    chunks = iter(loader)
    with run.bar(stage, total, "image") as bar:
        while chunk := _next(chunks, clock):
            _check_chunk(stage, chunk, run)
            unit = opened.setdefault(chunk.unit.name, OpenUnit())
            _add_chunk(stage, unit, chunk, run)
            bar.update(len(chunk.ids) + len(chunk.bad))
            covered[chunk.covered] = True
            if chunk.last:
                run.save(stage, chunk.unit.name, unit.take_part(run.encoder.dim, stage.dtype))
                del opened[chunk.unit.name]
            elif chunk.full and stage.locate is None:
                name = f"{chunk.unit.name}+{chunk.batch:06d}"
                run.save(stage, name, unit.take_part(run.encoder.dim, stage.dtype))
            if run.alone and not stage.whole and covered.all():
                _close_early(stage, opened, run)
                break
    clock.image_seconds += time.monotonic() - start


def _next(chunks: Iterator[Chunk], clock: Clock) -> Chunk | None:
    with clock.measure("waiting for data"):
        return next(chunks, None)


def _check_chunk(stage: Stage, chunk: Chunk, run: Extraction) -> None:
    if chunk.error:
        raise UserError(chunk.error)
    if chunk.bad and not run.settings.skip_bad:
        item, name, cause = chunk.bad[0]
        place = f" ({stage.table}, row {stage.first_row(item) + 1})" if stage.items else ""
        raise UserError(
            f"{name}{place}: {cause}; mend the image and run the same command again, or leave "
            "such images out with --on_bad_image skip"
        )


def _add_chunk(stage: Stage, unit: OpenUnit, chunk: Chunk, run: Extraction) -> None:
    """Add a chunk to its unit's batch, and encode the batch if it is complete."""
    if chunk.images is not None:
        with run.clock.measure("waiting for data"):
            pin = run.encoder.device.type == "cuda"
            unit.fill(chunk.images, chunk.names, run.settings.batch, pin)
    unit.ids += chunk.ids
    unit.bad += chunk.bad
    unit.covered += chunk.covered
    unit.unmatched += chunk.unmatched
    if chunk.full and unit.filled:
        with run.clock.measure("encoding"):
            features = run.encoder.encode_images(unit.buffer[: unit.filled]).numpy()
        unit.features.append(_settle(stage, features, unit.names, unit.ids[-unit.filled :]))
        run.clock.images += unit.filled
        unit.filled, unit.names = 0, []


def _settle(
    stage: Stage, features: np.ndarray, names: Sequence[str], ids: Sequence[int]
) -> np.ndarray:
    """Features in the type they are kept in. Raises UserError if they are not finite."""
    with np.errstate(over="ignore"):
        features = features.astype(stage.dtype)
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        place = ""
        if stage.items is not None:
            place = f" ({stage.table}, row {stage.first_row(ids[wrong[0]]) + 1})"
        raise UserError(
            f"the features of {names[wrong[0]]!r}{place} are not finite numbers; use --precision "
            "fp32 or bf16 and --save_dtype float32, which reach further than float16"
        )
    return features


def _close_early(stage: Stage, opened: dict[str, OpenUnit], run: Extraction) -> None:
    """Finish a limited run: every row has its sample, and the other shards are not needed."""
    for unit in opened.values():
        if unit.filled:
            _add_chunk(stage, unit, Chunk(Unit(""), full=True), run)
    for missing in run.parts.missing(stage):
        unit = opened.get(missing.name, OpenUnit())
        run.save(stage, missing.name, unit.take_part(run.encoder.dim, stage.dtype))


def encode_texts(stage: Stage, units: list[Unit], run: Extraction) -> None:
    """Encode texts, plain or (with the stage's words) contextualised: a part for each unit."""
    prompts = 2 * len(stage.words) or 1
    with run.bar(stage, sum(unit.stop - unit.start for unit in units), "text") as bar:
        for unit in units:
            texts, batch = stage.items[unit.start : unit.stop], run.settings.batch
            with run.clock.measure("encoding"):
                if prompts > 1:
                    features = run.encoder.encode_contextual_texts(
                        texts, stage.words, batch, bar.update
                    )
                else:
                    features = run.encoder.encode_texts(texts, batch, bar.update)
            ids = np.arange(unit.start, unit.stop)
            run.save(stage, unit.name, Part(ids, _settle(stage, features, texts, ids)))


# ---------------------------------------------------------------------------------------------
# Running a job
# ---------------------------------------------------------------------------------------------


def run_job(job: Job, encoder: Encoder, settings: Settings, ranks: Ranks) -> Clock | None:
    """Do this rank's share of a job; rank 0 puts the parts together and gives its times.

    Raises UserError, with everything done so far safe on disk.
    """
    run = Extraction(
        encoder, job.parts, settings, Clock(), quiet=ranks.rank > 0, alone=ranks.world == 1
    )
    with in_plain_words():
        if ranks.world > 1:
            return _run_among_ranks(job, run, ranks)
        with _lock(job.parts.folder):
            _prepare(job, settings)
            _encode_share(job, run, ranks)
            _finish(job, settings, run.clock)
        return run.clock


def _run_among_ranks(job: Job, run: Extraction, ranks: Ranks) -> Clock | None:
    """One of several ranks' share: rank 0 prepares, all encode, rank 0 waits and finishes."""
    folder, settings = job.parts.folder / "ranks", run.settings
    others = [0] if ranks.rank else range(1, ranks.world)
    # Rank 0 shows no sign before it has the lock: another launch's would be taken for it.
    with contextlib.nullcontext() if ranks.rank else _lock(job.parts.folder):
        watches = [Watch(folder, rank, settings.timeout) for rank in others]
        beat = Beat(folder, ranks.rank)
        try:
            if ranks.rank:
                _wait(watches, ("ready", "encoded"))
                _encode_share(job, run, ranks)
                beat.say("encoded")
                return None
            _prepare(job, settings)
            beat.say("ready")
            _encode_share(job, run, ranks)
            _wait(watches, ("encoded",))
            beat.say("encoded")
            beat.stop()
            _finish(job, settings, run.clock)
            return run.clock
        except BaseException as error:
            beat.say("failed", str(error) or type(error).__name__)
            raise
        finally:
            beat.stop()


@contextlib.contextmanager
def in_plain_words() -> Iterator[None]:
    """Turn what a machine's limits raise into a line for the user; the parts done are safe."""
    safe = "what is done is safe, and the same command continues"
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not hold the model and a batch ({str(error).splitlines()[0]}); "
            "start afresh with a smaller --batch and --overwrite"
        ) from error
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{name}{error.strerror or error}; {safe}") from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(
                "no memory for a batch; start afresh with a smaller --batch and --overwrite"
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a worker process died, perhaps for lack of (shared) memory; {safe}, best with fewer "
            "--workers"
        ) from error


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep two runs from writing the same parts; the system drops the lock of a dead process.

    The lock is the process's own: unlike flock's, worker processes that outlive it do not keep it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: another run is at work on these features") from None
        except OSError:
            pass  # a shared disk without locks
        yield


def _prepare(job: Job, settings: Settings) -> None:
    """Check the parts there are, note what this run may not change, and list what is to do."""
    folder = job.parts.folder
    if settings.overwrite:
        for path in job.outputs:
            path.unlink(missing_ok=True)
        for name in os.listdir(folder):
            if name not in ("lock", "ranks"):
                _remove(folder / name)
    before = read_json(folder / "run.json") if (folder / "run.json").exists() else {"stages": {}}
    stages = {stage.name: stage.fingerprint for stage in job.stages}
    if "identity" in before:
        _refuse_change(folder, before["identity"], job.identity)
    for stage in job.stages:
        if stage.name in before["stages"]:
            _refuse_change(folder, before["stages"][stage.name], stage.fingerprint)
            _drop_changed(job.parts, stage, before["stages"][stage.name].get("shards", {}))
    write_json(folder / "run.json", {"identity": job.identity, "stages": before["stages"] | stages})
    todo = {stage.name: [u.name for u in job.parts.missing(stage)] for stage in job.stages}
    write_json(folder / "todo.json", todo)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _drop_changed(parts: Parts, stage: Stage, before: dict) -> None:
    """Drop the parts of units whose shards have other sizes now: mended or fetched again."""
    for unit, sizes in stage.fingerprint.get("shards", {}).items():
        if before.get(unit, sizes) != sizes:
            parts.drop(stage, unit)
            print(f"{stage.name}: the shards of {unit} have changed; encoding them again")


def _refuse_change(folder: Path, before: dict, now: dict) -> None:
    """Raise UserError if two fingerprints differ in more than their shards."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    for key in sorted((before.keys() | now.keys()) - {"shards"}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key, old, new = next(
                (f"{key}, {k}", old.get(k), new.get(k))
                for k in sorted(old.keys() | new.keys())
                if old.get(k) != new.get(k)
            )
        raise UserError(
            f"{folder} holds an unfinished run with another {key} ({old}, now {new}); continue "
            "it with what it was begun with, or start afresh with --overwrite"
        )


def _encode_share(job: Job, run: Extraction, ranks: Ranks) -> None:
    """Encode the units that fall to this rank: every world-th of those listed."""
    todo = read_json(job.parts.folder / "todo.json")
    for stage in job.stages:
        names = set(todo[stage.name][ranks.rank :: ranks.world])
        units = [unit for unit in stage.units if unit.name in names]
        if units:
            stage.encode(stage, units, run)


def _wait(watches: list[Watch], states: tuple[str, ...]) -> None:
    """Wait until every watched rank has come to one of the states."""
    while not all(watch.look() in states for watch in watches):
        time.sleep(POLL_SECONDS)


def _finish(job: Job, settings: Settings, clock: Clock) -> None:
    """Write the finished files, report what was left out, and drop the parts."""
    missing = [unit for stage in job.stages for unit in job.parts.missing(stage)]
    if missing:
        raise UserError(f"{len(missing)} parts are missing; the same command continues")
    summaries = {
        stage.name: summarise(stage, job.parts, settings.skip_bad)
        for stage in job.stages
        if stage.encode is not encode_texts
    }
    job.finish(summaries)
    clock.rows = {stage.name: stage.rows for stage in job.stages}
    for name, summary in summaries.items():
        clock.rows[name] = int(summary.keep.sum())
        _report(name, summary)
    drop_parts(job.parts.folder)


def drop_parts(folder: Path) -> None:
    """Remove a folder of parts, what other ranks may still be writing there included."""
    shutil.rmtree(folder, ignore_errors=True)


def _report(name: str, summary: Summary) -> None:
    for entry in summary.skipped:
        row = f" row {entry['row']}" if entry["row"] else ""
        print(f"skipped {name}{row}: {entry['image_path']}: {entry['cause']}")
    if summary.unmatched:
        print(f"{name}: {summary.unmatched} samples of the shards belong to no row; left out")


# ---------------------------------------------------------------------------------------------
# Putting parts together
# ---------------------------------------------------------------------------------------------


def write_array(path: Path, stage: Stage, parts: Parts, dim: int, keep: np.ndarray) -> None:
    """Write a stage's rows (those to keep) to a .npy file, one part in memory at a time."""
    rows_by_item = np.argsort(stage.item_of_row, kind="stable")
    sorted_items = stage.item_of_row[rows_by_item]
    starts = np.searchsorted(sorted_items, np.arange(len(stage.items) + 1))
    target = np.cumsum(keep) - 1
    filled = np.zeros(len(stage.items), bool)
    dtype = np.dtype(stage.dtype)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (int(keep.sum()), dim)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + int(keep.sum()) * dim * dtype.itemsize)
        for part in parts.read(stage):
            fresh = ~filled[part.ids]
            ids, features = part.ids[fresh], part.features[fresh]
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


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file with a header, quoted where needed, UTF-8."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


@contextlib.contextmanager
def publishing(staging: Path, folder: Path, last: str) -> Iterator[Path]:
    """Give an empty folder to write files to; they are moved to `folder` together, `last` last.

    An earlier `last` goes before any other file changes, so it never stands for a mixture.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    names = sorted(os.listdir(staging), key=lambda name: (name == last, name))
    for name in names:
        with open(staging / name, "rb") as file:
            os.fsync(file.fileno())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / last).unlink(missing_ok=True)
    for name in names:
        os.replace(staging / name, folder / name)
    staging.rmdir()


def mean_of_units(stage: Stage, parts: Parts, dim: int) -> tuple[np.ndarray, int]:
    """The mean (D,) float32 of the unit-length features of a stage, and how many there were."""
    total, count = np.zeros(dim, np.float64), 0
    for part in parts.read(stage):
        features = part.features.astype(np.float64)
        total += (features / np.linalg.norm(features, axis=1, keepdims=True)).sum(axis=0)
        count += len(features)
    if not count:
        raise UserError(f"{stage.table}: none of its images can be read")
    return (total / count).astype(np.float32), count


# ---------------------------------------------------------------------------------------------
# The reference's files
# ---------------------------------------------------------------------------------------------


def write_pickle(path: Path, content: dict) -> None:
    """Pickle a dict, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file, protocol=4)


def read_table(path: Path) -> list[list[str]]:
    """The columns of a table that write_table wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [list(column) for column in zip(*rows, strict=True)]


def write_reference_dataset(folder: Path, name: str, dataset: str) -> list[Path]:
    """Write the reference's two pickles of a data set from the native files beside them.

    name: what the features go by; dataset: the folder of the images.
    """
    written = []
    for split in ("query", "database"):
        image_paths, texts, instances = read_table(folder / f"{split}.csv")
        content = {"image_feats": np.load(folder / f"{split}_image.npy").astype(np.float32)}
        if split == "query":
            content["text_feats"] = np.load(folder / "query_text.npy")
            content["context_text_feats"] = np.load(folder / "query_context_text.npy")
        paths = [reference_path(dataset, path) for path in image_paths]
        content |= {"paths": paths, "instances": instances, "texts": texts}
        if split == "database":
            content["text_feats"] = None
        written.append(folder / f"{split}_{name}_features.pkl")
        write_pickle(written[-1], content)
    return written


def write_reference_corpus(folder: Path, name: str) -> None:
    """Write the reference's pickle of a corpus from the native files beside it."""
    (prompts,) = read_table(folder / f"{name}.csv")
    write_pickle(
        folder / f"{name}.pkl", {"feats": np.load(folder / f"{name}.npy"), "prompts": prompts}
    )


def reference_path(name: str, image_path: str) -> str:
    """An image path as the reference keeps it: ./data/icir/query/mug.jpg."""
    return f"./data/{name}/{native_path(name, image_path)}"


def native_path(name: str, image_path: str) -> str:
    """An image path of the reference's, relative to the data set's folder."""
    return relative_image_path(Dataset(name, Path(name)), image_path)
