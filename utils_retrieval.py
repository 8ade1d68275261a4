"""The equations of the methods, and what a method is: from features to a score for every pair.

Pure tensor functions, no files. All of them follow docs/DESIGN.md section 5 and the paper:

    I (Q, D) query images    T (Q, D) query texts    X (N, D) database images, rows of unit length
    P, M  positive and negative corpus    m_i, m_t  image and text mean    S (Q, N) scores

The database is never copied to centre, normalise or project it: with raw rows Y = diag(|y|) X,
V (X - m)' = (V Y') / |y| - V m, and W is an orthogonal projector: projecting the query is enough.
torch is imported inside the functions that need it, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from utils_task import unique_in_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils_inputs import AskedTexts, Input

EXPANSION_TEMPERATURE = 0.1  # weights exp(0.1 s) of the neighbours, exp(0.1) of the query
COVARIANCE_OFFSET = 1e-5  # added to every entry of C, as the reference does
ZERO_EIGENVALUE = 1e-9  # of the largest in size; rounding makes about 1e-14 of zero
SYNTHETIC_ROWS_AT_ONCE = 4096
PAIRS_HELD = 1 << 24  # similarities that are held together while the nearest rows are found
PAIRS_WORTH_SHARING = 1 << 22  # of a product on a CPU, from which equal vectors are looked for
ROWS_COMPARED = 512  # by one product on a CPU, then: what comes of it stays in the caches
PAIRS_IN_CACHE = 1 << 16  # similarities that are rescaled together
BYTES_KEPT = 1 << 29  # of similarities, for queries that are scored a few at a time
FEW = 16  # vectors, at most, shared by FEW times as many queries: compared once a gallery
BYTES_OF_FEW = 1 << 26  # of similarities of such vectors, for all queries of a gallery


# ---------------------------------------------------------------------------------------------
# Flags of a method: one line each in its dataclass of parameters
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """What the command line, limits, names and docs know of a parameter, beside its default.

    help: of --help. word: how a departure from the preset is written in a variant's name: a switch
    as "no_WORD" or "WORD", anything else as the word and its value ("aa0.5"). low, high: limits.
    choices: the values there are. allowed: a test of the value, and how an error says it.
    only_with: the switches of which one has to be on for the parameter to have an effect.
    """

    help: str
    word: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    allowed: tuple[Callable[[Any], bool], str] | None = None
    only_with: tuple[str, ...] = ()


def flag(default: bool | int | float | str, help: str, *, word: str, **options) -> Any:
    """A field of a method's dataclass of parameters that is a flag of the command; see Flag."""
    return field(default=default, metadata={"flag": Flag(help, word, **options)})


@dataclass(frozen=True)
class NoParameters:
    """The parameters of a method that has none."""


@dataclass(frozen=True)
class TextParameters:
    """The parameters of methods that read the query text."""

    contextualize: bool = flag(
        False, "use the contextualised query texts", word="contextualization"
    )


# ---------------------------------------------------------------------------------------------
# Inputs of a method
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asked:
    """A similarity V (X - m)' that a method asks for, and what it makes of it.

    vectors: yields V (Q, D), a row for each of the observed queries. mean: m (D,), or None for
    zero. then(similarity, rows): what is made of the similarity of some rows of V, which it does
    not change, element by element.
    """

    vectors: Callable[[], Tensor]
    mean: Tensor | None = None
    then: Callable[[Tensor, Tensor | slice], Tensor] = lambda similarity, rows: similarity


@dataclass(frozen=True, eq=False)
class Shared:
    """Values (U, N) that queries share: kind (Q,) says which row is whose; None: one of each."""

    values: Tensor
    kind: Tensor | None = None

    def of(self, place: slice | Tensor) -> Tensor:
        """The values of some of the queries, (q, N); copied only where they lie scattered."""
        if self.kind is None:
            return self.values[place]
        if isinstance(place, slice) and place == slice(None) and self.values.shape[0] > 1:
            return self.values.index_select(0, self.kind)
        kind = self.kind[place]
        own = kind.cpu().numpy()  # whose small steps cost less than a tensor's
        first, count = int(own[0]), len(own)
        if (own == first).all():
            return self.values[first].expand(count, -1)
        if (own[1:] - own[:-1] == 1).all():
            return self.values[first : first + count]
        return self.values.index_select(0, kind)


@dataclass(frozen=True, eq=False)
class Queries:
    """The features of some queries, unit rows (Q, D), by name: image, text, and further inputs.

    number: int64 array (Q,), their rows in the task. words: their texts, Q strings. device: where
    scores are to be. whole: the queries that were observed, where these are some of them, and
    place: which.
    """

    features: Mapping[str, Tensor]
    number: Any = None
    words: Sequence[str] = ()
    device: Any = "cpu"
    whole: Queries | None = None
    place: slice | Tensor = field(default_factory=partial(slice, None))
    _known: dict[Hashable, Shared] = field(default_factory=dict, repr=False)
    _own: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.features[name]

    @property
    def image(self) -> Tensor:
        return self.features["image"]

    @property
    def text(self) -> Tensor:
        return self.features["text"]

    @property
    def observed(self) -> Queries:
        """The queries that were observed: these, or those that these are some of."""
        return self.whole or self

    def texts(self, contextualize: bool) -> Tensor:
        """The plain or the contextualised text features, (Q, D)."""
        return self.features[name_of_texts(contextualize)]

    def anew(self) -> Queries:
        """These queries, and those that they are some of, without what they know of galleries."""
        if self.whole is not None:
            return self.whole.anew().some(self.place)
        return replace(self, _known={}, _own={})

    def some(self, place: slice | Tensor) -> Queries:
        """Some of these queries, by their places (int64); they share what any of them ask for."""
        features = {name: rows[place] for name, rows in self.features.items()}
        which = place if isinstance(place, slice) else place.cpu().numpy()
        words = self.words[place] if isinstance(place, slice) else [self.words[i] for i in which]
        return Queries(features, self.number[which], words, self.device, self, place)

    def similarities(
        self, gallery: Gallery, *names: str, of: str = "image", at_least: float | None = None
    ) -> list[Tensor]:
        """V X' of the features of each name with a gallery's features: (Q, N) each.

        What is not known yet takes one product; all methods share it, and none may change it.
        at_least: what lower similarities are raised to.
        """
        features = self.observed.features
        asked = {name: Asked(partial(features.__getitem__, name)) for name in names}
        if at_least is None:
            found = self.compare(gallery, asked, of)
            return [found[name] for name in names]
        unkept = self._learn(gallery, asked, of)
        raised = {name: own.clamp(min=at_least) for name, own in unkept.items()}
        for name in asked.keys() - raised:
            raised[name] = self._raised((gallery, of, name), at_least)
        return [raised[name] for name in names]

    def compare(
        self, gallery: Gallery, asked: Mapping[Hashable, Asked], of: str = "image"
    ) -> dict[Hashable, Tensor]:
        """What is asked of a gallery's rows, by key: (Q, N) each, which none may change.

        What is not known yet takes one product: of all that were observed, equal vectors once, if
        there is room to keep what comes of it, else of these. Equal keys are to ask for the same.
        """
        unkept = self._learn(gallery, asked, of)
        return {
            key: unkept[key] if key in unkept else self._taken((gallery, of, key)) for key in asked
        }

    def _learn(
        self, gallery: Gallery, asked: Mapping[Hashable, Asked], of: str
    ) -> dict[Hashable, Tensor]:
        """Compute what is asked and not known; what there is no room to keep, by key: (Q, N)."""
        known = self.observed._known
        new = {key: one for key, one in asked.items() if (gallery, of, key) not in known}
        if not new:
            return {}
        kept, found = _ask(new, gallery, of, self._room, self.place)
        if not kept:
            return {key: shared.values for key, shared in found.items()}
        known.update({(gallery, of, key): shared for key, shared in found.items()})
        return {}

    @property
    def _room(self) -> int:
        """Bytes that may still be kept."""
        return BYTES_KEPT - sum(shared.values.nbytes for shared in self.observed._known.values())

    def _raised(self, key: Hashable, least: float) -> Tensor:
        """What is known, no lower than this: of shared values once, if there is room."""
        known, own = self.observed._known, (key, least)
        if own not in known:
            if known[key].values.nbytes > self._room:
                return self._taken(key).clamp(min=least)
            known[own] = replace(known[key], values=known[key].values.clamp(min=least))
        return self._taken(own)

    def _taken(self, key: Hashable) -> Tensor:
        if key not in self._own:
            self._own[key] = self.observed._known[key].of(self.place)
        return self._own[key]


def _ask(
    asked: Mapping[Hashable, Asked], gallery: Gallery, of: str, room: int, place: slice | Tensor
) -> tuple[bool, dict[Hashable, Shared]]:
    """Whether what is asked of the observed queries fits in `room` bytes, and it, or of some."""
    parts, few = {}, set()
    for key, one in asked.items():
        vectors = one.vectors()
        first, kind = gallery.distinct(vectors)
        parts[key] = gallery.pick(vectors, first), first, kind
        if kind is not None and len(first) <= min(FEW, len(kind) // FEW):
            few.add(key)
    fits = 4 * len(gallery) * sum(len(vectors) for vectors, _, _ in parts.values()) <= room
    if not fits:
        parts = {key: (one.vectors()[place], place, None) for key, one in asked.items()}
        few.clear()
    vectors = {key: (part[0], asked[key].mean) for key, part in parts.items()}
    similar = gallery.similarities(vectors, of, few)
    return fits, {
        key: Shared(asked[key].then(similar[key], rows), kind)
        for key, (_, rows, kind) in parts.items()
    }


def name_of_texts(contextualize: bool) -> str:
    """The name of the plain or the contextualised text features."""
    return "context_text" if contextualize else "text"


@dataclass(frozen=True, eq=False)
class Rows:
    """Database features of one kind: raw rows Y (N, D) float32 and their lengths |y| (N,)."""

    raw: Tensor
    length: Tensor

    @classmethod
    def of(cls, raw: Tensor) -> Rows:
        """Measure the rows of raw, (N, D) of any float type, once; they become float32."""
        raw = raw.float()
        return cls(raw, raw.norm(dim=1))

    @cached_property
    def mean(self) -> Tensor:
        """The mean of X, (D,)."""
        return self.length.reciprocal() @ self.raw / len(self.raw)

    def product(self, vectors: Tensor) -> Tensor:
        """V X': (V, D) -> (V, N)."""
        import torch

        if vectors.is_cuda or len(vectors) * len(self.raw) < PAIRS_WORTH_SHARING:
            return (vectors @ self.raw.T).div_(self.length)
        found = vectors.new_empty(len(vectors), len(self.raw))
        for first in range(0, len(self.raw), ROWS_COMPARED):
            some = slice(first, first + ROWS_COMPARED)
            torch.div(vectors @ self.raw[some].T, self.length[some], out=found[:, some])
        return found

    def weighted(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Weighted sums of rows of X: weights, rows (Q, K) -> (Q, D)."""
        from torch.nn.functional import embedding_bag

        weights = weights / self.length[rows]
        return embedding_bag(rows, self.raw, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True, eq=False)
class Gallery:
    """The rows that some queries search, and the questions a method may ask of them.

    kinds: features of the rows by name, those that the runs read. number: int64 array (N,), the
    rows in the task, increasing.
    """

    kinds: Mapping[str, Rows]
    number: Any = None
    _remembered: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, raw: Tensor) -> Gallery:
        """A gallery of images alone: raw (N, D) of any float type."""
        return cls({"image": Rows.of(raw)})

    def __len__(self) -> int:
        return len(next(iter(self.kinds.values())).raw)

    def distinct(self, vectors: Tensor) -> tuple[Tensor | slice, Tensor | None]:
        """equal_rows of (V, D), where a product with all rows is worth it; else all, and None.

        Images and texts recur in composed queries.
        """
        if vectors.is_cuda or len(vectors) * len(self) < PAIRS_WORTH_SHARING:
            return slice(None), None
        first, kind = equal_rows(vectors)
        return (slice(None), None) if len(first) == len(kind) else (first, kind)

    def pick(self, vectors: Tensor, first: Tensor | slice) -> Tensor:
        """Those of some vectors that are compared in place of all."""
        if isinstance(first, slice):
            return vectors[first]
        return vectors.index_select(0, first)  # several times faster

    def similarity(self, vectors: Tensor, mean: Tensor | None = None, of: str = "image") -> Tensor:
        """V (X - m)': (V, D) against all rows -> (V, N); mean: (D,) or None for zero."""
        return self.similarities({"": (vectors, mean)}, of)[""]

    def similarities(
        self,
        parts: Mapping[Hashable, tuple[Tensor, Tensor | None]],
        of: str = "image",
        few: Collection[Hashable] = (),
    ) -> dict[Hashable, Tensor]:
        """similarity of each part (V_i, m_i) -> (V_i, N), by name, by one product over the rows.

        few: parts of vectors that many queries share, which are remembered.
        """
        import torch

        rows = self.kinds[of]
        found = {name: self._similarity_of_few(parts[name][0], of) for name in few}
        others = {name: vectors for name, (vectors, _) in parts.items() if name not in found}
        if others:
            product = rows.product(torch.cat(list(others.values())))
            found |= zip(others, product.split(list(map(len, others.values()))), strict=True)
        for name, (vectors, mean) in parts.items():
            if mean is not None:
                found[name].sub_((vectors @ mean)[:, None])
        return found

    def _similarity_of_few(self, vectors: Tensor, of: str) -> Tensor:
        """V X' of vectors that many queries share, remembered one by one: (V, D) -> (V, N).

        Each has a product of its own, so that no bit depends on which of them came together.
        """
        import torch

        known = self.remember(("few", of), dict)
        room = BYTES_OF_FEW // (4 * len(self))
        found = []
        for vector, key in zip(vectors, map(bytes, vectors.cpu().numpy()), strict=True):
            row = known.get(key)
            if row is None:
                row = self.kinds[of].product(vector[None])[0]
                if len(known) < room:
                    known[key] = row
            found.append(row)
        return torch.stack(found)

    def nearest(self, vectors: Tensor, k: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k most similar rows (or all), best first: their similarity and number, (V, k)."""
        import torch

        k, size = min(k, len(self)), max(1, PAIRS_HELD // len(self))
        found = [self.similarity(some, mean).topk(k, dim=1) for some in vectors.split(size)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def mean(self, of: str = "image") -> Tensor:
        """The mean of X, (D,)."""
        return self.kinds[of].mean

    def moments(self, vectors: Tensor, of: str = "image") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N - 1) of each vector's similarities: twice (V, 1)."""
        similarity = self.similarity(vectors, of=of)
        correction = min(1, len(self) - 1)  # the deviation in a gallery of one is 0
        deviation = similarity.std(1, correction=correction, keepdim=True)
        return similarity.mean(1, keepdim=True), deviation

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What make yields, once for this gallery: what its parts of queries share."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    def weighted_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """For each query the sum of its rows of X, weighted: weights, rows (Q, K) -> (Q, D)."""
        return self.kinds["image"].weighted(weights, rows)


@dataclass(frozen=True, eq=False)
class Assets:
    """What methods need beside the features: unit rows, (rows, D); (D,) for the image mean.

    prompts: the texts of each corpus' rows, as far as they are known. encode_texts: unit features
    (n, D) of n texts, by the features' own backbone, which is loaded when it is first asked.
    """

    corpora: Mapping[str, Tensor] = field(default_factory=dict)
    image_mean: Tensor | None = None
    synthetic_images: Tensor | None = None
    synthetic_texts: Tensor | None = None
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    encode_texts: Callable[[Sequence[str]], Tensor] | None = None
    _remembered: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What make yields, once for these assets: what runs of one search after another share."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]


@dataclass(frozen=True)
class Needs:
    """Which assets some runs read: corpora with the fewest rows each may have, mean, synthetic.

    prompts: the corpora whose texts are read as well as their features. texts: encode_texts.
    """

    corpora: Mapping[str, int] = field(default_factory=dict)
    image_mean: bool = False
    synthetic: bool = False
    prompts: tuple[str, ...] = ()
    texts: bool = False


# ---------------------------------------------------------------------------------------------
# What a method is
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fusion:
    """How two parts X, Y of a score make it: x X + y Y + xx X^2 + xy X Y + yy Y^2."""

    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def __call__(self, x: Any, y: Any) -> Any:
        """The score of parts, numbers or arrays alike."""
        return self.x * x + self.y * y + self.xx * x * x + self.xy * x * y + self.yy * y * y


@dataclass(frozen=True, eq=False)
class Parts:
    """What the scores of some queries are made of, as the method used it.

    similarities: two parts by name, each (Q, N). fusion: makes the scores of them, None where no
    polynomial of degree 2 does. neighbours: int64 (Q, k), the gallery rows that the query was
    expanded by, or None.
    """

    similarities: Mapping[str, Tensor]
    fusion: Fusion | None = None
    neighbours: Tensor | None = None


def _points_as_they_are(points: Sequence, assets: Assets) -> Sequence:
    return points


def _states_as_they_are(states: Sequence, queries: Queries, gallery: Gallery) -> Sequence:
    return states


@dataclass(frozen=True, eq=False)
class Method:
    """A method, as its file under methods/ declares it.

    parameters: a frozen dataclass whose fields are flags. scores(states, queries, gallery) yields
    one (Q, N) matrix for each point; a row's score depends on the state and on that row alone, and
    the vectors that it compares with the gallery are those of the queries, Q of them, in order; the
    queries may be some of those that were observed, queries.place. preset: the published settings;
    presets: what departs from them on some data sets, by name. reads: the query features and
    gallery_reads the database features it works on, by name. prepare(points, assets) -> states:
    once a run, what no gallery changes. observe(states, queries, gallery) -> states: what the
    gallery as a whole decides for these queries. of_queries: the fields of an observed state that
    hold vectors (Q, D) of its queries: states of several galleries that agree in all else may
    become one, of all their queries. needs(points): the assets they read. together: a
    tag whose queries are observed together (all of a gallery's, where the task has no such tag).
    by_features: queries that agree in the features that are read score the same, and are ranked
    once. inputs: name -> producer of further features, for `create_features.py --inputs NAME`.
    steps: the components of --ablation, each with the parameters that take it away. compared:
    parameter -> methods that a sweep of it is compared with. caution(parameters): what of a setting
    ranks otherwise than its user may mean, in words, or "". takes(parameters, assets): what a
    setting takes so many of, (flag, how many, how many there are, in words of what), the last two
    None for rows of the gallery; where there are fewer, a note says so. parts(state, queries,
    gallery): what the scores of a state are made of, for pages that explain them, or None.
    draws(method, names): of a method that reads one of several draws, a method for each that the
    query features of these names hold. On a CPU observe and scores run in several threads at once,
    for other queries each: what is not of the call is not to be changed.
    """

    name: str
    parameters: type
    scores: Callable[[Sequence, Queries, Gallery], Iterable[Tensor]]
    summary: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reads: tuple[str, ...] = ("image", "text")
    gallery_reads: tuple[str, ...] = ("image",)
    prepare: Callable[[Sequence, Assets], Sequence] = _points_as_they_are
    observe: Callable[[Sequence, Queries, Gallery], Sequence] = _states_as_they_are
    of_queries: tuple[str, ...] = ()
    needs: Callable[[Sequence], Needs] = lambda points: Needs()
    together: str | None = None
    by_features: bool = False
    inputs: Mapping[str, Input | AskedTexts] = field(default_factory=dict)
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    caution: Callable[[Any], str] = lambda parameters: ""
    takes: Callable[[Any, Assets], Sequence[tuple]] = lambda parameters, assets: ()
    parts: Callable[[Any, Queries, Gallery], Parts] | None = None
    draws: Callable[[Method, Sequence[str]], Sequence[Method]] = lambda method, names: (method,)

    def query_features(self, parameters: Any) -> tuple[str, ...]:
        """The query features that a run of these parameters reads."""
        contextual = getattr(parameters, "contextualize", False)
        return tuple("context_text" if contextual and n == "text" else n for n in self.reads)


def similarity_scores(
    points: Sequence, queries: Queries, gallery: Gallery, name: str
) -> Iterator[Tensor]:
    """V X' of the query features of that name, for every point: yields (Q, N)."""
    [similarity] = queries.similarities(gallery, name)
    yield from repeat(similarity, len(points))


def late_interaction(query: Tensor, rows: Tensor, kind: str) -> Tensor:
    """Scores (Q, N) of rows of T vectors: query (Q, T, D), rows (N, T, D).

    "max": the best pair of vectors (CoVR-2 on CIRR); "maxsim": each query vector's best, summed
    (ColBERT); "mean": of the mean vectors.
    """
    import torch

    if kind == "mean":
        return query.mean(1) @ rows.mean(1).T
    best = torch.stack([(rows @ own.T).amax(1) for own in query])  # (Q, N, T)
    return best.amax(2) if kind == "max" else best.sum(2)


# ---------------------------------------------------------------------------------------------
# The equations of BASIC
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


def expand_queries(
    images: Tensor, nearest: tuple[Tensor, Tensor], gallery: Gallery, mean: Tensor | None
) -> Tensor:
    """Weighted mean of each query image and its nearest rows, centred, unprojected: (Q, D).

    images: centred I (Q, D). nearest: similarity of the projected I to its k nearest rows, and
    these rows, (Q, k) each. mean: (D,) or None for zero. Weights exp(0.1 s) for the rows, exp(0.1)
    for the query, made to sum to 1.
    """
    import torch

    similarity, rows = nearest
    own = torch.ones_like(similarity[:, :1])
    weights = (EXPANSION_TEMPERATURE * torch.cat([own, similarity], dim=1)).softmax(dim=1)
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
    """max((s - lowest) / |scale|, 0), element by element: (Q, N) -> (Q, N)."""
    import torch

    found = torch.empty_like(similarity)
    size = max(1, PAIRS_IN_CACHE // similarity.shape[1])
    for some, out in zip(similarity.split(size), found.split(size), strict=True):
        torch.sub(some, lowest, out=out).div_(abs(scale)).clamp_(min=0)
    return found


def harris_terms(s_i: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor]:
    """s_i s_t and (s_i + s_t)^2, element by element: score = the first - lambda the second."""
    return s_i * s_t, (s_i + s_t).square_()


def centre(vectors: Tensor, mean: Tensor | None) -> Tensor:
    """V - m: (V, D) and (D,), or None for zero -> (V, D)."""
    return vectors if mean is None else vectors - mean


def equal_rows(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each kind of equal rows of (V, D), int64 (U,), and each row's kind, (V,)."""
    import numpy as np
    import torch

    _, of = unique_in_order(row.tobytes() for row in vectors.cpu().numpy())
    first = np.unique(of, return_index=True)[1]
    return tuple(torch.from_numpy(index).to(vectors.device) for index in (first, of))


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """Every row divided by its length: (rows, D) float32 -> the same."""
    return vectors / vectors.norm(dim=1, keepdim=True)
