"""Features of a system of composed/: a row a composed query, a row a gallery image.

    query_composed.npy                   distinct pairs of an image and a text; with boxes, of what
                                         they show. query.csv: key, composed_row
    query_composed_draw2.npy, ...        of a system that draws, the further draws
    database_image.npy                   the gallery, as the system compares it
    query_tokens.npy, database_tokens.npy    every token's vector, where they were asked for

They are made as all features are: by units that survive a kill, by any number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from composed import ComposedEncoder, System
from composed.texts import form_of, query_texts
from extraction.dataset import (
    GalleryWork,
    TaskWork,
    distinct_values,
    hash_values,
    used_rows,
)
from extraction.encoding import Settings
from extraction.job import Job, Work
from extraction.labelled import LabelledWork
from extraction.manifest import describe
from extraction.parts import Parts, write_arrays
from extraction.stage import ImageStage, Rows, Stage
from methods.words import task_texts
from utils import write_csv
from utils_task import Picture, Task, unique_in_order

SHOWN = 60  # characters of a text in a message

Pair = tuple[Picture, str]  # what is composed to one row


def of_system(work: Work, system: System, prompt: str | None) -> Work:
    """A work of a data set, done by a system. prompt: the form of texts, in place of its own."""
    if isinstance(work, GalleryWork):
        return ComposedGallery(work)
    kind = ComposedLabelled if isinstance(work, LabelledWork) else ComposedTask
    own = {field.name: getattr(work, field.name) for field in fields(work)}
    return kind(**own, system=system, prompt=prompt)


@dataclass(frozen=True)
class ComposedGallery:
    """A gallery that several tasks share, encoded by a system."""

    work: GalleryWork

    @property
    def folder(self) -> Path:
        return self.work.folder

    def plan(self, settings: Settings, encoder: ComposedEncoder) -> Job:
        """Its job; no stages if it is finished."""
        return self.work.of_system(encoder).plan(settings, encoder)


def _facts(texts: Sequence[str], form: str, encoder: ComposedEncoder) -> dict:
    """What a manifest says of the queries. Says how many texts are cut."""
    distinct = list(dict.fromkeys(texts))
    cut = [text for text in distinct if encoder.composer.is_cut(text)]
    if cut:
        print(
            f"{len(cut)} of {len(distinct)} texts are longer than the system reads and were cut, "
            f"the first {cut[0][:SHOWN]!r}..."
        )
    arrays = {name: {"unit": encoder.composer.unit} for name in encoder.query_columns}
    return {"composed": {"text": form, "cut_texts": len(cut)}, "arrays": arrays}


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComposedTask(TaskWork):
    """A task's composed queries, and its gallery where no other task shares it.

    A query of several images has a pair of each; they are averaged when they are read.
    """

    system: System
    prompt: str | None
    encoder: ComposedEncoder | None = None

    def plan(self, settings: Settings, encoder: ComposedEncoder) -> Job:
        """The job of a task; no stages if it is finished."""
        work = replace(self, gallery=self.gallery.of_system(encoder), encoder=encoder)
        return work._plan(settings)

    def _plan(self, settings: Settings) -> Job:
        pairs, form = self.pairs(self.task), self._form
        manifest = describe(settings, self.encoder, "dataset", self.task.name, self.limit)
        manifest |= {"sources": dict(self.task.sources), "pixels": self.gallery.pixels}
        manifest |= {"rows": hash_values([*self.gallery.pictures, *pairs])}
        manifest |= _facts([text for own in pairs for _, text in own], form, self.encoder)
        return self._job(manifest, self._stages(settings), settings, self.encoder)

    @property
    def _form(self) -> str:
        return form_of(self.system, self.task.prompts, self.prompt)

    def pairs(self, task: Task) -> list[list[Pair]]:
        """What each query is composed of: its image, or each of several, and its text."""
        texts = query_texts(self.system, self._form, task_texts(task))
        pictures = task.queries.pictures()
        return [
            [(picture, text) for picture in own] for own, text in zip(pictures, texts, strict=True)
        ]

    @functools.cached_property
    def distinct(self) -> list[Pair]:
        """The distinct pairs."""
        return distinct_values(self.pairs(self.task))

    def _stages(self, settings: Settings) -> list[Stage]:
        pictures = [picture for picture, _ in self.distinct]
        stage = self.gallery.picture_stage(
            "query_image", pictures, f"queries of {self.task.name}", settings
        )
        texts = [text for _, text in self.distinct]
        queries = _composed(stage, texts, self.encoder, settings.part_rows)
        return [queries] if self.task.gallery.shared else [queries, self.gallery.stage(settings)]

    def _remark_texts(self, encoder: ComposedEncoder) -> dict:
        """Nothing beside the texts that are cut, of which the manifest's "composed" tells."""
        return {}

    def _write_queries(
        self, staging: Path, task: Task, arrays: Mapping[str, Stage], parts: Parts, dim: int
    ) -> None:
        keep, rows = used_rows(self.distinct, self.pairs(task))
        write_arrays(staging, arrays["query_image"], parts, dim, keep)
        table = zip(task.queries.key, rows, strict=True)
        write_csv(staging / "query.csv", ["key", "composed_row"], table)


def _composed(
    stage: ImageStage, texts: Sequence[str], encoder: ComposedEncoder, size: int
) -> ImageStage:
    """A stage of images, one a row, as a stage of composed queries with these texts, one a row.

    Its items are the distinct pairs of both; size: of its units.
    """
    items = stage.rows.item_of_row.tolist()
    pairs, item_of_row = unique_in_order(zip(items, texts, strict=True))
    rows = Rows(
        [stage.rows.items[item] for item, _ in pairs],
        item_of_row,
        stage.rows.table,
        stage.rows.lines,
    )
    fingerprint = {**stage.fingerprint, "texts": hash_values(texts)}
    return stage.of_items(
        [item for item, _ in pairs],
        size,
        rows=rows,
        texts=[text for _, text in pairs],
        columns=encoder.query_columns,
        fingerprint=fingerprint,
    )


# ---------------------------------------------------------------------------------------------
# Data sets in i-CIR's form
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComposedLabelled(LabelledWork):
    """A data set in i-CIR's form, composed: a row a query."""

    system: System
    prompt: str | None
    encoder: ComposedEncoder | None = None

    def plan(self, settings: Settings, encoder: ComposedEncoder) -> Job:
        """The job of a data set; no stages if it is finished."""
        work = replace(self, encoder=encoder)
        manifest = work._describe(settings, encoder)
        manifest |= _facts(work._texts, work._form, encoder)
        manifest |= {"rows": hash_values(work._texts)}
        return work._job(manifest, settings, encoder)

    @property
    def _form(self) -> str:
        return form_of(self.system, "", self.prompt)

    @property
    def _texts(self) -> list[str]:
        known = {"caption": self.annotations["query"].texts}
        return query_texts(self.system, self._form, known)

    def _stages(self, settings: Settings) -> list[Stage]:
        query, database = (self._images(settings, split) for split in ("query", "database"))
        queries = _composed(query, self._texts, self.encoder, settings.part_rows)
        return [queries, replace(database, columns=self.encoder.gallery_columns)]

    def _remark_texts(self, encoder: ComposedEncoder) -> dict:
        """Nothing beside the texts that are cut, of which the manifest's "composed" tells."""
        return {}
