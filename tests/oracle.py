"""Average precision of every method, by the formulas of docs/DESIGN.md and docs/domains.md.

The oracle shares no code with what it judges: float64 numpy, one query at a time. Float32 rounds
otherwise: every score comes with how far it may lie off, and every AP with the bounds that this,
ties included, leaves.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from random_worlds import EPSILON, WORDS, World

NEAR = 2e-6  # how far a float32 similarity of unit vectors lies off
UNSURE = 2e-5  # what lies so near at the end of a list of neighbours may be in it or not
COVARIANCE_OFFSET = 1e-5
GAP = 0.02  # of eigenvalues, of the largest: what lies nearer is not told apart safely


class Undecided(Exception):
    """Rounding decides what the score is: any AP is right."""


class Refused(Exception):
    """The command has to refuse this: nothing is left to project on."""


@dataclass(frozen=True)
class Trial:
    """A method with its flags, and what of the protocol is changed."""

    method: str
    flags: Mapping[str, object] = field(default_factory=dict)
    whole: bool = False
    without_own: bool = False

    def words(self) -> list[str]:
        """The command line."""
        words = ["--method", self.method]
        for name, value in self.flags.items():
            flag = f"--{name}" if value is not False else f"--no-{name}"
            words += [flag] if isinstance(value, bool) else [flag, str(value)]
        words += ["--gallery", "all"] if self.whole else []
        return [*words, *(["--exclude_query_image"] if self.without_own else [])]


def make_trials(seed: int, world: World) -> list[Trial]:
    """Every method, and random flags."""
    rng = random.Random(f"trials {seed}")
    weight = round(rng.random(), 3)
    smallest = min(Counter(row[2] for row in world.rows).values())
    plain = [Trial(name) for name in ("image", "text", "sum", "product", "weicom")]
    plain.append(Trial("freedom", {"kappa": min(smallest, rng.randint(1, 9))}))
    odd = [
        Trial("sum", {"fusion_weight": weight, "contextualize": True}, whole=rng.random() < 0.5),
        Trial("product", {"clamp": False}, without_own=True),
        Trial("weicom", {"weicom_lambda": weight, "contextualize": True}, whole=True),
        Trial("freedom", {"kappa": 1, "ni": rng.randint(1, 8), "miu": rng.randint(1, 8)}),
        *(_basic(rng) for _ in range(3)),
    ]
    return [*plain, *odd]


def _basic(rng: random.Random) -> Trial:
    flags: dict[str, object] = {"harris_lambda": rng.choice((0.1, 0.0, 0.3, -0.5))}
    if rng.random() < 0.6:
        flags |= {"standardize_features": True, "use_laion_mean": rng.random() < 0.5}
    if rng.random() < 0.5:
        components = rng.choice((1, 2, 5, 250, 0.5, 0.9))
        flags |= {"project_features": True, "aa": rng.choice((0, 0.2, 0.5))}
        flags["num_principal_components_for_projection"] = components
    if rng.random() < 0.5:
        flags |= {"do_query_expansion": True, "qe_k": rng.randint(1, 30)}
    if rng.random() < 0.6:
        flags |= {"normalize_similarities": True}
        flags["normalize_text_by"] = rng.choice(("image", "text"))
    if rng.random() < 0.5:
        flags["contextualize"] = True
    return Trial("basic", flags, whole=rng.random() < 0.3, without_own=rng.random() < 0.3)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# Scores of a query: (n,) values, and (n,) how far each may lie off
# ---------------------------------------------------------------------------------------------

Scored = tuple[np.ndarray, np.ndarray]


def score(trial: Trial, world: World, query: int, pool: Sequence[int]) -> Scored:
    """The scores of a query against the rows of its pool."""
    if trial.method == "basic":
        return basic(trial.flags, world, query, pool)
    if trial.method == "freedom":
        return freedom(trial.flags, world, query, pool)
    rows, flags = unit(world.database[pool]), trial.flags
    texts = world.assets["context_text"] if flags.get("contextualize") else world.text
    image, text = (rows @ unit(own[query]) for own in (world.image, texts))
    one = np.full(len(pool), NEAR)
    if trial.method in ("image", "text"):
        return (image if trial.method == "image" else text), one
    if trial.method == "sum":
        w = flags.get("fusion_weight", 0.5)
        return 2 * ((1 - w) * image + w * text), 2 * one
    if trial.method == "product":
        if flags.get("clamp", True):
            image, text = np.maximum(image, 0), np.maximum(text, 0)
        return image * text, 2 * one
    w = flags.get("weicom_lambda", 0.5)
    (a, near_a), (b, near_b) = (_cdf(own) for own in (image, text))
    return (1 - w) * a + w * b, (1 - w) * near_a + w * near_b


def _cdf(similarity: np.ndarray) -> Scored:
    """cdf((s - mean) / deviation), N - 1; a half where there is no deviation."""
    if len(similarity) == 1:
        return np.array([0.5]), np.zeros(1)
    deviation = similarity.std(ddof=1)
    if deviation < UNSURE:
        return np.full(len(similarity), 0.5), np.ones(len(similarity))
    z = (similarity - similarity.mean()) / deviation
    value = np.array([(1 + math.erf(one / math.sqrt(2))) / 2 for one in z])
    return value, NEAR * (1 + np.abs(z)) / deviation + NEAR


def basic(flags: Mapping[str, object], world: World, query: int, pool: Sequence[int]) -> Scored:
    """Section 5 of DESIGN, step by step."""
    rows = unit(world.database[pool])
    texts = world.assets["context_text"] if flags.get("contextualize") else world.text
    image, text = unit(world.image[query]), unit(texts[query])
    assets = {name: world.assets[name].astype(np.float64) for name in world.assets}
    positive, negative = (unit(assets[n]) for n in ("generic_subjects", "generic_styles"))
    m_i = m_t = np.zeros(rows.shape[1])
    if flags.get("standardize_features"):
        m_i = assets["mean"][0] if flags["use_laion_mean"] else rows.mean(0)
        m_t = positive.mean(0)
    basis, near = np.eye(rows.shape[1]), 3 * NEAR
    if flags.get("project_features"):
        basis, gap = projector(positive - m_t, negative - m_t, flags)
        near += 3e-7 / gap
    rows, image, text = rows - m_i, image - m_i, text - m_t
    if flags.get("do_query_expansion"):
        image = expand(image, rows, basis, int(flags["qe_k"]), near)
    s_i, s_t = rows @ (basis @ image), rows @ text
    near_i = near_t = np.full(len(pool), near * (1 + np.linalg.norm(m_i)))
    if flags.get("normalize_similarities"):
        images, captions = unit(assets["image_features"]) - m_i, unit(assets["text_features"]) - m_t
        a, b = (images @ images.T).min(), (captions @ images.T).min()
        by = b if flags["normalize_text_by"] == "text" else a
        if min(abs(a), abs(by)) < 1e-4:
            raise Undecided
        near_i = (2 * near_i + np.abs(s_i - a) * near / abs(a)) / abs(a)
        near_t = (2 * near_t + np.abs(s_t - b) * near / abs(by)) / abs(by)
        s_i, s_t = (s_i - a) / abs(a), (s_t - b) / abs(by)
    s_i, s_t = np.maximum(s_i, 0), np.maximum(s_t, 0)
    lam = float(flags["harris_lambda"])
    both = 2 * abs(lam) * (s_i + s_t) * (near_i + near_t)
    rounding = 1e-6 * (s_i * s_t + abs(lam) * (s_i + s_t) ** 2)
    return s_i * s_t - lam * (s_i + s_t) ** 2, s_t * near_i + s_i * near_t + both + rounding


def projector(
    positive: np.ndarray, negative: np.ndarray, flags: Mapping[str, object]
) -> tuple[np.ndarray, float]:
    """W of the contrastive PCA, and how far apart kept and other eigenvalues lie."""
    aa, components = float(flags["aa"]), flags["num_principal_components_for_projection"]
    a = positive.T @ positive / (len(positive) - 1)
    b = negative.T @ negative / (len(negative) - 1)
    values, vectors = np.linalg.eigh((1 - aa) * a - aa * b + COVARIANCE_OFFSET)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.abs(values).max()
    some = values[values > 1e-9 * largest]
    if not len(some):
        raise Refused
    if components >= 1:
        kept = min(int(components), len(some))
    else:
        share = np.cumsum(some) / some.sum()
        kept = min(int((share < components).sum()) + 1, len(some))
        if np.abs(share - components).min() < 1e-6:
            raise Undecided
    gap = 1.0 if kept == len(values) else float((values[kept - 1] - values[kept]) / largest)
    if gap < GAP:
        raise Undecided
    return vectors[:, :kept] @ vectors[:, :kept].T, gap


def expand(
    image: np.ndarray, rows: np.ndarray, basis: np.ndarray, k: int, near: float
) -> np.ndarray:
    """The weighted mean of a query image and its k nearest rows."""
    similarity = rows @ (basis @ image)
    order = np.argsort(-similarity, kind="stable")
    _require_apart(similarity[order], rows[order], k, UNSURE + near)
    nearest = order[:k]
    weights = np.exp(0.1 * np.array([1.0, *similarity[nearest]]))
    return (weights / weights.sum()) @ np.vstack([image, rows[nearest]])


def _require_apart(values: np.ndarray, rows: np.ndarray, k: int, near: float) -> None:
    """Raise Undecided if the k-th and the next differ, but hardly in value."""
    if len(values) > k and values[k - 1] - values[k] < near:
        alike = np.abs(values - values[k - 1]) < near
        if np.abs(rows[alike] - rows[k]).max() > 1e-9:
            raise Undecided


def freedom(flags: Mapping[str, object], world: World, query: int, pool: Sequence[int]) -> Scored:
    """Words of the proxies vote; the winners, with the query text, are searched together."""
    kappa, n, m = (int(flags.get(name, 7)) for name in ("kappa", "ni", "miu"))
    rows, words = unit(world.database[pool]), unit(world.assets["open_image_v7_class_names"])
    instance = world.queries[query][2]
    images = unit(world.image[[q for q, own in enumerate(world.queries) if own[2] == instance]])
    best = (images @ rows.T).max(1).min()
    if abs(best - 0.98) < UNSURE:
        raise Undecided
    similarity = rows @ unit(world.image[query])
    order = np.argsort(-similarity, kind="stable")
    chosen = rows[order]
    _require_order(similarity[order][: kappa + 1], chosen[: kappa + 1])
    proxies = list(chosen[:kappa])
    if best < 0.98:
        proxies = [unit(world.image[query]), *proxies[: kappa - 1]]
    slots: list[int] = []
    for proxy in proxies:
        near_words = np.argsort(-(words @ proxy), kind="stable")
        _require_order((words @ proxy)[near_words][: n + 1], words[near_words][: n + 1])
        slots += near_words[:n].tolist()
    counted = Counter(slots).most_common(m)
    text = world.queries[query][1]
    phrases = [(world.said[f"{WORDS[word]} {text}"], count) for word, count in counted]
    weights = [count / counted[0][1] for _, count in counted]
    fused = sum(w * unit(own) for w, (own, _) in zip(weights, phrases, strict=True))
    return rows @ fused, np.full(len(pool), NEAR * sum(weights))


def _require_order(values: np.ndarray, rows: np.ndarray) -> None:
    """Raise Undecided if neighbours in a falling list differ, but hardly in value."""
    close = -np.diff(values) < UNSURE
    if (close & (np.abs(np.diff(rows, axis=0)).max(1) > 1e-9)).any():
        raise Undecided


# ---------------------------------------------------------------------------------------------
# Average precision
# ---------------------------------------------------------------------------------------------


def average_precision(ranks: np.ndarray) -> float:
    """AP-T of the ranks of n positives, from 0, ascending."""
    if not len(ranks):
        return 0.0
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    after = (j + 1) / (ranks + 1)
    return float(((before + after) / 2).sum() / (len(ranks) + EPSILON))


def judge(world: World, trial: Trial) -> list[tuple[float, float]]:
    """For each query the lowest and the highest AP that ties and rounding admit."""
    bounds = []
    for query, (path, text, instance) in enumerate(world.queries):
        pool = [n for n, row in enumerate(world.rows) if trial.whole or row[2] == instance]
        rows = [world.rows[n] for n in pool]
        ranked = np.array([not (trial.without_own and row[0] == path) for row in rows])
        right = np.array([row[1:] == (text, instance) for row in rows])
        try:
            values, near = score(trial, world, query, pool)
        except Undecided:
            bounds.append((0.0, 1.0))
            continue
        wrong, own = ranked & ~right, ranked & right
        bounds.append(_bounds(values[wrong], near[wrong], values[own], near[own]))
    return bounds


def _bounds(
    wrong: np.ndarray, wrong_near: np.ndarray, own: np.ndarray, own_near: np.ndarray
) -> tuple[float, float]:
    """The APs with as many negatives before each positive as may be, and as few as must."""
    most, least = (
        [op(wrong + sign * wrong_near, value - sign * near).sum() for value, near in pairs]
        for op, sign in ((np.greater_equal, 1), (np.greater, -1))
        for pairs in [list(zip(own.tolist(), own_near.tolist(), strict=True))]
    )
    before = np.arange(len(own))
    return average_precision(np.sort(most) + before), average_precision(np.sort(least) + before)
