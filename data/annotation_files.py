"""The annotation files of CIRR, CIRCO, FashionIQ and GeneCIS at their publishers' repositories."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Run from a script, Python looks for modules in data/; the shared ones lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import find_folder, list_benchmarks, missing_images
from utils import UserError

RAW_URL = "https://raw.githubusercontent.com"
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Repository:
    """A publisher's repository at one commit.

    files: path there -> git blob id; None where no copy was at hand to take it from: such a file
    is checked to be whole JSON. inner: the folder, below the data set's, that they are put in.
    """

    name: str
    commit: str
    files: Mapping[str, str | None]
    licence: str
    inner: str = "."

    @property
    def url(self) -> str:
        """What the paths are appended to."""
        return f"{RAW_URL}/{self.name}/{self.commit}"


REPOSITORIES = {
    "cirr": Repository(
        "Cuberick-Orion/CIRR",
        "910278c29d2a5602eae0119d6af906c3bae366bc",
        {
            "captions/cap.rc2.val.json": "0c65c92cb41ec1aee226df91ed4b2851a774a9b4",
            "captions/cap.rc2.test1.json": "e34a010f4e5e3fefee931a99c59a0aa4775b8ece",
            "image_splits/split.rc2.val.json": "0d147941d0b476e9057d2781b2302e36fff06e7b",
            "image_splits/split.rc2.test1.json": "24548fffcc44b99a86ecdfbb9fdb415fb6f90811",
        },
        "MIT",
        inner="cirr",
    ),
    "circo": Repository(
        "miccunifi/CIRCO",
        "6db0150476ffcee0f60ea1d8fb04d15e6845f5db",
        {
            "annotations/val.json": "ae56f48ff7ddda4c7e5018aca72602ca85dfe3b3",
            "annotations/test.json": "968f113f016f451112472aa993c5afab29172b87",
        },
        "CC BY-NC 4.0",
    ),
    "fashioniq": Repository(
        "XiaoxiaoGuo/fashion-iq",
        "f71b16c3b09ef03b02c0fed160fa072fb3b8aa16",
        {
            "captions/cap.dress.val.json": "8058b4f6939644bb74956d488fe83b927d8b1d75",
            "captions/cap.shirt.val.json": "deb212a7a20fb8da5d09fe96cff109439090b2e1",
            "captions/cap.toptee.val.json": "da6e44a6c2af25e46aba791b09519263049fafcf",
            "image_splits/split.dress.val.json": "043c875df540c80b1c9b04313d971fee0d97f97a",
            "image_splits/split.shirt.val.json": "e7eda347d43305a0251a9828d9d97db57aadf9d1",
            "image_splits/split.toptee.val.json": "a45be27ee3f244bb793725fa058b897fec583311",
        },
        "CDLA",
    ),
    "genecis": Repository(
        "facebookresearch/genecis",
        "0c5c968c01b8ccffcc0990af2b430d21d7a12f49",
        {
            "genecis/focus_attribute.json": None,
            "genecis/change_attribute.json": None,
            "genecis/focus_object.json": "8aa323433948d115beb48d18058208dff586edd0",
            "genecis/change_object.json": "f06e61063c121f1ec68bea021ab3b08887d517d5",
        },
        "CC BY-NC 4.0",
    ),
}


def place_annotations(target: str, data_dir: Path) -> dict[Path, tuple[str, str | None]]:
    """The files that a target brings: path here -> path in the repository, git blob id or None."""
    repository = REPOSITORIES[target]
    folder = find_folder(data_dir, target) / repository.inner
    return {folder / path: (path, digest) for path, digest in repository.files.items()}


def say_missing(missing: Sequence[str]) -> str:
    """How many images are missing, and the first few of them."""
    if not missing:
        return "all images are there"
    more = ", ..." if len(missing) > NAMES_SHOWN else ""
    return f"{len(missing)} images are missing: {', '.join(missing[:NAMES_SHOWN])}{more}"


def describe_images(target: str, data_dir: Path) -> list[str]:
    """Lines that say, for each task of a target, which images are missing, and how to get them."""
    lines, how_to_get = [], ""
    root = find_folder(data_dir, target)
    for name, benchmark in list_benchmarks().items():
        if benchmark.folder.get(name, name) != target:
            continue
        try:
            missing = missing_images(benchmark, benchmark.tasks[name](root), root)
        except UserError as error:
            lines.append(f"{name}: {error}")
            continue
        lines.append(f"{name}: {say_missing(missing)}")
        how_to_get = benchmark.how_to_get if missing else how_to_get
    return [*lines, how_to_get] if how_to_get else lines
