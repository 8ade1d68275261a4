"""Candidates: of a gallery that is too large to compare every row, those worth comparing.

faiss finds the rows nearest to a query's image and text, and to whatever a method compares, by an
index of eight bits a number; the method then ranks these alone, by their features as they are.
Nothing is sure to be among them: a ranking of candidates is approximate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from live.gallery import Kept, LiveGallery, LiveRows, role_of
from utils import UserError, atomic_path
from utils_retrieval import Gallery, Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_LISTS = 4096  # of rows that lie together
LEARNED = 40  # rows a list is learned from
ROWS_ADDED = 65_536  # at once
LISTS_READ = 64  # at least, for a vector
ROOM = 8  # rows that are looked at for each candidate, at least
MIXED = (0.25, 0.5, 0.75)  # shares of the image in mixtures, in standard deviations
LEAST_SPREAD = 1e-9
SAMPLE = 20_000  # rows, drawn once, of which methods take the moments of the gallery
GALLERIES_KEPT = 8


def import_faiss() -> Any:
    """Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError("--candidates needs faiss: pip install faiss-cpu") from None
    return faiss


@dataclass(frozen=True, eq=False)
class CandidateGallery(LiveGallery):
    """Some rows of a gallery: scores are of these, what a method observes is of them all.

    Nearest rows are found by the index too, and moments are those of a sample. asked: the vectors
    that were compared. fused: those of the query's image and text, by role.
    """

    of: Candidates | None = None
    asked: list[Tensor] = field(default_factory=list)
    fused: dict[str | None, Tensor] = field(default_factory=dict)

    def shared(self, parts: Mapping, of: str = "image") -> dict[Hashable, Tensor]:
        self.asked.extend(vectors for vectors, _ in parts.values())
        self.fused.update({role_of(name): vectors for name, (vectors, _) in parts.items()})
        return super().shared(parts, of)

    @property
    def wanted(self) -> list[Tensor]:
        """The vectors whose nearest rows may rank first: those asked for, and mixtures of the two
        that are fused, for what resembles both, and neither most.
        """
        if not {"image", "text"} <= self.fused.keys():
            return self.asked
        image, text = (
            self.fused[role] / self.of.sample.moments(self.fused[role])[1].clamp(min=LEAST_SPREAD)
            for role in ("image", "text")
        )
        return [*self.asked, *(share * image + (1 - share) * text for share in MIXED)]

    def mean(self, of: str = "image") -> Tensor:
        return self.of.rows.mean

    def moments(self, vectors: Tensor, of: str = "image") -> tuple[Tensor, Tensor]:
        return self.of.sample.moments(vectors, of)

    def find_nearest(self, vectors: Tensor, k: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.of.nearest(vectors, k, mean)

    def weighted_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        return self.of.rows.weighted(weights, rows)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Finds the candidates of a query. most: rows that are taken for each of its vectors."""

    rows: LiveRows
    index: Any
    most: int
    _kept: Kept = field(default_factory=partial(Kept, GALLERIES_KEPT), repr=False)

    @classmethod
    def open(cls, rows: Rows, most: int, path: Path, say: Callable[[str], None]) -> Candidates:
        """With the index that lies at `path`, which is made where it is not there.

        Raises UserError without faiss, on a GPU, and for a damaged index.
        """
        faiss = import_faiss()
        if not isinstance(rows, LiveRows):
            raise UserError("--candidates works on the CPU: add --gpu -1")
        if not path.is_file():
            say(f"making an index of {len(rows.raw):,} rows for --candidates, once: {path.name}")
            index = _make_index(faiss, rows)
            for old in path.parent.glob("candidates-*.faiss"):
                old.unlink()
            with atomic_path(path) as temporary:
                faiss.write_index(index, str(temporary))
        index = _read_index(faiss, path, len(rows.raw))
        share = ROOM * most * index.nlist / len(rows.raw)
        index.nprobe = min(index.nlist, max(LISTS_READ, math.ceil(share)))
        return cls(rows, index, min(most, len(rows.raw)))

    def gallery(self, vectors: Sequence[Tensor]) -> CandidateGallery:
        """The candidates of some vectors (V, D): number has their rows, rising."""
        import torch

        asked = torch.cat(list(vectors)).unique(dim=0)
        key = asked.numpy().tobytes()

        def find() -> CandidateGallery:
            rows = self._find(asked, self.most)
            return CandidateGallery({"image": self._select(rows)}, rows, of=self)

        found = self._kept.get_or(key, find)
        found.asked.clear()
        found.fused.clear()
        return found

    def nearest(self, vectors: Tensor, k: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k nearest rows of all, as Gallery.nearest has them."""
        import torch

        rows = self._find(vectors, ROOM * k)
        similarity, places = Gallery({"image": self._select(rows)}).nearest(vectors, k, mean)
        return similarity, torch.from_numpy(rows)[places]

    def _find(self, vectors: Tensor, count: int) -> np.ndarray:
        """The rows that the index has nearest to any of the vectors (V, D), rising."""
        found = np.unique(self.index.search(vectors.numpy(), min(count, len(self.rows.raw)))[1])
        return found[found >= 0]

    @cached_property
    def sample(self) -> LiveGallery:
        """Rows drawn once."""
        count = len(self.rows.raw)
        drawn = np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False)
        return LiveGallery({"image": self._select(np.sort(drawn))})

    def _select(self, rows: np.ndarray) -> LiveRows:
        return LiveRows(self.rows.raw[rows].float(), self.rows.length[rows])


def _make_index(faiss: Any, rows: LiveRows) -> Any:
    """An index of all rows: lists of those that lie together, eight bits a number."""
    count, dim = rows.raw.shape
    lists = max(1, min(MOST_LISTS, int(4 * math.sqrt(count)), count // LEARNED))
    index = faiss.index_factory(dim, f"IVF{lists}_HNSW32,SQ8", faiss.METRIC_INNER_PRODUCT)
    drawn = np.random.default_rng(0).choice(count, min(count, LEARNED * lists), replace=False)
    index.train(_unit(rows, np.sort(drawn)))
    for start in range(0, count, ROWS_ADDED):
        index.add(_unit(rows, slice(start, start + ROWS_ADDED)))
    return index


def _read_index(faiss: Any, path: Path, count: int) -> Any:
    """Raises UserError if it is not an index of so many rows."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError:
        index = None
    if index is None or index.ntotal != count:
        raise UserError(f"{path} is damaged: remove it, and it is made anew")
    return index


def _unit(rows: LiveRows, some: np.ndarray | slice) -> np.ndarray:
    unit: torch.Tensor = rows.raw[some].float() / rows.length[some][:, None]
    return unit.numpy()
