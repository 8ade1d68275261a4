"""The corpora of this repository: plain lists of distinct prompts, varied from the first row."""

import csv
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

CORPORA = Path(__file__).parents[1] / "corpora"
CONTEXT_WORDS = 100  # rows of generic_subjects that contextualise a query text


def rows(name: str) -> list[list[str]]:
    with open(CORPORA / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def prompts(name: str) -> list[str]:
    return [row[0] for row in rows(name)]


def singular(prompt: str) -> str:
    """A rough singular: enough to find "box" beside "boxes" and "tulip" beside "tulips"."""
    if prompt.endswith("ies"):
        return prompt[:-3] + "y"
    if re.search(r"(s|x|z|ch|sh)es$", prompt):
        return prompt[:-2]
    return prompt[:-1] if re.search(r"[^s]s$", prompt) else prompt


BOTH = pytest.mark.parametrize("name", ["generic_subjects", "generic_styles"])


@BOTH
def test_the_file_is_one_plain_column(name):
    raw = (CORPORA / f"{name}.csv").read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in raw
    assert raw.endswith(b"\n")
    assert not raw.endswith(b"\n\n")
    assert {len(row) for row in rows(name)} == {1}


@pytest.mark.parametrize(
    ("name", "low", "high"), [("generic_subjects", 1700, 1900), ("generic_styles", 950, 1050)]
)
def test_the_size_is_what_the_method_was_tuned_for(name, low, high):
    assert low <= len(prompts(name)) <= high


@BOTH
def test_every_prompt_is_tidy(name):
    untidy = [
        p for p in prompts(name) if p != " ".join(p.split()) or not p or p != p.lower() or "_" in p
    ]
    assert untidy == []
    assert max(len(p.split()) for p in prompts(name)) <= 8


@BOTH
def test_there_is_no_header(name):
    headers = {"object_name", "subject", "style", "prompt", "text", "name", "object", "styles"}
    assert prompts(name)[0] not in headers


@BOTH
def test_no_prompt_comes_twice_nor_as_its_own_plural(name):
    counts = Counter(singular(p) for p in prompts(name))
    assert [p for p, count in counts.items() if count > 1] == []


def test_no_prompt_is_in_both_lists():
    subjects = {singular(p) for p in prompts("generic_subjects")}
    assert [p for p in prompts("generic_styles") if singular(p) in subjects] == []


def test_the_context_words_are_varied():
    words = prompts("generic_subjects")[:CONTEXT_WORDS]
    assert len({word[0] for word in words}) >= 15, "drawn from many initial letters"
    assert words != sorted(words)
    assert max(Counter(word[0] for word in words).values()) <= 20
    assert max(Counter(word.split()[-1] for word in words).values()) <= 2, "no family of one noun"


def test_the_lists_are_interleaved_not_sorted_blocks():
    for name in ("generic_subjects", "generic_styles"):
        words = prompts(name)
        repeats = sum(a.split()[0] == b.split()[0] for a, b in itertools.pairwise(words))
        assert repeats < 0.12 * len(words), name


def test_styles_are_phrases_that_follow_an_object():
    """Most styles read on after an object's name: "a mug" + "covered in snow"."""
    phrases = [p for p in prompts("generic_styles") if " " in p]
    assert len(phrases) > 0.7 * len(prompts("generic_styles"))
