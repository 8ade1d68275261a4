"""A data set's features: the distinct images and texts of any task, and the task beside them.

    database.csv, database_image.npy     a row a gallery image; in a folder of their own where
                                         several tasks share a gallery
    query.csv                            key, and the rows of the query's images and texts below
    query_image.npy                      distinct query images; absent where all of them are in the
                                         gallery, to whose rows query.csv then points
    query_text.npy, query_context_text.npy               distinct query texts
    task.json, task.npz, manifest.json

Data sets in i-CIR's form have a row a query instead, see labelled.py.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import Found, find_dataset, missing_images
from extraction.encoding import Settings
from extraction.job import Job, Work
from extraction.labelled import read_labelled
from extraction.manifest import describe, identify, image_bytes, is_finished
from extraction.parts import Parts, cut_ranges, drop_parts, write_array, write_arrays
from extraction.reading import FileImages
from extraction.remarks import remark_images, remark_texts, tell_remarks
from extraction.stage import FileStage, Rows, Stage, Summary
from extraction.words import ContextWords, read_context_words
from utils import UserError, publishing, refuse_idle, say, write_csv, write_json
from utils_labels import relabel_task
from utils_records import read_manifest
from utils_storage import load_features
from utils_task import (
    UNREADABLE,
    WHOLE,
    Picture,
    Task,
    first_rows,
    save_task,
    without_images,
)

if TYPE_CHECKING:
    from composed import ComposedEncoder
    from utils_features import Encoder

ARRAYS = (
    "database_image.npy",
    "query_context_text.npy",
    "query_image.npy",
    "query_text.npy",
)  # that --overwrite drops, whether or not they are made again
BOX_COLUMNS = ("left", "upper", "right", "lower")
NAMES_SHOWN = 5  # of missing images


def read_dataset(
    dataset: str,
    data_dir: Path,
    source: str | None,
    corpora_dir: Path,
    limit: int | None,
    features: Path,
    pickles: bool = False,
    missing: str | None = None,
    skip_bad: bool = False,
    pixels: str | None = None,
) -> list[Work]:
    """Read what --dataset names. features: the backbone's folder of features.

    source: "folder" or "wds"; None, and no pickles: all that tasks bear that are not in i-CIR's
    form. missing: "skip" leaves out the rows of images that are not there, "fail" does not, and
    None does if skip_bad, as rows of images that cannot be read. pixels: see remark_images; None:
    plain for a published data set, viewed for one's own. Raises UserError if anything is missing or
    malformed.
    """
    found = find_dataset(dataset, data_dir)
    pixels = pixels or ("plain" if found.is_published else "viewed")
    if found.benchmark.labelled:
        refuse_idle(["on_missing_image"] if missing else [], f"with --dataset {dataset}")
        words = read_context_words(corpora_dir)
        return [read_labelled(found, source or "folder", words, limit, features, pixels)]
    if source:
        refuse_idle(["icir_source"], f"with --dataset {dataset}")
    if pickles:
        raise UserError(f"--format pkl: the reference's files cannot hold {found.name}; leave it")
    task = found.read(found.root)
    if limit:
        task = first_rows(task, limit)
    task = _with_images(found, task, missing or ("leave" if skip_bad else "fail"))
    words = read_context_words(corpora_dir)
    locate = functools.partial(found.benchmark.locate, found.root)
    images = FileImages(locate, task.gallery.own_mode, pixels == "viewed")
    gallery = GalleryWork(task, images, str(found.root.resolve()), features)
    work = TaskWork(gallery, words, limit, not found.is_published)
    return [gallery, work] if task.gallery.shared else [work]


def _with_images(found: Found, task: Task, missing: str) -> Task:
    """The task without the images that are not there ("skip"), or with all of them ("leave").

    Raises UserError, naming the first of them, otherwise ("fail"), or if there are none at all.
    """
    lost = missing_images(found.benchmark, task, found.root)
    count = len({*task.gallery.path, *chain(*task.queries.images)})
    shown = ", ".join(lost[:NAMES_SHOWN]) + (", ..." if len(lost) > NAMES_SHOWN else "")
    what = f"{found.root}: {len(lost)} of the {count} images of {found.name} are missing: {shown}"
    if lost and (missing == "fail" or len(lost) == count):
        advice = "" if len(lost) == count else "; or leave them out with --on_missing_image skip"
        raise UserError(f"{what}; {_how_to_mend(found, lost[0])}{advice}")
    if not lost or missing == "leave":
        return task
    task = without_images(task, lost, "missing")
    say(f"{what}; {task.notes[-1]}")
    return task


def _how_to_mend(found: Found, lost: str) -> str:
    """What to do about a missing image: of one's own, where it is named; else how to get it."""
    place = found.benchmark.place_of and found.benchmark.place_of(found.root, lost)
    if place:
        return f"{place} names the first: put it there, or mend the path"
    return found.benchmark.how_to_get


def hash_values(values: Iterable[object]) -> str:
    """SHA-256 of what the values are printed as."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()


def distinct_values(values: Iterable[Sequence]) -> list:
    """The distinct values of all queries, in order of first appearance."""
    return list(dict.fromkeys(value for own in values for value in own))


# ---------------------------------------------------------------------------------------------
# The gallery
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GalleryWork:
    """The gallery of a task; as a work of its own, that which several tasks share.

    images: opens them; place: the folder they are below; features: the backbone's folder. columns:
    the arrays of a row, where it is not database_image alone.
    """

    task: Task
    images: FileImages
    place: str
    features: Path
    columns: Mapping[str, int] | None = None

    @property
    def folder(self) -> Path:
        """Where its features go."""
        return self.features / (self.task.gallery.shared or self.task.name)

    @property
    def pixels(self) -> str:
        """How its images are encoded: see remark_images."""
        return "viewed" if self.images.viewed else "plain"

    def of_system(self, encoder: ComposedEncoder) -> GalleryWork:
        """The same, encoded by a system."""
        return replace(self, columns=encoder.gallery_columns)

    @functools.cached_property
    def pictures(self) -> list[Picture]:
        """What each row shows."""
        return self.task.gallery.pictures()

    def stage(self, settings: Settings) -> FileStage:
        """The stage of the gallery's images."""
        rows, name = self.pictures, self.task.gallery.shared or self.task.name
        stage = self.picture_stage("database_image", rows, f"gallery of {name}", settings)
        return replace(stage, columns=self.columns)

    def picture_stage(
        self, name: str, pictures: Sequence[Picture], table: str, settings: Settings
    ) -> FileStage:
        """A stage of pictures, one a row. table: what a message calls the rows."""
        rows = Rows.of(pictures, table, range(1, len(pictures) + 1))
        boxes = np.array([box for _, box in rows.items], np.int64)
        paths = [path for path, _ in rows.items]
        return FileStage(
            name=name,
            rows=Rows(paths, rows.item_of_row, table, rows.lines),
            units=cut_ranges(rows.count, settings.part_rows),
            # The files of a folder are too many to look at, so they are known by their place.
            fingerprint={
                "rows": hash_values(pictures),
                "source": f"folder {self.place}",
                "own_mode": self.images.own_mode,
                "pixels": self.pixels,
            },
            dtype=settings.save_dtype if name == "database_image" else "float32",
            images=self.images,
            boxes=boxes if boxes.any() else None,
        )

    def write(
        self, folder: Path, stage: Stage, parts: Parts, dim: int, missing: Collection[str]
    ) -> int:
        """Write the table and the array of the rows whose images are there, and count them."""
        keep = np.array([path not in missing for path, _ in self.pictures], bool)
        kept = [picture for picture, good in zip(self.pictures, keep, strict=True) if good]
        boxed = any(box != WHOLE for _, box in self.pictures)
        rows = ((path, *box) if boxed else (path,) for path, box in kept)
        write_csv(folder / "database.csv", ["image_path", *(BOX_COLUMNS if boxed else ())], rows)
        write_arrays(folder, stage, parts, dim, keep)
        return len(kept)

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of a shared gallery; no stages if it is finished."""
        manifest = describe(settings, encoder, "gallery", self.folder.name)
        rows = hash_values(self.pictures)
        manifest |= {"sources": {}, "rows": rows, "pixels": self.pixels}
        stage, parts = self.stage(settings), Parts(self.folder / ".parts")
        done = is_finished(
            self.folder / "manifest.json", manifest, settings.overwrite, settings.skip_bad
        )
        if done:
            drop_parts(parts.folder)
        arrays = [f"{name}.npy" for name in stage.arrays]
        names = ("manifest.json", "database.csv", *arrays)
        return Job(
            title=self.folder.name,
            parts=parts,
            stages=[] if done else [stage],
            identity=identify(settings, encoder),
            outputs=[self.folder / name for name in names],
            finish=functools.partial(self._finish, parts, stage, manifest, encoder.dim),
        )

    def _finish(
        self, parts: Parts, stage: Stage, manifest: dict, dim: int, summaries: dict[str, Summary]
    ) -> None:
        """Write the table, the array and, last, the manifest."""
        skipped = _skipped(summaries)
        with publishing(parts.folder / "finished", self.folder, last="manifest.json") as staging:
            missing = {entry["image_path"] for entry in skipped}
            count = self.write(staging, stage, parts, dim, missing)
            manifest = manifest | {"counts": {"database": count}, "skipped": skipped}
            manifest |= remark_images(self.pixels, summaries)
            write_json(staging / "manifest.json", manifest)
        tell_remarks(manifest)


def _skipped(summaries: dict[str, Summary]) -> list[dict]:
    """The images that the stages left out, as a manifest lists them."""
    return [
        {"split": name.partition("_")[0], **entry}
        for name, summary in summaries.items()
        for entry in summary.skipped
    ]


# ---------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskWork:
    """A task's queries, and its gallery where no other task shares it.

    words: that contextualise the texts; limit: what --limit was, None: none; is_own: it is of a
    folder of one's own.
    """

    gallery: GalleryWork
    words: ContextWords
    limit: int | None
    is_own: bool

    @property
    def task(self) -> Task:
        return self.gallery.task

    @property
    def folder(self) -> Path:
        """Where its features go."""
        return self.gallery.features / self.task.name

    @functools.cached_property
    def pictures(self) -> list[Picture]:
        """The distinct query images; none where all of them are in the gallery."""
        distinct = distinct_values(self.task.queries.pictures())
        return [] if set(distinct) <= set(self.gallery.pictures) else distinct

    @functools.cached_property
    def phrases(self) -> list[str]:
        """The distinct query texts."""
        return distinct_values(self.task.queries.phrases())

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of a task; no stages if it is finished."""
        manifest = describe(settings, encoder, "dataset", self.task.name, self.limit)
        sources = {**self.task.sources, self.words.path.name: self.words.sha256}
        rows = [self.gallery.pictures, self.task.queries.pictures(), self.task.queries.phrases()]
        manifest |= {"sources": sources, "context_words": len(self.words.words)}
        manifest |= {"pixels": self.gallery.pixels}
        manifest |= {"rows": hash_values(row for part in rows for row in part)}
        if self.is_own:
            images = (path for path, _ in chain(self.gallery.pictures, self.pictures))
            manifest |= image_bytes(images, self.gallery.images.locate)
        return self._job(manifest, self._stages(settings), settings, encoder)

    def _job(
        self, manifest: dict, stages: list[Stage], settings: Settings, encoder: Encoder
    ) -> Job:
        path, parts = self.folder / "manifest.json", Parts(self.folder / ".parts")
        arrays = [f"{name}.npy" for stage in stages for name in stage.arrays]
        covers = functools.partial(self._covers, settings.backbone)
        if is_finished(path, manifest, settings.overwrite, settings.skip_bad, covers=covers):
            drop_parts(parts.folder)
            stored = read_manifest(path)
            if stored["sources"] == manifest["sources"]:
                self._renew(stored.get("skipped") or [])
            stages = []
        return Job(
            title=self.task.name,
            parts=parts,
            stages=stages,
            identity=identify(settings, encoder),
            outputs=[
                path,
                *(self.folder / name for name in ("task.json", "task.npz")),
                *(self.folder / f"{split}.csv" for split in ("query", "database")),
                *(self.folder / name for name in sorted({*ARRAYS, *arrays})),
            ],
            finish=functools.partial(self._finish, parts, stages, manifest, encoder),
        )

    def _covers(self, backbone: str, stored: dict) -> bool:
        """Whether finished features hold every picture and text of the task, of one's own.

        Raises UserError for the first that they do not.
        """
        words = (stored.get("sources") or {}).get(self.words.path.name)
        covers = words == self.words.sha256 and not self.limit and self.is_own
        if covers:
            folder = self.gallery.features.parent
            relabel_task(load_features(folder, backbone, self.task.name), self.task)
        return covers

    def query_stage(self, name: str, settings: Settings) -> tuple[FileStage, dict[Picture, int]]:
        """A stage of the distinct query images, and the item of each."""
        distinct = distinct_values(self.task.queries.pictures())
        table = f"queries of {self.task.name}"
        stage = self.gallery.picture_stage(name, distinct, table, settings)
        return stage, dict(zip(distinct, stage.rows.item_of_row.tolist(), strict=True))

    def _stages(self, settings: Settings) -> list[Stage]:
        table = f"queries of {self.task.name}"
        numbers = range(1, len(self.phrases) + 1)
        texts = Rows.of(self.phrases, table, numbers)
        stages = list(
            self.words.stages(texts, {"rows": hash_values(self.phrases)}, settings.part_rows)
        )
        if self.pictures:
            images = self.gallery.picture_stage("query_image", self.pictures, table, settings)
            stages.insert(0, images)
        return stages if self.task.gallery.shared else [*stages, self.gallery.stage(settings)]

    def _finish(
        self,
        parts: Parts,
        stages: list[Stage],
        manifest: dict,
        encoder: Encoder,
        summaries: dict[str, Summary],
    ) -> None:
        """Write the tables, the arrays, the task without what was left out, last the manifest."""
        skipped = _skipped(summaries)
        if self.task.gallery.shared:
            skipped += read_manifest(self.gallery.folder / "manifest.json").get("skipped") or []
        missing = {entry["image_path"] for entry in skipped}
        task = without_images(self.task, missing, UNREADABLE) if missing else self.task
        arrays = {stage.name: stage for stage in stages}
        with publishing(parts.folder / "finished", self.folder, last="manifest.json") as staging:
            if "database_image" in arrays:
                self.gallery.write(staging, arrays["database_image"], parts, encoder.dim, missing)
            self._write_queries(staging, task, arrays, parts, encoder.dim)
            save_task(task, staging)
            counts = {"query": len(task.queries), "database": len(task.gallery)}
            manifest = manifest | {"counts": counts, "skipped": skipped}
            manifest |= remark_images(self.gallery.pixels, summaries)
            manifest |= {"texts": self._remark_texts(encoder)}
            write_json(staging / "manifest.json", manifest)
        tell_remarks(manifest)

    def _remark_texts(self, encoder: Encoder) -> dict:
        """What there is to remark of the query texts, by the numbers of the queries."""
        asked = self.task.queries.phrases()
        numbers = [number for number, own in enumerate(asked, 1) for _ in own]
        rows = Rows.of(chain.from_iterable(asked), f"queries of {self.task.name}", numbers)
        images = [self.task.queries.images[number - 1] for number in numbers]
        remarks = remark_texts(encoder, rows, self.words.words, images)
        return {"query": remarks} if remarks else {}

    def _write_queries(
        self, staging: Path, task: Task, arrays: Mapping[str, Stage], parts: Parts, dim: int
    ) -> None:
        """Write the arrays of the queries of a task, and the table of their rows."""
        images, shown = used_rows(self.pictures, task.queries.pictures())
        texts, said = used_rows(self.phrases, task.queries.phrases())
        for name, keep in {"image": images, "text": texts, "context_text": texts}.items():
            if f"query_{name}" in arrays:
                stage = arrays[f"query_{name}"]
                write_array(staging / f"query_{name}.npy", stage, parts, dim, keep)
        if not self.pictures:
            shown = rows_in(task.gallery.pictures(), task.queries.pictures())
        rows = zip(task.queries.key, shown, said, strict=True)
        write_csv(staging / "query.csv", ["key", "image_row", "text_row"], rows)

    def _renew(self, skipped: list[dict]) -> None:
        """Write the task of finished features again if it is judged otherwise than it was then."""
        missing = {entry["image_path"] for entry in skipped}
        task = without_images(self.task, missing, UNREADABLE) if missing else self.task
        with tempfile.TemporaryDirectory() as place:
            save_task(task, Path(place))
            same = all(
                (self.folder / path.name).is_file()
                and (self.folder / path.name).read_bytes() == path.read_bytes()
                for path in Path(place).iterdir()
            )
        if not same:
            save_task(task, self.folder)
            print(f"{self.folder}: the task was written anew; its features are as they were")


def used_rows(distinct: Sequence, asked: Sequence[Sequence]) -> tuple[np.ndarray, list[str]]:
    """Which of the distinct pictures or texts queries use, bool (d,); and the rows of each query's
    among these, as query.csv has them: none where there are none.
    """
    used = set(distinct_values(asked))
    keep = np.array([value in used for value in distinct], bool)
    kept = [value for value in distinct if value in used]
    return keep, rows_in(kept, asked) if kept else []


def rows_in(values: Sequence, asked: Iterable[Sequence]) -> list[str]:
    """The rows of each query's values, as query.csv has them: numbers, blanks between."""
    row_of = {value: row for row, value in reversed(list(enumerate(values)))}
    return [" ".join(str(row_of[value]) for value in own) for own in asked]
