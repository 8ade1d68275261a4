"""Benchmarks, found by folder: every module here that holds a BENCHMARK is one, or a family.

A benchmark's file reads the publisher's layout into a Task (utils_task.py) and says where its
images lie. Nothing else knows its name. The modules import neither torch nor PIL at the top.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError, last_part, say
from utils_backbones import own_data
from utils_datasets import RESERVED_NAMES, Dataset, ImageStore

if TYPE_CHECKING:
    from utils_task import Task


# What the name of a data set ends in, of which only the first N rows were extracted.
LIMITED = re.compile(r"_first\d+$")


class NoDataset(UserError):
    """There is no data set of that name or in that folder, which a wrong one is not."""


def image_below(root: Path, path: str) -> Path:
    """The file of an image: its path below the data set's folder."""
    return root / path


def find_folder(data_dir: Path, name: str) -> Path:
    """A data set's folder, which may be written otherwise: "CIRR", "fashionIQ", "Fashion-IQ"."""
    folder = data_dir / name
    if not folder.exists() and data_dir.is_dir():
        written = [
            own for own in sorted(data_dir.iterdir()) if _letters(own.name) == _letters(name)
        ]
        folder = next(iter(written), folder)
    return folder


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in "-_ ")


@dataclass(frozen=True)
class Layout:
    """A form of submission file: JSON, constant entries, then each query's images, best first.

    name: an image's path -> its name in the file; header: the constant entries.
    """

    name: Callable[[str], str | int]
    header: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's file offers.

    tasks: name of --dataset -> reader, task = read(root). folder: of the data set below the data
    folder (see find_folder), by name of --dataset (names that are absent have their own name as
    folder). how_to_get: the line that says where annotations and images come from. locate(root,
    path): the file of an image of the task. submissions: layout of a Submission -> its form.

    fits(root): whether a folder of one's own is in this form, which `read` then reads, and whose
    name `name_of` gives; None where there is no such form; place_of(root, path): the file and line
    of it that name an image of the task first, None where no file does. labelled: features are in
    i-CIR's form (a row a query and a gallery image, image_path,text,instance), and images may lie
    in shards.
    """

    tasks: Mapping[str, Callable[[Path], Task]]
    how_to_get: str
    folder: Mapping[str, str] = field(default_factory=dict)
    locate: Callable[[Path, str], Path] = image_below
    submissions: Mapping[str, Layout] = field(default_factory=dict)
    fits: Callable[[Path], bool] | None = None
    read: Callable[[Path], Task] | None = None
    name_of: Callable[[Path], str] = last_part
    place_of: Callable[[Path, str], str | None] | None = None
    labelled: bool = False


@dataclass(frozen=True)
class Found:
    """A data set that was found: the name of its features, its folder, and how it is read."""

    name: str
    root: Path
    benchmark: Benchmark
    read: Callable[[Path], Task]

    @property
    def is_published(self) -> bool:
        """Whether it goes by the name of a published data set."""
        return self.name in list_benchmarks()

    @property
    def images(self) -> ImageStore:
        """Its images, wherever they lie."""
        return ImageStore(Dataset(self.name, self.root), self.benchmark.locate)


@cache
def _benchmarks() -> dict[str, Benchmark]:
    """Every benchmark of this folder, by the name of its module."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    loaded = {name: importlib.import_module(f"{__name__}.{name}") for name in modules}
    return {name: own.BENCHMARK for name, own in loaded.items() if hasattr(own, "BENCHMARK")}


@cache
def list_benchmarks() -> dict[str, Benchmark]:
    """Every name of --dataset that a file of this folder offers, sorted, with its benchmark.

    Raises UserError if two files offer one name.
    """
    found: dict[str, Benchmark] = {}
    for module, benchmark in _benchmarks().items():
        for name in benchmark.tasks:
            if name in found:
                raise UserError(f"benchmarks/{module}.py: the name {name!r} is taken")
            found[name] = benchmark
    return dict(sorted(found.items()))


def find_dataset(dataset: str, data_dir: Path) -> Found:
    """The published data set of that name, or the folder of one's own: under data_dir, or a path.

    Raises NoDataset if there is none, listing what exists and how to get the rest, and UserError
    if what names it is wrong.
    """
    published = list_benchmarks().get(dataset)
    if published:
        folder = find_folder(data_dir, published.folder.get(dataset, dataset))
        root = own_data(folder, published.fits or Path.is_dir)
        if root.is_dir():
            return Found(dataset, root, published, published.tasks[dataset])
    for root in _places(dataset, data_dir):
        if root.is_dir():
            return _read_form(root)
    forms = [published] if published else _own_forms()
    raise NoDataset(
        f"no data set {dataset!r}: neither {data_dir / dataset} nor {dataset} is a folder (data "
        f"sets under {data_dir}: {', '.join(list_folders(data_dir)) or 'none'}; published ones: "
        f"{', '.join(list_benchmarks())}); {'; '.join(form.how_to_get for form in forms)}"
    )


def _places(dataset: str, data_dir: Path) -> list[Path]:
    """Where a folder of one's own may lie: what begins with a dot is no name below data_dir."""
    below = [] if dataset.startswith(".") else [data_dir / dataset]
    return [*below, Path(dataset)] if dataset else []


def _own_forms() -> list[Benchmark]:
    return [benchmark for benchmark in _benchmarks().values() if benchmark.fits]


def _read_form(root: Path) -> Found:
    """A folder of one's own, in whichever form it is."""
    for form in _own_forms():
        if form.fits(root):
            name = form.name_of(root)
            if name in RESERVED_NAMES:
                raise UserError(
                    f"{root}: a data set cannot be called {name!r}, that name is taken under "
                    "features/; rename the folder"
                )
            if list_benchmarks().get(name, form) is not form:
                raise UserError(
                    f"{root}: a data set of one's own cannot be called {name!r}, as a published "
                    "one is, to whose features and results it would go; choose another name"
                )
            return Found(name, root, form, form.read)
    raise NoDataset(f"{root} is no data set: {'; '.join(form.how_to_get for form in _own_forms())}")


def list_folders(data_dir: Path) -> list[str]:
    """Names of the folders under data_dir that are data sets of one's own form, sorted."""
    folders = sorted(data_dir.iterdir()) if data_dir.is_dir() else ()
    return [own.name for own in folders if any(form.fits(own) for form in _own_forms())]


def find_images(dataset: str, data_dir: Path) -> ImageStore:
    """The images of a data set given by name or folder; for NAME_firstN, failing that, of NAME.

    Where it is not on this machine, a store that holds no image, which stderr says.
    """
    try:
        return find_dataset(dataset, data_dir).images
    except UserError as error:
        whole = LIMITED.sub("", dataset)
        if whole != dataset:
            return find_images(whole, data_dir)
        say(f"{error}; the report names the images that it cannot show", error=True)
        name = last_part(dataset)
        return ImageStore(Dataset(name, data_dir / name))


def missing_images(benchmark: Benchmark, task: Task, root: Path) -> list[str]:
    """The paths of a task's images whose files are not there, each once, the gallery's first."""
    queries = (path for own in task.queries.images for path in own)
    distinct = dict.fromkeys([*task.gallery.path, *queries])
    return [path for path in distinct if not benchmark.locate(root, path).is_file()]


def read_task(dataset: str, data_dir: Path) -> Task:
    """The task of a data set. Raises UserError as find_dataset does, or for wrong annotations."""
    found = find_dataset(dataset, data_dir)
    return found.read(found.root)
