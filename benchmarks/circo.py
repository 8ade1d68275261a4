"""CIRCO (ICCV 2023): COCO's unlabelled images, several positives a query.

Layout: annotations/{val,test}.json; COCO2017_unlabeled/annotations/image_info_unlabeled2017.json,
whose every image is in the gallery, in file order; COCO2017_unlabeled/unlabeled2017/*.jpg.

mAP@k counts all positives, Recall@k the target alone, as the official script has it; the reference
stays in the gallery there, and some papers leave it out: a second view. test has no ground truth:
one file goes to the server.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath

from benchmarks import Benchmark, Layout
from benchmarks.annotations import (
    distinct_keys,
    find_annotations,
    first_found,
    hash_sources,
    list_entries,
    load_json,
    read_entries,
)
from utils import UserError
from utils_task import (
    Column,
    Group,
    Images,
    QueryTable,
    SetBuilder,
    Submission,
    Task,
    View,
    whole_gallery,
)

HOW_TO_GET = (
    "the annotations come with `python3 data/download.py circo`, the pictures are COCO's: "
    "http://images.cocodataset.org/zips/unlabeled2017.zip (19 GB) and http://images.cocodataset.org"
    "/annotations/image_info_unlabeled2017.zip, both unpacked into data/circo/COCO2017_unlabeled"
)
IMAGE_INFO = "annotations/image_info_unlabeled2017.json"
IMAGES = "unlabeled2017"
PLACES = ("COCO2017_unlabeled/", "")
KS = (5, 10, 25, 50)
LISTED = 50  # images of each query in a submission


def read(root: Path, name: str, split: str) -> Task:
    """The task of a split ("val", "test"); raises UserError for annotations that are not right."""
    annotations = find_annotations(root, (f"annotations/{split}.json",), HOW_TO_GET)
    image_info = find_annotations(root, (f"{place}{IMAGE_INFO}" for place in PLACES), HOW_TO_GET)
    entries = read_entries(annotations)
    paths, rows = _read_gallery(image_info)
    sets = SetBuilder()
    references = [entry.find("reference_img_id", int, rows) for entry in entries]
    hidden, tags = split == "test", {}
    views, columns = {"all": View(None)}, ()
    if not hidden:
        every = sets.each(entry.find_each("gt_img_ids", int, rows) for entry in entries)
        target = sets.each([entry.find("target_img_id", int, rows)] for entry in entries)
        reference = sets.each([row] for row in references)
        views = {
            "all": View(every),
            "target": View(target),
            "reference_out": View(every, excluded=reference),
        }
        tags = {"aspect": [tuple(entry.each("semantic_aspects", str)) for entry in entries]}
        columns = _columns(tags["aspect"])
    return Task(
        name=name,
        gallery=Images(paths, shared="circo_images", own_mode=True),
        queries=QueryTable(
            key=[str(number) for number in distinct_keys(entries, "id", int)],
            images=[(paths[row],) for row in references],
            text=[entry.get("relative_caption", str) for entry in entries],
            fields={"concept": [entry.get("shared_concept", str) for entry in entries]},
            tags=tags,
        ),
        sets=sets.done(),
        pool=whole_gallery(len(entries)),
        views=views,
        columns=columns,
        submissions=(Submission("submission.json", "all", LISTED, "ids"),),
        sources=hash_sources(root, (annotations, image_info)),
        prompts="circo",
    )


def _read_gallery(path: Path) -> tuple[list[str], dict[int, int]]:
    """The gallery's image paths, and id -> row."""
    content = load_json(path)
    if not isinstance(content, dict) or "images" not in content:
        raise UserError(f"{path} has no 'images'; fetch it again")
    images = list_entries(content["images"], str(path))
    rows = distinct_keys(images, "id", int)
    return [f"{PLACES[0]}{IMAGES}/{image.get('file_name', str)}" for image in images], rows


def _columns(aspects: list[tuple[str, ...]]) -> tuple[Column, ...]:
    names = sorted({name for own in aspects for name in own})
    return (
        *(Column(f"mAP@{k}", f"AP-S@{k}") for k in KS),
        *(Column(f"Recall@{k}", f"Hit@{k}", "target") for k in KS),
        *(Column(f"mAP@{k} reference out", f"AP-S@{k}", "reference_out") for k in KS),
        *(
            Column(f"mAP@10 {name}", "AP-S@10", groups=(Group("aspect", only=name),))
            for name in names
        ),
    )


def locate(root: Path, path: str) -> Path:
    """The file of an image."""
    inner = path.removeprefix(PLACES[0])
    return first_found(root, (f"{place}{inner}" for place in PLACES))


def image_id(path: str) -> int:
    """An image's id in a submission, from its file's name."""
    return int(PurePosixPath(path).stem)


BENCHMARK = Benchmark(
    tasks={
        "circo": partial(read, name="circo", split="val"),
        "circo_test": partial(read, name="circo_test", split="test"),
    },
    how_to_get=HOW_TO_GET,
    folder={"circo_test": "circo"},
    locate=locate,
    submissions={"ids": Layout(image_id)},
)
