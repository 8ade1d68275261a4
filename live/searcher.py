"""A query and a method's parameters to ranked rows: the methods' own code, on one live query.

from search import open_folder
photos = open_folder("~/Pictures", backbone="ViT-B-32/laion2b_s34b_b79k")
photos.search("dog.jpg", "on a beach", method="basic", harris_lambda=0.05)
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from live.candidates import Candidates
from live.choices import Choices
from live.gallery import Heard, Kept, LiveGallery, find_again, first_rows, grid_of, open_rows
from live.threads import at_once
from methods import find_method
from utils import UserError, say
from utils_assets import load_assets
from utils_backbones import Places
from utils_evaluation import unit_features, unit_queries
from utils_protocol import TEXT_REMARKS, query_image_rows
from utils_retrieval import Assets, Queries, name_of_texts
from utils_runs import Run
from utils_signs import doing
from utils_storage import Features
from utils_task import QueryTable

if TYPE_CHECKING:
    import pandas as pd

    from extraction.words import ContextWords
    from utils_datasets import ImageStore
    from utils_features import Encoder

GRID = 40  # image by text similarities at which the fusion is drawn
DOTS = 1500  # gallery rows of the scatter, beside those that are shown
TEXTS_KEPT, IMAGES_KEPT, ASSETS_KEPT, COLUMNS_KEPT = 4096, 64, 4, 8
ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, eq=False)
class Shown:
    """A query image. key: what the page calls it. path: as a task names it.

    vector: float32 (D,), as the model gives it. row: of the gallery, -1 where it is in none. query:
    of the data set's own queries, -1 for another. data: its bytes, where a visitor has brought it.
    """

    key: str
    path: str
    vector: np.ndarray
    row: int = -1
    query: int = -1
    data: bytes = b""


@dataclass(frozen=True, eq=False)
class Column:
    """The best rows of one ranking: int64 (K,), their scores float32 (K,), and all scores (N,).

    places: int64 (K,), where the rows are in the scores: they are the rows, unless these are
    candidates. rising: all scores in rising order.
    """

    rows: np.ndarray
    values: np.ndarray
    places: np.ndarray
    scores: np.ndarray
    rising: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, number: np.ndarray, k: int) -> Column:
        """The k best, equal ones in the order of their places, without those of -inf.

        scores: float32 (N,). number: their rows.
        """
        rising = np.sort(scores)
        places = np.flatnonzero(~(scores < rising[-min(k, len(rising))]))  # NaN is no less
        places = places[np.argsort(-scores[places], kind="stable")][:k]
        places = places[~np.isneginf(scores[places])]
        return cls(number[places], scores[places], places, scores, rising)

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """The ranks, from 1, of what is at some places: int64. Equal scores rank in row order."""
        own = self.scores[places]
        end = np.searchsorted(self.rising, own, "right")
        ranks = len(self.rising) - end + 1
        tied = end - np.searchsorted(self.rising, own) > 1
        for place in np.flatnonzero(tied):
            ranks[place] += np.count_nonzero(self.scores[: places[place]] == own[place])
        return ranks


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a live query finds.

    columns: name -> Column: "composed", "image", "text", as far as the query has them. image, text:
    the similarities (N,) that the method fuses, or the plain ones where it does not. run: what was
    asked; None without a composed column. remark: what is to be said of the query, or "". level:
    the fusion over image and text similarity, (scores (GRID, GRID), image axis, text axis), or None
    where it is no function of the two.
    """

    columns: Mapping[str, Column]
    image: torch.Tensor | None
    text: torch.Tensor | None
    run: Run | None = None
    remark: str = ""
    level: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Searcher:
    """One gallery, ready to be searched by any image and any words. Used by one thread at a time.

    An image that is in several rows is ranked once, by the first of them; methods see them all.

    features: of the gallery, with its queries where it is a data set's. images: where its pictures
    are. load: gives the encoder, which is asked for when something is to be encoded. words: of
    contextualised texts, or why there are none. decode: an encoded image -> an image as extraction
    sees it. most: how many candidates of a vector are ranked, 0: all rows. Raises UserError where
    candidates cannot be found.
    """

    def __init__(
        self,
        features: Features,
        places: Places,
        images: ImageStore,
        load: Callable[[], Encoder],
        decode: Callable[[bytes], Any],
        words: ContextWords | UserError,
        device: torch.device,
        most: int = 0,
    ):
        self.features, self.places, self.images = features, places, images
        self.load, self.decode, self.words, self.device = load, decode, words, device
        self.choices = Choices(features, places)
        files = features.database_files
        with doing(f"reading {features.folder}"):
            kinds = {
                name: open_rows(file, device, whole=name == "image" and not most)
                for name, file in files.items()
            }
        self.gallery = LiveGallery(kinds, np.arange(len(features.task.gallery)))
        self.candidates = self._open_candidates(most) if most else None
        self._first = first_rows(features.task.gallery)
        self.again = find_again(self._first)
        self._texts, self._given = Kept(TEXTS_KEPT), Kept(IMAGES_KEPT)
        self._assets, self._columns = Kept(ASSETS_KEPT), Kept(COLUMNS_KEPT)
        self._loading, self._encoder = threading.Lock(), None

    def __len__(self) -> int:
        return len(self.gallery)

    def _open_candidates(self, most: int) -> Candidates:
        if list(self.gallery.kinds) != ["image"]:
            raise UserError(
                f"--candidates finds image features alone, and {self.features.source} has "
                f"{', '.join(self.gallery.kinds)}"
            )
        path = self.features.folder / ".live" / f"candidates-{self.version}.faiss"
        return Candidates.open(self.gallery.kinds["image"], most, path, say)

    @property
    def paths(self) -> Sequence[str]:
        """The gallery's image paths."""
        return self.features.task.gallery.path

    @cached_property
    def shown(self) -> np.ndarray:
        """The rows that are shown: the first of each image, int64 rising; the others are again."""
        return np.delete(np.arange(len(self)), self.again)

    @cached_property
    def listed(self) -> np.ndarray:
        """In how many rows of the gallery each row's image is, int64 (N,)."""
        return np.bincount(self._first, minlength=len(self))[self._first]

    @cached_property
    def version(self) -> str:
        """What changes with the rows of the gallery."""
        from utils_storage import manifest_hash

        return manifest_hash(self.features)

    @property
    def encoder(self) -> Encoder:
        """The backbone, loaded once. Raises UserError if it is not that of the features."""
        with self._loading:
            if self._encoder is None:
                self._encoder = self._load()
        return self._encoder

    @property
    def is_loaded(self) -> bool:
        """Whether the backbone is there already."""
        return self._encoder is not None

    def _load(self) -> Encoder:
        encoder = self.load()
        made = (self.features.manifest or {}).get("model")
        if made and made != encoder.identity:
            raise UserError(
                f"{self.features.source} is of another model than {self.features.backbone} is now; "
                "extract the features again"
            )
        if encoder.dim != self.features.dim:
            raise UserError(
                f"{self.features.source} has {self.features.dim} dimensions, but "
                f"{self.features.backbone} gives {encoder.dim}"
            )
        return encoder

    # --- what a query is made of -------------------------------------------------------------

    def key_of(self, row: int) -> str:
        """What a gallery image is called: its row, and a hash of its path that outlives it."""
        return f"g{row}-{_hash(self.paths[row].encode())}"

    def find(self, key: str) -> Shown:
        """The query image of a key: gROW-HASH of the gallery, qNUMBER of the data set's queries,
        uHASH that was given. Raises UserError if there is none.
        """
        kind, number, digest = key[:1], key[1:].partition("-")[0], key.partition("-")[2]
        if kind == "u" and key[1:] in self._given:
            return self._given[key[1:]]
        if number.isascii() and number.isdecimal() and len(number) < 12:
            if kind == "g":
                return self.of_gallery(self._row(int(number), digest))
            if kind == "q" and int(number) < len(self.features.task.queries):
                return self.of_queries(int(number))
        raise UserError(f"there is no image {key[:40]!r}; choose another one")

    def _row(self, row: int, digest: str) -> int:
        """The row of a gallery image, also where rows have moved since it was called so."""
        if row < len(self) and digest in ("", _hash(self.paths[row].encode())):
            return row
        if ID.fullmatch(digest):
            for other, path in enumerate(self.paths):
                if _hash(path.encode()) == digest:
                    return other
        raise UserError("that image is no longer in the gallery; choose another one")

    def of_gallery(self, row: int) -> Shown:
        """A gallery image as a query: nothing is encoded."""
        vector = self.features.database("image").read(slice(row, row + 1))[0].astype(np.float32)
        return Shown(self.key_of(row), self.paths[row], vector, row)

    def of_queries(self, number: int) -> Shown:
        """The image of one of the data set's queries."""
        queries = self.features.task.queries
        unit = self._own("image", number)
        return Shown(f"q{number}", queries.images[number][0], unit, query=number)

    def _own(self, name: str, number: int) -> np.ndarray:
        """A feature of one of the data set's queries, as evaluation reads it, (D,)."""
        rows = self._texts.get_or(
            (name,), lambda: unit_queries(self.features.query(name), torch.device("cpu"))
        )
        return rows.select(np.array([number]))[0].numpy()

    def give(self, data: bytes) -> Shown:
        """An image that a visitor brings, encoded once. Raises UserError if it is none."""
        from utils_pixels import BadImage

        digest = _hash(data)

        def encode() -> Shown:
            try:
                pixels = self.encoder.preprocess(self.decode(data))
            except BadImage as error:
                raise UserError(f"this image cannot be read: {error.cause}") from None
            except Exception as error:  # a transform's own; the image is at fault
                raise UserError(f"this image cannot be read: {type(error).__name__}") from error
            vector = self.encoder.encode_images(pixels[None]).numpy()[0]
            return Shown(f"u{digest}", f"queries/{digest}", vector, data=data)

        return self._given.get_or(digest, encode)

    def text_vector(self, text: str, contextualize: bool = False) -> np.ndarray:
        """The feature of a text (D,), as the model gives it; each is encoded once."""
        if not contextualize:
            return self._texts.get_or(text, lambda: self.encoder.encode_texts([text], 1)[0])
        if isinstance(self.words, UserError):
            raise self.words

        def encode() -> np.ndarray:
            return self.encoder.encode_contextual_texts([text], self.words.words, 256)[0]

        return self._texts.get_or((text, self.words.sha256), encode)

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit features of texts that a method makes up, (n, D)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            for text, vector in zip(new, self.encoder.encode_texts(new, 256), strict=True):
                self._texts.get_or(text, lambda vector=vector: vector)
        return self._unit(np.stack([self.text_vector(text) for text in texts]), "texts")

    def _unit(self, vectors: np.ndarray, place: str) -> torch.Tensor:
        return unit_features(np.ascontiguousarray(vectors, np.float32), self.device, place)

    # --- ranking -----------------------------------------------------------------------------

    def assets(self, run: Run) -> Assets:
        """What a run needs beside the features, read once."""
        needs = run.method.needs([run.parameters])
        key = (*sorted(needs.corpora.items()), needs.image_mean, needs.synthetic, needs.prompts)

        def load() -> Assets:
            found = load_assets(self.places, self.features, [run], self.device)
            return replace(found, encode_texts=self._encode_texts)

        return self._assets.get_or(key, load)

    def features_of(self, run: Run, image: Shown, text: str) -> dict[str, torch.Tensor]:
        """The features that a run reads of a query, (1, D) each. Raises UserError for others."""
        found = {}
        for name in run.method.query_features(run.parameters):
            if name == "image":
                found[name] = self._unit(image.vector[None], "the query image")
            elif name in (name_of_texts(False), name_of_texts(True)):
                vector = self.text_of(image, text, name == name_of_texts(True))
                found[name] = self._unit(vector[None], "the query text")
            else:  # as it is: not all inputs are of unit length
                vector = self.own_input(name, image, text)
                found[name] = torch.from_numpy(vector[None]).to(self.device)
        return found

    def is_own(self, image: Shown | None, text: str) -> bool:
        """Whether a query is one of the data set's own, as it stands there."""
        queries = self.features.task.queries
        return image is not None and image.query >= 0 and text == queries.text[image.query]

    def text_of(self, image: Shown | None, text: str, contextualize: bool = False) -> np.ndarray:
        """The text's feature (D,): the data set's own where the query is, else encoded."""
        name = name_of_texts(contextualize)
        if self.is_own(image, text) and self.features.has_query(name):
            return self._own(name, image.query)
        return self.text_vector(text, contextualize)

    def cut_at(self, image: Shown | None, text: str) -> int:
        """How many tokens the backbone reads of a query's text, 0 where that is all of it."""
        if self.is_own(image, text) and self.features.has_query("text"):
            texts = ((self.features.manifest or {}).get("texts") or {}).get("query") or {}
            is_cut = text in (texts.get("cut") or {}).get("all", ())
            return texts["context_length"] if is_cut else 0

        def find() -> int:
            return self.encoder.context_length if self.encoder.find_cut_texts([text]) else 0

        return self._texts.get_or((text, "cut", None), find)

    def own_input(self, name: str, image: Shown, text: str) -> np.ndarray:
        """A further input of one of the data set's own queries, (D,).

        Raises UserError for any other query.
        """
        if not self.is_own(image, text):
            raise UserError(
                f"query_{name}.npy is made for the data set's own queries: choose one of them, and "
                "leave its text as it is"
            )
        return self._own(name, image.query)

    def rank(
        self,
        image: Shown | None,
        text: str,
        method: str,
        given: Mapping[str, Any],
        k: int,
        leave_out: bool = False,
    ) -> Ranked:
        """Rank the gallery. given: parameters over those where the method starts.

        k: rows of each column. leave_out: the rows that show the query image itself. Raises
        UserError for what cannot be ranked so.
        """
        with torch.inference_mode():
            return self._rank(image, text, method, given, k, leave_out)

    def _rank(self, image, text, method, given, k, leave_out) -> Ranked:
        clock = Clock()
        found = find_method(method)
        run = self.choices.run(found, {**self.choices.start(found), **given})
        vectors = {}
        if image:
            vectors["image"] = self._unit(image.vector[None], "the query image")
        if text:
            vectors["text"] = self._unit(self.text_of(image, text)[None], "the query text")
        if image and text:
            queries = self._queries(self.features_of(run, image, text), text)
        clock.tick("encoding")
        gallery = self._gallery_of(list(vectors.values()))
        gallery.expect(list(vectors.values()))
        heard, composed, level = {}, None, None
        if image and text:
            states, composed, heard = self._compose(run, queries, gallery)
            if self.candidates:  # among those of the vectors that it compares, too
                gallery = self._gallery_of([*vectors.values(), *gallery.wanted])
                states, composed, heard = self._compose(run, queries, gallery)
            clock.tick("method")
        plain = gallery.shared({n: (v, None) for n, v in vectors.items()}) if vectors else {}
        if heard:
            level = self._level(run, states, queries, plain | heard)
        heard = plain | heard
        clock.tick("columns")
        out = tuple(self.rows_of(image)) if leave_out and image else ()
        scores = plain if composed is None else {"composed": composed, **plain}
        keys = {n: (gallery, own.cpu().numpy().tobytes(), k, out) for n, own in vectors.items()}
        columns = {n: self._columns[keys[n]] for n in keys if keys[n] in self._columns}
        new = [name for name in scores if name not in columns]
        make = partial(self._column, gallery=gallery, k=k, out=out)
        columns |= zip(new, at_once(make, [scores[name] for name in new]), strict=True)
        for name, key in keys.items():  # the same from slider to slider
            self._columns.get_or(key, partial(columns.get, name))
        columns = {name: columns[name] for name in scores}
        clock.tick("best rows")
        return Ranked(
            columns,
            heard["image"][0] if image else None,
            heard["text"][0] if text else None,
            run if composed is not None else None,
            self._remark(image, text),
            level,
            clock.seconds,
        )

    def _remark(self, image: Shown | None, text: str) -> str:
        length = self.cut_at(image, text) if text else 0
        return f"the text is {TEXT_REMARKS['cut'].format(context_length=length)}" if length else ""

    def _gallery_of(self, vectors: Sequence[torch.Tensor]) -> LiveGallery:
        """What is ranked for some vectors: all rows, or their candidates."""
        return self.candidates.gallery(vectors) if self.candidates and vectors else self.gallery

    def _queries(self, features: Mapping[str, torch.Tensor], text: str) -> Queries:
        return Queries(features, np.zeros(1, np.int64), [text], self.device)

    def _compose(self, run: Run, queries: Queries, gallery: LiveGallery) -> tuple:
        """A method's states, its scores (1, N), and the similarities that it fuses, by role.

        None of the last where the scores are not made of image and text similarity alone.
        """
        method, heard = run.method, Heard.over(gallery)
        states = method.prepare([run.parameters], self.assets(run))
        states = method.observe(states, queries, gallery)
        [scores] = method.scores(states, queries, heard)
        return states, scores, {} if None in heard.heard else heard.heard

    def _level(self, run: Run, states: Sequence, queries: Queries, used: Mapping) -> tuple:
        """The fusion over what is used of image and text similarity: see Ranked."""
        grid, *axes = grid_of(used["image"], used["text"], GRID)
        again = self._queries(queries.features, queries.words[0])
        [level] = run.method.scores(states, again, grid)
        return level.reshape(GRID, GRID).cpu().numpy(), *axes

    def rows_of(self, image: Shown) -> list[int]:
        """The gallery's rows that show a query image, as run_retrieval.py leaves them out."""
        queries = QueryTable(["1"], [(image.path,)], [""])
        return query_image_rows(replace(self.features.task, queries=queries))[0].tolist()

    def _column(
        self, scores: torch.Tensor, gallery: LiveGallery, k: int, out: Sequence[int]
    ) -> Column:
        is_whole = gallery is self.gallery
        hidden = self.again if is_whole else find_again(self._first[gallery.number])
        if out:
            hidden = np.union1d(hidden, np.flatnonzero(np.isin(gallery.number, out)))
        if len(hidden):
            scores = scores.index_fill(1, torch.from_numpy(hidden).to(scores.device), -np.inf)
        return Column.of(scores[0].cpu().numpy(), gallery.number, k)

    # --- for notebooks -----------------------------------------------------------------------

    def search(
        self,
        image: str | Path | bytes | None = None,
        text: str = "",
        method: str = "sum",
        k: int = 60,
        **parameters: Any,
    ) -> pd.DataFrame:
        """The best k rows of an image (a file, or its bytes) and a text, or of one of the two.

        parameters: of the method, over those where it starts (its preset, as far as its assets are
        there). Columns: rank, path, score, and the image and text similarity that are fused.
        Raises UserError for an image that cannot be read, and an unknown method or parameter.
        """
        shown = None
        if image is not None:
            data = image if isinstance(image, bytes) else Path(image).expanduser().read_bytes()
            shown = self.give(data)
        if shown is None and not text:
            raise UserError("a search needs an image, a text, or both")
        unknown = parameters.keys() - self.choices.start(find_method(method)).keys()
        if unknown:
            raise UserError(f"{method} has no parameter {min(unknown)!r}")
        return table_of(self, self.rank(shown, text, method, parameters, k))


def table_of(searcher: Searcher, ranked: Ranked) -> pd.DataFrame:
    """A ranking's main column as a table: rank, path, score, image, text."""
    import pandas as pd

    column = next(iter(ranked.columns.values()))
    parts = {name: getattr(ranked, name) for name in ("image", "text")}
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(column.rows) + 1),
            "path": [searcher.paths[row] for row in column.rows],
            "score": column.values,
            **{n: v[column.places].cpu().numpy() for n, v in parts.items() if v is not None},
        }
    )


class Clock:
    """Seconds from tick to tick, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def tick(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


@cache
def dots_of(count: int) -> np.ndarray:
    """Which of so many rows the scatter shows, the same for every query: int64, rising."""
    draw = np.random.default_rng(0)
    return np.sort(draw.choice(count, min(DOTS, count), replace=False))


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()[:16]
