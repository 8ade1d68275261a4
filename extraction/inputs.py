"""Inputs of methods: further features beside a data set's own, each with a manifest, NAME.json.

What the rows are made of is the method's affair (utils_inputs.py). Here they are encoded: distinct
ones once, part by part, so that a killed run continues.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from extraction.dataset import TaskWork
from extraction.encoding import Run, Settings, settle
from extraction.job import Job
from extraction.labelled import LabelledWork
from extraction.manifest import describe, identify, is_finished
from extraction.parts import Part, Parts, cut_ranges, drop_parts, write_array
from extraction.stage import ImageStage, Rows, Stage, Summary
from utils import UserError, publishing, say, sha256_file, write_json
from utils_inputs import Input, InputArray, Options, Produced, Words
from utils_storage import Features
from utils_task import Picture, unique_in_order
from utils_text_tower import Replacement

if TYPE_CHECKING:
    from utils_features import Encoder

NO_IMAGE = -1
SHOWN = 60  # characters of a text in a message
HALF_PIXELS = "query_image_half_pixels"  # the stage of query images that only words are made of


# ---------------------------------------------------------------------------------------------
# Query images
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QueryImages:
    """The distinct images of queries: pictures d of them, several where a query has several.

    features: (d, D) as the model gives them, the mean of several; of: int64 (Q,), of each query.
    """

    pictures: list[tuple[Picture, ...]]
    features: np.ndarray
    of: np.ndarray

    @classmethod
    def read(cls, features: Features) -> QueryImages:
        """Those of a data set's features."""
        rows = features.query("image")
        pictures, of = unique_in_order(map(tuple, features.task.queries.pictures()))
        first = np.unique(of, return_index=True)[1]
        if rows.of is None:
            values = rows.values[first if rows.row is None else rows.row[first]]
        else:
            values = np.stack([rows.values[own[own >= 0]].mean(0) for own in rows.of[first]])
        return cls(pictures, values, of)


@dataclass(frozen=True, eq=False)
class HalfPixels:
    """Query images that are encoded again: their stage, and the item of each picture."""

    stage: ImageStage
    items: dict[Picture, int]

    def features(self, images: QueryImages, run: Run) -> np.ndarray:
        """Those of the distinct images, (d, D), from the parts of the stage, all being there."""
        found = np.empty((len(self.stage.rows.items), run.encoder.dim), np.float32)
        for part in run.parts.read(self.stage):
            found[part.ids] = part.features
        own = [[self.items[picture] for picture in pictures] for pictures in images.pictures]
        return np.stack([found[items].mean(0) for items in own])


# ---------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InputStage(Stage):
    """The rows of an input's array: items are the texts of a row with the number of its image.

    words: their pseudo words, or None. half_pixels: what these are made of, if not of images.
    with_image: numbers of items that are averaged with their image.
    """

    images: QueryImages
    words: Words | None
    half_pixels: HalfPixels | None
    with_image: frozenset[int]

    def encode(self, units: list, run: Run) -> None:
        vectors = self._vectors(run)
        with run.bar(self, sum(unit.stop - unit.start for unit in units), "row") as bar:
            for unit in units:
                ids = np.arange(unit.start, unit.stop)
                with run.clock.measure("encoding"):
                    features = self._rows(ids, vectors, run)
                names = [self.rows.items[item][0][0] for item in ids]
                run.save(self, unit.name, Part(ids, settle(self, features, names, ids)))
                bar.update(len(ids))

    def _vectors(self, run: Run) -> np.ndarray | None:
        """The pseudo words of the query images, (d, W)."""
        if self.words is None:
            return None
        features = self.images.features
        if self.half_pixels is not None:
            features = self.half_pixels.features(self.images, run)
        return self.words.make(np.ascontiguousarray(features, np.float32))

    def _rows(self, ids: np.ndarray, vectors: np.ndarray | None, run: Run) -> np.ndarray:
        """The rows of some items: the mean of their texts' unit features, (k, D)."""
        items = [self.rows.items[item] for item in ids]
        counts = [len(texts) for texts, _ in items]
        texts = [text for own, _ in items for text in own]
        replace = None
        if vectors is not None:
            which = np.repeat([image for _, image in items], counts)
            replace = Replacement(self.words.mark, vectors, which, self.words.everywhere)
        features = unit(run.encoder.encode_texts(texts, run.settings.batch, replace=replace))
        starts = np.cumsum([0, *counts[:-1]])
        rows = np.add.reduceat(features, starts, axis=0) / np.array(counts)[:, None]
        for row, (item, (_, image)) in enumerate(zip(ids, items, strict=True)):
            if int(item) in self.with_image:
                rows[row] = (unit(rows[row]) + unit(self.images.features[image])) / 2
        return rows.astype(np.float32)

    def sum_up(self, parts: Parts, skip_bad: bool) -> Summary:
        return Summary(np.ones(len(self.rows), bool), [])


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (..., D) at unit length."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputWork:
    """An input of a method, for the features of a data set, which base has made."""

    name: str
    source: Input
    options: Options
    features: Features
    base: TaskWork | LabelledWork

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of the input; no stages if it is finished.

        Raises UserError if the features are of another model, and as the producer.
        """
        self._check_model(encoder)
        produced = self.source.produce(self.features.task, encoder, self.options)
        manifest = describe(settings, encoder, "input", self.name)
        manifest["sources"] = {"features": sha256_file(self.features.source), **produced.facts}
        manifest["arrays"] = {array.name: {"unit": array.unit} for array in produced.arrays}
        path = self.features.folder / f"{self.name}.json"
        parts = Parts(self.features.folder / f".parts_{self.name}")
        stages: list[Stage] = []
        if is_finished(path, manifest, settings.overwrite, settings.skip_bad):
            drop_parts(parts.folder)
        else:
            half = self._half_pixels(produced, settings)
            images = QueryImages.read(self.features)
            arrays = [
                self._stage(array, images, half, settings, manifest) for array in produced.arrays
            ]
            manifest["cut_texts"] = {s.name: _report_cut(s, encoder) for s in arrays}
            stages = [half.stage, *arrays] if half else arrays
        return Job(
            title=f"{self.features.dataset} {self.name}",
            parts=parts,
            stages=stages,
            identity=identify(settings, encoder),
            outputs=[path, *(path.with_name(f"{array.name}.npy") for array in produced.arrays)],
            finish=functools.partial(self._finish, parts, stages, manifest, encoder.dim),
        )

    def _check_model(self, encoder: Encoder) -> None:
        made_by = (self.features.manifest or {}).get("model")
        now = json.loads(json.dumps(encoder.identity))
        if made_by != now:
            raise UserError(
                f"{self.features.source} is of features that another model made, or of the "
                "reference's: extract them with this backbone before --inputs"
            )

    def _half_pixels(self, produced: Produced, settings: Settings) -> HalfPixels | None:
        """The query images that are to be encoded again, if any word is made of such."""
        if not any(array.words and array.words.half_pixels for array in produced.arrays):
            return None
        stage, items = self.base.query_stage(HALF_PIXELS, settings)
        return HalfPixels(replace(stage, half_pixels=True), items)

    def _stage(
        self,
        array: InputArray,
        images: QueryImages,
        half: HalfPixels | None,
        settings: Settings,
        manifest: dict,
    ) -> InputStage:
        of = [NO_IMAGE] * len(array.texts)
        needs_image = np.zeros(len(of), bool) if array.with_image is None else array.with_image
        if array.words is not None or needs_image.any():
            used = array.words is not None or needs_image
            of = np.where(used, images.of, NO_IMAGE).tolist()
        rows = Rows.of(
            zip(array.texts, of, strict=True), self.features.source, range(1, len(of) + 1)
        )
        with_image = frozenset(rows.item_of_row[needs_image].tolist())
        most = max(map(len, array.texts))
        digest = hashlib.sha256(json.dumps([list(array.texts), of]).encode())
        return InputStage(
            name=array.name,
            rows=rows,
            units=cut_ranges(rows.count, max(1, settings.part_rows // most)),
            fingerprint={"sources": manifest["sources"], "texts": digest.hexdigest()},
            images=images,
            words=array.words,
            half_pixels=half if array.words and array.words.half_pixels else None,
            with_image=with_image,
        )

    def _finish(
        self,
        parts: Parts,
        stages: Sequence[Stage],
        manifest: dict,
        dim: int,
        summaries: dict[str, Summary],
    ) -> None:
        """Write the arrays and, last, the manifest."""
        last = f"{self.name}.json"
        with publishing(parts.folder / "finished", self.features.folder, last=last) as staging:
            for stage in stages:
                if stage.name not in manifest["arrays"]:
                    continue
                keep = summaries[stage.name].keep
                write_array(staging / f"{stage.name}.npy", stage, parts, dim, keep)
            write_json(staging / last, manifest)


def _report_cut(stage: InputStage, encoder: Encoder) -> int:
    """How many texts of a stage are cut at the model's context length, which is said."""
    texts = list(dict.fromkeys(text for own, _ in stage.rows.items for text in own))
    cut = encoder.find_cut_texts(texts)
    if cut:
        say(
            f"{stage.name}: {len(cut)} of {len(texts)} texts are longer than the backbone's "
            f"{encoder.context_length} tokens and were cut, the first {texts[cut[0]][:SHOWN]!r}..."
        )
    return len(cut)
