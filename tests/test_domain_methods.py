"""FREEDOM and WeiCom against naive oracles, on random features, and on the golden ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from domain_world import NAMES, golden, read_prompts, read_task, stored_features

from methods import freedom, weicom
from utils import UserError
from utils_features import load_encoder
from utils_retrieval import Assets, Gallery, Queries, unit_rows

CORPUS = "open_image_v7_class_names"


def random_rows(seed: int, *shape: int) -> torch.Tensor:
    return unit_rows(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def tiny_texts():
    """Texts to unit features, by the tiny backbone."""
    encoder = load_encoder("tiny", torch.device("cpu"), "fp32")
    return lambda texts: unit_rows(torch.from_numpy(encoder.encode_texts(texts, 64)))


# ---------------------------------------------------------------------------------------------
# FREEDOM
# ---------------------------------------------------------------------------------------------


def text_feature(text: str) -> np.ndarray:
    """A feature that depends on every character of a text."""
    seed = sum((place + 1) * ord(letter) for place, letter in enumerate(text))
    return random_rows(seed, 1, 16)[0].numpy()


def encode(texts: list[str]) -> torch.Tensor:
    assert len(set(texts)) == len(texts), "a text is encoded twice"
    return torch.from_numpy(np.stack([text_feature(text) for text in texts]))


def naive_freedom(queries, texts, gallery, words, names, p) -> np.ndarray:
    """Step by step as the paper has it, one query at a time, in float64: scores (Q, N)."""
    similarity = queries @ gallery.T
    add_self = similarity.max(axis=1).min() < 0.98
    scores = []
    for query, own, text in zip(queries, similarity, texts, strict=True):
        proxies = [gallery[row] for row in np.argsort(-own, kind="stable")[: p.proxies]]
        if add_self:
            proxies = [query, *proxies[:-1]]
        counts: dict[str, int] = {}
        for proxy in proxies:
            for word in np.argsort(-(words @ proxy), kind="stable")[: p.ni]:
                counts[names[word]] = counts.get(names[word], 0) + 1
        chosen = sorted(counts, key=lambda word: -counts[word])[: p.miu]
        largest = max(counts.values())
        fused = sum(counts[w] / largest * text_feature(f"{w} {text}") for w in chosen)
        scores.append(gallery @ fused)
    return np.array(scores)


SETTINGS = [
    freedom.Parameters(),
    freedom.Parameters(expand=False),
    freedom.Parameters(kappa=3, ni=2, miu=4),
    freedom.Parameters(kappa=2, ni=1, miu=7),  # fewer words than asked for
]


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("in_gallery", ["none", "all", "all but one"])
def test_freedom_is_the_paper_s(in_gallery, remembered, monkeypatch):
    """Every setting in one call, as a sweep makes it, each query image asked with two texts.

    remembered: the words of each proxy, as where there are many; then they are compared once.
    """
    if remembered:
        monkeypatch.setattr(freedom, "PAIRS_WORTH_SHARING", 0)
        monkeypatch.setattr(freedom, "PAIRS_AT_ONCE", 7 * 40)
    gallery, words = random_rows(1, 60, 16), random_rows(2, 40, 16)
    gallery[7] = gallery[3]
    images = gallery[[3, 11, 30, 59]] if in_gallery != "none" else random_rows(3, 4, 16)
    if in_gallery == "all but one":
        images[2] = random_rows(4, 1, 16)
    images, texts = images.repeat(2, 1), ["toy"] * 4 + ["in a drawing"] * 4
    names = [f"word {number}" for number in range(40)]
    assets = Assets(corpora={CORPUS: words}, prompts={CORPUS: names}, encode_texts=encode)
    queries = Queries({"image": images}, np.arange(8), texts)
    space = Gallery.of(gallery)
    states = freedom.observe(freedom.prepare(SETTINGS, assets), queries, space)
    if remembered:
        monkeypatch.setattr(freedom, "_compare_words", None)
        states = freedom.observe(freedom.prepare(SETTINGS, assets), queries, space)
    arrays = [array.double().numpy() for array in (images, gallery, words)]
    for p, scores in zip(SETTINGS, freedom.scores(states, queries, space), strict=True):
        expected = naive_freedom(arrays[0], texts, arrays[1], arrays[2], names, p)
        assert np.abs(scores.numpy() - expected).max() < 1e-5
    some = Queries({"image": images[[1, 6]]}, np.array([1, 6]), ["toy", "in a drawing"])
    parts = freedom.scores(states, some, space)
    whole = freedom.scores(states, queries, space)
    for part, every in zip(parts, whole, strict=True):
        assert torch.allclose(part, every[[1, 6]], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_words_and_weights_of_every_golden_query_image(name, tiny_texts):
    task, figures = read_task(name), golden(name)
    gallery, features = stored_features(name)
    words = read_prompts()
    assets = Assets(
        corpora={CORPUS: tiny_texts(words)}, prompts={CORPUS: words}, encode_texts=tiny_texts
    )
    space = Gallery.of(gallery)
    sources = np.array(task.queries.tags["source"])
    for variant, p in (("freedom", freedom.Parameters()), ("freedom_dagger", SETTINGS[1])):
        (state,) = freedom.prepare([p], assets)
        for source, added in figures["freedom_self_added"].items():
            rows = np.flatnonzero(sources == source)
            images, first = np.unique([task.queries.images[i][0] for i in rows], return_index=True)
            own = features["image"][rows[first]]
            proxies = freedom.find_proxies(own, space, p.proxies)
            assert bool((proxies[:, 0] >= len(gallery)).all()) == added
            assert bool((proxies[:, 0] >= len(gallery)).any()) == added
            vectors, place = freedom._proxy_vectors(proxies, own, space)
            slots = freedom._nearest_words(vectors, state, p.ni)[place].flatten(1)
            chosen, weights = freedom.count_words(slots.numpy(), p.miu)
            for image, which, weight in zip(images, chosen, weights, strict=True):
                expected = figures["freedom_labels"][variant][image]
                kept = weight > 0
                assert [words[number] for number in which[kept]] == [w for w, _ in expected]
                assert weight[kept] == pytest.approx([w for _, w in expected], abs=1e-5)


def test_equal_words_come_in_the_order_of_the_list():
    values = torch.tensor([[1.0, 3, 2, 3, 2, 2], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]])
    assert freedom.first_largest(values, 3).tolist() == [[1, 3, 2], [0, 1, 2], [5, 4, 3]]
    assert freedom.first_largest(values, 6).tolist()[0] == [1, 3, 2, 4, 5, 0]


def test_a_gallery_smaller_than_kappa_is_refused():
    assets = Assets(corpora={CORPUS: random_rows(0, 9, 16)}, prompts={CORPUS: list("abcdefghi")})
    queries = Queries({"image": random_rows(1, 2, 16)}, np.arange(2), ["toy", "toy"])
    states = freedom.prepare([freedom.Parameters(kappa=12)], assets)
    with pytest.raises(UserError, match=r"--kappa 12: a gallery has 11 images only; .*--kappa 11"):
        freedom.observe(states, queries, Gallery.of(random_rows(2, 11, 16)))


@pytest.mark.parametrize(
    ("words", "said"),
    [(["cat", "dog", "cat"], "rows 1 and 3 are both 'cat'"), (["cat", " ", "x"], "row 2: a blank")],
)
def test_words_that_repeat_or_are_blank_are_refused(words, said):
    assets = Assets(corpora={CORPUS: random_rows(0, 3, 16)}, prompts={CORPUS: words})
    with pytest.raises(UserError, match=said):
        freedom.prepare([freedom.Parameters()], assets)


def test_the_words_that_a_run_needs():
    need = freedom.needs([freedom.Parameters(ni=9), freedom.Parameters(freedom_corpus="mine")])
    assert need.corpora == {CORPUS: 9, "mine": 7}


# ---------------------------------------------------------------------------------------------
# WeiCom
# ---------------------------------------------------------------------------------------------


def naive_weicom(image, text, gallery, weight) -> np.ndarray:
    def cdf(similarity):
        z = (similarity - similarity.mean()) / similarity.std(ddof=1)
        return np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in z])

    return np.array(
        [
            (1 - weight) * cdf(gallery @ i) + weight * cdf(gallery @ t)
            for i, t in zip(image, text, strict=True)
        ]
    )


def test_weicom_normalises_over_the_gallery_of_each_query():
    features = {"image": random_rows(1, 5, 16), "text": random_rows(2, 5, 16)}
    features["context_text"] = random_rows(3, 5, 16)
    gallery = random_rows(4, 50, 16)
    points = [
        weicom.Parameters(contextualize=contextualize, weicom_lambda=weight)
        for contextualize in (False, True)
        for weight in (0.0, 0.3, 1.0)
    ]
    queries, space = Queries(features, np.arange(5)), Gallery.of(gallery)
    states = weicom.observe(points, queries, space)
    for p, scores in zip(points, weicom.scores(states, queries, space), strict=True):
        text = queries.texts(p.contextualize)
        arrays = [array.double().numpy() for array in (queries.image, text, gallery)]
        assert np.abs(scores.numpy() - naive_weicom(*arrays, p.weicom_lambda)).max() < 1e-5


def test_weicom_with_a_gallery_of_one_image_has_no_preference():
    queries = Queries({"image": random_rows(1, 2, 16), "text": random_rows(2, 2, 16)})
    space = Gallery.of(random_rows(3, 1, 16))
    states = weicom.observe([weicom.Parameters()], queries, space)
    (scores,) = weicom.scores(states, queries, space)
    assert torch.equal(scores, torch.full((2, 1), 0.5))
