"""BASIC (i-CIR paper, section 4): centre, project, expand, normalise, and fuse as Harris does.

Each step is on its own flag. The equations are in utils_retrieval.py; here they are put together,
and the points of a sweep share what they agree in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from utils import UserError
from utils_retrieval import (
    Asked,
    Assets,
    Fusion,
    Gallery,
    Method,
    Needs,
    Parts,
    Queries,
    TextParameters,
    centre,
    contrastive_components,
    expand_queries,
    flag,
    harris_terms,
    kept_components,
    lowest_similarities,
    normalise_similarity,
    project,
    second_moment,
)
from utils_sweeps import in_batches, once_each

if TYPE_CHECKING:
    from torch import Tensor

NOTHING_ABOVE_ZERO = 0.25  # lambda from which on every score is at most zero
IMAGE_VARIANTS_AT_ONCE = 32  # of a sweep, searched by one product: bounds the memory


@dataclass(frozen=True)
class Parameters(TextParameters):
    """Flags of basic."""

    standardize_features: bool = flag(
        False, "subtract the image mean and the text mean", word="standardization"
    )
    use_laion_mean: bool = flag(
        False,
        "take the backbone's stored image mean, not each database's own",
        word="laion_mean",
        only_with=("standardize_features",),
    )
    project_features: bool = flag(
        False, "project the query image on the contrastive PCA", word="projection"
    )
    specified_corpus: str = flag(
        "generic_subjects",
        "positive corpus: what to keep, and the text mean",
        word="corpus-",
        only_with=("standardize_features", "project_features"),
    )
    specified_ncorpus: str = flag(
        "generic_styles",
        "negative corpus: what to suppress",
        word="ncorpus-",
        only_with=("project_features",),
    )
    aa: float = flag(
        0.2,
        "alpha, weight of the negative corpus in the contrastive PCA, 0 to 1",
        word="aa",
        low=0,
        high=1,
        only_with=("project_features",),
    )
    num_principal_components_for_projection: float = flag(
        250.0,
        "components to keep; below 1, the share of energy",
        word="components",
        allowed=(
            lambda value: 0 < value < 1 or (value >= 1 and value % 1 == 0),
            "a whole number of components, or a share of energy above 0 and below 1",
        ),
        only_with=("project_features",),
    )
    do_query_expansion: bool = flag(
        False, "add the nearest database images to the query image", word="query_expansion"
    )
    qe_k: int = flag(
        25, "images added by query expansion", word="k", low=1, only_with=("do_query_expansion",)
    )
    normalize_similarities: bool = flag(
        False, "rescale both similarities by the normalisation features", word="normalization"
    )
    normalize_text_by: str = flag(
        "image",
        "the minimum that divides the text similarity: image (as the published figures) or text "
        "(as the paper's text)",
        word="text_by_",
        choices=("image", "text"),
        only_with=("normalize_similarities",),
    )
    harris_lambda: float = flag(
        0.1, "lambda of the Harris fusion", word="lambda", low=-1e6, high=1e6
    )

    @property
    def own_mean(self) -> bool:
        """Whether images are centred by the mean of the gallery that is searched."""
        return self.standardize_features and not self.use_laion_mean

    @property
    def text_mean(self) -> str | None:
        """The corpus whose mean centres the texts, None where they are not centred."""
        return self.specified_corpus if self.standardize_features else None

    @property
    def image_mean(self) -> str | None:
        """Which mean centres the images: the gallery's "own", the "stored" one, or None."""
        if not self.standardize_features:
            return None
        return "stored" if self.use_laion_mean else "own"

    @property
    def projection(self) -> tuple | None:
        """What decides the projection: points that agree in it share one."""
        if not self.project_features:
            return None
        components = self.num_principal_components_for_projection
        return self.text_mean, self.specified_corpus, self.specified_ncorpus, self.aa, components

    @property
    def query_image(self) -> tuple:
        """What decides the vectors of the query images before expansion."""
        return self.image_mean, self.projection

    @property
    def expanded_image(self) -> tuple:
        """What decides the vectors of the query images that are scored."""
        return (*self.query_image, self.qe_k if self.do_query_expansion else 0)

    @property
    def query_text(self) -> tuple:
        """What decides the vectors of the query texts, and their similarity."""
        return self.image_mean, self.text_mean, self.contextualize

    @property
    def lowest(self) -> tuple:
        """What decides the normalisation constants."""
        return self.normalize_similarities, self.image_mean, self.text_mean

    @property
    def scored_image(self) -> tuple:
        """What decides the similarity to the query image that is fused."""
        return "image", "basic", self.expanded_image, self.lowest

    @property
    def scored_text(self) -> tuple:
        """What decides the similarity to the query text that is fused."""
        return "text", "basic", self.query_text, self.lowest, self.normalize_text_by

    @property
    def fusion(self) -> tuple:
        """All that decides the two similarities that are fused: all but lambda."""
        return self.scored_image, self.scored_text


@dataclass(frozen=True, eq=False)
class State:
    """One setting with what it has computed so far.

    m_i, m_t: image and text mean (D,), None where off (m_i of the gallery's own: until observe).
    basis: B (D, k) of the projection W = B B', None where off. lowest: a, b of the normalisation,
    None where off. assets: the normalisation features. images, texts: the query vectors (Q, D).
    """

    p: Parameters
    m_i: Tensor | None
    m_t: Tensor | None
    basis: Tensor | None
    assets: Assets
    lowest: tuple[float, float] | None = None
    images: Tensor | None = None
    texts: Tensor | None = None


# ---------------------------------------------------------------------------------------------
# Once a run: means, projections, normalisation constants
# ---------------------------------------------------------------------------------------------


def needs(points: Sequence[Parameters]) -> Needs:
    """The corpora (two prompts or more where they span a projection), the mean and the rest."""
    rows = {p.specified_corpus: 1 for p in points if p.standardize_features}
    for p in points:
        if p.project_features:
            rows |= {p.specified_corpus: 2, p.specified_ncorpus: 2}
    return Needs(
        corpora=rows,
        image_mean=any(p.image_mean == "stored" for p in points),
        synthetic=any(p.normalize_similarities for p in points),
    )


def prepare(points: Sequence[Parameters], assets: Assets) -> list[State]:
    """Do once per run what no gallery changes: text means, projections, normalisation constants.

    Raises UserError if a projection would keep nothing, or a normalisation constant is 0.
    """
    text_means = once_each(points, lambda p: p.text_mean, lambda p: _text_mean(p, assets))
    eigen = once_each(
        list(zip(points, text_means, strict=True)),
        lambda item: item[0].projection and item[0].projection[:-1],
        lambda item: item[0].projection and _components(*item, assets),
    )
    bases = once_each(
        list(zip(points, eigen, strict=True)),
        lambda item: item[0].projection,
        lambda item: item[0].projection and _basis(*item),
    )
    states = [
        State(p, assets.image_mean if p.image_mean == "stored" else None, m_t, basis, assets)
        for p, m_t, basis in zip(points, text_means, bases, strict=True)
    ]
    lowest = once_each(
        states,
        lambda s: s.p.lowest,
        lambda s: (
            None if s.p.own_mean else assets.remember(("lowest", s.p.lowest), lambda: _lowest(s))
        ),
    )
    return [replace(s, lowest=pair) for s, pair in zip(states, lowest, strict=True)]


def _text_mean(p: Parameters, assets: Assets) -> Tensor | None:
    return p.text_mean and assets.corpora[p.text_mean].mean(0)


def _components(p: Parameters, m_t: Tensor | None, assets: Assets) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the contrastive PCA of a setting."""

    def make() -> tuple[Tensor, Tensor]:
        positive, negative = (
            second_moment(centre(assets.corpora[name], m_t))
            for name in (p.specified_corpus, p.specified_ncorpus)
        )
        return contrastive_components(positive, negative, p.aa)

    return assets.remember(("components", p.projection[:-1]), make)


def _basis(p: Parameters, eigen: tuple[Tensor, Tensor]) -> Tensor:
    values, vectors = eigen
    kept = kept_components(values, p.num_principal_components_for_projection)
    if not kept:
        raise UserError(
            "--project_features: the contrastive PCA has no positive eigenvalue to keep; lower "
            "--aa, or check the corpora"
        )
    return vectors[:, :kept].float().contiguous()


def _lowest(s: State) -> tuple[float, float] | None:
    """a, b of a setting's means, None where the step is off."""
    if not s.p.normalize_similarities:
        return None
    images = centre(s.assets.synthetic_images, s.m_i)
    lowest = lowest_similarities(images, centre(s.assets.synthetic_texts, s.m_t))
    if 0.0 in lowest:
        raise UserError(
            "--normalize_similarities: a lowest similarity of the normalisation features is 0, "
            "by which nothing can be divided; make them of more images and captions"
        )
    return lowest


# ---------------------------------------------------------------------------------------------
# What the gallery as a whole decides: its mean, and the expanded queries
# ---------------------------------------------------------------------------------------------


def observe(states: Sequence[State], queries: Queries, gallery: Gallery) -> list[State]:
    """The query vectors of every setting: centred, projected, expanded by their neighbours."""
    first, kind = gallery.distinct(queries.image)
    query_images = queries.image[first]
    states = [replace(s, m_i=gallery.mean()) if s.p.own_mean else s for s in states]
    lowest = once_each(states, lambda s: s.p.lowest, lambda s: _lowest_here(s, gallery))
    images = once_each(
        states, lambda s: s.p.query_image, lambda s: project(centre(query_images, s.m_i), s.basis)
    )
    texts = once_each(
        states, lambda s: s.p.query_text, lambda s: centre(queries.texts(s.p.contextualize), s.m_t)
    )
    found = zip(states, lowest, images, texts, strict=True)
    states = [replace(s, lowest=pair, images=i, texts=t) for s, pair, i, t in found]
    expanded: list[State] = []
    for some in in_batches(states, lambda s: s.p.query_image, IMAGE_VARIANTS_AT_ONCE):
        expanded += _expand(some, query_images, gallery)
    if kind is None:
        return expanded
    images = once_each(expanded, lambda s: s.p.expanded_image, lambda s: s.images[kind])
    return [replace(s, images=own) for s, own in zip(expanded, images, strict=True)]


def _lowest_here(s: State, gallery: Gallery) -> tuple[float, float] | None:
    """a, b with the gallery's own mean where that centres the images, once a gallery."""
    if not s.p.own_mean:
        return s.lowest
    return gallery.remember(("lowest", s.p.lowest), lambda: _lowest(s))


def _expand(states: list[State], query_images: Tensor, gallery: Gallery) -> list[State]:
    """Each setting with its expanded query images where it expands, by one search a mean.

    query_images: the distinct ones, as they are, (U, D).
    """
    import torch

    expanded: dict[tuple, Tensor] = {}
    expanding = [s for s in states if s.p.do_query_expansion]
    for mean in dict.fromkeys(s.p.image_mean for s in expanding):
        some = [s for s in expanding if s.p.image_mean == mean]
        variants = {s.p.query_image: s for s in some}
        m_i = some[0].m_i
        vectors = torch.cat([s.images for s in variants.values()])
        nearest = gallery.nearest(vectors, max(s.p.qe_k for s in some), m_i)
        for k in dict.fromkeys(s.p.qe_k for s in some):
            images = centre(query_images, m_i).repeat(len(variants), 1)
            found = expand_queries(images, tuple(n[:, :k] for n in nearest), gallery, m_i)
            parts = found.chunk(len(variants))
            for (key, s), part in zip(variants.items(), parts, strict=True):
                expanded[(*key, k)] = project(part, s.basis)
    return [replace(s, images=expanded.get(s.p.expanded_image, s.images)) for s in states]


# ---------------------------------------------------------------------------------------------
# Scores, row by row
# ---------------------------------------------------------------------------------------------


def scores(states: Sequence[State], queries: Queries, gallery: Gallery) -> Iterator[Tensor]:
    """s_i s_t - lambda (s_i + s_t)^2 of every setting: yields (Q, N)."""
    for some in in_batches(states, lambda s: s.p.expanded_image, IMAGE_VARIANTS_AT_ONCE):
        asked = {key: one for s in some for key, one in _asked(s).items()}
        found = queries.compare(gallery, asked)
        for _, alike in groupby(some, lambda s: s.p.fusion):
            *others, last = alike
            s_i, s_t = found[last.p.scored_image], found[last.p.scored_text]
            product, squared_sum = harris_terms(s_i, s_t)
            for s in others:
                yield product.sub(squared_sum, alpha=s.p.harris_lambda)
            yield product.sub_(squared_sum, alpha=last.p.harris_lambda)


def parts(s: State, queries: Queries, gallery: Gallery) -> Parts:
    """Both similarities of a setting as they are fused, and the rows that expansion took."""
    found = queries.compare(gallery, _asked(s))
    fusion = Fusion(xx=-s.p.harris_lambda, xy=1 - 2 * s.p.harris_lambda, yy=-s.p.harris_lambda)
    neighbours = None
    if s.p.do_query_expansion:
        own = project(centre(queries.image, s.m_i), s.basis)
        _, neighbours = gallery.nearest(own, s.p.qe_k, s.m_i)
    image, text = found[s.p.scored_image], found[s.p.scored_text]
    return Parts({"image": image, "text": text}, fusion, neighbours)


def _asked(s: State) -> dict[tuple, Asked]:
    """max((s_i - a)/|a|, 0) and max((s_t - b)/|a or b|, 0); unscaled where the step is off."""
    a, b = s.lowest or (0.0, 0.0)
    by = (a, b if s.p.normalize_text_by == "text" else a) if s.lowest else (1.0, 1.0)

    def normalised(vectors: Tensor, lowest: float, scale: float) -> Asked:
        return Asked(
            lambda: vectors, s.m_i, lambda own, rows: normalise_similarity(own, lowest, scale)
        )

    return {
        s.p.scored_image: normalised(s.images, a, by[0]),
        s.p.scored_text: normalised(s.texts, b, by[1]),
    }


def caution(p: Parameters) -> str:
    """What a large lambda does: s_i s_t <= (s_i + s_t)^2 / 4, so no score is above zero."""
    if p.harris_lambda < NOTHING_ABOVE_ZERO:
        return ""
    return (
        f"with harris_lambda {NOTHING_ABOVE_ZERO:g} and above no score is above zero: rows that "
        "resemble the query in nothing rank first"
    )


def takes(p: Parameters, assets: Assets) -> list[tuple]:
    """Rows that expand a query, and components of the projection."""
    taken = [("qe_k", p.qe_k, None, None)] if p.do_query_expansion else []
    name = "num_principal_components_for_projection"
    if p.project_features and (wanted := int(getattr(p, name))):
        values, _ = _components(p, _text_mean(p, assets), assets)
        there = kept_components(values, len(values))
        taken.append((name, wanted, there, "components with a positive eigenvalue"))
    return taken


METHOD = Method(
    "basic",
    Parameters,
    scores,
    "the i-CIR paper's method: centring, contrastive PCA, expansion, normalisation, Harris fusion",
    preset={
        "contextualize": True,
        "standardize_features": True,
        "use_laion_mean": True,
        "project_features": True,
        "specified_corpus": "generic_subjects",
        "specified_ncorpus": "generic_styles",
        "aa": 0.2,
        "num_principal_components_for_projection": 250.0,
        "do_query_expansion": True,
        "normalize_similarities": True,
        "harris_lambda": 0.1,
    },
    prepare=prepare,
    observe=observe,
    of_queries=("images", "texts"),
    needs=needs,
    caution=caution,
    takes=takes,
    parts=parts,
    # The steps of the paper's component table, in its order.
    steps={
        "standardization": {"standardize_features": False, "use_laion_mean": False},
        "projection": {"project_features": False},
        "query expansion": {"do_query_expansion": False},
        "contextualization": {"contextualize": False},
        "normalisation": {"normalize_similarities": False},
        "Harris": {"harris_lambda": 0.0},
    },
)
