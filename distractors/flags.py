"""The flags of run_retrieval.py that are about distractors, as a table. Imports nothing large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError, not_negative, positive, positive_share, refuse_idle
from utils_ranks import TIMEOUT

if TYPE_CHECKING:
    from distractors.running import Added


def numbers(text: str) -> list[int]:
    """Integers of at least 0 with commas between them, for argparse."""
    return [not_negative(number) for number in text.split(",")]


FLAGS = {
    "distractors": {
        "nargs": "+",
        "type": Path,
        "metavar": "PATH",
        "help": "rows that are wrong for every query, ranked beside each query's gallery: .npy "
        "files, folders of them (img_emb/*.npy of LAION and clip-retrieval), features folders",
    },
    "distractors_limit": {
        "nargs": "+",
        "type": numbers,
        "metavar": "N",
        "help": "rank the first N of them; of several (N N or N,N), the curve (default: all)",
    },
    "neighbours_from": {
        "choices": ("gallery", "all"),
        "help": "whether means, moments and neighbours are the gallery's, or the distractors' too "
        "(default: all)",
    },
    "on_bad_row": {
        "choices": ("fail", "skip"),
        "help": "stop at a distractor that is zero, infinite or NaN, or leave such rows out, which "
        "tables then say (default: fail)",
    },
    "distractors_alike": {
        "type": positive_share,
        "metavar": "X",
        "help": "also say how many have a cosine of X or more with the image of a positive or of a "
        "query (0.95: mostly the same picture) and so may be answers that nobody labelled; takes "
        "about as long as counting for --method product",
    },
    "distractors_precision": {
        "choices": ("float32", "bfloat16", "float16"),
        "help": "round the factors of the products that count to this, which is faster on a GPU "
        "alone; how ranks differ for it is counted among the first million rows, and said "
        "(default: float32)",
    },
    "fresh": {
        "action": "store_true",
        "help": "count anew what an earlier, perhaps interrupted run has counted",
    },
    "rank_timeout": {
        "type": positive,
        "metavar": "S",
        "help": "seconds that a rank of torchrun waits for the others (default: 1800)",
    },
}
# What distractors cannot be beside, and what to do instead: of their rows only counts are kept.
REFUSED = {
    "top_k": "the best rows are not kept among distractors: run it once more without these",
    "report": "a page would show rankings without the distractors: run it once more without these",
    "export": "rankings without the distractors would be written: run it once more without these",
    "external": "another system's results say nothing of the distractors: leave these, or take in "
    "its embeddings as features (create_features.py --from_embeddings) and give them a method",
}


@dataclass(frozen=True)
class Asked:
    """What the flags ask for. limits: numbers of rows, rising, or none for all there are."""

    paths: tuple[Path, ...]
    limits: tuple[int, ...] = ()
    neighbours: str = "all"
    skips_bad: bool = False
    alike: float | None = None
    precision: str = "float32"
    fresh: bool = False
    timeout: float = TIMEOUT


def asked_for(given: dict, one_number: bool) -> Asked | None:
    """What a command's flags, by name, ask of distractors; None without --distractors.

    one_number: whether the command writes a row for each run, which --sweep and --ablation do not.
    Raises UserError for flags without effect.
    """
    if not given["distractors"]:
        refuse_idle([name for name in FLAGS if given[name]], "without --distractors")
        return None
    for name in REFUSED:
        if given[name]:
            raise UserError(f"--{name} with --distractors: {REFUSED[name]}")
    limits = tuple(sorted(set(chain(*given["distractors_limit"] or ()))))
    if len(limits) > 1 and not one_number:
        raise UserError("--sweep and --ablation take one --distractors_limit: the curve is a run's")
    return Asked(
        tuple(given["distractors"]),
        limits,
        given["neighbours_from"] or "all",
        given["on_bad_row"] == "skip",
        given["distractors_alike"],
        given["distractors_precision"] or "float32",
        given["fresh"],
        given["rank_timeout"] or TIMEOUT,
    )


@contextmanager
def adding(asked: Asked | None, results: Path) -> Iterator[list[Added | None]]:
    """What a command adds to each of its plans, smallest first; [None] where that is nothing.

    Of several ranks, all are there while the block runs. Raises UserError for paths that hold no
    rows, for more rows than there are, and if a rank does not come.
    """
    if asked is None:
        yield [None]
        return
    from distractors.pool import open_pool
    from distractors.precision import CHECKED_ROWS, FULL
    from distractors.running import Added
    from utils_ranks import joined_ranks

    checked = () if asked.precision == FULL else (CHECKED_ROWS,)
    pool = open_pool(asked.paths)
    files = Counter(shard.path.resolve() for shard in pool.shards)
    for path in (path for path, times in files.items() if times > 1):
        raise UserError(f"--distractors: {path} is named twice, and would count twice: leave one")
    pool = replace(pool, cuts=(*asked.limits, *checked), skips_bad=asked.skips_bad)
    pools = [pool.first(limit) for limit in asked.limits] or [pool]
    said: set[tuple[str, str]] = set()
    with joined_ranks(asked.timeout) as group:
        yield [
            Added(
                own,
                results,
                asked.neighbours,
                group,
                asked.alike,
                asked.precision,
                fresh=asked.fresh and own is pools[0],
                is_largest=own is pools[-1],
                said=said,
            )
            for own in pools
        ]
