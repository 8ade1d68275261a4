"""The images of a data set, in folders or inside tar shards.

    ROOT/webdataset/{query,database}/{split}-NNNNNN.tar    the shards

ROOT is {data_dir}/NAME, or any folder of one's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError, open_regular, read_bytes

SPLITS = ("query", "database")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# The formats that are decoded, by Pillow's names (MPO comes with JPEG): those of the data sets of
# this field. Others start programs (EPS), or decoders that hardly anything else tests.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
IMAGE_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, MPO or PPM"

SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")  # of a file

# Folder names that features/{backbone}/ needs for itself.
RESERVED_NAMES = ("corpus", "mean", "synthetic", "texts")


def is_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first of two rows that begin with an image's path is a header, by its shape.

    It names no file, but the second does; a single row is none.
    """
    first, second = ([*rows, [], []][number][:1] or [""] for number in (0, 1))
    is_path = bool(SUFFIX.search(first[0].strip()) or re.search(r"[/\\]", first[0]))
    return not is_path and bool(SUFFIX.search(second[0].strip()))


def slashed(path: str) -> str:
    """A path with slashes, also where Windows has written it."""
    return path.replace("\\", "/")


@dataclass(frozen=True)
class Dataset:
    """A data set: the name its features and results go by, and the folder that holds it."""

    name: str
    root: Path


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def find_image(dataset: Dataset, image_path: str) -> Path:
    """The file of an annotated image, relative to the data set's root or to the root's parent.

    Paths as the reference's feature files hold them (./data/icir/...) are found as well.
    Raises FileNotFoundError if it is in none of these places.
    """
    parent = Path(os.path.abspath(dataset.root)).parent
    for path in (
        dataset.root / image_path,
        parent / image_path,
        dataset.root / relative_image_path(dataset, image_path),
    ):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{image_path} is neither under {dataset.root} nor under its parent")


def relative_image_path(dataset: Dataset, image_path: str) -> str:
    """An annotated path without the leading folders of the data set, which any form may have."""
    return re.sub(rf"^(\./)?((data/)?{re.escape(dataset.name)}/)?", "", image_path)


def plain_path(dataset: Dataset, path: str) -> str:
    """The one form of a path that may be spelled in several ways."""
    plain = posixpath.normpath(relative_image_path(dataset, path))
    return unicodedata.normalize("NFC", plain)


def find_spellings(paths: Sequence[str], dataset: Dataset) -> dict[str, str]:
    """Paths -> the first one that names the same image, where that is another one.

    Those that differ in the leading folders of the data set alone may be two files.
    """
    first: dict[tuple[str, Path | None], str] = {}
    spelled: dict[str, str] = {}
    alike: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        alike.setdefault(plain_path(dataset, path), []).append(path)
    for plain, own in alike.items():
        for path in own if len(own) > 1 else ():
            known = first.setdefault((plain, _file_of(dataset, path)), path)
            if known != path:
                spelled[path] = known
    return spelled


def _file_of(dataset: Dataset, path: str) -> Path | None:
    """The file of an image, None of one in shards or of none."""
    with contextlib.suppress(FileNotFoundError):
        return find_image(dataset, path).resolve()
    return None


def list_shards(dataset: Dataset, split: str, how_to_get: str = "") -> list[Path]:
    """The tar shards of one split, in the order of their numbers. how_to_get: said of absent ones.

    Raises UserError if there is none, or if the numbering has a gap.
    """
    folder = dataset.root / "webdataset" / split
    pattern = re.compile(rf"{split}-(\d+)\.tar")
    files = folder.iterdir() if folder.is_dir() else ()
    shards: dict[int, Path] = {}
    for path in sorted(files):
        if match := pattern.fullmatch(path.name):
            if int(match[1]) in shards:
                raise UserError(f"{path} and {shards[int(match[1])]} have one number; remove one")
            shards[int(match[1])] = path
    if not shards:
        raise UserError(f"no {split}-NNNNNN.tar in {folder}; {how_to_get}")
    first = min(1, *shards)  # numbering starts at 0 or 1
    missing = sorted(set(range(first, max(shards))) - set(shards))
    if missing:
        names = ", ".join(f"{split}-{number:06d}.tar" for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"missing shards in {folder}: {names}{more}; {how_to_get}")
    return [shards[number] for number in sorted(shards)]


@dataclass(frozen=True)
class SampleSpelling:
    """What the image of a shard's sample, or of an annotated row, is known by.

    That is the path without the leading folders of the data set, which either may have; but where
    two annotated images differ in these folders alone, and the shards hold both, it is the
    annotated path itself behind "./". rows, samples: those paths, and what they are known by.
    """

    dataset: Dataset
    rows: Mapping[str, str]
    samples: Mapping[str, str]

    def of_row(self, image_path: str) -> str:
        """What an annotated image is known by."""
        return self._known(self.rows, image_path)

    def of_sample(self, image_path: str) -> str:
        """What the image of a sample is known by."""
        return self._known(self.samples, image_path)

    def _known(self, apart: Mapping[str, str], image_path: str) -> str:
        known = apart.get(image_path.removeprefix("./"))
        return known or relative_image_path(self.dataset, image_path)


def spell_samples(
    dataset: Dataset, image_paths: Iterable[str], shards: Sequence[Path]
) -> SampleSpelling:
    """How annotated paths and those in the shards are to be compared.

    The shards are looked through only where annotated paths differ in leading folders alone.
    """
    alike: dict[str, set[str]] = {}
    for path in image_paths:
        alike.setdefault(relative_image_path(dataset, path), set()).add(path.removeprefix("./"))
    groups = [paths for paths in alike.values() if len(paths) > 1]
    spelling = SampleSpelling(dataset, {}, {})
    if not groups:
        return spelling
    there = {path.removeprefix("./") for shard in shards for path, *_ in _read_places(shard)}
    for paths in groups:
        for lead in ("", f"{dataset.name}/", f"data/{dataset.name}/"):
            if all(f"{lead}{path}" in there for path in paths):
                spelling.rows.update((path, f"./{path}") for path in paths)
                spelling.samples.update((f"{lead}{path}", f"./{path}") for path in paths)
                break
    return spelling


@dataclass(frozen=True)
class ImageStore:
    """Random access to the images of a data set, wherever they lie.

    locate: the file of an image, by the data set's folder and the path; find_image where there is
    none. The places of the images inside the shards are read from the tar headers when a split is
    first asked for, once per process.
    """

    dataset: Dataset
    locate: Callable[[Path, str], Path] | None = None
    _places: dict[str, dict[str, tuple[Path, int, int]]] = field(default_factory=dict, repr=False)

    def read(self, split: str, image_path: str) -> bytes:
        """The encoded bytes of an annotated image.

        Raises FileNotFoundError if neither the folder nor the shards hold it.
        """
        try:
            return read_bytes(self._place(image_path))
        except FileNotFoundError:
            shard, offset, size = self._find_in_shards(split, image_path)
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def file(self, image_path: str) -> Path | None:
        """The file of an annotated image, None where it has none of its own."""
        try:
            path = self._place(image_path)
        except FileNotFoundError:
            return None
        return path if path.is_file() else None

    def _place(self, image_path: str) -> Path:
        if self.locate:
            return self.locate(self.dataset.root, image_path)
        return find_image(self.dataset, image_path)

    def _find_in_shards(self, split: str, image_path: str) -> tuple[Path, int, int]:
        if split not in self._places:
            self._places[split] = _index_shards(self.dataset, split)
        relative = relative_image_path(self.dataset, image_path)
        if relative not in self._places[split]:
            raise FileNotFoundError(
                f"{image_path} is neither a file of {self.dataset.root} nor in its {split} shards"
            )
        return self._places[split][relative]


def _index_shards(dataset: Dataset, split: str) -> dict[str, tuple[Path, int, int]]:
    """Where each image of a split lies: relative image path -> shard, offset and size in bytes."""
    folder = dataset.root / "webdataset" / split
    index = {}
    for shard in list_shards(dataset, split) if folder.is_dir() else ():
        for image_path, offset, size in _read_places(shard):
            index.setdefault(relative_image_path(dataset, image_path), (shard, offset, size))
    return index


def _read_places(shard: Path) -> Iterator[tuple[str, int, int]]:
    """The image path, offset and size of every sample of a shard (image and json members)."""
    paths, places = {}, {}
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")  # as webdataset splits a member's name
                key = (folder, stem)
                if extension.lower().rpartition(".")[2] == "json":
                    paths[key] = str(json.load(tar.extractfile(member))["img_path"])
                elif f".{extension.lower().rpartition('.')[2]}" in IMAGE_SUFFIXES:
                    places[key] = (member.offset_data, member.size)
    except Exception as error:  # tarfile's, the disk's, JSON's, a member without an img_path
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{shard} cannot be read ({reason}); fetch it again") from None
    for key, image_path in paths.items():
        if key in places:
            yield image_path, *places[key]
