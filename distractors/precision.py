"""Products of vectors and rows in half precision, and what they do to ranks.

The factors are rounded, products of two are exact in float32, and so are they summed: what tensor
cores do. A CPU multiplies the rounded factors in float32, as fast as others, to the same effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from distractors.passes import AllLeftOut
from utils import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distractors.counting import Counting
    from distractors.passes import Found
    from distractors.pool import Pool
    from utils_runs import Run
    from utils_task import Task

FULL = "float32"
CHECKED_ROWS = 1 << 20  # of a pool, the first ones, that are counted in full precision too


def rounded(values: Tensor, precision: str) -> Tensor:
    """Values as factors in a precision, a type of torch: of it on a GPU, else float32."""
    import torch

    if precision == FULL:
        return values
    half = values.to(getattr(torch, precision))
    return half if half.is_cuda else half.float()


def multiply(vectors: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """V X' of factors, (V, D) and (n, D), into float32 (V, n)."""
    import torch

    if vectors.dtype == out.dtype:
        return torch.mm(vectors, rows.T, out=out)
    return torch.mm(vectors, rows.T, out_dtype=out.dtype, out=out)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError if the device has no such products."""
    import torch

    ones = torch.ones(16, 16, device=device)
    factors = rounded(ones, precision)
    try:
        multiply(factors, factors, out=torch.empty_like(ones))
    except RuntimeError as error:
        raise UserError(
            f"--distractors_precision {precision}: {device} has no such products "
            f"({str(error).splitlines()[0]}); leave it"
        ) from None


def describe_effect(
    counting: Counting,
    count: Callable[..., Found],
    pool: Pool,
    runs: Sequence[Run],
    task: Task,
    ties: str,
) -> list[str]:
    """The line on how ranks differ from those of float32, among the first rows of a pool.

    count(counting, pool=...): run_pass with the rest. ties: see positive_ranks.
    """
    some = pool.first(min(CHECKED_ROWS, len(pool)))
    try:
        own, full = (
            found["above"] + (found["tied"] if ties == "worst" else 0)
            for found in (count(replace(counting, precision=p), pool=some) for p in _both(counting))
        )
    except AllLeftOut:
        return [
            f"warning: {counting.precision} products: how ranks differ from those of float32 is "
            f"not known, as the first {len(some)} distractors were all left out"
        ]
    apart = np.abs(own - full)
    what = f"{counting.precision} products: among the first {len(some)} distractors, counted in "
    what += f"float32 too, {np.count_nonzero(apart)} of {len(apart)} ranks differ"
    if not apart.any():
        return [f"note: {what}"]
    worst = int(apart.argmax())
    run, query, row = counting.positive(worst)
    return [
        f"warning: {what}, by {apart.mean():.3g} on average of all and by {apart[worst]} at most: "
        f"{own[worst]} instead of {full[worst]} rank before {task.gallery.path[row]!r} of query "
        f"{task.queries.key[query]!r} ({runs[run].variant})"
    ]


def _both(counting: Counting) -> tuple[str, str]:
    return counting.precision, FULL
