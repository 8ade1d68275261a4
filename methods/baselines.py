"""The four baselines: image, text, and two simple fusions of both similarities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from utils_retrieval import (
    Fusion,
    Gallery,
    Method,
    NoParameters,
    Parts,
    Queries,
    TextParameters,
    flag,
    name_of_texts,
    similarity_scores,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SumParameters(TextParameters):
    """Flags of sum."""

    fusion_weight: float = flag(0.5, "sum: (1 - w) image + w text", word="weight", low=0, high=1)


@dataclass(frozen=True)
class ProductParameters(TextParameters):
    """Flags of product."""

    clamp: bool = flag(True, "product: similarities below zero count as zero", word="clamp")


def text_scores(points: Sequence, queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
    """T X', for every point: yields (Q, N)."""
    yield from queries.similarities(gallery, *(name_of_texts(p.contextualize) for p in points))


def sum_scores(points: Sequence, queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
    """(1 - w) I X' + w T X', for every point: yields (Q, N). w = 0.5 ranks like the plain sum."""
    image, text = _image_and_text(points, queries, gallery)
    for p in points:
        if p.fusion_weight == 0.5:
            yield image + text[p.contextualize]
        else:
            yield image.lerp(text[p.contextualize], p.fusion_weight)


def product_scores(points: Sequence, queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
    """max(I X', 0) * max(T X', 0), or unclamped I X' * T X', element by element: yields (Q, N)."""
    are_clamped = all(p.clamp for p in points)
    image, text = _image_and_text(points, queries, gallery, are_clamped)
    for p in points:
        if p.clamp and not are_clamped:
            yield image.clamp(min=0).mul_(text[p.contextualize].clamp(min=0))
        else:
            yield image * text[p.contextualize]


def sum_parts(p: SumParameters, queries: Queries, gallery: Gallery) -> Parts:
    """I X' and T X', weighted as they are summed."""
    image, text = _image_and_text([p], queries, gallery)
    even = p.fusion_weight == 0.5
    weights = (1.0, 1.0) if even else (1 - p.fusion_weight, p.fusion_weight)
    return Parts({"image": image, "text": text[p.contextualize]}, Fusion(*weights))


def product_parts(p: ProductParameters, queries: Queries, gallery: Gallery) -> Parts:
    """I X' and T X', at least zero where they are clamped."""
    image, text = _image_and_text([p], queries, gallery, p.clamp)
    return Parts({"image": image, "text": text[p.contextualize]}, Fusion(xy=1.0))


def _image_and_text(
    points: Sequence, queries: Queries, gallery: Gallery, clamp: bool = False
) -> tuple[Tensor, dict[bool, Tensor]]:
    """I X' (Q, N), and T X' by whether the texts are contextualised, in one product.

    clamp: those below zero are zero.
    """
    kinds = list(dict.fromkeys(p.contextualize for p in points))
    names, least = ("image", *map(name_of_texts, kinds)), 0.0 if clamp else None
    image, *texts = queries.similarities(gallery, *names, at_least=least)
    return image, dict(zip(kinds, texts, strict=True))


METHODS = (
    Method(
        "image",
        NoParameters,
        partial(similarity_scores, name="image"),
        "similarity to the query image",
        reads=("image",),
        by_features=True,
    ),
    Method(
        "text",
        TextParameters,
        text_scores,
        "similarity to the query text",
        reads=("text",),
        by_features=True,
    ),
    Method(
        "sum",
        SumParameters,
        sum_scores,
        "weighted sum of both similarities",
        compared={"fusion_weight": ("image", "text")},
        parts=sum_parts,
    ),
    Method(
        "product",
        ProductParameters,
        product_scores,
        "product of both similarities",
        parts=product_parts,
    ),
)
