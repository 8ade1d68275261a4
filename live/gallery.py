"""The rows that are searched live: products that are kept, and what a method asked of them.

A method asks a gallery for similarities, whoever it is; none of its formulas is known here.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
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
FEW = 8  # vectors, at most, of a product that goes through the rows by parts
MOST_OF_MEMORY = 0.25  # that half precision may take as float32
SIMILARITIES = {"image": "image", "text": "text", "context_text": "text"}  # a part -> its role


@dataclass(frozen=True, eq=False)
class LiveRows(Rows):
    """Rows that few vectors are multiplied with: read from memory once, whatever their number.

    As one product of matrices, two vectors take more than twice the time of one.
    """

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, float32, a few at a time, which a cache holds, and where they are."""
        for start in range(0, len(self.raw), ROWS_AT_ONCE):
            yield slice(start, start + ROWS_AT_ONCE), self.raw[start : start + ROWS_AT_ONCE].float()

    def product(self, vectors: Tensor) -> Tensor:
        is_few = 1 < len(vectors) <= FEW and not vectors.is_cuda
        return self.by_parts(vectors) if is_few else super().product(vectors)

    def by_parts(self, vectors: Tensor) -> Tensor:
        """The product, part by part."""
        import torch

        found = vectors.new_empty(len(vectors), len(self.raw))
        for place, rows in self.parts():
            for vector, target in zip(vectors, found, strict=True):
                torch.mv(rows, vector, out=target[place])
        return found.div_(self.length)


@dataclass(frozen=True, eq=False)
class HalfRows(LiveRows):
    """Rows in half precision, made float32 as they are used: half the memory, but slower."""

    @classmethod
    def of(cls, raw: Tensor) -> HalfRows:
        """Measure the rows of raw, (N, D) float16."""
        import torch

        return cls(raw, torch.cat([some.float().norm(dim=1) for some in raw.split(ROWS_AT_ONCE)]))

    @cached_property
    def mean(self) -> Tensor:
        weights = self.length.reciprocal()
        return sum(weights[place] @ rows for place, rows in self.parts()) / len(self.raw)

    def product(self, vectors: Tensor) -> Tensor:
        return self.by_parts(vectors)

    def weighted(self, weights: Tensor, rows: Tensor) -> Tensor:
        some = (self.raw[rows].float() / self.length[rows][..., None]) * weights[..., None]
        return some.sum(1)


def open_rows(file: MappedRows | ArrayRows, device: torch.device) -> Rows:
    """All rows of a file, mapped; half precision is made float32 where memory is ample.

    Raises UserError for a row that is zero or not finite.
    """
    import torch

    from utils_evaluation import check_lengths

    raw = torch.from_numpy(file.read(slice(0, file.shape[0])))
    keep_half = raw.dtype == torch.float16 and 4 * raw.numel() > MOST_OF_MEMORY * _memory()
    rows = (HalfRows if keep_half else LiveRows).of(raw.to(device))
    check_lengths(rows.length, file.path)
    return rows


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, eq=False)
class LiveGallery(Gallery):
    """A gallery that keeps its latest products: vectors that come again take none."""

    _kept: OrderedDict = field(default_factory=OrderedDict, repr=False)

    @property
    def most_kept(self) -> int:
        """How many products are kept, N float32 each."""
        return max(FEWEST, KEPT_BYTES // (4 * max(1, len(self))))

    def similarities(
        self, parts: Mapping[Hashable, tuple[Tensor, Tensor | None]], of: str = "image"
    ) -> dict[Hashable, Tensor]:
        """As Gallery.similarities; each is the caller's own, to change as it likes."""
        keys = {name: (of, *map(_content, part)) for name, part in parts.items()}
        new = {keys[name]: part for name, part in parts.items() if keys[name] not in self._kept}
        if new:
            self._kept.update(super().similarities(new, of))
        found = {}
        for name, key in keys.items():
            self._kept.move_to_end(key)
            found[name] = self._kept[key].clone()
        while len(self._kept) > self.most_kept:
            self._kept.popitem(last=False)
        return found


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

    def similarities(self, parts: Mapping, of: str = "image") -> dict[Hashable, Tensor]:
        found = self.gallery.similarities(parts, of)
        for name, similarity in found.items():
            self.heard[role_of(name) if of == "image" else None] = similarity.clone()
        return found


@dataclass(frozen=True, eq=False)
class Grid(Gallery):
    """A gallery whose rows have given similarities: what a method makes of each pair of them.

    given: role -> (P,). Only for methods that ask for image and text alone.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.given.values())))

    def similarities(self, parts: Mapping, of: str = "image") -> dict[Hashable, Tensor]:
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
