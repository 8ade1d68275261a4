"""Distractors that look like a positive, or like a query's image: perhaps answers nobody labelled.

Every row would have to be compared with the images of all positives, which are several times as
many as queries. So both are first drawn together to few numbers that bound their cosine from above:
with an orthonormal basis B of the directions that the images have most of, and what is left of a
unit vector, x' = x - B'Bx, it is x y <= Bx By + |x'| |y'| (Cauchy-Schwarz). Only rows that this
does not rule out are compared in full, and float64 decides: nothing is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distractors.pool import MOST_ROWS, SCORES_HELD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distractors.pool import Chunk, Pool
    from utils_storage import Features

PAIRS_AT_ONCE = 1 << 20  # of rows and images, that are compared together
BASIS = 64  # numbers to which vectors are drawn together
LEAST_WIDTH = 4 * BASIS  # of vectors for which that is worth it
SLACK = 1e-4  # by which float32 bounds and cosines may be too low
EQUAL = 1e-9  # float64 cosines that differ less are equal: of a row with itself it may be below 1
FOUND = ("alike", "alike_row", "alike_image", "alike_cosine")
NONE_FOUND = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Images:
    """Images that distractors are compared with, raw (V, D), and what messages call each.

    label: what messages call one of them. because: what follows if a distractor looks like one.
    """

    label: str
    because: str
    raw: np.ndarray
    names: Sequence[str]


def find_images(features: Features, positives: np.ndarray) -> list[Images]:
    """Images of positives, by their rows of the gallery, int64 (V,) increasing, and of queries."""
    raw, paths = features.database("image").read(positives), features.task.gallery.path
    names = [repr(paths[row]) for row in positives.tolist()]
    because = ", and may be answers that nobody labelled"
    groups = [Images("a positive's image", because, raw, names)]
    return [*groups, _of_queries(features)] if features.has_query("image") else groups


def _of_queries(features: Features) -> Images:
    query = features.query("image")
    owner = np.zeros(len(query.values), np.int64)
    rows = np.arange(len(query)) if query.row is None else query.row
    places = rows[:, None] if query.of is None else query.of
    for number in reversed(range(len(places))):  # the first query that has it
        owner[places[number][places[number] >= 0]] = number
    used = np.unique(places[places >= 0])  # of queries that were read anew, not all are
    keys = [features.task.queries.key[number] for number in owner[used].tolist()]
    names = [f"that of query {key!r}" for key in keys]
    return Images("a query's image", "", query.values[used], names)


@dataclass(frozen=True, eq=False)
class Bound:
    """What bounds the cosines of rows with some images: basis B (k, D), the images' (V, k + 1)."""

    basis: Tensor
    images: Tensor

    @classmethod
    def of(cls, unit: Tensor) -> Bound | None:
        """Of unit images (V, D); None where full comparison costs little more."""
        import torch

        if unit.shape[1] < LEAST_WIDTH:
            return None
        products = unit.double().T @ unit.double()
        basis = torch.linalg.eigh(products).eigenvectors[:, -BASIS:].T.float().contiguous()
        return cls(basis, _drawn_together(unit, basis))

    def highest(self, unit: Tensor) -> Tensor:
        """No cosine of a row with an image is higher: (n, D) -> (n,)."""
        import torch

        rows = _drawn_together(unit, self.basis)
        best = rows.new_full((len(rows),), -torch.inf)
        size = max(1, PAIRS_AT_ONCE // len(rows))
        scores = rows.new_empty(size * len(rows))  # memory that is touched already is faster
        for some in self.images.split(size):
            product = scores[: len(rows) * len(some)].view(len(rows), -1)
            best = torch.maximum(best, torch.mm(rows, some.T, out=product).amax(1))
        return best


def _drawn_together(unit: Tensor, basis: Tensor) -> Tensor:
    """(n, D) -> (n, k + 1): the products with a basis, and the length of what is left."""
    import torch

    seen = unit @ basis.T
    left = (1 - seen.square().sum(1, keepdim=True)).clamp(min=0)
    return torch.cat([seen, left.add(SLACK**2).sqrt()], dim=1)


@dataclass(frozen=True, eq=False)
class Alike:
    """A pass that looks for rows whose cosine with an image is `least` or more.

    images: raw float32 (V, D). ends: the groups of images end there, "positives" first.
    """

    images: Tensor
    unit: Tensor
    ends: tuple[int, ...]
    least: float
    bound: Bound | None

    @classmethod
    def of(cls, groups: Sequence[Images], least: float, device: torch.device) -> Alike:
        import torch

        raw = np.concatenate([group.raw for group in groups]).astype(np.float32)
        images = torch.from_numpy(raw).to(device)
        unit = (images / images.norm(dim=1, keepdim=True)).nan_to_num()  # no image: like nothing
        ends = tuple(np.cumsum([len(group.raw) for group in groups]).tolist())
        return cls(images, unit, ends, least, Bound.of(unit))

    @property
    def groups(self) -> list[slice]:
        return [slice(*both) for both in zip((0, *self.ends), self.ends, strict=False)]

    def counter(self) -> UnitAlike:
        return UnitAlike(self)

    @property
    def rows_at_once(self) -> int:
        return MOST_ROWS

    def content(self) -> Iterator[bytes]:
        """All that decides what is found, for a digest."""
        yield repr((self.ends, self.least)).encode()
        yield self.images.cpu().numpy().tobytes()

    def join(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        count, *first = (np.stack([own[name] for own in found]) for name in FOUND)
        place = first[0].argmin(0), np.arange(len(self.ends))
        return dict(zip(FOUND, [count.sum(0), *(own[place] for own in first)], strict=True))


class UnitAlike:
    """Looks for such rows among those of one unit."""

    def __init__(self, alike: Alike):
        self._alike = alike
        groups = len(alike.ends)
        self._count, self._image = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
        self._row, self._cosine = np.full(groups, NONE_FOUND), np.zeros(groups)

    def add(self, chunk: Chunk) -> None:
        """Look at some rows."""
        number, rows, unit = chunk.number, chunk.raw["image"], chunk.unit["image"]
        if self._alike.bound is not None:
            open_ones = self._alike.bound.highest(unit) >= self._alike.least - SLACK
            number, rows, unit = number[open_ones], rows[open_ones], unit[open_ones]
        size = max(1, SCORES_HELD // len(self._alike.unit))
        for some in zip(number.split(size), rows.split(size), unit.split(size), strict=True):
            if len(some[0]):
                self._compare(*some)

    def _compare(self, number: Tensor, rows: Tensor, unit: Tensor) -> None:
        cosine = unit @ self._alike.unit.T
        for group, images in enumerate(self._alike.groups):
            own = cosine[:, images]
            best = own.amax(1, keepdim=True)
            near = (best[:, 0] >= self._alike.least - SLACK).nonzero()[:, 0]
            for some in near.split(max(1, PAIRS_AT_ONCE // own.shape[1])):
                may_be_best = own[some] >= best[some] - SLACK
                exact, image = _best(rows[some], self._alike.images[images], may_be_best)
                self._note(group, number[some], exact, image + images.start)

    def _note(self, group: int, number: Tensor, exact: Tensor, image: Tensor) -> None:
        """Note which rows are alike, by each one's best image and their cosine."""
        hit = (exact >= self._alike.least - EQUAL).nonzero()[:, 0]
        self._count[group] += len(hit)
        if len(hit) and self._row[group] == NONE_FOUND:  # rows come in their order
            first = hit[0]
            self._row[group] = int(number[first])
            self._image[group], self._cosine[group] = int(image[first]), float(exact[first])

    def result(self) -> dict[str, np.ndarray]:
        """Of each group of images: how many rows are alike, int64; the first one's number in the
        pool, its image and their cosine.
        """
        return dict(zip(FOUND, (self._count, self._row, self._image, self._cosine), strict=True))


def _best(rows: Tensor, images: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row (n, D) the highest cosine with the images (V, D) that are asked, bool (n, V).

    float64 (n,), and the first image that has it, int64 (n,). A few pairs at a time.
    """
    import torch

    pairs = [some.T for some in asked.nonzero().split(max(1, PAIRS_AT_ONCE // rows.shape[1]))]
    exact = rows.new_full(asked.shape, -torch.inf, dtype=torch.float64)
    exact[asked] = torch.cat([_cosine(rows[row], images[image]) for row, image in pairs])
    return exact.max(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of rows in pairs, (n, D) both: float64 (n,)."""
    a, b = a.double(), b.double()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def describe_alike(
    found: Mapping[str, np.ndarray], groups: Sequence[Images], least: float, pool: Pool
) -> list[str]:
    """The lines on what was found: a warning for each group of images, or that there is nothing."""
    lines = []
    names = [name for group in groups for name in group.names]
    of_groups = (found[name].tolist() for name in FOUND)
    for group, count, row, image, cosine in zip(groups, *of_groups, strict=True):
        if count:
            lines.append(
                f"warning: {count} of {len(pool)} distractors have a cosine of {least:g} or more "
                f"with {group.label}{group.because}; the first: {pool.place(row)}, {cosine:.4f} "
                f"with {names[image]}"
            )
    labels = " or ".join(group.label for group in groups)
    return lines or [f"note: no distractor has a cosine of {least:g} or more with {labels}"]
