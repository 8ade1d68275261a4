"""Benchmarks, found by folder: every module here that holds a BENCHMARK is one, or a family.

A benchmark's file reads the publisher's layout into a Task (utils_task.py) and says where its
images lie. Nothing else knows its name. The modules import neither torch nor PIL at the top.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError

if TYPE_CHECKING:
    from utils_task import Task


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
    """

    tasks: Mapping[str, Callable[[Path], Task]]
    how_to_get: str
    folder: Mapping[str, str] = field(default_factory=dict)
    locate: Callable[[Path, str], Path] = image_below
    submissions: Mapping[str, Layout] = field(default_factory=dict)


@cache
def list_benchmarks() -> dict[str, Benchmark]:
    """Every name of --dataset that a file of this folder offers, sorted, with its benchmark.

    Raises UserError if two files offer one name.
    """
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(__path__):
        benchmark = getattr(importlib.import_module(f"{__name__}.{module.name}"), "BENCHMARK", None)
        for name in benchmark.tasks if benchmark else ():
            if name in found:
                raise UserError(f"benchmarks/{module.name}.py: the name {name!r} is taken")
            found[name] = benchmark
    return dict(sorted(found.items()))


def missing_images(benchmark: Benchmark, task: Task, root: Path) -> list[str]:
    """The paths of a task's images whose files are not there, each once, the gallery's first."""
    queries = (path for own in task.queries.images for path in own)
    distinct = dict.fromkeys([*task.gallery.path, *queries])
    return [path for path in distinct if not benchmark.locate(root, path).is_file()]


def read_task(name: str, data_dir: Path) -> Task:
    """The task of a benchmark, read from its folder below data_dir.

    Raises UserError if there is no such benchmark, or its annotations are absent or wrong.
    """
    benchmark = list_benchmarks().get(name)
    if benchmark is None:
        raise UserError(f"{name!r} is no benchmark: there are {', '.join(list_benchmarks())}")
    return benchmark.tasks[name](find_folder(data_dir, benchmark.folder.get(name, name)))
