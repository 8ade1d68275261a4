"""GeneCIS (CVPR 2023): {focus,change} on an {attribute,object}, a small gallery for each query.

Layout: genecis/{focus,change}_{attribute,object}.json (or without the inner genecis/);
coco2017/val2017/*.jpg for the object tasks, Visual_Genome/VG_All/*.jpg for the attribute tasks.

A query's gallery is its target and some distractors; one image may be there twice, and then is two
rows. The publisher's code lists the target first, which makes it win ties; here it loses them. In
the attribute tasks an image is a box around an instance, dilated and set on a black square. The
headline is the mean of R@1 over the four tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import Benchmark
from benchmarks.annotations import Entry, find_annotations, first_found, hash_sources, read_entries
from utils import UserError
from utils_startup import Late
from utils_task import WHOLE, Column, Group, Images, Picture, QueryTable, SetBuilder, Task, View

np = Late("numpy")

HOW_TO_GET = (
    "the annotations come with `python3 data/download.py genecis`, the pictures are those of COCO "
    "(http://images.cocodataset.org/zips/val2017.zip, into data/genecis/coco2017) and of Visual "
    "Genome 1.2 (https://homes.cs.washington.edu/~ranjay/visualgenome, all into "
    "data/genecis/Visual_Genome/VG_All)"
)
DILATION = 0.7  # of the box, to the left and upwards; the right and lower sides follow
PLACES = {  # folder of the task's paths -> where users have it
    "coco2017/val2017": ("coco2017/val2017", "coco/val2017", "val2017"),
    "Visual_Genome/VG_All": (
        "Visual_Genome/VG_All",
        *(
            f"{outer}{inner}"
            for outer in ("Visual_Genome/", "")
            for inner in ("VG_100K", "VG_100K_2")
        ),
    ),
}
KS = (1, 2, 3)
LARGEST = 1e9  # pixels of a box


def whole_image(entry: Entry) -> Picture:
    """An image of the object tasks."""
    return f"coco2017/val2017/{entry.get('val_image_id', int):012d}.jpg", WHOLE


def dilated_box(entry: Entry) -> Picture:
    """An image of the attribute tasks: the box is wider than the instance's, and lopsided.

    With [x, y, w, h]: from max(0, x - 0.7 w), 1.7 w wide, and likewise in height; corners are
    rounded half to even.
    """
    numbers = entry.get("instance_bbox", list)
    if len(numbers) != 4 or not all(map(_is_pixel, numbers)):
        raise UserError(f"{entry.place}: 'instance_bbox' is {str(numbers)[:80]}, not four numbers")
    x, y, width, height = numbers
    if min(width, height) <= 0:
        raise UserError(f"{entry.place}: 'instance_bbox' is {numbers}, which has no area")
    left, top = max(0.0, x - DILATION * width), max(0.0, y - DILATION * height)
    corners = left, top, left + (1 + DILATION) * width, top + (1 + DILATION) * height
    path = f"Visual_Genome/VG_All/{entry.get('image_id', int)}.jpg"
    return path, tuple(round(corner) for corner in corners)


def _is_pixel(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


TASKS = {
    "focus_attribute": dilated_box,
    "change_attribute": dilated_box,
    "focus_object": whole_image,
    "change_object": whole_image,
}


@dataclass
class _Rows:
    """The gallery as it grows: an image with its box, and again where one query lists it twice."""

    numbers: dict[tuple[Picture, int], int] = field(default_factory=dict)

    def of(self, pictures: Sequence[Picture]) -> list[int]:
        """The rows of a query's pictures, distinct ones."""
        seen: Counter[Picture] = Counter()
        rows = []
        for picture in pictures:
            key = picture, seen[picture]
            rows.append(self.numbers.setdefault(key, len(self.numbers)))
            seen[picture] += 1
        return rows

    def images(self) -> Images:
        """The gallery, in which the second listing of a picture is a copy of the first."""
        pictures = [picture for picture, _ in self.numbers]
        first = np.array([self.numbers[picture, 0] for picture in pictures], np.int64)
        is_copied = (first != np.arange(len(first))).any()
        return Images(
            [path for path, _ in pictures],
            box=_boxes(pictures),
            own_mode=True,
            copy_of=first if is_copied else None,
        )


def _boxes(pictures: Sequence[Picture]) -> np.ndarray | None:
    boxes = np.array([box for _, box in pictures], np.int64)
    return boxes if boxes.any() else None


def read(root: Path, name: str, tasks: Sequence[str]) -> Task:
    """One or several of the four tasks; raises UserError for annotations that are not right."""
    files = [
        find_annotations(root, (f"genecis/{task}.json", f"{task}.json"), HOW_TO_GET)
        for task in tasks
    ]
    rows, sets = _Rows(), SetBuilder()
    labels, entries, references, pools, targets = [], [], [], [], []
    for task, file in zip(tasks, files, strict=True):
        picture = TASKS[task]
        own = read_entries(file)
        for entry in own:
            shown = [picture(image) for image in [entry.of("target"), *entry.entries("gallery")]]
            numbers = rows.of(shown)
            pools.append(sets(numbers))
            targets.append(sets(numbers[:1]))
            references.append(picture(entry.of("reference")))
        entries += own
        labels += [task] * len(own)
    conditions = [entry.get("condition", str) for entry in entries]
    return Task(
        name=name,
        gallery=rows.images(),
        queries=QueryTable(
            key=[f"{task}-{number - labels.index(task)}" for number, task in enumerate(labels)],
            images=[(path,) for path, _ in references],
            text=conditions,
            box=_boxes(references),
            tags={"task": labels},
        ),
        sets=sets.done(),
        pool=np.array(pools, np.int64),
        views={"all": View(np.array(targets, np.int64))},
        columns=_columns(tasks),
        ties="worst",
        sources=hash_sources(root, files),
        prompts="genecis",
    )


def _columns(tasks: Sequence[str]) -> tuple[Column, ...]:
    overall = (Group("task"),)
    alone = [
        Column(f"{task} R@{k}", f"Hit@{k}", groups=(Group("task", only=task),))
        for task in tasks
        for k in KS
    ]
    return (
        *(Column(f"R@{k}", f"Hit@{k}", groups=overall) for k in KS),
        *(alone if len(tasks) > 1 else ()),
    )


def locate(root: Path, path: str) -> Path:
    """The file of an image."""
    folder, _, file = path.rpartition("/")
    return first_found(root, (f"{place}/{file}" for place in PLACES[folder]))


NAMES = {"genecis": tuple(TASKS)} | {f"genecis_{task}": (task,) for task in TASKS}
BENCHMARK = Benchmark(
    tasks={name: partial(read, name=name, tasks=tasks) for name, tasks in NAMES.items()},
    how_to_get=HOW_TO_GET,
    folder=dict.fromkeys(NAMES, "genecis"),
    locate=locate,
)
