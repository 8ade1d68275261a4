"""Stages: rows of features to make. Images in files, images in shards, and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extraction.encoding import ImageBatches, Run, settle
from extraction.parts import Part, Parts, Unit, cut_ranges
from extraction.reading import (
    EverySample,
    FileChunks,
    FileImages,
    FileOrders,
    Orders,
    SampleIndex,
    ShardChunks,
    load_chunks,
)
from utils import UserError
from utils_task import unique_in_order

if TYPE_CHECKING:
    from torch import Tensor

    from utils_features import Encoder


# ---------------------------------------------------------------------------------------------
# Rows and what became of them
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What the parts of a stage say. keep: bool (rows,), the rows that have features (without a
    table of rows, the images that have).

    skipped: {"row" (line of the table), "image_path", "cause"} of the others; unmatched: samples
    of no row; odd: see count_odd.
    """

    keep: np.ndarray
    skipped: list[dict]
    unmatched: int = 0
    odd: list[dict] = field(default_factory=list)


def count_odd(odd: Iterable[tuple[int, str, str]]) -> list[dict]:
    """{"fact", "images" (how many have it), "first" (of them)}, a fact of utils_pixels each.

    odd: as parts hold it.
    """
    names: dict[str, dict[str, int]] = {}
    for item, name, fact in odd:
        names.setdefault(fact, {}).setdefault(name, item)
    return [
        {"fact": fact, "images": len(own), "first": min(own, key=own.get)}
        for fact, own in sorted(names.items())
    ]


@dataclass(frozen=True)
class Rows:
    """The rows of a table, and the distinct images or texts ("items") that they show.

    items: in order of first appearance; item_of_row: (rows,) int64; table: the file that the rows
    come from, or another name for them; lines: the line of it at which each row begins, from 1.
    """

    items: Sequence[str]
    item_of_row: np.ndarray
    table: Path | str
    lines: Sequence[int]

    @classmethod
    def of(cls, values: Iterable[str], table: Path, lines: Sequence[int]) -> Rows:
        """Rows of these values, one a row."""
        items, item_of_row = unique_in_order(values)
        return cls(items, item_of_row, table, lines)

    def __len__(self) -> int:
        return len(self.item_of_row)

    @property
    def count(self) -> int:
        """How many distinct items there are."""
        return len(self.items)

    def line(self, item: int) -> int:
        """The line at which an item stands first."""
        return int(self.lines[int(np.flatnonzero(self.item_of_row == item)[0])])

    def place(self, item: int) -> str:
        """Where an item stands first, for a message."""
        return f" ({self.table}, row {self.line(item)})"

    def sum_up(self, parts: Iterable[Part], covered: np.ndarray, skip_bad: bool) -> Summary:
        """What a finished stage's parts say. covered: bool (rows,), rows sure of their image.

        Raises UserError for a row without a sample, and for a bad image unless those are skipped.
        """
        good, covered = np.zeros(len(self.items), bool), covered.copy()
        causes: dict[int, str] = {}
        unmatched, odd = 0, []
        for part in parts:
            odd += part.odd
            good[part.ids] = True
            covered[part.covered] = True
            causes |= {item: cause for item, _, cause in part.bad}
            unmatched += part.unmatched
        if not covered.all():
            self._refuse_uncovered(np.flatnonzero(~covered))
        keep = good[self.item_of_row]
        skipped = [
            {"row": self.lines[row], "image_path": self.items[item], "cause": causes[int(item)]}
            for row, item in zip(np.flatnonzero(~keep), self.item_of_row[~keep], strict=True)
        ]
        if skipped and not skip_bad:
            first = skipped[0]
            raise UserError(
                f"{first['image_path']} ({self.table}, row {first['row']}): {first['cause']}; mend "
                "it and start afresh with --overwrite, or leave it out with --on_bad_image skip"
            )
        if not keep.any():
            raise UserError(f"{self.table}: none of its images can be read")
        return Summary(keep, skipped, unmatched, count_odd(odd))

    def _refuse_uncovered(self, uncovered: np.ndarray) -> None:
        row = int(uncovered[0])
        more = f" (and {len(uncovered) - 1} rows more)" if len(uncovered) > 1 else ""
        raise UserError(
            f"{self.table}, row {self.lines[row]}{more}: no sample of the shards has the image "
            f"path {self.items[self.item_of_row[row]]!r} with this row's text and instance; "
            "complete the shards and run the same command again"
        )


@dataclass(frozen=True)
class NoRows:
    """Images that no table lists: all that some shards hold, known as they come."""

    count: None = None

    def __len__(self) -> int:
        return 0

    def place(self, item: int) -> str:
        """Nothing: there is no table."""
        return ""

    def sum_up(self, parts: Iterable[Part], covered: np.ndarray, skip_bad: bool) -> Summary:
        """What a finished stage's parts say. Raises UserError as Rows.sum_up does."""
        bad, odd, count = [], [], 0
        for part in parts:
            bad += part.bad
            odd += part.odd
            count += len(part.ids)
        if bad and not skip_bad:
            _, name, cause = bad[0]
            raise UserError(
                f"{name}: {cause}; mend it and start afresh with --overwrite, or leave it out "
                "with --on_bad_image skip"
            )
        skipped = [{"row": None, "image_path": name, "cause": cause} for _, name, cause in bad]
        return Summary(np.ones(count, bool), skipped, odd=count_odd(odd))


# ---------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Rows of features to make, in units.

    name: of its array and of its folder of parts; fingerprint: what its parts depend on, with the
    sizes of each unit's shards under "shards"; dtype: of the features on disk. columns: the arrays
    that a row is cut into, name -> width, where it is not one of the stage's name.
    """

    name: str
    rows: Rows | NoRows
    units: list[Unit]
    fingerprint: dict
    dtype: str = "float32"
    columns: Mapping[str, int] | None = None

    @property
    def arrays(self) -> list[str]:
        """The names of its arrays."""
        return list(self.columns or [self.name])

    def encode(self, units: list[Unit], run: Run) -> None:
        """Encode those of the units that the ranks deal to this one, and write their parts."""
        raise NotImplementedError

    def sum_up(self, parts: Parts, skip_bad: bool) -> Summary:
        """What the stage's parts say, all of them being there.

        Raises UserError for a row without a sample, and for a bad image unless those are skipped.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ImageStage(Stage):
    """Images. half_pixels: encoded with their pixels rounded, see Encoder.encode_images.

    texts: of composed queries, the text of each item; none: the items are images alone.
    """

    half_pixels: bool = False
    texts: Sequence[str] = ()

    def of_items(self, items: Sequence[int], size: int, **changes) -> ImageStage:
        """A stage with these changes, whose item i shows what this one's items[i] shows.

        size: of its units, where these are ranges of items.
        """
        raise NotImplementedError

    def preprocess(self, encoder: Encoder) -> Callable:
        """How its images are preprocessed."""
        return encoder.query_preprocess if self.texts else encoder.preprocess

    def width(self, encoder: Encoder) -> int:
        """How many numbers a row has."""
        return sum(self.columns.values()) if self.columns else encoder.dim

    def features(self, encoder: Encoder, images: Tensor | list, items: list[int]) -> np.ndarray:
        """The rows of preprocessed images (B, ...), which show these items: (B, width) float32."""
        if self.texts:
            texts = [self.texts[item] for item in items]
            return encoder.encode_queries(images, texts, items).numpy()
        return encoder.encode_images(images, self.half_pixels).numpy()


@dataclass(frozen=True, kw_only=True)
class FileStage(ImageStage):
    """Images in files: a part for each unit. boxes: int (items, 4), what to show of each, or None.

    The items are paths, one of which may recur with another box.
    """

    images: FileImages
    boxes: np.ndarray | None = None

    def of_items(self, items: Sequence[int], size: int, **changes) -> FileStage:
        units = cut_ranges(len(items), size)
        boxes = None if self.boxes is None else self.boxes[np.asarray(items)]
        return replace(self, units=units, boxes=boxes, **changes)

    def encode(self, units: list[Unit], run: Run) -> None:
        dataset = FileChunks(self.images, self.preprocess(run.encoder))
        settings = run.settings
        dealt = (units[number] for number in run.group.deal(len(units)))
        orders = FileOrders(self.rows.items, self.boxes, dealt, settings.batch)
        chunks = load_chunks(dataset, settings.workers, settings.patience, sampler=orders)
        total = sum(unit.stop - unit.start for unit in units)
        for _ in ImageBatches(self, run).encode(chunks, total):
            pass

    def sum_up(self, parts: Parts, skip_bad: bool) -> Summary:
        found = parts.read(self, features=False)
        return self.rows.sum_up(found, np.ones(len(self.rows), bool), skip_bad)


@dataclass(frozen=True, kw_only=True)
class ShardStage(ImageStage):
    """Images in shards: a part for each batch of a unit, the last one completes it.

    samples: says which item a sample shows. whole: False if the rows are not all there are
    (--limit): then the rest of the shards is not read once every row has its sample. viewed: see
    read_pixels.
    """

    samples: SampleIndex | EverySample
    whole: bool = True
    viewed: bool = False

    def of_items(self, items: Sequence[int], size: int, **changes) -> ShardStage:
        samples = replace(self.samples, item_of_row=changes["rows"].item_of_row)
        return replace(self, samples=samples, **changes)

    def encode(self, units: list[Unit], run: Run) -> None:
        workers = min(run.settings.workers, len(units))
        done = self._batches_done(run.parts)
        preprocess, batch = self.preprocess(run.encoder), run.settings.batch
        orders = Orders(run.group.deal(len(units)), workers)
        dataset = ShardChunks(units, orders, self.samples, preprocess, batch, done, self.viewed)
        chunks = orders.answer(load_chunks(dataset, workers, run.settings.patience))
        batches, covered = ImageBatches(self, run), np.zeros(len(self.rows), bool)
        for chunk in batches.encode(chunks, self._count(units)):
            covered[chunk.covered] = True
            if chunk.full and not chunk.last:
                batches.save(f"{chunk.unit.name}+{chunk.batch:06d}", chunk.unit)
            if run.alone and not self.whole and covered.all():
                batches.close_early()
                return

    def _batches_done(self, parts: Parts) -> dict[str, set[int]]:
        done: dict[str, set[int]] = {}
        for name in parts.names(self):
            unit, _, batch = name.partition("+")
            if batch:
                done.setdefault(unit, set()).add(int(batch))
        return done

    def _count(self, units: list[Unit]) -> int | None:
        """About how many images these units hold; None if that is not known."""
        count = self.rows.count
        return None if count is None else count * len(units) // len(self.units)

    def sum_up(self, parts: Parts, skip_bad: bool) -> Summary:
        found = parts.read(self, features=False)
        summary = self.rows.sum_up(found, np.zeros(len(self.rows), bool), skip_bad)
        return summary if self.whole else replace(summary, unmatched=0)


@dataclass(frozen=True, kw_only=True)
class TextStage(Stage):
    """Texts: a part for each unit. words: those that contextualise them, none: plain texts."""

    words: Sequence[str] = ()

    def encode(self, units: list[Unit], run: Run) -> None:
        with run.bar(self, sum(unit.stop - unit.start for unit in units), "text") as bar:
            for unit in (units[number] for number in run.group.deal(len(units))):
                texts, batch = self.rows.items[unit.start : unit.stop], run.settings.batch
                with run.clock.measure("encoding"):
                    if self.words:
                        features = run.encoder.encode_contextual_texts(
                            texts, self.words, batch, bar.update
                        )
                    else:
                        features = run.encoder.encode_texts(texts, batch, bar.update)
                ids = np.arange(unit.start, unit.stop)
                run.save(self, unit.name, Part(ids, settle(self, features, texts, ids)))

    def sum_up(self, parts: Parts, skip_bad: bool) -> Summary:
        return Summary(np.ones(len(self.rows), bool), [])
