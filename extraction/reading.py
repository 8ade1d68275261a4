"""Reading images, from files or out of shards: what the loader's worker processes run."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from extraction.warned import named_warnings
from utils import UserError, open_regular
from utils_datasets import IMAGE_SUFFIXES
from utils_pixels import BadImage, decode_image, read_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from extraction.parts import Unit

IMAGES_AT_ONCE = 32  # images that a worker hands over together, whatever the batch size
SECONDS_BETWEEN_LOOKS = 0.1  # of a worker that waits for a unit
CHUNKS_AHEAD = 4  # that each worker reads before they are asked for
SEMAPHORES_EACH = 3  # of a queue
SEMAPHORES_SHARED = 12  # of the queue of results and the events, and some to spare


@dataclass
class Chunk:
    """Some images of one unit, preprocessed. images: (k, 3, H, W), or None if k is 0; an array
    where there is no shared memory for a tensor; a list where they are left as images.

    batch: the number of their batch in the unit; full: that batch ends here; last: the unit does.
    odd, covered, unmatched: see Part. error: a reason to stop. idle: the number of a worker that
    waits for a unit to read next; without a unit a chunk says only that.
    """

    unit: Unit | None
    batch: int = 0
    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    images: torch.Tensor | np.ndarray | list[torch.Tensor] | None = None
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    odd: list[tuple[int, str, str]] = field(default_factory=list)
    full: bool = False
    last: bool = False
    covered: list[int] = field(default_factory=list)
    unmatched: int = 0
    error: str | None = None
    idle: int | None = None

    def add(self, item: int, name: str, read: Callable, preprocess: Callable) -> None:
        """Read and preprocess one image, or note why it cannot be. read: see read_pixels."""
        try:
            with named_warnings(name):
                image, facts = read()
                image = preprocess(image)
        except FileNotFoundError:
            self.bad.append((item, name, "no such file"))
        except BadImage as error:
            self.bad.append((item, name, error.cause))
        except Exception as error:  # a decoder's or transform's own; the image is at fault
            self.bad.append((item, name, f"{type(error).__name__}: {error}"))
        else:
            self.ids.append(item)
            self.names.append(name)
            self.odd += [(item, name, fact) for fact in facts]
            self.images = [*(self.images or []), image]

    def close(self) -> Chunk:
        """This chunk, its images one tensor or array, ready to go to another process."""
        if self.images and isinstance(self.images[0], torch.Tensor):
            self.images = torch.stack(self.images)
            if torch.utils.data.get_worker_info():
                self.images = _hand_over(self.images)
        return self


def _hand_over(images: torch.Tensor) -> torch.Tensor | np.ndarray:
    """Images in shared memory or, where that is full, as an array, which goes through a pipe.

    Left to torch, a tensor for which there is no memory would be lost without a word.
    """
    try:
        return images.share_memory_()
    except RuntimeError:
        return images.numpy()


# ---------------------------------------------------------------------------------------------
# Worker processes
# ---------------------------------------------------------------------------------------------


def load_chunks(dataset: object, workers: int, patience: float, **options) -> Iterator[Chunk]:
    """The chunks of a dataset, read by worker processes (0: by this one).

    Where shared memory is too small for what so many workers need, there are fewer, which is said.
    patience: seconds without a chunk after which the workers count as stuck.
    Raises UserError if they are, and RuntimeError if one dies; none is left behind.
    """
    chunks = _start(dataset, workers, options)
    try:
        while True:
            with _alarm(patience) if workers else contextlib.nullcontext():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk
    except (RuntimeError, OSError, EOFError, UserError) as error:
        _kill_workers()
        if isinstance(error, EOFError):
            raise RuntimeError("DataLoader worker: its message broke off") from error
        raise


def _start(dataset: object, workers: int, options: dict) -> Iterator[Chunk]:
    """A loader at work, with as many workers as there is room for."""
    count = workers
    while not _have_room(count):
        count //= 2
    if count < workers:
        print(f"no shared memory for --workers {workers}: {count} read the images", file=sys.stderr)
    ahead = {"prefetch_factor": CHUNKS_AHEAD} if count else {}
    return iter(DataLoader(dataset, None, num_workers=count, **ahead, **options))


def _have_room(workers: int) -> bool:
    """Whether shared memory holds the semaphores that so many workers need."""
    needed = workers and SEMAPHORES_EACH * workers + SEMAPHORES_SHARED
    try:
        return bool([multiprocessing.Semaphore() for _ in range(needed)]) or not workers
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise UserError in the block once it takes so long, whatever it waits for.

    Does nothing outside the main thread, which alone hears alarms.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise UserError(
            f"the worker processes have given no image for {seconds:g} s: they are stuck, or what "
            "they read from; what is done is safe, and the same command continues "
            "(--worker_timeout S waits longer)"
        )

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _kill_workers() -> None:
    """End the worker processes, also those that are stopped or hold what others wait for."""
    main = threading.current_thread() is threading.main_thread()
    # torch's answer to the death of a worker is an error in whatever runs at that moment.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    if main:
        signal.signal(signal.SIGCHLD, before)


# ---------------------------------------------------------------------------------------------
# Images in files
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileImages:
    """Opens images that lie in files. locate: the file of a path; the rest: see read_pixels."""

    locate: Callable[[str], Path]
    own_mode: bool = False
    viewed: bool = False

    def open(self, path: str, box: np.ndarray | None) -> tuple[Image, tuple[str, ...]]:
        """An image, or what a box shows of it, and what sets it apart."""
        return read_pixels(self.locate(path), box, self.own_mode, self.viewed)

    def decode(self, source: Path | bytes, box: np.ndarray | None = None) -> Image:
        """An image of a file or of its bytes, as all others are seen."""
        return decode_image(source, box, self.own_mode, self.viewed)


class FileChunks:
    """Reads the images that each work order names."""

    def __init__(self, images: FileImages, preprocess: Callable):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, order: tuple[Chunk, int, list[str], list]) -> Chunk:
        chunk, first, paths, boxes = order
        for item, (path, box) in enumerate(zip(paths, boxes, strict=True), first):
            chunk.add(item, path, partial(self.images.open, path, box), self.preprocess)
        return chunk.close()


class FileOrders:
    """The work orders of a stage's units, in order, as the loader's sampler.

    items: paths; boxes: int (items, 4), or None.
    """

    def __init__(
        self, items: Sequence[str], boxes: np.ndarray | None, units: Iterable[Unit], batch: int
    ):
        self.items, self.boxes, self.units, self.batch = items, boxes, units, batch

    def __iter__(self) -> Iterator[tuple[Chunk, int, list[str], list]]:
        for unit in self.units:
            for start in range(unit.start, unit.stop, self.batch):
                end = min(start + self.batch, unit.stop)
                for first in range(start, end, IMAGES_AT_ONCE):
                    stop = min(first + IMAGES_AT_ONCE, end)
                    chunk = Chunk(unit, full=stop == end, last=stop == unit.stop)
                    paths = self.items[first:stop]
                    boxes = [None] * len(paths) if self.boxes is None else self.boxes[first:stop]
                    yield chunk, first, paths, list(boxes)


# ---------------------------------------------------------------------------------------------
# Images in shards
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: its image's bytes, and its key if the json member gives one."""

    name: str
    data: bytes | None
    image_path: str
    text: str = ""
    instance: str = ""


@dataclass(frozen=True)
class SampleIndex:
    """Finds the rows of a shard's sample by (image path, text, instance), or by the path alone.

    Held as sorted hashes, 24 bytes a row, because every worker has one. spell: a sample's path as
    the rows have it.
    """

    hashes: np.ndarray  # (rows,) uint64, sorted
    row_of_hash: np.ndarray  # (rows,) int64
    item_of_row: np.ndarray  # (rows,) int64
    spell: Callable[[str], str]
    by_path: bool = False

    @property
    def needs_labels(self) -> bool:
        """Whether samples are known by their json members."""
        return not self.by_path

    def find(self, image_path: str, text: str, instance: str) -> np.ndarray:
        """The rows that this sample is for, (k,) int64."""
        key = _hash_key(self.spell(image_path), *(() if self.by_path else (text, instance)))
        start, stop = (np.searchsorted(self.hashes, key, side) for side in ("left", "right"))
        return self.row_of_hash[start:stop]

    def match(self, sample: Sample, count: int) -> tuple[int | None, np.ndarray]:
        """The item that a sample shows, None if it is of no row, and its rows."""
        rows = self.find(sample.image_path, sample.text, sample.instance)
        return (int(self.item_of_row[rows[0]]) if len(rows) else None), rows

    def name(self, sample: Sample) -> str:
        """What messages call a sample."""
        return sample.image_path


@dataclass(frozen=True)
class EverySample:
    """Takes every sample of a unit, numbered as they come: images without rows."""

    needs_labels: bool = False

    def match(self, sample: Sample, count: int) -> tuple[int | None, np.ndarray]:
        """The number of a sample, of which `count` came before."""
        return count, np.empty(0, np.int64)

    def name(self, sample: Sample) -> str:
        """What messages call a sample."""
        return sample.name


def index_samples(
    rows: Iterable[tuple[str, ...]], item_of_row: np.ndarray, spell: Callable[[str], str]
) -> SampleIndex:
    """Index rows (image_path, text, instance), or (image_path,), by their hashes."""
    keys, by_path = [], False
    for image_path, *rest in rows:
        by_path = not rest
        keys.append(_hash_key(image_path, *rest))
    hashes = np.array(keys, np.uint64)
    order = np.argsort(hashes, kind="stable")
    return SampleIndex(hashes[order], order, item_of_row, spell, by_path)


def _hash_key(*parts: str) -> np.uint64:
    data = json.dumps(parts).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


def read_samples(shards: Sequence[Path], need_json: bool) -> Iterator[Sample]:
    """The samples of shards, in order, put together by webdataset from files that we open.

    Given their names, it would take what looks like a URL or a command for one.

    Raises UserError, naming the shard, if it is damaged or a sample is not as it should be.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for shard in shards:
        try:
            with open_regular(shard) as stream:
                members = tar_file_expander([{"url": str(shard), "stream": stream}])
                for content in group_by_keys(members):
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


class Orders:
    """Numbers of units on their way to the workers: the next one to each that is idle."""

    def __init__(self, numbers: Iterator[int], workers: int):
        self._numbers = numbers
        self.inboxes, self._outboxes = zip(
            *(multiprocessing.Pipe(duplex=False) for _ in range(max(1, workers))), strict=True
        )

    def answer(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks of units; a worker that is idle is sent a number, or None if there is none."""
        for chunk in chunks:
            if chunk.idle is not None:
                self._outboxes[chunk.idle].send(next(self._numbers, None))
            if chunk.unit:
                yield chunk


class ShardChunks(IterableDataset):
    """Reads shards, each worker one unit after the other, as they are ordered.

    A unit's distinct images are numbered as they come and cut into batches; those in `done`
    (unit name -> batch numbers) are passed over undecoded. viewed: see read_pixels.
    """

    def __init__(
        self,
        units: list[Unit],
        orders: Orders,
        samples: SampleIndex | EverySample,
        preprocess: Callable,
        batch: int,
        done: dict[str, set[int]],
        viewed: bool = False,
    ):
        self.units, self.inboxes = units, orders.inboxes
        self.samples, self.preprocess = samples, preprocess
        self.batch, self.done, self.viewed = batch, done, viewed

    def __iter__(self) -> Iterator[Chunk]:
        worker = torch.utils.data.get_worker_info()
        number = worker.id if worker else 0
        yield Chunk(None, idle=number)
        while (order := (yield from self._wait(number))) is not None:
            unit = self.units[order]
            try:
                yield from self._read(unit)
            except UserError as error:
                yield Chunk(unit, error=str(error))
                return
            yield Chunk(None, idle=number)

    def _wait(self, number: int) -> Generator[Chunk, None, int | None]:
        """The next order. Empty chunks meanwhile: the loader may want this worker no more."""
        while not self.inboxes[number].poll(SECONDS_BETWEEN_LOOKS):
            yield Chunk(None)
        return self.inboxes[number].recv()

    def _read(self, unit: Unit) -> Iterator[Chunk]:
        done = self.done.get(unit.name, set())
        chunk, seen = Chunk(unit), set()
        for sample in read_samples(unit.shards, self.samples.needs_labels):
            item = self._take(sample, chunk, len(seen), done)
            if item is None or item in seen:
                continue
            chunk.batch = len(seen) // self.batch
            seen.add(item)
            if chunk.batch not in done:
                name = self.samples.name(sample)
                read = partial(read_pixels, sample.data, viewed=self.viewed)
                chunk.add(item, name, read, self.preprocess)
            chunk.full = len(seen) % self.batch == 0
            if chunk.batch in done:
                chunk.full = False
            elif chunk.full or len(chunk.ids) + len(chunk.bad) == IMAGES_AT_ONCE:
                yield chunk.close()
                chunk = Chunk(unit, batch=chunk.batch)
        chunk.full = chunk.last = True
        yield chunk.close()

    def _take(self, sample: Sample, chunk: Chunk, count: int, done: set[int]) -> int | None:
        """The item that a sample shows, its rows noted; None if it has no image or no row."""
        if sample.data is None:
            return None
        item, rows = self.samples.match(sample, count)
        if item is None:
            chunk.unmatched += count // self.batch not in done  # else its part has counted it
        chunk.covered.extend(rows.tolist())
        return item
