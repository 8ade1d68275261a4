"""The methods: from the features of one gallery block to a score for every (query, row) pair.

Pure tensor functions, no files. All of them follow DESIGN section 5 and the paper's notation:

    I (Q, D) query images    T (Q, D) query texts    X (N, D) database images, rows of unit length
    P, M  positive and negative corpus    m_i, m_t  image and text mean    S (Q, N) scores

The database is never copied to centre, normalise or project it: with raw rows Y = diag(|y|) X,
V (X - m)' = (V Y') / |y| - V m, and W is an orthogonal projector: projecting the query is enough.
torch is imported inside the functions that need it, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING

from utils import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXPANSION_TEMPERATURE = 0.1  # weights exp(0.1 s) of the neighbours, exp(0.1) of the query
COVARIANCE_OFFSET = 1e-5  # added to every entry of C, as the reference does
ZERO_EIGENVALUE = 1e-9  # of the largest in size; rounding makes about 1e-14 of zero
SYNTHETIC_ROWS_AT_ONCE = 4096
IMAGE_VARIANTS_AT_ONCE = 32  # of a sweep, searched by one product: bounds the memory


# ---------------------------------------------------------------------------------------------
# Inputs of a method
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Everything a run of a method can be told, named as the flags; the defaults are theirs."""

    contextualize: bool = False
    fusion_weight: float = 0.5
    standardize_features: bool = False
    use_laion_mean: bool = False
    project_features: bool = False
    specified_corpus: str = "generic_subjects"
    specified_ncorpus: str = "generic_styles"
    aa: float = 0.2
    num_principal_components_for_projection: float = 250.0
    do_query_expansion: bool = False
    qe_k: int = 25
    normalize_similarities: bool = False
    normalize_text_by: str = "image"
    harris_lambda: float = 0.1


@dataclass(frozen=True)
class Queries:
    """Query features of one block, unit rows: image, text (Q, D), context_text (Q, D) or None."""

    image: Tensor
    text: Tensor
    context_text: Tensor | None

    def texts(self, contextualize: bool) -> Tensor:
        """The plain or the contextualised text features, (Q, D)."""
        return self.context_text if contextualize else self.text


@dataclass(frozen=True)
class Gallery:
    """Database features of one block: raw rows Y (N, D) and their lengths |y| (N,)."""

    raw: Tensor
    length: Tensor

    @classmethod
    def of(cls, raw: Tensor) -> Gallery:
        """Measure the rows of raw, (N, D) of any float type, once; they become float32."""
        raw = raw.float()
        return cls(raw, raw.norm(dim=1))

    def similarity(self, vectors: Tensor, mean: Tensor | None = None) -> Tensor:
        """V (X - m)': (V, D) against all rows -> (V, N); mean: (D,) or None for zero."""
        return self.similarities({"": (vectors, mean)})[""]

    def similarities(self, parts: dict[Hashable, tuple[Tensor, Tensor | None]]) -> dict:
        """similarity of each part (V_i, m_i) -> (V_i, N), by name, by one product over the rows."""
        import torch

        vectors = [vectors for vectors, _ in parts.values()]
        product = (torch.cat(vectors) @ self.raw.T).div_(self.length)
        found = dict(zip(parts, product.split([len(v) for v in vectors]), strict=True))
        for name, (vectors, mean) in parts.items():
            if mean is not None:
                found[name].sub_((vectors @ mean)[:, None])
        return found

    @cached_property
    def mean(self) -> Tensor:
        """The mean of X, (D,)."""
        return self.length.reciprocal() @ self.raw / len(self.raw)

    def weighted_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """For each query the sum of its rows of X, weighted: weights, rows (Q, K) -> (Q, D)."""
        from torch.nn.functional import embedding_bag

        weights = weights / self.length[rows]
        return embedding_bag(rows, self.raw, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True, eq=False)
class Assets:
    """What basic needs beside the features: unit rows, (rows, D); (D,) for the image mean."""

    corpora: dict[str, Tensor] = field(default_factory=dict)
    image_mean: Tensor | None = None
    synthetic_images: Tensor | None = None
    synthetic_texts: Tensor | None = None


# ---------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------


def image_scores(queries: Queries, gallery: Gallery, points: Sequence[Parameters]):
    """I X', for every point: yields (Q, N)."""
    similarity = gallery.similarity(queries.image)
    for _ in points:
        yield similarity


def text_scores(queries: Queries, gallery: Gallery, points: Sequence[Parameters]):
    """T X', for every point: yields (Q, N)."""
    similarity = cache(lambda contextualize: gallery.similarity(queries.texts(contextualize)))
    for point in points:
        yield similarity(point.contextualize)


def sum_scores(queries: Queries, gallery: Gallery, points: Sequence[Parameters]):
    """(1 - w) I X' + w T X', for every point: yields (Q, N). w = 0.5 ranks like the plain sum."""
    image, text = _image_and_text(queries, gallery, points)
    for point in points:
        if point.fusion_weight == 0.5:
            yield image + text[point.contextualize]
        else:
            yield image.lerp(text[point.contextualize], point.fusion_weight)


def product_scores(queries: Queries, gallery: Gallery, points: Sequence[Parameters]):
    """max(I X', 0) * max(T X', 0), element by element, for every point: yields (Q, N)."""
    image, text = _image_and_text(queries, gallery, points)
    for similarity in (image, *text.values()):
        similarity.clamp_(min=0)
    for point in points:
        yield image * text[point.contextualize]


def _image_and_text(queries: Queries, gallery: Gallery, points: Sequence[Parameters]):
    """I X' (Q, N), and T X' by whether the texts are contextualised, in one product."""
    text = {point.contextualize: None for point in points}
    vectors = {"image": queries.image} | {name: queries.texts(name) for name in text}
    found = gallery.similarities({name: (v, None) for name, v in vectors.items()})
    return found.pop("image"), found


# ---------------------------------------------------------------------------------------------
# basic, step by step
# ---------------------------------------------------------------------------------------------


def second_moment(corpus: Tensor) -> Tensor:
    """P'P / (p - 1) of a corpus P (p, D) float32, centred if the features are: (D, D) float64.

    In single precision, rounding would decide the sign of eigenvalues that are zero, and the number
    of threads with it.
    """
    corpus = corpus.double()
    return corpus.T @ corpus / (len(corpus) - 1)


def contrastive_components(positive: Tensor, negative: Tensor, alpha: float) -> tuple:
    """Contrastive PCA: eigenvalues (D,), falling, and eigenvectors (D, D), columns, of C.

    positive, negative: the second moments (D, D) of the corpora P and M. All float64.
    C = (1 - alpha) P'P / (p - 1) - alpha M'M / (m - 1) + 1e-5 (on every entry).
    """
    import torch

    contrast = (1 - alpha) * positive - alpha * negative + COVARIANCE_OFFSET
    values, vectors = torch.linalg.eigh(contrast)
    return values.flip(0), vectors.flip(1)


def kept_components(values: Tensor, components: float) -> int:
    """How many of the falling eigenvalues (D,) to keep.

    components >= 1: that many, at most the positive ones. Below 1: the fewest whose sum holds that
    share of the sum of the positive ones. Positive is what exceeds ZERO_EIGENVALUE of the largest
    in size: fewer prompts than D leave eigenvalues that are zero but for rounding.
    """
    positive = values[values > ZERO_EIGENVALUE * values.abs().max()]
    if components >= 1:
        return min(int(components), len(positive))
    share = positive.cumsum(0) / positive.sum()
    return min(int((share < components).sum()) + 1, len(positive))


def project(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """V W with W = B B': (V, D) -> (V, D); B (D, k) has orthonormal columns, None is W = 1."""
    return vectors if basis is None else (vectors @ basis) @ basis.T


def expand_queries(images: Tensor, similarity: Tensor, gallery: Gallery, mean, k: int) -> Tensor:
    """Weighted mean of each query image and its k nearest rows, centred, unprojected: (Q, D).

    images: centred I (Q, D); similarity: of the projected I to all rows (Q, N); mean: (D,) or None.
    Weights exp(0.1 s) for the rows, exp(0.1) for the query, made to sum to 1.
    """
    import torch

    nearest, rows = similarity.topk(min(k, similarity.shape[1]), dim=1)
    own = torch.ones_like(nearest[:, :1])
    weights = (EXPANSION_TEMPERATURE * torch.cat([own, nearest], dim=1)).softmax(dim=1)
    expanded = weights[:, :1] * images + gallery.weighted_rows(weights[:, 1:], rows)
    return expanded if mean is None else expanded - weights[:, 1:].sum(1, keepdim=True) * mean


def lowest_similarities(images: Tensor, texts: Tensor) -> tuple[float, float]:
    """a, b: the lowest image-image and text-image similarity of the normalisation features.

    images (n, D), texts (m, D): unit rows, centred if the features are.
    """

    def lowest(vectors: Tensor) -> float:
        chunks = vectors.split(SYNTHETIC_ROWS_AT_ONCE)
        return min(float((chunk @ images.T).min()) for chunk in chunks)

    return lowest(images), lowest(texts)


def normalise_similarity(similarity: Tensor, lowest: float, scale: float) -> Tensor:
    """max((s - lowest) / |scale|, 0), element by element."""
    return similarity.sub(lowest).div_(abs(scale)).clamp_(min=0)


# ---------------------------------------------------------------------------------------------
# basic, put together
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BasicPoint:
    """One setting of basic with all that does not depend on the block.

    text_mean m_t (D,) and basis B (D, k) are None where their step is off; image_mean m_i (D,) is
    None where it is off or the block's own. minima(m_i, m_t) gives a, b, computed once.
    """

    parameters: Parameters
    image_mean: Tensor | None
    text_mean: Tensor | None
    basis: Tensor | None
    minima: Callable[[Tensor | None, Tensor | None], tuple[float, float]]

    @property
    def qe_k(self) -> int:
        """Neighbours of query expansion, 0 where it is off."""
        return self.parameters.qe_k if self.parameters.do_query_expansion else 0

    @property
    def own_mean(self) -> bool:
        """Whether images are centred by the mean of the block."""
        return self.parameters.standardize_features and not self.parameters.use_laion_mean

    @property
    def image_variant(self) -> tuple:
        """Points that agree in this have the same image similarity."""
        return self.image_mean, self.own_mean, self.basis, self.qe_k


def prepare_basic(points: Sequence[Parameters], assets: Assets) -> list[BasicPoint]:
    """Do once per run what no block changes: means, projections, normalisation constants.

    Raises UserError if a projection would keep nothing, or a normalisation constant is 0.
    """

    @cache
    def moment(name: str, m_t: Tensor | None) -> Tensor:
        corpus = assets.corpora[name]
        return second_moment(corpus if m_t is None else corpus - m_t)

    @cache
    def text_mean(name: str) -> Tensor:
        return assets.corpora[name].mean(0)

    @cache
    def components(positive: str, negative: str, alpha: float, m_t: Tensor | None) -> tuple:
        return contrastive_components(moment(positive, m_t), moment(negative, m_t), alpha)

    @cache
    def basis(values: Tensor, vectors: Tensor, wanted: float) -> Tensor:
        kept = kept_components(values, wanted)
        if not kept:
            raise UserError(
                "--project_features: the contrastive PCA has no positive eigenvalue to keep; lower "
                "--aa, or check the corpora"
            )
        return vectors[:, :kept].float().contiguous()

    @cache
    def minima(m_i: Tensor | None, m_t: Tensor | None) -> tuple[float, float]:
        images, texts = assets.synthetic_images, assets.synthetic_texts
        lowest = lowest_similarities(
            images if m_i is None else images - m_i, texts if m_t is None else texts - m_t
        )
        if 0.0 in lowest:
            raise UserError(
                "--normalize_similarities: a lowest similarity of the normalisation features is 0, "
                "by which nothing can be divided; make them of more images and captions"
            )
        return lowest

    prepared = []
    for p in points:
        m_t = text_mean(p.specified_corpus) if p.standardize_features else None
        m_i = assets.image_mean if p.use_laion_mean else None
        eigen = p.project_features and components(
            p.specified_corpus, p.specified_ncorpus, p.aa, m_t
        )
        point = BasicPoint(
            parameters=p,
            image_mean=m_i,
            text_mean=m_t,
            basis=basis(*eigen, p.num_principal_components_for_projection) if eigen else None,
            minima=minima,
        )
        if p.normalize_similarities and not point.own_mean:
            minima(m_i, m_t)  # now, and not by several blocks that are searched at once
        prepared.append(point)
    return prepared


def basic_scores(queries: Queries, gallery: Gallery, points: Sequence[BasicPoint]):
    """BASIC's scores for every point: yields (Q, N). Neighbouring points share what they can."""
    for some in _neighbours(points):
        yield from _basic_scores(queries, gallery, some)


def _neighbours(points: Sequence[BasicPoint]) -> Iterator[list[BasicPoint]]:
    """Runs of points with at most IMAGE_VARIANTS_AT_ONCE different image similarities."""
    some, variants = [], set()
    for point in points:
        if point.image_variant not in variants and len(variants) == IMAGE_VARIANTS_AT_ONCE:
            yield some
            some, variants = [], set()
        some.append(point)
        variants.add(point.image_variant)
    yield some


def _basic_scores(queries: Queries, gallery: Gallery, points: Sequence[BasicPoint]):
    """The scores of a few points, every stage done once for those that agree in what it reads.

    Two products over the gallery serve them all: of the query images and the texts, and of the
    expanded queries.
    """
    import torch

    @cache
    def centred_images(m_i: Tensor | None) -> Tensor:
        return queries.image if m_i is None else queries.image - m_i

    def texts(m_t: Tensor | None, contextualize: bool) -> Tensor:
        vectors = queries.texts(contextualize)
        return vectors if m_t is None else vectors - m_t

    @cache
    def normalised(similarity: Tensor, lowest: float, scale: float) -> Tensor:
        return normalise_similarity(similarity, lowest, scale)

    @cache
    def harris_terms(s_i: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor]:
        return s_i * s_t, (s_i + s_t).square_()

    plans, vectors = [], {}
    for point in points:
        m_i = gallery.mean if point.own_mean else point.image_mean
        image = ("image", m_i, point.basis)
        text = ("text", m_i, point.text_mean, point.parameters.contextualize)
        if image not in vectors:
            vectors[image] = project(centred_images(m_i), point.basis), m_i
        if text not in vectors:
            vectors[text] = texts(*text[2:]), m_i
        plans.append((point, m_i, image, text))
    found = gallery.similarities(vectors)

    to_expand: dict[tuple, dict] = {}
    for point, m_i, image, _ in plans:
        if point.qe_k:
            to_expand.setdefault((m_i, point.qe_k), {})[image] = point.basis
    expanded = {}
    for (m_i, k), bases in to_expand.items():
        images = centred_images(m_i).repeat(len(bases), 1)
        similarity = torch.cat([found[image] for image in bases])
        parts = expand_queries(images, similarity, gallery, m_i, k).chunk(len(bases))
        for (image, basis), part in zip(bases.items(), parts, strict=True):
            expanded[image, k] = project(part, basis), m_i
    if expanded:
        found |= gallery.similarities(expanded)

    for point, m_i, image, text in plans:
        p = point.parameters
        s_i, s_t = found[(image, point.qe_k) if point.qe_k else image], found[text]
        if p.normalize_similarities:
            a, b = point.minima(m_i, point.text_mean)
            s_i = normalised(s_i, a, a)
            s_t = normalised(s_t, b, b if p.normalize_text_by == "text" else a)
        else:
            s_i, s_t = normalised(s_i, 0.0, 1.0), normalised(s_t, 0.0, 1.0)
        product, squared_sum = harris_terms(s_i, s_t)
        yield product.sub(squared_sum, alpha=p.harris_lambda)  # max(s_i, 0) and max(s_t, 0) above


# ---------------------------------------------------------------------------------------------
# The table of methods
# ---------------------------------------------------------------------------------------------


def _as_they_are(points: Sequence[Parameters], assets: Assets) -> Sequence[Parameters]:
    return points


@dataclass(frozen=True)
class Method:
    """A method: its scores, the parameters it reads, its preset, and its work before any block.

    scores(queries, gallery, points) yields one (Q, N) matrix for each of the points that
    prepare(parameters, assets) made. On a CPU it runs in several threads at once, for a block each:
    what is not of the block is not to be changed.
    """

    scores: Callable[[Queries, Gallery, Sequence], Iterator[Tensor]]
    reads: tuple[str, ...] = ()
    preset: dict[str, bool | int | float | str] = field(default_factory=dict)
    prepare: Callable[[Sequence[Parameters], Assets], Sequence] = _as_they_are


METHODS = {
    "image": Method(image_scores),
    "text": Method(text_scores, reads=("contextualize",)),
    "sum": Method(sum_scores, reads=("contextualize", "fusion_weight")),
    "product": Method(product_scores, reads=("contextualize",)),
    "basic": Method(
        basic_scores,
        reads=(
            "contextualize",
            "standardize_features",
            "use_laion_mean",
            "project_features",
            "specified_corpus",
            "specified_ncorpus",
            "aa",
            "num_principal_components_for_projection",
            "do_query_expansion",
            "qe_k",
            "normalize_similarities",
            "normalize_text_by",
            "harris_lambda",
        ),
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
        prepare=prepare_basic,
    ),
}

# A parameter (left) has an effect only where one of these is on.
EFFECTIVE_WITH = {
    "use_laion_mean": ("standardize_features",),
    "specified_corpus": ("standardize_features", "project_features"),
    "specified_ncorpus": ("project_features",),
    "aa": ("project_features",),
    "num_principal_components_for_projection": ("project_features",),
    "qe_k": ("do_query_expansion",),
    "normalize_text_by": ("normalize_similarities",),
}


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """Every row divided by its length: (rows, D) float32 -> the same."""
    return vectors / vectors.norm(dim=1, keepdim=True)
