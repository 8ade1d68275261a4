"""What the page is told: a gallery, its methods, a ranking, as JSON that names no place on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from live.searcher import dots_of

if TYPE_CHECKING:
    from torch import Tensor

    from live.searcher import Ranked, Searcher

A_PAGE = 60  # rows
ABSOLUTE = re.compile(r"(?<![\w./])~?/[^\s'\"`;:,()]+")


class Hidden:
    """Takes the places on this machine out of what is said of them."""

    def __init__(self, searcher: Searcher):
        places = searcher.places
        known = {
            "FEATURES_DIR": places.features,
            "DATA_DIR": places.data,
            "SYNTHETIC_DIR": places.synthetic,
            "GALLERY": searcher.images.dataset.root,
        }
        self._names = []
        for name, path in known.items():
            forms = {str(path), os.path.abspath(path)} if path else ()
            self._names += [(form, name) for form in forms if len(Path(form).parts) > 1]
        self._names.sort(key=lambda pair: -len(pair[0]))

    def __call__(self, text: str) -> str:
        for path, name in self._names:
            text = text.replace(path, name)
        return ABSOLUTE.sub("PATH", text)


def describe_state(searcher: Searcher, hide: Hidden) -> dict:
    """What the page starts from."""
    features = searcher.features
    methods = [
        {**method, "lacking": method["lacking"] and hide(method["lacking"])}
        for method in searcher.choices.described
    ]
    skipped = (features.manifest or {}).get("skipped") or []
    return {
        "name": searcher.images.dataset.name,
        "backbone": hide(features.backbone),
        "device": searcher.device.type,
        "version": searcher.version,
        "count": len(searcher.shown),
        "rows": len(searcher),
        "queries": len(features.task.queries),
        "loaded": searcher.is_loaded,
        "skipped": [{"name": s.get("image_path"), "cause": s.get("cause")} for s in skipped[:50]],
        "skippedCount": len(skipped),
        "methods": methods,
    }


def describe_rows(searcher: Searcher, rows: Sequence[int]) -> list[dict]:
    """Gallery images by row. listed: in how many rows each is."""
    return [
        {
            "row": row,
            "key": searcher.key_of(row),
            "name": searcher.paths[row],
            "listed": int(searcher.listed[row]),
        }
        for row in map(int, rows)
    ]


def describe_queries(searcher: Searcher, find: str, first: int) -> dict:
    """The data set's own queries whose text, or file, holds the words looked for."""
    queries, words = searcher.features.task.queries, find.casefold().split()
    found = [
        number
        for number, (text, images) in enumerate(zip(queries.text, queries.images, strict=True))
        if all(word in f"{text} {images[0]}".casefold() for word in words)
    ]
    listed = [
        {"key": f"q{number}", "text": queries.text[number], "name": queries.images[number][0]}
        for number in found[first : first + A_PAGE]
    ]
    return {"count": len(found), "from": first, "queries": listed}


def describe_ranked(searcher: Searcher, ranked: Ranked) -> dict:
    """A ranking: the rows of every column, where the others rank them, and the scatter."""
    columns = {}
    for name, column in ranked.columns.items():
        rows = describe_rows(searcher, column.rows)
        ranks = {
            other: own.ranks(column.places).tolist()
            for other, own in ranked.columns.items()
            if other != name
        }
        parts = {"image": ranked.image, "text": ranked.text}
        sub = {n: numbers(v[column.places]) for n, v in parts.items() if v is not None}
        scores = numbers(column.values)
        for place, row in enumerate(rows):
            row["score"] = scores[place]
            row |= {part: values[place] for part, values in sub.items()}
            row["ranks"] = {other: own[place] for other, own in ranks.items()}
        columns[name] = rows
    return {
        "columns": columns,
        "scatter": _scatter(searcher, ranked),
        "approximate": _approximation(searcher, ranked),
        "remark": ranked.remark,
        "caution": ranked.run.method.caution(ranked.run.parameters) if ranked.run else "",
        "seconds": {name: round(s, 4) for name, s in ranked.seconds.items()},
        "version": searcher.version,
    }


def _approximation(searcher: Searcher, ranked: Ranked) -> str:
    """What is said of a ranking of candidates, "" where all rows are ranked."""
    if searcher.candidates is None:
        return ""
    count = len(next(iter(ranked.columns.values())).scores)
    return f"approximate: only the {count:,} images that faiss finds nearest are ranked"


def _scatter(searcher: Searcher, ranked: Ranked) -> dict | None:
    """Image against text similarity of some rows, and the fusion over both."""
    if ranked.image is None or ranked.text is None:
        return None
    dots = dots_of(len(ranked.image))
    image, text = (numbers(own[dots]) for own in (ranked.image, ranked.text))
    found = {"image": image, "text": text, "of": len(searcher.shown), "level": None}
    if ranked.level is not None:
        names = ("scores", "image", "text")
        found["level"] = {n: numbers(own) for n, own in zip(names, ranked.level, strict=True)}
    return found


def numbers(values: np.ndarray | Tensor) -> list[float | None]:
    """Numbers as JSON has them, in 7 digits; None for what is not finite."""
    values = values.cpu() if hasattr(values, "cpu") else values  # of a GPU
    values = np.asarray(values, np.float64).ravel()
    finite = np.isfinite(values)
    usual = np.where(finite & (values != 0), np.abs(values), 1.0)
    scale = 10.0 ** (6 - np.floor(np.log10(usual)))
    rounded = np.round(np.where(finite, values, 0.0) * scale) / scale
    return [
        own if is_finite else None
        for own, is_finite in zip(rounded.tolist(), finite.tolist(), strict=True)
    ]
