"""A folder of photographs: what is in it, and its features, which follow its changes.

    features/{backbone}_features/{NAME}/   database.csv database_image.npy manifest.json photos.csv
    features/.../{NAME}/.parts/            an unfinished round: what it was to encode, what is done

A round takes the folder as it is seen at its start, encodes what is new or changed by the ordinary
extraction, and puts the finished rows together with those that stayed. A round that was killed is
finished first; what changed since then is the next one's.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import (
    UserError,
    file_safe,
    held,
    last_part,
    publishing,
    read_json,
    say,
    write_csv,
    write_json,
)
from utils_datasets import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from extraction.encoding import Settings
    from extraction.job import Job
    from extraction.reading import FileImages
    from extraction.stage import FileStage, Summary
    from utils_features import Encoder

# Folders that programs put beside photographs, with pictures of their own in them.
PASSED_FOLDERS = ("@eaDir", "node_modules", "__MACOSX", "lost+found")
KINDS = {".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".raw", ".dng", ".cr2"}
KINDS |= {".cr3", ".nef", ".arw", ".orf", ".rw2", ".jxl", ".svg", ".psd"}
COLUMNS = ("image_path", "bytes", "mtime_ns", "cause")
ROUND = "round.csv"  # in .parts: the folder as the unfinished round saw it
STAGING = "finished"  # in .parts: files that are about to be published
PIXELS = "viewed"  # how photographs are decoded: as a viewer shows them
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Photo:
    """A file: its path below the folder, its size in bytes and the time of its last change.

    cause: why it cannot be read, "" where it can be or has not been tried.
    """

    path: str
    size: int
    changed: int
    cause: str = ""

    @property
    def stamp(self) -> tuple[str, int, int]:
        """What is equal as long as the file is the same."""
        return self.path, self.size, self.changed


@dataclass(frozen=True)
class Seen:
    """What is in a folder: its photographs by path, and files that look like others of them."""

    photos: tuple[Photo, ...]
    passed: tuple[str, ...] = ()


def see(root: Path) -> Seen:
    """Look through a folder. Raises UserError if it is none, or holds no photograph.

    Hidden folders, links to folders and those of PASSED_FOLDERS are not looked into.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder; name the folder of your photographs")
    found, passed = [], []
    for entry in _walk(root):
        name = os.path.relpath(entry.path, root).replace(os.sep, "/")
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in IMAGE_SUFFIXES and entry.is_file() and _is_utf8(name):
            status = entry.stat()
            found.append(Photo(name, status.st_size, status.st_mtime_ns))
        elif suffix in KINDS or suffix in IMAGE_SUFFIXES:  # a link to nothing, a pipe
            passed.append(name)
    if not found:
        raise UserError(f"there is no {'/'.join(IMAGE_SUFFIXES)} file below {root}")
    return Seen(tuple(sorted(found, key=lambda photo: photo.path)), tuple(sorted(passed)))


def _walk(root: Path) -> Iterator[os.DirEntry]:
    """The files below a folder that are not hidden."""
    open_folders = [os.fspath(root)]
    while open_folders:
        with os.scandir(open_folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    yield entry
                elif entry.name not in PASSED_FOLDERS:
                    open_folders.append(entry.path)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_of(root: Path) -> str:
    """The name that a folder's features go by: its own, and a hash of where it is."""
    place = hashlib.sha1(os.fsencode(os.path.realpath(root))).hexdigest()[:6]
    return f"{file_safe(last_part(root)) or 'photographs'}-{place}"


def open_photo(root: Path) -> FileImages:
    """What opens the photographs of a folder, and others for them: all are seen alike."""
    from benchmarks import image_below
    from extraction.reading import FileImages

    return FileImages(functools.partial(image_below, root), viewed=PIXELS == "viewed")


# ---------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """The finished features of a folder: its photographs in the order of the rows, and the others.

    row_of: the row of each photograph by its stamp. bad: those that cannot be read.
    """

    photos: tuple[Photo, ...] = ()
    bad: tuple[Photo, ...] = ()
    manifest: dict = field(default_factory=dict)

    @functools.cached_property
    def row_of(self) -> dict[tuple, int]:
        return {photo.stamp: row for row, photo in enumerate(self.photos)}

    @functools.cached_property
    def cause_of(self) -> dict[tuple, str]:
        return {photo.stamp: photo.cause for photo in self.bad}

    def is_new(self, photo: Photo) -> bool:
        """Whether nothing is known of a file as it is now."""
        return photo.stamp not in self.row_of and photo.stamp not in self.cause_of


def read_stored(folder: Path) -> Stored:
    """What is finished in a folder of features, nothing where there is none.

    Raises UserError for files that do not fit together.
    """
    from utils_storage import MappedRows

    if not (folder / "manifest.json").is_file():
        return Stored()
    photos = _read_photos(folder / "photos.csv")
    good = tuple(photo for photo in photos if not photo.cause)
    bad = tuple(photo for photo in photos if photo.cause)
    count = MappedRows(folder / "database_image.npy").shape[0]
    if count != len(good):
        raise UserError(
            f"{folder}: photos.csv names {len(good):,} photographs, and database_image.npy has "
            f"{count:,} rows; index the folder again with --overwrite"
        )
    return Stored(good, bad, read_json(folder / "manifest.json"))


def _read_photos(path: Path) -> tuple[Photo, ...]:
    """Raises UserError if the file is not what _write_photos wrote."""
    from utils_storage import read_csv_columns

    table = read_csv_columns(path, COLUMNS)
    try:
        sizes, times = (list(map(int, table[name])) for name in ("bytes", "mtime_ns"))
    except ValueError as error:
        raise UserError(f"{path}: {error}; index the folder again with --overwrite") from None
    return tuple(map(Photo, table["image_path"], sizes, times, table["cause"]))


def _write_photos(path: Path, photos: Sequence[Photo]) -> None:
    rows = ((photo.path, photo.size, photo.changed, photo.cause) for photo in photos)
    write_csv(path, COLUMNS, rows)


# ---------------------------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------------------------


def index_photos(
    root: Path,
    folder: Path,
    settings: Settings,
    load: Callable[[], Encoder],
    say: Callable[[str], None] = say,
) -> Stored:
    """Bring the features of a folder of photographs up to date, in as many rounds as it takes.

    folder: of the features. load: gives the encoder, which is asked for where there is something
    to encode. Raises UserError if the features there are of another model or kind, with everything
    done so far safe on disk, and if another process is at work on them.
    """
    see(root)  # what is wrong with it is said before anything is made
    with held(folder / ".lock", "another search.py is at work on these features"):
        return _index(root, folder, settings, load, say)


def _index(
    root: Path,
    folder: Path,
    settings: Settings,
    load: Callable[[], Encoder],
    say: Callable[[str], None],
) -> Stored:
    from extraction.parts import drop_parts

    if settings.overwrite:
        (folder / "manifest.json").unlink(missing_ok=True)
    elif _publish_on(folder):
        drop_parts(folder / ".parts")
    if settings.overwrite or not (folder / ".parts" / ROUND).is_file():
        drop_parts(folder / ".parts")
    settings = replace(settings, overwrite=False, skip_bad=True)
    _check_kind(folder, settings)
    while True:
        stored, seen = read_stored(folder), see(root)
        unfinished = folder / ".parts" / ROUND
        photos = _read_photos(unfinished) if unfinished.is_file() else seen.photos
        new = [photo for photo in photos if stored.is_new(photo)]
        stamps = {photo.stamp for photo in photos}
        gone = sum(photo.stamp not in stamps for photo in (*stored.photos, *stored.bad))
        if not new and not gone and stored.manifest:
            drop_parts(folder / ".parts")
            _say_state(root, stored, seen, say)
            return stored
        say(f"{root}: {len(new):,} photographs to encode, {gone:,} gone or changed")
        _run_round(Round(root, folder, stored, photos, tuple(new)), settings, load)


def _publish_on(folder: Path) -> bool:
    """Move the files that a run was killed while it moved, see publishing; whether there are any.

    The manifest is the last that is written, and the last that is moved.
    """
    staging = folder / ".parts" / STAGING
    if (folder / "manifest.json").is_file() or not (staging / "manifest.json").is_file():
        return False
    for name in sorted(os.listdir(staging), key=lambda name: (name == "manifest.json", name)):
        os.replace(staging / name, folder / name)
    return True


def stored_dtype(folder: Path) -> str | None:
    """The type of the features that a folder holds, None where it holds none."""
    path = folder / "manifest.json"
    return read_json(path).get("save_dtype") if path.is_file() else None


def _check_kind(folder: Path, settings: Settings) -> None:
    if not (folder / "manifest.json").is_file():
        return
    from extraction.manifest import UNSAID

    stored, now = read_json(folder / "manifest.json"), {**vars(settings), "pixels": PIXELS}
    for key in ("pixels", "precision", "save_dtype"):
        before = stored.get(key, UNSAID.get(key))
        if before != now[key]:
            keep = "" if key == "pixels" else f"--{key} {before} takes them as they are, "
            raise UserError(
                f"{folder} holds features with another {key} ({before}, now {now[key]}); "
                f"{keep}--overwrite encodes all photographs again"
            )


def _say_state(root: Path, stored: Stored, seen: Seen, say: Callable[[str], None]) -> None:
    say(f"{root}: {len(stored.photos):,} photographs")
    if stored.bad:
        first = stored.bad[0]
        say(f"  {len(stored.bad):,} cannot be read, the first {first.path!r}: {first.cause}")
    if seen.passed:
        count = f"{len(seen.passed):,}, the first {seen.passed[0]!r}"
        kinds = "/".join(IMAGE_SUFFIXES)
        say(f"  left out, being no {kinds}, no file, or not named in UTF-8: {count}")


def _run_round(own: Round, settings: Settings, load: Callable[[], Encoder]) -> None:
    """Encode what is new, and publish; with nothing to encode, no model is loaded."""
    from extraction.job import run_job

    if own.new:
        _write_photos(own.folder / ".parts" / ROUND, own.photos)
        encoder = load()
        _check_model(own, encoder)
        run_job(own.plan(settings, encoder), encoder, settings)
    else:
        own.publish(own.stored.manifest, None)


def _check_model(own: Round, encoder: Encoder) -> None:
    before, now = own.stored.manifest.get("model"), encoder.identity
    if before and before != now:
        key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
        raise UserError(
            f"{own.folder} holds features of another model ({key} {before.get(key)}, now "
            f"{now.get(key)}); --overwrite encodes all photographs again"
        )


@dataclass(frozen=True)
class Round:
    """A folder as it was seen, what is stored of it, and the photographs that are to be encoded."""

    root: Path
    folder: Path
    stored: Stored
    photos: tuple[Photo, ...]
    new: tuple[Photo, ...]

    def stage(self, settings: Settings) -> FileStage:
        """The stage of the new photographs."""
        from extraction.parts import cut_ranges
        from extraction.stage import Rows
        from live.stage import PhotoStage

        stamps = hashlib.sha256(repr([photo.stamp for photo in self.new]).encode()).hexdigest()
        rows = Rows.of([p.path for p in self.new], self.root, range(1, len(self.new) + 1))
        return PhotoStage(
            name="database_image",
            rows=rows,
            units=cut_ranges(rows.count, settings.part_rows),
            fingerprint={"photographs": stamps, "pixels": PIXELS},
            dtype=settings.save_dtype,
            images=open_photo(self.root),
        )

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of a round."""
        from extraction.job import Job
        from extraction.manifest import describe, identify
        from extraction.parts import Parts

        stage, parts = self.stage(settings), Parts(self.folder / ".parts")
        manifest = describe(settings, encoder, "photographs", self.folder.name)
        manifest |= {"pixels": PIXELS}

        def finish(summaries: dict[str, Summary]) -> None:
            self.publish(manifest, (stage, parts, encoder.dim, summaries["database_image"]))

        names = ("manifest.json", "photos.csv", "database.csv", "database_image.npy")
        return Job(
            title=self.folder.name,
            parts=parts,
            stages=[stage],
            identity=identify(settings, encoder),
            outputs=[self.folder / name for name in names],
            finish=finish,
        )

    def publish(self, manifest: dict, encoded: tuple | None) -> None:
        """Write the tables and the array of all that can be read, and last the manifest.

        encoded: the stage with its parts, the dimension and the summary; None: nothing is new.
        """
        from extraction.parts import drop_parts, write_array
        from utils_storage import MappedRows

        causes = dict(self.stored.cause_of)
        staging = self.folder / ".parts" / STAGING
        with publishing(staging, self.folder, last="manifest.json") as folder:
            sources, fresh = [], {}
            if self.stored.photos:
                sources.append((MappedRows(self.folder / "database_image.npy"), self.stored.row_of))
            if encoded:
                stage, parts, dim, summary = encoded
                numbers = {entry["row"] - 1: entry["cause"] for entry in summary.skipped}
                causes |= {self.new[number].stamp: cause for number, cause in numbers.items()}
                good = [p.stamp for n, p in enumerate(self.new) if n not in numbers]
                fresh = {stamp: row for row, stamp in enumerate(good)}
                if fresh:
                    write_array(folder.parent / "fresh.npy", stage, parts, dim, summary.keep)
                    sources.append((MappedRows(folder.parent / "fresh.npy"), fresh))
            kept = [photo for photo in self.photos if photo.stamp not in causes]
            bad = [p for p in self.photos if p.stamp in causes]
            if not kept:
                drop_parts(self.folder / ".parts")  # once one is mended, a round is to begin
                cause = f"{bad[0].path}: {causes[bad[0].stamp]}"
                raise UserError(f"{self.root}: no photograph can be read, the first is {cause}")
            _merge(folder / "database_image.npy", [photo.stamp for photo in kept], sources)
            write_csv(folder / "database.csv", ["image_path"], ([p.path] for p in kept))
            named = [Photo(*photo.stamp, causes[photo.stamp]) for photo in bad]
            _write_photos(folder / "photos.csv", [*kept, *named])
            skipped = [{"image_path": p.path, "cause": p.cause} for p in named]
            counts = {"database": len(kept)}
            write_json(
                folder / "manifest.json",
                manifest | {"counts": counts, "skipped": skipped},
            )


def _merge(path: Path, stamps: Sequence[tuple], sources: Sequence[tuple]) -> None:
    """Write the rows of these stamps, each from the source, (rows, {stamp: row}), that has it."""
    rows, dtype = sources[0][0], sources[0][0].dtype
    target = np.lib.format.open_memmap(path, "w+", dtype, (len(stamps), rows.shape[1]))
    for start in range(0, len(stamps), ROWS_AT_ONCE):
        some = stamps[start : start + ROWS_AT_ONCE]
        for rows, row_of in sources:
            here = [place for place, stamp in enumerate(some) if stamp in row_of]
            found = np.array([row_of[some[place]] for place in here], np.int64)
            target[start + np.array(here, np.int64)] = rows.read(found)
    target.flush()
