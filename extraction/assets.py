"""What methods need beside a data set: corpora, an image mean, normalisation features."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extraction.encoding import Settings
from extraction.job import Job
from extraction.manifest import describe, identify, is_finished
from extraction.parts import (
    Parts,
    cut_ranges,
    drop_parts,
    shard_sizes,
    shard_units,
    write_array,
)
from extraction.reading import EverySample, FileImages, SampleIndex, index_samples
from extraction.reference import write_reference_corpus
from extraction.remarks import remark_images, remark_texts, tell_remarks
from extraction.stage import FileStage, NoRows, Rows, ShardStage, Stage, Summary, TextStage
from extraction.words import read_corpus
from utils import (
    UserError,
    atomic_path,
    publishing,
    read_csv,
    say,
    sha256_file,
    write_csv,
    write_json,
)
from utils_datasets import IMAGE_SUFFIXES, is_header, slashed
from utils_pickles import one_line, read_archive
from utils_records import check_manifest

if TYPE_CHECKING:
    from utils_features import Encoder

# ---------------------------------------------------------------------------------------------
# Corpora
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorporaWork:
    """Text corpora by file, each its prompts and their lines. folder: of their features."""

    corpora: Mapping[Path, tuple[list[str], list[int]]]
    folder: Path

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of the corpora that are not finished."""
        stages, manifests, outputs = [], {}, []
        for path, (prompts, lines) in self.corpora.items():
            manifest = describe(settings, encoder, "corpus", path.stem)
            manifest["sources"] = {path.name: sha256_file(path)}
            manifest["counts"], manifest["skipped"] = {"prompts": len(prompts)}, []
            stored = self.folder / f"{path.stem}.json"
            if is_finished(stored, manifest, settings.overwrite, settings.skip_bad):
                continue
            rows = Rows.of(prompts, path, lines)
            stages.append(
                TextStage(
                    name=path.stem,
                    rows=rows,
                    units=cut_ranges(rows.count, settings.part_rows),
                    fingerprint={"corpus": manifest["sources"][path.name]},
                )
            )
            manifests[path.stem] = manifest
            outputs += [self.folder / f"{path.stem}.{suffix}" for suffix in ("json", "csv", "npy")]
        parts = Parts(self.folder / ".parts", suffix=".csv")
        return Job(
            title="corpus",
            parts=parts,
            stages=stages,
            identity=identify(settings, encoder),
            outputs=outputs,
            finish=functools.partial(self._finish, parts, stages, manifests, encoder),
        )

    def _finish(
        self,
        parts: Parts,
        stages: list[Stage],
        manifests: dict[str, dict],
        encoder: Encoder,
        summaries: dict[str, Summary],
    ) -> None:
        """Write the tables, arrays and manifests, one corpus after the other."""
        for stage in stages:
            last = f"{stage.name}.json"
            with publishing(parts.folder / "finished", self.folder, last) as staging:
                prompts = ([stage.rows.items[item]] for item in stage.rows.item_of_row)
                write_csv(staging / f"{stage.name}.csv", ["prompt"], prompts)
                keep = summaries[stage.name].keep
                write_array(staging / f"{stage.name}.npy", stage, parts, encoder.dim, keep)
                remarks = remark_texts(encoder, stage.rows)
                manifest = manifests[stage.name] | {"texts": {stage.name: remarks}}
                write_json(staging / last, manifest)
            tell_remarks(manifest)

    def export(self) -> list[Path]:
        """Write the reference's pickles beside finished corpora."""
        return [write_reference_corpus(self.folder, path.stem) for path in self.corpora]


def read_corpora(corpora_dir: Path, features: Path) -> CorporaWork:
    """The prompts of every corpus of a folder. features: the backbone's folder of features."""
    paths = sorted(corpora_dir.glob("*.csv"))
    if not paths:
        raise UserError(f"no corpus (*.csv) in {corpora_dir}; --corpora_dir names the folder")
    return CorporaWork({path: read_corpus(path) for path in paths}, features / "corpus")


# ---------------------------------------------------------------------------------------------
# Images of the user's
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTree:
    """The images below a folder, or in the shards below it where there are none, or in one shard.

    sources: the hash of their names and sizes, for the manifest; prints: of their names alone, and
    how they are encoded, for what may not change while a run is unfinished; pixels: see
    remark_images.
    """

    root: Path
    files: list[str]
    shards: list[Path]
    sources: dict[str, str]
    prints: dict[str, str]
    pixels: str

    def all_images(self, part_rows: int) -> FileStage | ShardStage:
        """The stage of all images there are."""
        if self.shards:
            return self._in_shards(NoRows(), EverySample(), self.prints)
        rows = Rows.of(self.files, self.root, range(1, len(self.files) + 1))
        return self._in_files(rows, part_rows, self.prints)

    def images_of(self, rows: Rows, part_rows: int, prints: dict) -> FileStage | ShardStage:
        """The stage of the images that the rows of a table name. prints: see Stage."""
        if not self.shards:
            return self._in_files(rows, part_rows, prints)
        names = ((rows.items[item],) for item in rows.item_of_row)
        return self._in_shards(rows, index_samples(names, rows.item_of_row, _same_path), prints)

    def _in_files(self, rows: Rows, part_rows: int, prints: dict) -> FileStage:
        return FileStage(
            name="images",
            rows=rows,
            units=cut_ranges(rows.count, part_rows),
            fingerprint=prints,
            images=FileImages(functools.partial(_below, self.root), viewed=self.pixels == "viewed"),
        )

    def _in_shards(
        self, rows: Rows | NoRows, samples: SampleIndex | EverySample, prints: dict
    ) -> ShardStage:
        units = [
            replace(unit, name=f"{i:06d}")
            for i, unit in enumerate(shard_units(self.shards, together=False))
        ]
        sizes = {"shards": shard_sizes(units)}
        return ShardStage(
            name="images",
            rows=rows,
            units=units,
            fingerprint=prints | sizes,
            samples=samples,
            viewed=self.pixels == "viewed",
        )


def read_images(root: Path, pixels: str) -> ImageTree:
    """Find what --images names. pixels: see remark_images. Raises UserError if there is nothing."""
    if not root.exists():
        raise UserError(f"--images {root} does not exist")
    files = sorted(_list_images(root))
    shards = [root] if root.suffix == ".tar" else [] if files else sorted(root.rglob("*.tar"))
    if not shards and not files:
        raise UserError(
            f"--images {root} holds neither images ({', '.join(IMAGE_SUFFIXES)}) nor tar shards"
        )
    names = [*files, *(shard.relative_to(root).as_posix() for shard in shards)]
    sizes = [(root / name).stat().st_size for name in names]
    listing = [f"{name}\t{size}" for name, size in zip(names, sizes, strict=True)]
    sources, prints = {"images": _hash_lines(listing)}, {"images": _hash_lines(names)}
    return ImageTree(root, files, shards, sources, prints | {"pixels": pixels}, pixels)


def _hash_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _list_images(root: Path) -> list[str]:
    found = [p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    of_macs = {path for path in found if path.name.startswith("._")}
    if of_macs:
        say(f"--images {root}: {len(of_macs)} files ._* of macOS, which are no images: left out")
    names = [path.relative_to(root).as_posix() for path in found if path not in of_macs]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"--images {root}: {name!a} is not UTF-8; rename the file") from None
    return names


def _same_path(path: str) -> str:
    return path.removeprefix("./")


def _below(root: Path, path: str) -> Path:
    return root / path


# ---------------------------------------------------------------------------------------------
# The image mean and the normalisation features: one file each
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanWork:
    """The mean of unit-length image features. path: of the finished file."""

    images: ImageTree
    path: Path

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of the mean; no stages if it is finished."""
        manifest = describe(settings, encoder, "mean", self.path.stem)
        manifest |= {"sources": self.images.sources, "pixels": self.images.pixels}
        stages = [self.images.all_images(settings.part_rows)]
        return _plan_file(self.path, settings, encoder, manifest, stages, _finish_mean)


@dataclass(frozen=True)
class SyntheticWork:
    """The normalisation features: a row of images and of texts for each caption.

    captions: (line, image path, caption) of the file `table`; path: of the finished file.
    """

    images: ImageTree
    table: Path
    captions: list[tuple[int, str, str]]
    path: Path

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of the normalisation features; no stages if it is finished."""
        digest = {"captions": sha256_file(self.table)}
        manifest = describe(settings, encoder, "synthetic", self.path.stem)
        manifest |= {"sources": self.images.sources | digest, "pixels": self.images.pixels}
        prints = self.images.prints | digest
        lines, paths, texts = (list(column) for column in zip(*self.captions, strict=True))
        shown = Rows.of(map(_same_path, paths), self.table, lines)
        said = Rows.of(texts, self.table, lines)
        stages = [
            self.images.images_of(shown, settings.part_rows, prints),
            TextStage(
                name="texts",
                rows=said,
                units=cut_ranges(said.count, settings.part_rows),
                fingerprint=prints,
            ),
        ]
        return _plan_file(self.path, settings, encoder, manifest, stages, _finish_synthetic)


def read_synthetic(images: Path, captions: Path, path: Path, pixels: str) -> SyntheticWork:
    """Read what --images and --captions name. pixels: see remark_images.

    Raises UserError if there is nothing.
    """
    return SyntheticWork(read_images(images, pixels), captions, read_captions(captions), path)


def read_captions(path: Path) -> list[tuple[int, str, str]]:
    """The rows (line, image path, caption) of a CSV; a header line is passed over."""
    if not path.is_file():
        raise UserError(f"--captions {path} does not exist")
    rows, listed = [], list(read_csv(path))
    has_header = is_header([row for _, row in listed[:2]])
    for line, row in listed[has_header:]:
        if len(row) != 2 or not all(row):
            raise UserError(f"{path}, row {line}: image_path,caption is expected")
        rows.append((line, slashed(row[0]), row[1]))
    if not rows:
        raise UserError(f"{path} is empty: rows image_path,caption are expected")
    return rows


def _plan_file(
    path: Path,
    settings: Settings,
    encoder: Encoder,
    manifest: dict,
    stages: list[Stage],
    finish: Callable,
) -> Job:
    """The job of one file of arrays that holds its own manifest."""
    parts = Parts(path.parent / f".{path.stem}.parts")
    if is_finished(path, manifest, settings.overwrite, settings.skip_bad, _read_manifest):
        drop_parts(parts.folder)
        stages = []
    return Job(
        title=manifest["kind"],
        parts=parts,
        stages=stages,
        identity=identify(settings, encoder),
        outputs=[path],
        finish=functools.partial(finish, path, parts, stages, manifest, encoder),
    )


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(str(read_archive(path, ["manifest"])["manifest"]))
        return check_manifest(manifest, path)
    except UserError:
        raise
    except Exception as error:  # not a zip, not an array, not JSON
        problem = f"{path} cannot be read ({one_line(error)})"
        raise UserError(f"{problem}; --overwrite replaces it") from None


def _write_arrays(path: Path, manifest: dict, arrays: dict) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, manifest=np.array(json.dumps(manifest, ensure_ascii=False)))


def _finish_mean(
    path: Path,
    parts: Parts,
    stages: list[Stage],
    manifest: dict,
    encoder: Encoder,
    summaries: dict[str, Summary],
) -> None:
    """Write the mean (D,) float32."""
    total, count = np.zeros(encoder.dim, np.float64), 0
    for part in parts.read(stages[0]):
        features = part.features.astype(np.float64)
        total += (features / np.linalg.norm(features, axis=1, keepdims=True)).sum(axis=0)
        count += len(features)
    if not count:
        raise UserError(f"{path}: none of the images can be read")
    skipped = summaries["images"].skipped
    manifest = manifest | {"counts": {"images": count}, "skipped": skipped}
    manifest |= remark_images(manifest["pixels"], summaries)
    _write_arrays(path, manifest, {"mean": (total / count).astype(np.float32)})
    tell_remarks(manifest)


def _finish_synthetic(
    path: Path,
    parts: Parts,
    stages: list[Stage],
    manifest: dict,
    encoder: Encoder,
    summaries: dict[str, Summary],
) -> None:
    """Write image_features and text_features, a row of each for every caption, (n, D) float32."""
    keep = summaries["images"].keep
    arrays = {}
    for stage, name in zip(stages, ("image_features", "text_features"), strict=True):
        write_array(parts.folder / f"{name}.npy", stage, parts, encoder.dim, keep)
        arrays[name] = np.load(parts.folder / f"{name}.npy")
    skipped = summaries["images"].skipped
    manifest = manifest | {"counts": {"pairs": int(keep.sum())}, "skipped": skipped}
    manifest |= remark_images(manifest["pixels"], summaries)
    manifest |= {"texts": {"caption": remark_texts(encoder, stages[1].rows)}}
    _write_arrays(path, manifest, arrays)
    tell_remarks(manifest)
