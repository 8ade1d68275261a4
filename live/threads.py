"""Work on all rows, shared out among threads that stay.

In new ones a product of two vectors takes 1.4 times as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def at_once(work: Callable[[Any], Any], items: Iterable) -> list:
    """work(item) of every item, in order; each with one thread of torch's."""
    import torch

    def infer(item: Any) -> Any:
        with torch.inference_mode():  # which is a thread's own
            return work(item)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(_pool().map(infer, items))
    finally:
        torch.set_num_threads(threads)


def share_out(work: Callable[[slice], None], count: int, step: int) -> None:
    """Call work(rows) for shares of so many rows, of whole steps, one for each thread of torch."""
    import torch

    share = -(-count // (torch.get_num_threads() * step)) * step
    starts = range(0, count, max(1, share))
    at_once(work, [slice(start, min(start + share, count)) for start in starts])
