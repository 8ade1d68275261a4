"""WeiCom (Composed image retrieval for remote sensing, rscir; section 3): two ranks, weighed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils_retrieval import (
    Asked,
    Fusion,
    Gallery,
    Method,
    Parts,
    Queries,
    TextParameters,
    flag,
    name_of_texts,
)
from utils_sweeps import once_each

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Parameters(TextParameters):
    """Flags of weicom."""

    weicom_lambda: float = flag(
        0.5, "lambda, weight of the text, 0 to 1", word="lambda", low=0, high=1
    )


@dataclass(frozen=True, eq=False)
class State:
    """A setting with mean and standard deviation of the similarities, twice (Q, 1), of each."""

    p: Parameters
    image: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]


def observe(points: Sequence[Parameters], queries: Queries, gallery: Gallery) -> list[State]:
    """What normalises each query's similarities: their moments over its gallery (N - 1)."""
    image = _moments(queries.image, gallery)
    texts = once_each(
        points,
        lambda p: p.contextualize,
        lambda p: _moments(queries.texts(p.contextualize), gallery),
    )
    return [State(p, image, text) for p, text in zip(points, texts, strict=True)]


def _moments(vectors: Tensor, gallery: Gallery) -> tuple[Tensor, Tensor]:
    first, kind = gallery.distinct(vectors)
    mean, deviation = gallery.moments(vectors[first])
    return (mean, deviation) if kind is None else (mean[kind], deviation[kind])


def scores(states: Sequence[State], queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
    """(1 - l) cdf(z(I X')) + l cdf(z(T X')), z over the gallery of one query: yields (Q, N)."""
    asked = {("image", "weicom"): _cdf(queries, "image", states[0].image)}
    for s in states:
        name = name_of_texts(s.p.contextualize)
        asked[name, "weicom"] = _cdf(queries, name, s.text)
    found = queries.compare(gallery, asked)
    for s in states:
        text = found[name_of_texts(s.p.contextualize), "weicom"]
        yield found["image", "weicom"].lerp(text, s.p.weicom_lambda)


def _cdf(queries: Queries, name: str, moments: tuple[Tensor, Tensor]) -> Asked:
    """What is asked for some features of the observed queries, whose moments these are."""
    features = queries.observed.features
    return Asked(
        lambda: features[name],
        then=lambda similarity, rows: normal_cdf(similarity, *(part[rows] for part in moments)),
    )


def parts(s: State, queries: Queries, gallery: Gallery) -> Parts:
    """Both normalised similarities of a setting."""
    names = ("image", name_of_texts(s.p.contextualize))
    image, text = queries.similarities(gallery, *names)
    both = {"image": normal_cdf(image, *s.image), "text": normal_cdf(text, *s.text)}
    return Parts(both, Fusion(1 - s.p.weicom_lambda, s.p.weicom_lambda))


def normal_cdf(similarity: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(1 + erf(z / sqrt 2)) / 2 with z = (s - mean) / deviation: (Q, N), (Q, 1), (Q, 1) -> (Q, N).

    A deviation of 0 (a gallery of one image, or of copies of one) leaves all at 1/2.
    """
    import torch

    z = (similarity - mean).div_(deviation)
    return torch.special.ndtr(z.masked_fill_(deviation == 0, 0.0))


METHOD = Method(
    "weicom",
    Parameters,
    scores,
    "weighted sum of normalised similarities",
    observe=observe,
    parts=parts,
)
