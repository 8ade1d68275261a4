"""What scores are made of, for pages that explain rankings: of hits, of positives, of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils_blocks import Block, Cells
from utils_retrieval import Fusion, Parts

if TYPE_CHECKING:
    from torch import Tensor

BELOW_TOP = 40  # positives of a query, at least, whose parts are kept beside the best rows
SAMPLED = 200  # of a query's gallery, at most, ...
SAMPLED_IN_ALL = 1_000_000  # ... and of all queries and runs together


@dataclass(frozen=True, eq=False)
class Explained:
    """What a run's scores in the main view are made of: two parts, (..., 2) float32 each.

    names, fusion: see Parts. top: (Q, K, 2), of the best rows. positives: (Q, P, 2), of the best
    ranked positives, best first. sample: (Q, S, 2), of ranked gallery rows at even steps. All three
    are NaN past their ends. low, high: (Q, 2), the ends over all rows that are ranked. neighbours:
    int64 (Q, E), database rows that queries were expanded by, -1 past the end; E may be 0.
    """

    names: tuple[str, ...]
    fusion: Fusion | None
    top: np.ndarray
    positives: np.ndarray
    sample: np.ndarray
    low: np.ndarray
    high: np.ndarray
    neighbours: np.ndarray


def rows_sampled(queries: int, runs: int) -> int:
    """How many gallery rows of each query are sampled for as many explained runs."""
    return min(SAMPLED, SAMPLED_IN_ALL // max(1, queries * runs))


def explain_part(
    parts: Parts,
    block: Block,
    positives: tuple[Cells, np.ndarray],
    ranked: Tensor,
    top: np.ndarray,
    sampled: int,
) -> Explained:
    """That of a block's queries, q for Q.

    positives: the cells of the main view and their ranks. ranked: bool (q, n), which rows are. top:
    int64 (q, K), the positions of the best, -1 past the end. sampled: rows of each gallery.
    """
    import torch

    count, rows = ranked.shape
    steps = np.unique(np.linspace(0, rows - 1, min(sampled, rows)).astype(np.int64))
    steps = np.broadcast_to(steps, (count, len(steps)))
    best = _best_ranked(*positives, count, top.shape[1] + BELOW_TOP)
    wanted = {"top": top, "positives": best, "sample": steps}
    similarities = list(parts.similarities.values())

    def gather(positions: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(positions.clip(min=0)).to(ranked.device)
        shown = torch.from_numpy(positions >= 0).to(ranked.device) & ranked.gather(1, at)
        found = [s.gather(1, at).masked_fill(~shown, float("nan")) for s in similarities]
        return torch.stack(found, -1).float().cpu().numpy()

    ends = {}
    for name, beyond, furthest in (("low", np.inf, "amin"), ("high", -np.inf, "amax")):
        known = [getattr(s.masked_fill(~ranked, beyond), furthest)(1) for s in similarities]
        ends[name] = torch.stack(known, -1).float().cpu().numpy()
    neighbours = np.empty((count, 0), np.int64)
    if parts.neighbours is not None:
        neighbours = block.database_rows(parts.neighbours.cpu().numpy())
    found = {name: gather(positions) for name, positions in wanted.items()}
    return Explained(
        tuple(parts.similarities), parts.fusion, **found, **ends, neighbours=neighbours
    )


def _best_ranked(cells: Cells, ranks: np.ndarray, queries: int, most: int) -> np.ndarray:
    """The positions of each query's best ranked positives, int64 (q, most), -1 past the end."""
    order = np.lexsort((ranks, cells.query))
    query, row = cells.query[order], cells.row[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    kept = place < most
    found = np.full((queries, most), -1, np.int64)
    found[query[kept], place[kept]] = row[kept]
    return found


def collect_explained(
    blocks: Sequence[Block], found: Sequence[Explained], queries: int
) -> Explained:
    """The parts of all blocks, by query."""
    first = found[0]
    fills: Mapping[str, float] = {
        **dict.fromkeys(("top", "positives", "sample", "low", "high"), np.nan),
        "neighbours": -1,
    }
    arrays = {}
    for name, fill in fills.items():
        own = [getattr(part, name) for part in found]
        shape = np.max([part.shape[1:] for part in own], axis=0)
        arrays[name] = np.full((queries, *shape), fill, own[0].dtype)
        for block, part in zip(blocks, own, strict=True):
            arrays[name][block.queries, : part.shape[1]] = part
    return Explained(first.names, first.fusion, **arrays)
