"""Images through the model: chunks put together to batches, batches to parts, all of it timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from extraction.parts import Part, Parts, Unit
from extraction.reading import Chunk
from utils import UserError

if TYPE_CHECKING:
    from composed import Options
    from extraction.stage import ImageStage, Stage
    from utils_features import Encoder
    from utils_ranks import Group


@dataclass(frozen=True)
class Settings:
    """How features are made, as a command says it.

    backbone, precision, save_dtype: see the flags; batch: images or texts encoded at once;
    part_rows: images or texts a unit; workers: processes that read; skip_bad: leave out images
    that cannot be read; patience: seconds without an image after which the workers count as stuck.
    system: what a system of composed/ is told, None for a backbone of images and texts.
    """

    backbone: str
    precision: str
    save_dtype: str
    batch: int
    part_rows: int
    workers: int
    skip_bad: bool
    overwrite: bool
    patience: float = 600
    system: Options | None = None


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
class Run:
    """One process's share of a job."""

    encoder: Encoder
    parts: Parts
    settings: Settings
    clock: Clock
    group: Group

    @property
    def alone(self) -> bool:
        """Whether this is the only rank."""
        return self.group.ranks.world == 1

    def bar(self, stage: Stage, total: int | None, unit: str) -> tqdm:
        """A progress bar of the first rank, of about its share of what all have to do."""
        disable = self.group.ranks.rank > 0 or None  # None: where stderr is no terminal
        share = total and total // self.group.ranks.world
        return tqdm(total=share, desc=stage.name, unit=unit, disable=disable)

    def save(self, stage: Stage, name: str, part: Part) -> None:
        with self.clock.measure("writing"):
            self.parts.write(stage, name, part)


@dataclass
class OpenUnit:
    """A unit under way: the batch being filled, and what waits to be written."""

    buffer: torch.Tensor | None = None  # (batch, 3, H, W), pinned where there is a GPU
    pictures: list = field(default_factory=list)  # instead, of a model that takes images
    filled: int = 0
    names: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    odd: list[tuple[int, str, str]] = field(default_factory=list)
    covered: list[int] = field(default_factory=list)
    unmatched: int = 0

    def fill(
        self, images: torch.Tensor | np.ndarray | list, names: list[str], batch: int, pin: bool
    ) -> None:
        if isinstance(images, list):
            self.pictures += images
        else:
            images = torch.as_tensor(images)
            if self.buffer is None:
                shape = (batch, *images.shape[1:])
                self.buffer = torch.empty(shape, dtype=images.dtype, pin_memory=pin)
            self.buffer[self.filled : self.filled + len(images)] = images
        self.filled += len(images)
        self.names += names

    def take_batch(self) -> torch.Tensor | list:
        """The batch as far as it is filled."""
        if self.buffer is not None:
            return self.buffer[: self.filled]
        pictures, self.pictures = self.pictures, []
        return pictures

    def take_part(self, dim: int, dtype: str) -> Part:
        """What waits to be written, which then waits no more."""
        features = np.concatenate([np.empty((0, dim), dtype), *self.features])
        covered = np.array(self.covered, np.int64)
        ids = np.array(self.ids, np.int64)
        part = Part(ids, features, self.bad, covered, self.unmatched, self.odd)
        self.ids, self.features, self.bad, self.covered, self.unmatched = [], [], [], [], 0
        self.odd = []
        return part


class ImageBatches:
    """The images of a stage on their way: chunks come in, parts go out."""

    def __init__(self, stage: ImageStage, run: Run):
        self.stage, self.run = stage, run
        self.opened: dict[str, OpenUnit] = {}

    def encode(self, chunks: Iterable[Chunk], total: int | None) -> Iterator[Chunk]:
        """Encode the chunks, write a part at each unit's end, and give every chunk that is done.

        total: images, for the progress bar.
        """
        start, clock = time.monotonic(), self.run.clock
        waiting = iter(chunks)
        try:
            with self.run.bar(self.stage, total, "image") as bar:
                while chunk := self._next(waiting):
                    self._check(chunk)
                    self._add(self.opened.setdefault(chunk.unit.name, OpenUnit()), chunk)
                    bar.update(len(chunk.ids) + len(chunk.bad))
                    if chunk.last:
                        self.save(chunk.unit.name, chunk.unit)
                        del self.opened[chunk.unit.name]
                    yield chunk
        finally:  # the caller may need no more chunks
            clock.image_seconds += time.monotonic() - start

    def save(self, name: str, unit: Unit) -> None:
        """Write what a unit has encoded and not yet written, as the part of that name."""
        opened = self.opened.get(unit.name, OpenUnit())
        dim, dtype = self.stage.width(self.run.encoder), self.stage.dtype
        self.run.save(self.stage, name, opened.take_part(dim, dtype))

    def close_early(self) -> None:
        """End every unit of the stage with what there is."""
        for unit in self.opened.values():
            if unit.filled:
                self._add(unit, Chunk(Unit(""), full=True))
        for missing in self.run.parts.missing(self.stage):
            self.save(missing.name, missing)

    def _next(self, chunks: Iterator[Chunk]) -> Chunk | None:
        with self.run.clock.measure("waiting for data"):
            return next(chunks, None)

    def _check(self, chunk: Chunk) -> None:
        if chunk.error:
            raise UserError(chunk.error)
        if chunk.bad and not self.run.settings.skip_bad:
            item, name, cause = chunk.bad[0]
            raise UserError(
                f"{name}{self.stage.rows.place(item)}: {cause}; mend the image and run the same "
                "command again, or leave such images out with --on_bad_image skip"
            )

    def _add(self, unit: OpenUnit, chunk: Chunk) -> None:
        """Add a chunk to its unit's batch, and encode the batch if it is complete."""
        run = self.run
        if chunk.images is not None:
            with run.clock.measure("waiting for data"):
                pin = run.encoder.device.type == "cuda"
                unit.fill(chunk.images, chunk.names, run.settings.batch, pin)
        unit.ids += chunk.ids
        unit.bad += chunk.bad
        unit.odd += chunk.odd
        unit.covered += chunk.covered
        unit.unmatched += chunk.unmatched
        if chunk.full and unit.filled:
            with run.clock.measure("encoding"):
                ids = unit.ids[-unit.filled :]
                features = self.stage.features(run.encoder, unit.take_batch(), ids)
            unit.features.append(settle(self.stage, features, unit.names, ids))
            run.clock.images += unit.filled
            unit.filled, unit.names = 0, []


def settle(
    stage: Stage, features: np.ndarray, names: Sequence[str], ids: Sequence[int]
) -> np.ndarray:
    """Features in the type they are kept in. Raises UserError if they are not finite."""
    with np.errstate(over="ignore"):
        features = features.astype(stage.dtype)
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        raise UserError(
            f"the features of {names[wrong[0]]!r}{stage.rows.place(ids[wrong[0]])} are not finite "
            "numbers; use --precision fp32 or bf16 and --save_dtype float32, which reach further "
            "than float16"
        )
    return features
