"""Data sets on disk: annotations, images in folders, images inside tar shards.

    ROOT/query_files.csv                      the folder layout: rows image_path,text,instance
    ROOT/database_files.csv
    ROOT/annotations/{query,database}_files.csv            the same files, beside shards
    ROOT/webdataset/{query,database}/{split}-NNNNNN.tar    the shards

ROOT is {data_dir}/NAME, or any folder of one's own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils import UserError, last_part, read_csv, sha256_file

SPLITS = ("query", "database")
COLUMNS = ("image_path", "text", "instance")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Where the annotations may lie under a data set's root, the usual place first.
ANNOTATION_PLACES = {
    "folder": ("", "annotations"),
    "wds": ("annotations", "webdataset/annotations", ""),
}

# The command that brings a data set that is not there.
HOW_TO_GET = {
    "icir": "python3 data/download.py icir",
    "tiny": "python3 data/tiny/make_split.py",
}

# Folder names that features/{backbone}/ needs for itself.
RESERVED_NAMES = ("corpus", "mean", "synthetic", "texts")

# What the name of a data set ends in, of which only the first N rows were extracted.
LIMITED = re.compile(r"_first\d+$")


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """A data set: the name its features and results go by, and the folder that holds it."""

    name: str
    root: Path


def find_dataset(dataset: str, data_dir: str | Path) -> Dataset:
    """The data set of that name under data_dir or, failing that, the folder of that path.

    Raises UserError if there is neither, listing what exists and how to get the rest.
    """
    named = Path(data_dir) / dataset
    for root in (named, Path(dataset)):
        if dataset and root.is_dir():
            return Dataset(_dataset_name(root), root)
    found = ", ".join(list_datasets(data_dir)) or "none"
    raise UserError(
        f"no data set {dataset!r}: neither {named} nor {dataset} is a folder "
        f"(data sets under {data_dir}: {found}); {_advice(dataset)}"
    )


def list_datasets(data_dir: str | Path) -> list[str]:
    """Names of the folders under data_dir that hold annotations, sorted."""
    folders = Path(data_dir).iterdir() if Path(data_dir).is_dir() else ()
    places = {place for source in ANNOTATION_PLACES.values() for place in source}
    return sorted(
        folder.name
        for folder in folders
        if any((folder / place / "query_files.csv").is_file() for place in places)
    )


def _dataset_name(root: Path) -> str:
    name = last_part(root)
    if name in RESERVED_NAMES:
        raise UserError(
            f"{root}: a data set cannot be called {name!r}, that name is taken under features/; "
            "rename the folder"
        )
    return name


def _advice(name: str) -> str:
    if name in HOW_TO_GET:
        return f"get it with `{HOW_TO_GET[name]}`"
    return "a data set is a folder with query_files.csv and database_files.csv (see README.md)"


# ---------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotation:
    """The rows of one split in annotation order: image_paths[i], texts[i], instances[i] are row i.

    lines[i] is the line of the file at which row i begins, from 1; path, sha256: the file. A text
    may be empty in the database (a negative without one); an image path may occur in several rows.
    """

    split: str
    path: Path
    sha256: str
    image_paths: list[str]
    texts: list[str]
    instances: list[str]
    lines: list[int]

    def select(self, rows: Sequence[int]) -> Annotation:
        """Those rows, by number from 0."""
        columns = ("image_paths", "texts", "instances", "lines")
        return replace(self, **{c: [getattr(self, c)[row] for row in rows] for c in columns})


def read_annotation(dataset: Dataset, split: str, source: str) -> Annotation:
    """Read the annotation of one split ("query" or "database") for a source, "folder" or "wds".

    Raises UserError, naming file and row, if the file is absent, empty, not UTF-8, or has a row
    that is not image_path,text,instance.
    """
    path = _find_annotation(dataset, split, source)
    lines, rows = [], []
    for line, row in read_csv(path):
        _check_row(row, f"{path}, row {line}", split)
        lines.append(line)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: rows {','.join(COLUMNS)} are expected")
    image_paths, texts, instances = (list(column) for column in zip(*rows, strict=True))
    return Annotation(split, path, sha256_file(path), image_paths, texts, instances, lines)


def _find_annotation(dataset: Dataset, split: str, source: str) -> Path:
    places = [dataset.root / place for place in ANNOTATION_PLACES[source]]
    for place in places:
        if (place / f"{split}_files.csv").is_file():
            return place / f"{split}_files.csv"
    looked = " or ".join(str(place) for place in places)
    raise UserError(f"no {split}_files.csv in {looked}; {_advice(dataset.name)}")


def _check_row(row: list[str], where: str, split: str) -> None:
    columns = ",".join(COLUMNS)
    if len(row) != len(COLUMNS):
        raise UserError(
            f"{where}: {len(row)} columns where {len(COLUMNS)} are expected ({columns}); "
            "put double quotes around a value that holds a comma"
        )
    if tuple(row) == COLUMNS:
        raise UserError(f"{where}: the file takes no header line; remove it")
    if "\r" in "".join(row):
        raise UserError(f"{where}: a carriage return inside a value; remove it")
    image_path, text, instance = row
    if not image_path or not instance:
        raise UserError(f"{where}: the image path and the instance must not be empty ({columns})")
    if split == "query" and not text.strip():
        raise UserError(f"{where}: a query needs a text ({columns})")


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


def list_shards(dataset: Dataset, split: str) -> list[Path]:
    """The tar shards of one split, in the order of their numbers.

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
        raise UserError(f"no {split}-NNNNNN.tar in {folder}; {_advice(dataset.name)}")
    first = min(1, *shards)  # numbering starts at 0 or 1
    missing = sorted(set(range(first, max(shards))) - set(shards))
    if missing:
        names = ", ".join(f"{split}-{number:06d}.tar" for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"missing shards in {folder}: {names}{more}; {_advice(dataset.name)}")
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

    The places of the images inside the shards are read from the tar headers when a split is first
    asked for, once per process.
    """

    dataset: Dataset
    _places: dict[str, dict[str, tuple[Path, int, int]]] = field(default_factory=dict, repr=False)

    def read(self, split: str, image_path: str) -> bytes:
        """The encoded bytes of an annotated image.

        Raises FileNotFoundError if neither the folder nor the shards hold it.
        """
        try:
            return find_image(self.dataset, image_path).read_bytes()
        except FileNotFoundError:
            shard, offset, size = self._find_in_shards(split, image_path)
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _find_in_shards(self, split: str, image_path: str) -> tuple[Path, int, int]:
        if split not in self._places:
            self._places[split] = _index_shards(self.dataset, split)
        relative = relative_image_path(self.dataset, image_path)
        if relative not in self._places[split]:
            raise FileNotFoundError(
                f"{image_path} is neither a file of {self.dataset.root} nor in its {split} shards"
            )
        return self._places[split][relative]


def find_images(dataset: str, data_dir: str | Path) -> ImageStore:
    """The images of a data set given by name or folder; for NAME_firstN, failing that, of NAME.

    Where it is not on this machine, a store that holds no image, which stderr says.
    """
    try:
        return ImageStore(find_dataset(dataset, data_dir))
    except UserError as error:
        whole = LIMITED.sub("", dataset)
        if whole != dataset:
            return find_images(whole, data_dir)
        print(f"{error}; the report names the images that it cannot show", file=sys.stderr)
        name = last_part(dataset)
        return ImageStore(Dataset(name, Path(data_dir) / name))


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
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")  # as webdataset splits a member's name
            key = (folder, stem)
            if extension.lower().rpartition(".")[2] == "json":
                paths[key] = json.load(tar.extractfile(member))["img_path"]
            elif f".{extension.lower().rpartition('.')[2]}" in IMAGE_SUFFIXES:
                places[key] = (member.offset_data, member.size)
    for key, image_path in paths.items():
        if key in places:
            yield image_path, *places[key]
