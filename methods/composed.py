"""Systems with networks of their own, which turn the image and the text into one query vector.

    S = Q X'      both as the system gives them, of unit length where it makes them so
    S = max over pairs of tokens q x'      composed_tokens: CoVR-2 on CIRR

A system that draws has a query vector of each draw: their figures are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from utils_retrieval import Gallery, Method, NoParameters, Queries

if TYPE_CHECKING:
    from torch import Tensor


def composed_scores(
    points: Sequence[NoParameters], queries: Queries, gallery: Gallery, name: str
) -> Iterator[Tensor]:
    """Q X', rows as they are on disk, for every point: yields (Q, N)."""
    scores = gallery.similarity(queries[name]) * gallery.kinds["image"].length
    for _ in points:
        yield scores


def token_scores(
    points: Sequence[NoParameters], queries: Queries, gallery: Gallery
) -> Iterator[Tensor]:
    """The largest product of a query's and a row's tokens, for every point: yields (Q, N)."""
    from utils_retrieval import late_interaction

    width = queries["composed"].shape[1]
    query, rows = queries["tokens"], gallery.kinds["tokens"].raw
    scores = late_interaction(
        query.unflatten(1, (-1, width)), rows.unflatten(1, (-1, width)), "max"
    )
    for _ in points:
        yield scores


def read_draws(method: Method, names: Sequence[str]) -> tuple[Method, ...]:
    """A method for each draw that the features hold. names: of their query arrays."""
    draws = sorted((n for n in names if n.startswith("composed")), key=lambda n: (len(n), n))
    return tuple(_method(name) for name in draws) or (method,)


def _method(name: str) -> Method:
    return Method(
        "composed",
        NoParameters,
        partial(composed_scores, name=name),
        "the query vector that a system with a network of its own composes",
        reads=(name,),
        draws=read_draws,
    )


METHODS = (
    _method("composed"),
    Method(
        "composed_tokens",
        NoParameters,
        token_scores,
        "the best pair of tokens of a system that gives several a row",
        reads=("composed", "tokens"),
        gallery_reads=("image", "tokens"),
    ),
)
