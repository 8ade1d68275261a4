"""What of a job's images and texts may not be meant: counted, with the first case of each kind.

It is said when the job ends, and stays in the manifest: `pixels`, `odd_images` and `encoded` of
images, `texts` of texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from extraction.stage import Rows, Summary
from utils import say
from utils_pixels import FRAMES
from utils_protocol import describe_own_images, describe_repeated, describe_texts

if TYPE_CHECKING:
    from utils_features import Encoder

WAYS = {
    "viewed": "images as a viewer shows them",
    "plain": "images as the model's usual preprocessing takes them",
}
TAKEN = {
    "viewed": "encoded as a viewer shows it",
    "plain": "encoded as usual, which is not what a viewer shows (--pixels viewed is)",
    "frames": "the first is encoded",
}


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def remark_images(pixels: str, summaries: Mapping[str, Summary]) -> dict:
    """The manifest's entries on images. pixels: "viewed" or "plain"."""
    odd = [{"stage": name, **entry} for name, summary in summaries.items() for entry in summary.odd]
    cases = "; ".join(f"{entry['stage']}: {_count(entry)}" for entry in odd)
    return {
        "pixels": pixels,
        "odd_images": odd,
        "encoded": WAYS[pixels] + (f" ({cases})" if odd else ""),
    }


def _tell_images(manifest: dict) -> None:
    for entry in manifest.get("odd_images", ()):
        taken = TAKEN["frames" if entry["fact"] == FRAMES else manifest["pixels"]]
        say(f"{entry['stage']}: {_count(entry)}; {taken}")


def _count(entry: dict) -> str:
    count = f"{entry['images']} image{'s' * (entry['images'] > 1)}"
    return f"{count} with {entry['fact']}, the first {entry['first']!a}"


# ---------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------


def remark_texts(
    encoder: Encoder,
    texts: Rows,
    words: Sequence[str] = (),
    images: Sequence[object] | None = None,
) -> dict:
    """The manifest's entry on the texts of some rows.

    words: that contextualise them; images: what is the same for rows of one query image, in order
    to find texts of one image that are alike once they are cut.
    """
    cut = encoder.find_cut_texts(texts.items)
    blank = [item for item, text in enumerate(texts.items) if not text.strip()]
    found = {"cut": cut, "cut_in_context": _find_cut_prompts(encoder, texts.items, words)}
    found |= {"empty": blank}
    remarks = {name: _first_of(texts, items) for name, items in found.items() if items}
    alike = _find_alike(encoder, texts, cut, images) if images is not None else []
    if alike:
        remarks["alike"] = {"count": len(alike), "rows": alike[0]}
    return remarks and {"context_length": encoder.context_length, "count": texts.count, **remarks}


def _first_of(texts: Rows, items: Sequence[int]) -> dict:
    item = min(items)
    first = {"first": texts.items[item], "row": texts.line(item)}
    return {"count": len(items), **first, "all": [texts.items[item] for item in items]}


def _find_cut_prompts(encoder: Encoder, texts: Sequence[str], words: Sequence[str]) -> list[int]:
    """The numbers of texts of which a contextual prompt is cut: the one with the longest word."""
    if not words:
        return []
    word = max(words, key=len)
    return encoder.find_cut_texts([f"{word} {text}" for text in texts])


def _find_alike(
    encoder: Encoder, texts: Rows, cut: Sequence[int], images: Sequence[object]
) -> list[list[int]]:
    """Pairs of rows, as [line, line], of one image whose texts differ only where they are cut."""
    tokens = encoder.tokenizer([texts.items[item] for item in cut]).tolist() if cut else []
    beginning = {item: tuple(own) for item, own in zip(cut, tokens, strict=True)}
    first: dict[tuple, int] = {}
    pairs = []
    for row, item in enumerate(texts.item_of_row.tolist()):
        if item in beginning:
            known = first.setdefault((images[row], beginning[item]), row)
            if texts.item_of_row[known] != item:
                pairs.append([texts.lines[known], texts.lines[row]])
    return pairs


def tell_remarks(manifest: dict) -> None:
    """Say what there is to remark of the images and texts of finished features."""
    _tell_images(manifest)
    for describe in (describe_texts, describe_repeated, describe_own_images):
        for line in describe(manifest):
            say(line)
