"""The rows that are searched live: products that are kept, and what a method asked of them.

A method asks a gallery for similarities, whoever it is; none of its formulas is known here.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from utils_retrieval import Gallery, Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils_storage import ArrayRows, MappedRows

KEPT_BYTES = 512 << 20  # of products; at least FEWEST of them
FEWEST = 12
ROWS_AT_ONCE = 1024  # that a cache holds
SIMILARITIES = {"image": "image", "text": "text", "context_text": "text"}  # a part -> its role


@dataclass(frozen=True, eq=False)
class LiveRows(Rows):
    """Rows on the CPU, float32 or float16 as they are on disk, multiplied with few vectors.

    All of them are read from memory once, whatever the number of vectors: a part of them at a time,
    that a cache holds, and each thread its own.
    """

    @classmethod
    def of(cls, raw: Tensor) -> LiveRows:
        """Measure the rows of raw, (N, D)."""
        import torch

        return cls(raw, torch.cat([rows.norm(dim=1) for _, rows in _parts(raw, 0, len(raw))]))

    @cached_property
    def mean(self) -> Tensor:
        weights = self.length.reciprocal()
        parts = _parts(self.raw, 0, len(self.raw))
        return sum(weights[place] @ rows for place, rows in parts) / len(self.raw)

    def product(self, vectors: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import pad

        count = len(vectors)
        if count > (1 if self.raw.dtype == torch.float32 else 2):  # four take less time than three
            vectors = pad(vectors, (0, 0, 0, -count % 4))
        found = vectors.new_empty(len(vectors), len(self.raw))

        def multiply(start: int, stop: int) -> None:
            with torch.inference_mode():  # which is a thread's own
                for place, rows in _parts(self.raw, start, stop):
                    torch.mm(vectors, rows.T, out=found[:, place])
                found[:count, start:stop].div_(self.length[start:stop])

        self._share_out(multiply)
        return found[:count]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Threads that stay: in new ones a product of two vectors takes 1.4 times as long."""
        return ThreadPoolExecutor(os.cpu_count())

    def _share_out(self, work: Callable[[int, int], None]) -> None:
        """Call work(start, stop) for shares of the rows, one a thread of torch."""
        import torch

        count, threads = len(self.raw), torch.get_num_threads()
        share = -(-count // threads)
        if share <= ROWS_AT_ONCE:
            work(0, count)
            return
        torch.set_num_threads(1)
        try:
            starts = range(0, count, share)
            list(self._pool.map(work, starts, (min(start + share, count) for start in starts)))
        finally:
            torch.set_num_threads(threads)

    def weighted(self, weights: Tensor, rows: Tensor) -> Tensor:
        import torch

        if self.raw.dtype == torch.float32:
            return super().weighted(weights, rows)
        some = (self.raw[rows].float() / self.length[rows][..., None]) * weights[..., None]
        return some.sum(1)


def _parts(raw: Tensor, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows start to stop, float32, a few at a time, and where they are; each until the next."""
    import torch

    room = torch.empty(0 if raw.dtype == torch.float32 else ROWS_AT_ONCE, raw.shape[1])
    for first in range(start, stop, ROWS_AT_ONCE):
        place = slice(first, min(first + ROWS_AT_ONCE, stop))
        rows = raw[place]
        yield place, room[: len(rows)].copy_(rows) if len(room) else rows


def open_rows(file: MappedRows | ArrayRows, device: torch.device) -> Rows:
    """All rows of a file, mapped, or float32 on a GPU.

    Raises UserError for a row that is zero or not finite.
    """
    import torch

    from utils_evaluation import check_lengths

    raw = torch.from_numpy(file.read(slice(0, file.shape[0])))
    rows = LiveRows.of(raw) if device.type == "cpu" else Rows.of(raw.to(device))
    check_lengths(rows.length, file.path)
    return rows


@dataclass(frozen=True, eq=False)
class LiveGallery(Gallery):
    """A gallery that keeps its latest products: vectors that come again take none."""

    _kept: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _nearest: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _expected: dict = field(default_factory=dict, repr=False)

    @property
    def most_kept(self) -> int:
        """How many products are kept, N float32 each."""
        return max(FEWEST, KEPT_BYTES // (4 * max(1, len(self))))

    def expect(self, vectors: Sequence[Tensor]) -> None:
        """Say which vectors (1, D) will be asked for: the next product has them too."""
        parts = {("image", _content(own), None): (own, None) for own in vectors}
        self._expected.clear()
        self._expected.update({k: part for k, part in parts.items() if k not in self._kept})

    def shared(
        self, parts: Mapping[Hashable, tuple[Tensor, Tensor | None]], of: str = "image"
    ) -> dict[Hashable, Tensor]:
        """As Gallery.similarities, of what is kept: nobody may change it."""
        keys = {name: (of, *map(_content, part)) for name, part in parts.items()}
        new = {keys[name]: part for name, part in parts.items() if keys[name] not in self._kept}
        if new:
            if of == "image":
                new = self._expected | new
                self._expected.clear()
            self._kept.update(super().similarities(new, of))
        for key in keys.values():
            self._kept.move_to_end(key)
        found = {name: self._kept[key] for name, key in keys.items()}
        _drop_oldest(self._kept, self.most_kept)
        return found

    def similarities(
        self, parts: Mapping, of: str = "image", few: Collection = ()
    ) -> dict[Hashable, Tensor]:
        """As Gallery.similarities; each is the caller's own, to change as it likes."""
        return {name: own.clone() for name, own in self.shared(parts, of).items()}

    def nearest(self, vectors: Tensor, k: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        key = (_content(vectors), _content(mean), k)
        if key not in self._nearest:
            self._nearest[key] = self.find_nearest(vectors, k, mean)
            _drop_oldest(self._nearest, FEWEST)
        return tuple(part.clone() for part in self._nearest[key])

    def find_nearest(self, vectors: Tensor, k: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """What nearest keeps."""
        return super().nearest(vectors, k, mean)


def _drop_oldest(kept: OrderedDict, most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def _content(vectors: Tensor | None) -> bytes | None:
    return None if vectors is None else vectors.cpu().numpy().tobytes()


# ---------------------------------------------------------------------------------------------
# What a method asks
# ---------------------------------------------------------------------------------------------


def role_of(name: Hashable) -> str | None:
    """Whether a part of similarities is of the query's "image" or "text"; None for what is neither.

    A part's name says so, or the first of the words that it consists of.
    """
    word = name[0] if isinstance(name, tuple) and name else name
    return SIMILARITIES.get(word) if isinstance(word, str) else None


@dataclass(frozen=True, eq=False)
class Heard(Gallery):
    """A gallery that notes which similarities a method's scores are made of, by role.

    heard: role -> (1, N), as they were given; None for parts that are neither image nor text.
    """

    gallery: LiveGallery | None = None
    heard: dict[str | None, Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, gallery: LiveGallery) -> Heard:
        return cls(gallery.kinds, gallery.number, gallery._remembered, gallery)

    def similarities(
        self, parts: Mapping, of: str = "image", few: Collection = ()
    ) -> dict[Hashable, Tensor]:
        found = self.gallery.shared(parts, of)
        for name, similarity in found.items():
            self.heard[role_of(name) if of == "image" else None] = similarity
        return {name: similarity.clone() for name, similarity in found.items()}


@dataclass(frozen=True, eq=False)
class Grid(Gallery):
    """A gallery whose rows have given similarities: what a method makes of each pair of them.

    given: role -> (P,). Only for methods that ask for image and text alone.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.given.values())))

    def similarities(
        self, parts: Mapping, of: str = "image", few: Collection = ()
    ) -> dict[Hashable, Tensor]:
        return {name: self.given[role_of(name)].clone()[None] for name in parts}


def grid_of(image: Tensor, text: Tensor, side: int) -> tuple[Grid, np.ndarray, np.ndarray]:
    """A grid over what image and text similarities (N,) span: side x side pairs, and both axes.

    The grid's pairs go through the texts of the first image, then of the next.
    """
    import torch

    axes = [torch.linspace(float(v.min()), float(v.max()), side) for v in (image, text)]
    first, second = (axis.to(image.device) for axis in axes)
    given = {"image": first.repeat_interleave(side), "text": second.repeat(side)}
    return Grid({}, given=given), axes[0].numpy(), axes[1].numpy()
