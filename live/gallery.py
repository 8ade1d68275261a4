"""The rows that are searched live: products that are kept, and what a method asked of them.

A method asks a gallery for similarities, whoever it is; none of its formulas is known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from live.packed import PackedRows
from live.threads import share_out
from utils_retrieval import Gallery, Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils_storage import ArrayRows, MappedRows
    from utils_task import Images

KEPT_BYTES = 512 << 20  # of products; at least FEWEST of them
FEWEST = 12
ROWS_AT_ONCE = 1024  # that a cache holds
SIMILARITIES = {"image": "image", "text": "text", "context_text": "text"}  # a part -> its role


@dataclass(frozen=True, eq=False)
class LiveRows(Rows):
    """Rows on the CPU, float32 or float16 as they are on disk, multiplied with few vectors.

    All of them are read from memory once, whatever the number of vectors: a part of them at a time,
    that a cache holds, and each thread its own. packed: the rows once more, for faster products.
    """

    packed: PackedRows | None = None

    @classmethod
    def of(cls, raw: Tensor) -> LiveRows:
        """Measure the rows of raw, (N, D)."""
        import torch

        length = torch.cat([rows.norm(dim=1) for _, rows in _parts(raw, slice(0, len(raw)))])
        return cls(raw, length)

    def pack(self) -> LiveRows:
        """With their copy, for products of all of them, where that can be: see PackedRows."""
        return replace(self, packed=PackedRows.of(self.raw, self.length))

    @cached_property
    def mean(self) -> Tensor:
        weights = self.length.reciprocal()
        parts = _parts(self.raw, slice(0, len(self.raw)))
        return sum(weights[place] @ rows for place, rows in parts) / len(self.raw)

    def product(self, vectors: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import pad

        if self.packed:
            return self.packed.product(vectors)
        count = len(vectors)
        if count > (1 if self.raw.dtype == torch.float32 else 2):  # four take less time than three
            vectors = pad(vectors, (0, 0, 0, -count % 4))
        found = vectors.new_empty(len(vectors), len(self.raw))

        def multiply(share: slice) -> None:
            for place, rows in _parts(self.raw, share):
                torch.mm(vectors, rows.T, out=found[:, place])
            found[:count, share].div_(self.length[share])

        share_out(multiply, len(self.raw), ROWS_AT_ONCE)
        return found[:count]

    def weighted(self, weights: Tensor, rows: Tensor) -> Tensor:
        import torch

        if self.raw.dtype == torch.float32:
            return super().weighted(weights, rows)
        some = (self.raw[rows].float() / self.length[rows][..., None]) * weights[..., None]
        return some.sum(1)


def _parts(raw: Tensor, share: slice) -> Iterator[tuple[slice, Tensor]]:
    """Some of the rows, float32, a few at a time, and where they are; each until the next."""
    import torch

    room = torch.empty(0 if raw.dtype == torch.float32 else ROWS_AT_ONCE, raw.shape[1])
    for first in range(share.start, share.stop, ROWS_AT_ONCE):
        place = slice(first, min(first + ROWS_AT_ONCE, share.stop))
        rows = raw[place]
        yield place, room[: len(rows)].copy_(rows) if len(room) else rows


def open_rows(file: MappedRows | ArrayRows, device: torch.device, whole: bool = True) -> Rows:
    """All rows of a file, mapped, or float32 on a GPU. whole: they are compared all at once.

    Raises UserError for a row that is zero or not finite.
    """
    import torch

    from utils_evaluation import check_lengths

    raw = torch.from_numpy(file.read(slice(0, file.shape[0])))
    rows = LiveRows.of(raw) if device.type == "cpu" else Rows.of(raw.to(device))
    check_lengths(rows.length, file.path)
    return rows.pack() if whole and isinstance(rows, LiveRows) else rows


def first_rows(images: Images) -> np.ndarray:
    """Of each row of a gallery the first that shows the same image and box: int64 (N,)."""
    shown = images.path
    if images.box is not None:
        shown = zip(images.path, map(tuple, images.box.tolist()), strict=True)
    first: dict[Hashable, int] = {}
    rows = (first.setdefault(own, row) for row, own in enumerate(shown))
    return np.fromiter(rows, np.int64, len(images))


def find_again(first: np.ndarray) -> np.ndarray:
    """The places (n,) of images that came before among them, int64 rising. first: what tells one
    image from another.
    """
    return np.delete(np.arange(len(first)), np.unique(first, return_index=True)[1])


class Kept(OrderedDict):
    """What was made last, at most so many."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def get_or(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key, or what make yields, which then is."""
        if key not in self:
            self[key] = make()
            self.drop_oldest(self.most)
        self.move_to_end(key)
        return self[key]

    def drop_oldest(self, most: int) -> None:
        """Keep at most so many."""
        while len(self) > most:
            self.popitem(last=False)


@dataclass(frozen=True, eq=False)
class LiveGallery(Gallery):
    """A gallery that keeps its latest products: vectors that come again take none."""

    _kept: Kept = field(default_factory=partial(Kept, FEWEST), repr=False)
    _nearest: Kept = field(default_factory=partial(Kept, FEWEST), repr=False)
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
        self._kept.drop_oldest(self.most_kept)
        return found

    def similarities(
        self, parts: Mapping, of: str = "image", few: Collection = ()
    ) -> dict[Hashable, Tensor]:
        """As Gallery.similarities; each is the caller's own, to change as it likes."""
        return {name: own.clone() for name, own in self.shared(parts, of).items()}

    def nearest(self, vectors: Tensor, k: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        key = (_content(vectors), _content(mean), k)
        found = self._nearest.get_or(key, partial(self.find_nearest, vectors, k, mean))
        return tuple(part.clone() for part in found)

    def find_nearest(self, vectors: Tensor, k: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """What nearest keeps."""
        return find_best(self.similarity(vectors, mean), min(k, len(self)))


def find_best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (V, N), falling, and where they are, (V, k).

    As torch.topk, which makes a copy of all scores with their places: 16 bytes for each of them.
    """
    import torch

    parts = scores.shape[1] // ROWS_AT_ONCE
    if k > parts:
        return scores.topk(k, dim=1)
    largest = scores[:, : parts * ROWS_AT_ONCE].unflatten(1, (parts, ROWS_AT_ONCE)).amax(2)
    least = largest.topk(k, dim=1).values[:, -1:]  # k scores, if not more, are as large
    places = [row.nonzero()[:, 0] for row in scores >= least]
    best = [own[some].topk(k) for own, some in zip(scores, places, strict=True)]
    values = torch.stack([own.values for own in best])
    found = [some[own.indices] for some, own in zip(places, best, strict=True)]
    return values, torch.stack(found)


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
