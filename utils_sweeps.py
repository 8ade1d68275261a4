"""What the points of a sweep share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any


def once_each(items: Sequence, key: Callable[[Any], Hashable], make: Callable[[Any], Any]) -> list:
    """What make yields for the first item of each key, for every item: sharing within a sweep."""
    made: dict[Hashable, Any] = {}
    for item in items:
        if key(item) not in made:
            made[key(item)] = make(item)
    return [made[key(item)] for item in items]


def in_batches(items: Iterable, key: Callable[[Any], Hashable], most: int) -> Iterator[list]:
    """The items in order, in batches of at most `most` different keys."""
    batch, keys = [], set()
    for item in items:
        if key(item) not in keys and len(keys) == most:
            yield batch
            batch, keys = [], set()
        batch.append(item)
        keys.add(key(item))
    if batch:
        yield batch
