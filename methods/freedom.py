"""FREEDOM (WACV 2025): a query image becomes words, each is joined to the query text, and searched.

Inversion without training: the images nearest to the query image (its proxies) vote for the words
of a large list; the most frequent ones, each followed by the query text (there the name of a
domain), are searched together. In i-CIR the query text takes the domain's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING

from utils import UserError
from utils_inputs import AskedTexts
from utils_retrieval import (
    PAIRS_WORTH_SHARING,
    Asked,
    Assets,
    Gallery,
    Method,
    Needs,
    Queries,
    Rows,
    equal_rows,
    flag,
)
from utils_sweeps import once_each

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SAME_IMAGE = 0.98  # query images whose best similarities are all as high are in the gallery
PAIRS_AT_ONCE = 1 << 23  # similarities of images to words that are held together
KEY_BYTES = 16  # of a digest, by which a vector's words are remembered


@dataclass(frozen=True)
class Parameters:
    """Flags of freedom, under the names of its code."""

    expand: bool = flag(
        True, "proxies; without them (its dagger) the image alone", word="expansion"
    )
    kappa: int = flag(
        20, "images that stand for a query", word="kappa", low=1, only_with=("expand",)
    )
    ni: int = flag(7, "n, words of each of these images", word="n", low=1)
    miu: int = flag(7, "m, words of a query", word="m", low=1)
    freedom_corpus: str = flag("open_image_v7_class_names", "the corpus of words", word="corpus-")

    @property
    def proxies(self) -> int:
        """How many images stand for a query: kappa, or 1 without expansion."""
        return self.kappa if self.expand else 1


@dataclass(frozen=True, eq=False)
class State:
    """A setting with its words, W of them, and their features; once observed, the queries (Q, D).

    distinct: V of them; of: int64 (W,), the row of distinct that is a word's feature, or None
    where all words differ. number: int64 (Q,), the rows of the queries in the task.
    """

    p: Parameters
    assets: Assets
    words: Sequence[str]
    distinct: Rows
    of: Tensor | None
    queries: Tensor | None = None
    number: np.ndarray | None = None


# ---------------------------------------------------------------------------------------------
# Once a run: the words
# ---------------------------------------------------------------------------------------------


def needs(points: Sequence[Parameters]) -> Needs:
    """The corpora of words, of at least n words each, and texts made of them."""
    rows: dict[str, int] = {}
    for p in points:
        rows[p.freedom_corpus] = max(p.ni, rows.get(p.freedom_corpus, 1))
    return Needs(corpora=rows, prompts=tuple(rows), texts=True)


def prepare(points: Sequence[Parameters], assets: Assets) -> list[State]:
    """The words of each setting. Raises UserError for a blank word, and for one that repeats."""
    features = once_each(
        points, lambda p: p.freedom_corpus, lambda p: _distinct_words(p.freedom_corpus, assets)
    )
    return [
        State(p, assets, assets.prompts[p.freedom_corpus], *found)
        for p, found in zip(points, features, strict=True)
    ]


def _distinct_words(corpus: str, assets: Assets) -> tuple[Rows, Tensor | None]:
    import torch

    _check_words(corpus, assets.prompts[corpus])
    features = assets.corpora[corpus]
    distinct, of = torch.unique(features, dim=0, return_inverse=True)
    if len(distinct) == len(features):
        distinct, of = features, None
    return Rows(distinct, distinct.new_ones(len(distinct))), of


def _check_words(corpus: str, words: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, word in enumerate(words, 1):
        if not word.strip():
            raise UserError(
                f"corpus {corpus}, row {row}: a blank word; remove it, and encode the corpus again"
            )
        if first.setdefault(word, row) != row:
            raise UserError(
                f"corpus {corpus}: rows {first[word]} and {row} are both {word!r}, and would be "
                "counted as one; remove one, and encode the corpus again"
            )


# ---------------------------------------------------------------------------------------------
# The query image in words
# ---------------------------------------------------------------------------------------------


def observe(states: Sequence[State], queries: Queries, gallery: Gallery) -> list[State]:
    """The queries of every setting: the sum over its words of weight times text feature.

    Words do not depend on the query text: they are found once for each distinct query image.
    Raises UserError for a gallery with fewer images than are to be proxies.
    """
    import torch

    first, image = equal_rows(queries.image)
    images = queries.image[first]
    most = max(s.p.proxies for s in states)
    if most > len(gallery):
        raise UserError(
            f"--kappa {most}: a gallery has {len(gallery)} images only; give --kappa "
            f"{len(gallery)} or less"
        )
    observed = []
    for s, slots in zip(states, _find_words(states, images, gallery, most), strict=True):
        chosen, weights = count_words(slots.flatten(1).cpu().numpy(), s.p.miu)
        chosen, weights = (torch.from_numpy(part).to(images.device) for part in (chosen, weights))
        fused = _fuse(s, chosen[image], weights[image], queries.words)
        observed.append(replace(s, queries=fused, number=queries.number))
    return observed


def _find_words(
    states: Sequence[State], images: Tensor, gallery: Gallery, most: int
) -> list[Tensor]:
    """Of each setting the words of the proxies of each image: int64 (U, proxies, n)."""
    proxies = find_proxies(images, gallery, most)
    vectors, place = _proxy_vectors(proxies, images, gallery)
    nearest = once_each(
        states,
        lambda s: s.p.freedom_corpus,
        lambda s: _nearest_words(vectors, s, _most_words(states, s.p.freedom_corpus)),
    )
    return [
        words[place[:, : s.p.proxies], : s.p.ni] for s, words in zip(states, nearest, strict=True)
    ]


def _most_words(states: Sequence[State], corpus: str) -> int:
    return max(s.p.ni for s in states if s.p.freedom_corpus == corpus)


def find_proxies(images: Tensor, gallery: Gallery, k: int) -> Tensor:
    """The k images that stand for each query image: int64 (U, k), best first.

    images: unit rows (U, D), all of one source domain. A number below N is a gallery row; N + u is
    the image u itself, which comes first, and the k-th row goes, unless every image's best
    similarity reaches 0.98: the rule is one for all of them, as published.
    """
    import torch

    similarity, rows = gallery.nearest(images, k)
    if similarity[:, 0].min() >= SAME_IMAGE:
        return rows
    own = torch.arange(len(gallery), len(gallery) + len(images), device=rows.device)
    return torch.cat([own[:, None], rows[:, : k - 1]], dim=1)


def _proxy_vectors(proxies: Tensor, images: Tensor, gallery: Gallery) -> tuple[Tensor, Tensor]:
    """The distinct proxies, unit rows (V, D), and the place of each proxy among them, (U, k)."""
    import torch

    numbers, place = torch.unique(proxies, return_inverse=True)
    rows, own = numbers[numbers < len(gallery)], numbers[numbers >= len(gallery)]
    ones = torch.ones(len(rows), 1, device=images.device)
    vectors = gallery.weighted_rows(ones, rows[:, None])
    return torch.cat([vectors, images[own - len(gallery)]]), place


def _nearest_words(vectors: Tensor, s: State, n: int) -> Tensor:
    """The n words nearest to each vector, (V, D) -> int64 (V, n), best first; ties by word.

    Gallery rows are proxies of several source domains. Where it is worth it, those of a vector are
    remembered. Vectors are then compared as many at a time as ever, so that no bit depends on which
    of them came together.
    """
    import numpy as np
    import torch

    size = max(1, PAIRS_AT_ONCE // len(s.words))
    if vectors.is_cuda or len(vectors) * len(s.words) < PAIRS_WORTH_SHARING:
        return torch.cat([_compare_words(some, s, n) for some in vectors.split(size)])
    known = s.assets.remember(("words", s.p.freedom_corpus, n), dict)
    keys = [blake2b(row, digest_size=KEY_BYTES).digest() for row in vectors.numpy()]
    # In an order of their own: what two threads look for at once is mostly not the same.
    order = np.random.default_rng(len(keys)).permutation(len(keys)).tolist()
    unknown = (row for row in order if keys[row] not in known)
    while new := list(islice(unknown, size)):
        found = _compare_words(vectors[np.resize(new, size)], s, n)
        known.update(zip((keys[row] for row in new), found.numpy(), strict=False))
    return torch.from_numpy(np.stack([known[key] for key in keys]))


def _compare_words(vectors: Tensor, s: State, n: int) -> Tensor:
    similarity = s.distinct.product(vectors)
    return first_largest(similarity if s.of is None else similarity[:, s.of], n)


def first_largest(values: Tensor, k: int) -> Tensor:
    """The columns of each row's k largest values, largest first, equal ones in column order.

    values: (Q, W). Returns int64 (Q, k).
    """
    largest, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    columns = columns[:, :k].sort(dim=1).values
    order = values.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    columns = columns.gather(1, order)
    open_rows = (largest[:, k - 1 : -1] == largest[:, k:]).nonzero()[:, 0]
    if len(open_rows):
        order = values[open_rows].sort(dim=1, descending=True, stable=True).indices
        columns[open_rows] = order[:, :k]
    return columns


def count_words(slots: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The m most frequent words of each query image, and their weights: count / largest count.

    slots: int (U, k n), words in the order of proxies, then of nearness, in which ties are broken.
    Returns int64 and float32 (U, m'); where there are fewer than m' words, the first with weight 0.
    """
    import numpy as np

    counted = [Counter(row).most_common(m) for row in slots.tolist()]
    width = max(map(len, counted))
    words = np.empty((len(counted), width), np.int64)
    weights = np.zeros((len(counted), width), np.float32)
    for row, pairs in enumerate(counted):
        words[row] = pairs[0][0]
        words[row, : len(pairs)] = [word for word, _ in pairs]
        weights[row, : len(pairs)] = [count / pairs[0][1] for _, count in pairs]
    return words, weights


def _fuse(s: State, chosen: Tensor, weights: Tensor, texts: Sequence[str]) -> Tensor:
    """The sum of weight times unit feature of "word text" over each query's words: (Q, D).

    chosen, weights: (Q, m'). texts: Q of them. Each distinct pair of word and text is encoded once.
    """
    import torch
    from torch.nn.functional import embedding_bag

    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    text = torch.tensor([number[text] for text in texts], device=chosen.device)
    pairs, slot = torch.unique(chosen * len(number) + text[:, None], return_inverse=True)
    names = list(number)
    prompts = [f"{s.words[p // len(names)]} {names[p % len(names)]}" for p in pairs.tolist()]
    features = s.assets.encode_texts(prompts).to(weights.device)
    return embedding_bag(slot, features, per_sample_weights=weights, mode="sum")


def scores(states: Sequence[State], queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
    """The fused queries, those asked for of the observed ones, against all rows: yields (Q, N)."""
    asked = {
        ("freedom", s.p): Asked(partial(_queries_of, s, queries.observed.number)) for s in states
    }
    yield from queries.compare(gallery, asked).values()


def _queries_of(s: State, number: np.ndarray) -> Tensor:
    """The fused queries of some of the task's rows, int64 (q,) -> (q, D)."""
    import numpy as np

    order = np.argsort(s.number)
    return s.queries[order[np.searchsorted(s.number, number, sorter=order)]]


def takes(p: Parameters, assets: Assets) -> list[tuple]:
    """Words of a query, of those that its images have."""
    return [("miu", p.miu, p.proxies * p.ni, "words of the images that stand for a query")]


METHOD = Method(
    "freedom",
    Parameters,
    scores,
    "words of the query image, each joined to the query text",
    reads=("image",),
    prepare=prepare,
    observe=observe,
    needs=needs,
    takes=takes,
    together="source",
    inputs={"freedom": AskedTexts("freedom")},
)
