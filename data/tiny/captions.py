"""The words of the tiny world: what may be said of a thing in a style, and its text corpora.

A caption comes with the attributes it mentions, so that a trainer knows which other images it
would be true of as well.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from render import COLOURS, EMBLEMS, FAMILIES, PATTERNS, STYLES, Thing

# Attributes in the order of `attributes()`; a caption mentions some of them.
NAMES = ("family", "colour", "second", "pattern", "emblem", "style")
VALUES = {
    "family": list(FAMILIES),
    "colour": list(COLOURS),
    "second": list(COLOURS),
    "pattern": list(PATTERNS),
    "emblem": list(EMBLEMS),
    "style": list(STYLES),
}
UNSAID = -1

SYNONYMS = {
    "mug": "cup",
    "bottle": "flask",
    "vase": "jar",
    "house": "cottage",
    "car": "automobile",
    "bus": "coach",
    "boat": "ship",
    "rocket": "spaceship",
    "umbrella": "parasol",
    "cat": "kitten",
    "tree": "pine",
    "mushroom": "toadstool",
    "chair": "seat",
    "turtle": "tortoise",
}


def attributes(thing: Thing, style: str) -> np.ndarray:
    """What an image shows: (6,) int8, each the place of its value in VALUES."""
    shown = (*thing.combination, style)
    pairs = zip(NAMES, shown, strict=True)
    return np.array([VALUES[name].index(value) for name, value in pairs], dtype=np.int8)


def _article(phrase: str, rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    if kind < 2:
        return phrase
    return f"the {phrase}" if kind == 2 else f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def describe(thing: Thing, rng: np.random.Generator) -> tuple[str, set[str]]:
    """A phrase for a thing, with more or fewer of its attributes, and which those are."""
    said = set()
    noun = SYNONYMS.get(thing.family, thing.family) if rng.random() < 0.3 else thing.family
    said.add("family")
    if rng.random() < 0.06:
        noun = "object"
        said.clear()
    words = []
    if rng.random() < 0.75:
        words.append(thing.colour)
        said.add("colour")
        if rng.random() < 0.55:
            words += ["and", thing.second]
            said.add("second")
    if rng.random() < 0.5:
        words.append(thing.pattern)
        said.add("pattern")
    phrase = _article(" ".join([*words, noun]), rng)
    if rng.random() < 0.4:
        phrase += f" with a {thing.emblem}"
        said.add("emblem")
    return phrase, said


def caption(thing: Thing, style: str, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A caption of an image and what it mentions: (6,) int8 as `attributes`, UNSAID elsewhere."""
    subject, said = describe(thing, rng)
    phrase = STYLES[style].phrases[rng.integers(len(STYLES[style].phrases))]
    kind = rng.random()
    if kind < 0.2:
        text = subject if rng.random() < 0.7 else f"a picture of {subject}"
    elif kind < 0.4:
        lead = ("", "", "something ", "a picture ")[rng.integers(4)]
        text, said = lead + phrase, {"style"}
    else:
        orders = (f"{subject} {phrase}", f"{phrase} {subject}", f"a picture of {subject} {phrase}")
        text = orders[(0, 0, 1, 1, 2)[rng.integers(5)]]
        said = said | {"style"}
    mentioned = np.array([name in said for name in NAMES])
    return text, np.where(mentioned, attributes(thing, style), UNSAID).astype(np.int8)


def full_caption(thing: Thing, style: str) -> str:
    """The caption that says everything."""
    return (
        f"a {thing.colour} and {thing.second} {thing.pattern} {thing.family} "
        f"with a {thing.emblem} {STYLES[style].phrases[0]}"
    )


def subject_corpus() -> list[str]:
    """Object phrases of this world; among the first hundred every family occurs, in turn."""
    rng = np.random.default_rng(0)
    families = list(FAMILIES)
    nouns = [*families, *SYNONYMS.values()]
    rows = []
    for turn in range(4):
        for family in rng.permutation(families):
            colour, second = rng.choice(list(COLOURS), 2, replace=False)
            pattern, emblem = rng.choice(PATTERNS), rng.choice(EMBLEMS)
            rows.append(
                (
                    f"{family}",
                    f"{colour} {family}",
                    f"{colour} and {second} {pattern} {family}",
                    f"{pattern} {family} with a {emblem}",
                )[turn]
            )
    rows += list(SYNONYMS.values())
    rows += [f"{colour} {noun}" for noun in nouns for colour in COLOURS]
    rows += [f"{pattern} {noun}" for noun in nouns for pattern in PATTERNS]
    rows += [f"{noun} with a {emblem}" for noun in families for emblem in EMBLEMS]
    return list(dict.fromkeys(rows))


def style_corpus() -> list[str]:
    """Style phrases of this world, those of different styles next to each other."""
    rounds = zip(*(style.phrases for style in STYLES.values()), strict=True)
    plain = [phrase for phrases in rounds for phrase in phrases]
    return [*plain, *(f"something {p}" for p in plain), *(f"a picture {p}" for p in plain)]


def write_corpora(folder: Path) -> None:
    """Write the two corpora as one-column CSV files without a header."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"generic_subjects": subject_corpus(), "generic_styles": style_corpus()}
    for name, prompts in rows.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([prompt] for prompt in prompts)
