"""Trees of shared beginnings, and vectors in a token's place, against plain implementations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import ROOT

from utils import UserError
from utils_features import Encoder, load_encoder
from utils_text_tower import Replacement, find_mark, grow_trees

CPU = torch.device("cpu")
GOLDEN = ROOT.parent / "shared" / "golden_benchmarks"
UNUSED = 40_000  # a token of CLIP's vocabulary that no text here has


def test_trees_hold_every_sequence_once_and_share_beginnings():
    random = np.random.default_rng(0)
    sequences = [tuple(random.integers(0, 3, random.integers(1, 7)).tolist()) for _ in range(200)]
    sequences = list(dict.fromkeys(sequences))
    trees = list(grow_trees(sequences, max_rows=20, max_tokens=30))
    assert sorted(row for tree in trees for row in tree.rows) == list(range(len(sequences)))
    for tree in trees:
        assert len(tree.rows) <= 20
        assert len(tree.tokens) <= 30
        ancestors = tree.ancestors()
        prefixes = set()
        for row, end in zip(tree.rows, tree.ends, strict=True):
            path = np.flatnonzero(ancestors[end])
            assert tuple(tree.tokens[node] for node in path) == sequences[row]
            assert [tree.depths[node] for node in path] == list(range(len(path)))
            prefixes |= {sequences[row][:depth] for depth in range(1, len(path) + 1)}
        assert len(tree.tokens) == len(prefixes)


def test_a_sequence_longer_than_a_tree_gets_its_own():
    trees = list(grow_trees([(1, 2, 3), (1,), (2,)], max_rows=9, max_tokens=2))
    assert [tree.rows for tree in trees] == [[1], [0], [2]]


# ---------------------------------------------------------------------------------------------
# Vectors in a token's place
# ---------------------------------------------------------------------------------------------

PROMPTS = [
    "a photo of $ that is at night",
    "a photo of $ that is at night and costs 5 $ , or 6 $ .",
    "a photo of $",
    "$ , in the rain",
    "a photo of $ that is at night",
    "a photo of $ that " + "word " * 90,
    "at night, $",
]
WHICH = np.array([0, 1, 2, 0, 0, 1, 2])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def encoder(request, make_clip) -> Encoder:
    folder = make_clip(request.param, ARCHITECTURES[request.param][0])
    return load_encoder(f"local-dir:{folder}", CPU)


@pytest.fixture(scope="module")
def clip(small_clip: Path) -> Encoder:
    return load_encoder(f"local-dir:{small_clip}", CPU)


def vectors_for(encoder: Encoder, count: int = 3) -> np.ndarray:
    """Vectors as large as token embeddings are, by which a text's feature moves visibly."""
    return np.random.default_rng(5).normal(0, 0.5, (count, encoder.token_dim)).astype(np.float32)


def encode_plainly(encoder: Encoder, texts: list[str], replace: Replacement) -> np.ndarray:
    """One text at a time at full length, its vector written into the table for an unused token."""
    table = getattr(encoder.model, "text", encoder.model).token_embedding.weight
    rows = []
    with torch.inference_mode():
        kept = table[UNUSED].clone()
        for text, which in zip(texts, replace.which, strict=True):
            tokens = encoder.tokenizer([text])
            places = (tokens[0] == 259).nonzero()[:, 0]  # CLIP's "$" with a blank after it
            tokens[0, places if replace.everywhere else places[:1]] = UNUSED
            table[UNUSED] = torch.from_numpy(replace.vectors[which])
            rows.append(encoder.model.encode_text(tokens, normalize=False)[0].numpy())
        table[UNUSED] = kept
    return np.stack(rows)


@pytest.mark.parametrize("everywhere", [False, True])
def test_vectors_take_the_place_of_the_mark(encoder, everywhere):
    replace = Replacement("$", vectors_for(encoder), WHICH, everywhere)
    plain = encode_plainly(encoder, PROMPTS, replace)
    for batch_size in (1, 3, 100):
        features = encoder.encode_texts(PROMPTS, batch_size, replace=replace)
        assert features.dtype == np.float32
        assert np.abs(features - plain).max() < 1e-5
    assert np.abs(features - encoder.encode_texts(PROMPTS, 100)).max(axis=1).min() > 1e-3
    assert (features[0] == features[4]).all()  # the same text with the same vector
    other = Replacement("$", replace.vectors, np.array([1, *WHICH[1:]]), everywhere)
    moved = np.abs(encoder.encode_texts(PROMPTS, 100, replace=other) - features).max(axis=1)
    assert (moved > 1e-3).tolist() == [True] + 6 * [False]


def test_the_table_is_as_before(clip):
    before = clip.encode_texts(PROMPTS, 3)
    clip.encode_texts(PROMPTS, 3, replace=Replacement("$", vectors_for(clip), WHICH))
    assert (clip.encode_texts(PROMPTS, 3) == before).all()


def test_a_text_with_its_vector_is_encoded_once_and_beginnings_are_shared(clip, monkeypatch):
    seen = []
    embedding = clip.model.token_embedding
    forward = embedding.forward
    monkeypatch.setattr(embedding, "forward", lambda t: seen.append(t.numel()) or forward(t))
    texts = ["a photo of $ by day", "a photo of $ at night", "a photo of $ by day"]
    vectors = vectors_for(clip)
    clip.encode_texts(texts, 10, replace=Replacement("$", vectors, np.array([0, 0, 0])))
    assert seen == [4 + 1 + 3 + 3]  # start, a, photo, of; the vector; by, day, end; at, night, end
    seen.clear()
    clip.encode_texts(texts, 10, replace=Replacement("$", vectors, np.array([0, 0, 1])))
    assert seen == [4 + 1 + 3 + 3 + 1 + 3]


def test_progress_counts_texts_with_vectors(clip):
    told = []
    replace = Replacement("$", vectors_for(clip), WHICH)
    clip.encode_texts(PROMPTS, 2, told.append, replace)
    assert sum(told) == len(PROMPTS)


@pytest.mark.parametrize("text", ["a photo of it", "it costs $$", "word " * 90 + "$"])
def test_a_text_without_the_mark_is_named(clip, text):
    replace = Replacement("$", vectors_for(clip), np.array([0, 1]))
    with pytest.raises(UserError, match=re.escape(repr(text)) + ".* 1 of 2 texts"):
        clip.encode_texts([text, "costs $5"], 9, replace=replace)  # the tokenizer parts $ and 5


def test_vectors_of_another_width_are_refused(clip):
    replace = Replacement("$", np.zeros((1, 768), np.float32), np.array([0]))
    with pytest.raises(UserError, match=r"have 768 numbers, but the token embeddings .* 32"):
        clip.encode_texts(["a $"], 1, replace=replace)


def test_a_tokenizer_that_drops_or_splits_the_mark_is_refused(clip):
    assert find_mark(clip.tokenizer, "$") == 259
    assert find_mark(clip.tokenizer, "*") == 265
    with pytest.raises(UserError, match="'two words' is 2 tokens for this backbone"):
        find_mark(clip.tokenizer, "two words")
    # SigLIP's tokenizer cleans texts of punctuation before it looks at them
    with pytest.raises(UserError, match=r"'\$' is no token for this backbone's tokenizer"):
        find_mark(lambda texts: clip.tokenizer([t.replace("$", "") for t in texts]), "$")


def test_cut_texts_are_found(encoder):
    length = encoder.context_length - 2  # beside start and end
    texts = ["a " * length, "a " * (length + 1), "", "a cat", "word " * 200]
    assert encoder.find_cut_texts(texts) == [1, 4]
    assert encoder.find_cut_texts([]) == []


ANNOTATIONS = {
    "cirr_val": ("cirr/cirr/captions/cap.rc2.val.json", "reference"),
    "circo_val": ("circo/annotations/val.json", "reference_img_id"),
}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden worlds are not here")
@pytest.mark.parametrize("task", ANNOTATIONS)
def test_pseudo_words_of_searle_give_its_published_programs_features(task, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, key = ANNOTATIONS[task]
    references = [str(row[key]) for row in json.loads((GOLDEN / file).read_text())]
    rows = json.loads((GOLDEN / "expected" / f"{task}.json").read_text())["searle"]["queries"]
    with np.load(GOLDEN / "expected" / f"{task}.npz") as expected:
        vectors, features = expected["tokens.searle"], expected["query.searle"]
        names = expected["tokens.names"].tolist()
    which = np.array([names.index(reference) for reference in references])
    encoder, replace = load_encoder("tiny", CPU), Replacement("$", vectors, which)
    found = encoder.encode_texts([row["text"] for row in rows], 64, replace=replace)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    assert np.abs(found - features).max() < 1e-5
