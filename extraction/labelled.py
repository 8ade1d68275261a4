"""Features in i-CIR's form: a row a query, a row a gallery image, images in files or in shards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import Found, list_benchmarks
from benchmarks.icir import LABELS, Annotation, find_listed_again, read_annotation
from extraction.encoding import Settings
from extraction.job import Job
from extraction.manifest import describe, identify, image_bytes, is_finished
from extraction.parts import (
    Parts,
    cut_ranges,
    drop_parts,
    shard_sizes,
    shard_units,
    write_arrays,
)
from extraction.reading import FileImages, index_samples
from extraction.reference import write_reference_dataset
from extraction.remarks import remark_images, remark_texts, tell_remarks
from extraction.stage import FileStage, ImageStage, Rows, ShardStage, Stage, Summary
from extraction.words import ContextWords
from utils import UserError, publishing, write_csv, write_json
from utils_datasets import (
    SPLITS,
    Dataset,
    find_image,
    list_shards,
    spell_samples,
)
from utils_labels import match_rows
from utils_records import read_manifest
from utils_storage import load_features
from utils_task import WHOLE

if TYPE_CHECKING:
    from utils_features import Encoder


@dataclass(frozen=True)
class LabelledWork:
    """A data set's annotations, its shards (none for folders), and the contextual words.

    name: what its features go by; limit: rows of each split, None: all; folder: of the features;
    pixels: see remark_images.
    """

    dataset: Dataset
    name: str
    limit: int | None
    annotations: Mapping[str, Annotation]
    shards: Mapping[str, Sequence[Path]]
    words: ContextWords
    folder: Path
    pixels: str

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of a data set; no stages if it is finished."""
        manifest = self._describe(settings, encoder)
        manifest["sources"][self.words.path.name] = self.words.sha256
        manifest["context_words"] = len(self.words.words)
        return self._job(manifest, settings, encoder)

    def _describe(self, settings: Settings, encoder: Encoder) -> dict:
        manifest = describe(settings, encoder, "dataset", self.name, self.limit)
        sources = {a.path.name: a.sha256 for a in self.annotations.values()}
        manifest |= {"sources": sources, "pixels": self.pixels}
        if self.shards["query"] or self.dataset.name in list_benchmarks():
            return manifest
        paths = (path for own in self.annotations.values() for path in own.image_paths)
        return manifest | image_bytes(paths, functools.partial(find_image, self.dataset))

    def _job(self, manifest: dict, settings: Settings, encoder: Encoder) -> Job:
        path, parts = self.folder / "manifest.json", Parts(self.folder / ".parts")
        stages = self._stages(settings)
        covers = functools.partial(self._covers, settings.backbone)
        if is_finished(path, manifest, settings.overwrite, settings.skip_bad, covers=covers):
            drop_parts(parts.folder)
            stages = []
        names = ["manifest.json", *(f"{split}.csv" for split in SPLITS)]
        names += [f"{name}.npy" for stage in stages for name in stage.arrays]
        return Job(
            title=self.name,
            parts=parts,
            stages=stages,
            identity=identify(settings, encoder),
            outputs=[self.folder / name for name in names],
            finish=functools.partial(self._finish, parts, stages, manifest, encoder),
        )

    def _covers(self, backbone: str, stored: dict) -> bool:
        """Whether finished features hold every image and text of these annotations.

        Raises UserError for the first that they do not.
        """
        same_words = (stored.get("sources") or {}).get(self.words.path.name) == self.words.sha256
        if same_words and not self.limit:
            features = load_features(self.folder.parent.parent, backbone, self.name)
            match_rows(features, self.annotations)
        return same_words and not self.limit

    def query_stage(self, name: str, settings: Settings) -> tuple[ImageStage, dict[tuple, int]]:
        """A stage of the distinct query images, and the item of each path and box (none)."""
        stage = replace(self._images(settings, "query"), name=name)
        paths = self.annotations["query"].image_paths
        items = zip(paths, stage.rows.item_of_row.tolist(), strict=True)
        return stage, {(path, WHOLE): item for path, item in items}

    @functools.cached_property
    def _texts(self) -> Rows:
        query = self.annotations["query"]
        return Rows.of(query.texts, query.path, query.lines)

    def _images(self, settings: Settings, split: str) -> ImageStage:
        of_files = not self.shards["query"]
        return self._files(settings, split) if of_files else self._shards(settings, split)

    def _stages(self, settings: Settings) -> list[Stage]:
        fingerprint = {"annotation": self.annotations["query"].sha256, "limit": self.limit}
        plain, contextual = self.words.stages(self._texts, fingerprint, settings.part_rows)
        images = [self._images(settings, split) for split in SPLITS]
        return [images[0], plain, contextual, images[1]]

    def _files(self, settings: Settings, split: str) -> FileStage:
        """The images of one split in files: ranges of them."""
        annotation = self.annotations[split]
        rows = Rows.of(annotation.image_paths, annotation.path, annotation.lines)
        return FileStage(
            rows=rows,
            units=cut_ranges(rows.count, settings.part_rows),
            images=FileImages(
                functools.partial(find_image, self.dataset), viewed=self.pixels == "viewed"
            ),
            # The files of a folder are too many to look at, so they are known by their place.
            **self._common(settings, split, f"folder {self.dataset.root.resolve()}"),
        )

    def _shards(self, settings: Settings, split: str) -> ShardStage:
        """The images of one split in shards, which are known by their sizes.

        A shard is a unit, but all of the query's are one: an image recurs in several of them.
        """
        annotation, shards = self.annotations[split], self.shards[split]
        spelling = spell_samples(self.dataset, annotation.image_paths, shards)
        spelled = [spelling.of_row(path) for path in annotation.image_paths]
        rows = Rows.of(spelled, annotation.path, annotation.lines)
        labels = zip(spelled, annotation.texts, annotation.instances, strict=True)
        units = shard_units(shards, together=split == "query")
        common = self._common(settings, split, "wds")
        common["fingerprint"] |= {"shards": shard_sizes(units)}
        return ShardStage(
            rows=rows,
            units=units,
            samples=index_samples(labels, rows.item_of_row, spelling.of_sample),
            whole=self.limit is None,
            viewed=self.pixels == "viewed",
            **common,
        )

    def _common(self, settings: Settings, split: str, source: str) -> dict:
        sha256 = self.annotations[split].sha256
        fingerprint = {"annotation": sha256, "limit": self.limit, "source": source}
        return {
            "name": f"{split}_image",
            "fingerprint": fingerprint | {"pixels": self.pixels},
            "dtype": settings.save_dtype if split == "database" else "float32",
        }

    def _finish(
        self,
        parts: Parts,
        stages: list[Stage],
        manifest: dict,
        encoder: Encoder,
        summaries: dict[str, Summary],
    ) -> None:
        """Write the tables, the arrays and, last, the manifest."""
        kept = {split: summaries[f"{split}_image"] for split in SPLITS}
        said = self._remark_texts(encoder)
        manifest = manifest | {
            **remark_images(self.pixels, summaries),
            "texts": {"query": said} if said else {},
            **find_listed_again(self.annotations, self.dataset),
            "counts": {split: int(kept[split].keep.sum()) for split in SPLITS},
            "skipped": [{"split": s, **entry} for s in SPLITS for entry in kept[s].skipped],
            "without_row": {split: kept[split].unmatched for split in SPLITS},
        }
        with publishing(parts.folder / "finished", self.folder, last="manifest.json") as staging:
            for split, annotation in self.annotations.items():
                rows = zip(*annotation.columns().values(), strict=True)
                chosen = (row for row, keep in zip(rows, kept[split].keep, strict=True) if keep)
                write_csv(staging / f"{split}.csv", LABELS, chosen)
            for stage in stages:
                keep = kept[stage.name.partition("_")[0]].keep
                write_arrays(staging, stage, parts, encoder.dim, keep)
            write_json(staging / "manifest.json", manifest)
        tell_remarks(manifest)

    def _remark_texts(self, encoder: Encoder) -> dict:
        paths = self.annotations["query"].image_paths
        return remark_texts(encoder, self._texts, self.words.words, paths)

    def export(self) -> list[Path]:
        """Write the reference's pickles beside finished features, with the labels that hold now."""
        stored, matched = read_manifest(self.folder / "manifest.json"), None
        now = {own.path.name: own.sha256 for own in self.annotations.values()}
        if now.items() - stored["sources"].items():
            features = load_features(self.folder.parent.parent, stored["backbone"], self.name)
            matched = match_rows(features, self.annotations)
        return write_reference_dataset(self.folder, self.name, self.dataset.name, matched)


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_labelled(
    found: Found, source: str, words: ContextWords, limit: int | None, features: Path, pixels: str
) -> LabelledWork:
    """Read the annotations. source: "folder" or "wds"; features: the backbone's folder; pixels: see
    remark_images.

    Raises UserError if anything is missing or malformed.
    """
    dataset = Dataset(found.name, found.root)
    annotations = {split: read_annotation(found.root, split, source) for split in SPLITS}
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    if source == "wds":
        how_to_get = found.benchmark.how_to_get
        shards = {split: list_shards(dataset, split, how_to_get) for split in SPLITS}
    else:
        _check_layout(dataset, annotations["query"])
    name = found.name
    if limit:
        name = f"{name}_first{limit}"
        annotations = _limit(annotations, limit)
    _check_instances(annotations)
    return LabelledWork(dataset, name, limit, annotations, shards, words, features / name, pixels)


def _check_layout(dataset: Dataset, annotation: Annotation) -> None:
    """Raise UserError if there are shards where images in folders were expected."""
    if not (dataset.root / "webdataset").is_dir():
        return
    for path in annotation.image_paths:
        with contextlib.suppress(FileNotFoundError):
            find_image(dataset, path)
            return
    raise UserError(
        f"{dataset.root} holds its images in shards, not in folders: add --icir_source wds"
    )


def _limit(annotations: Mapping[str, Annotation], limit: int) -> dict[str, Annotation]:
    """The first rows of each split, but queries whose instance then has no database row.

    Raises UserError if no query is left.
    """
    query, database = (
        annotation.select(range(min(limit, len(annotation.image_paths))))
        for annotation in (annotations[split] for split in SPLITS)
    )
    known = set(database.instances)
    kept = [row for row, instance in enumerate(query.instances) if instance in known]
    if not kept:
        raise UserError(
            f"--limit {limit}: the first rows of {query.path} and of {database.path} have no "
            "instance in common; take more"
        )
    if len(kept) < len(query.instances):
        print(
            f"--limit {limit}: {len(kept)} of {len(query.instances)} queries kept, those whose "
            "instance is among the database rows"
        )
    return {"query": query.select(kept), "database": database}


def _check_instances(annotations: Mapping[str, Annotation]) -> None:
    """Raise UserError for a query whose instance has no database row: it cannot be evaluated."""
    query, database = (annotations[split] for split in SPLITS)
    known = set(database.instances)
    for line, instance in zip(query.lines, query.instances, strict=True):
        if instance not in known:
            raise UserError(
                f"{query.path}, row {line}: the instance {instance!r} has no row in "
                f"{database.path}; add some, or remove its queries"
            )
