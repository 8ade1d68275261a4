"""FashionIQ (CVPR 2021): three categories of clothes, two captions a query.

Layout: captions/cap.{dress,shirt,toptee}.val.json (or json/ for captions/),
image_splits/split.*.val.json, images/<ASIN>.jpg or .png.

A query searches its category: the whole split (fashioniq), or the candidates and targets of the
category's queries alone (fashioniq_small, the "VAL" protocol). The reference stays in the gallery;
some papers leave it out: a second view. The average is that of the categories.

The two captions are stripped of ".?, " at both ends and joined by "and", in both orders, whose unit
features are averaged (as SEARLE does); fashioniq_forward and fashioniq_reversed take one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

from benchmarks import Benchmark
from benchmarks.annotations import (
    Entry,
    find_annotations,
    first_found,
    hash_sources,
    read_entries,
    read_names,
)
from utils import UserError
from utils_captions import join_captions
from utils_startup import Late
from utils_task import Column, Group, Images, QueryTable, SetBuilder, Task, View

np = Late("numpy")

HOW_TO_GET = (
    "the annotations come with `python3 data/download.py fashioniq`; the pictures are Amazon's, "
    "listed by https://github.com/hongwang600/fashion-iq-metadata: put <ASIN>.jpg or .png into "
    "data/fashioniq/images"
)
CATEGORIES = ("dress", "shirt", "toptee")
ENDINGS = (".jpg", ".png", ".jpeg")
CATEGORY_MEAN = (Group("category"),)
COLUMNS = (
    *(Column(f"R@{k}", f"Hit@{k}", groups=CATEGORY_MEAN) for k in (10, 50)),
    *(
        Column(f"{category} R@{k}", f"Hit@{k}", groups=(Group("category", only=category),))
        for category in CATEGORIES
        for k in (10, 50)
    ),
    *(Column(f"R@{k} reference out", f"Hit@{k}", "reference_out", CATEGORY_MEAN) for k in (10, 50)),
)


def join_both(first: str, second: str) -> tuple[str, ...]:
    return join_forward(first, second) + join_reversed(first, second)


def join_forward(first: str, second: str) -> tuple[str, ...]:
    return (join_captions(first, second),)


def join_reversed(first: str, second: str) -> tuple[str, ...]:
    return join_forward(second, first)


@dataclass(frozen=True)
class _Category:
    """A category's annotations. files: captions and split; names: ASIN -> its number."""

    label: str
    files: tuple[Path, Path]
    entries: list[Entry]
    names: dict[str, int]

    @classmethod
    def read(cls, root: Path, label: str) -> _Category:
        names = (f"{folder}/cap.{label}.val.json" for folder in ("captions", "json"))
        captions = find_annotations(root, names, HOW_TO_GET)
        split = find_annotations(root, (f"image_splits/split.{label}.val.json",), HOW_TO_GET)
        return cls(label, (captions, split), read_entries(captions), read_names(split))

    def paths(self) -> list[str]:
        return [f"images/{asin}.jpg" for asin in self.names]

    def rows_asked(self, first: int) -> list[tuple[int, int]]:
        """The rows of each query's candidate (the reference) and target, counted from first."""
        return [
            tuple(first + entry.find(key, str, self.names) for key in ("candidate", "target"))
            for entry in self.entries
        ]


def read(root: Path, name: str, small: bool, join=join_both) -> Task:
    """The task of the val split; raises UserError for annotations that are not right.

    small: of each category's split, only the candidates and targets are searched. join(first,
    second): the phrases of a query.
    """
    parts = [_Category.read(root, label) for label in CATEGORIES]
    entries = [entry for part in parts for entry in part.entries]
    category = [part.label for part in parts for _ in part.entries]
    sets, first = SetBuilder(), 0
    pools, candidates, targets = [], [], []
    for part in parts:
        asked = part.rows_asked(first)
        last = first + len(part.names)
        pools += [sets({*chain(*asked)} if small else range(first, last))] * len(asked)
        candidates += [sets([row]) for row, _ in asked]
        targets += [sets([row]) for _, row in asked]
        first = last
    pairs = [_captions(entry) for entry in entries]
    phrases = [join(*pair) for pair in pairs]
    positives, reference = np.array(targets, np.int64), np.array(candidates, np.int64)
    return Task(
        name=name,
        gallery=Images(
            [path for part in parts for path in part.paths()],
            shared="fashioniq_images",
            own_mode=True,
        ),
        queries=QueryTable(
            key=_keys(category),
            images=[(f"images/{entry.content['candidate']}.jpg",) for entry in entries],
            text=[own[0] for own in phrases],
            texts=phrases if len(phrases[0]) > 1 else None,
            fields={"first": [a for a, _ in pairs], "second": [b for _, b in pairs]},
            tags={"category": category},
        ),
        sets=sets.done(),
        pool=np.array(pools, np.int64),
        views={"all": View(positives), "reference_out": View(positives, excluded=reference)},
        columns=COLUMNS,
        sources=hash_sources(root, chain(*(part.files for part in parts))),
        prompts="fashioniq",
        spares_rows=small,
    )


def _captions(entry: Entry) -> tuple[str, str]:
    captions = entry.each("captions", str)
    if len(captions) != 2:
        raise UserError(f"{entry.place}: 'captions' holds {len(captions)} captions, not 2")
    return tuple(captions)


def _keys(category: list[str]) -> list[str]:
    """Category and number in its file, from 0."""
    return [f"{label}-{number - category.index(label)}" for number, label in enumerate(category)]


def locate(root: Path, path: str) -> Path:
    """The file of an image, whatever its ending."""
    stem = path.rpartition(".")[0]
    return first_found(root, (f"{stem}{ending}" for ending in ENDINGS))


GALLERIES = {"": False, "_small": True}
ORDERS = {"": join_both, "_forward": join_forward, "_reversed": join_reversed}
TASKS = {
    f"fashioniq{size}{order}": partial(read, small=GALLERIES[size], join=ORDERS[order])
    for size, order in product(GALLERIES, ORDERS)
}
BENCHMARK = Benchmark(
    tasks={name: partial(reader, name=name) for name, reader in TASKS.items()},
    how_to_get=HOW_TO_GET,
    folder=dict.fromkeys(TASKS, "fashioniq"),
    locate=locate,
)
