"""The task of a data set, and its images, read straight from the publisher's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import find_dataset
from utils_datasets import SPLITS, ImageStore

if TYPE_CHECKING:
    from utils_task import Task


@dataclass(frozen=True)
class Reader:
    """Reads the encoded images of a data set, in files or in shards, by their paths."""

    store: ImageStore

    def __call__(self, path: str) -> bytes:
        """Raises FileNotFoundError if neither split has the image."""
        for split in SPLITS[:-1]:
            try:
                return self.store.read(split, path)
            except FileNotFoundError:
                continue
        return self.store.read(SPLITS[-1], path)


def open_task(dataset: str, data_dir: Path) -> tuple[Task, Reader]:
    """The task that --dataset names, and what reads its images.

    Raises UserError if the data set is not there or its annotations are not right.
    """
    found = find_dataset(dataset, data_dir)
    return found.read(found.root), Reader(found.images)
