"""Small annotation files in the layouts of CIRR, CIRCO, FashionIQ and GeneCIS, made up here."""

from __future__ import annotations

import json
from pathlib import Path

GROUPS = [[f"dev-{group}-{i}-img0" for i in range(6)] for group in range(2)]


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return root


def cirr() -> dict[str, object]:
    """Three queries over two groups of six; test1 is val without targets."""
    rows = [
        {
            "pairid": 100 + number,
            "reference": GROUPS[group][reference],
            "target_hard": GROUPS[group][target],
            "caption": f"caption {number}",
            "img_set": {"id": group, "members": GROUPS[group]},
        }
        for number, (group, reference, target) in enumerate([(0, 0, 1), (0, 2, 5), (1, 3, 0)])
    ]
    hidden = [{key: value for key, value in row.items() if key != "target_hard"} for row in rows]
    split = {name: f"./dev/{name}.png" for group in GROUPS for name in group}
    return {
        "cirr/captions/cap.rc2.val.json": rows,
        "cirr/captions/cap.rc2.test1.json": hidden,
        "cirr/image_splits/split.rc2.val.json": split,
        "cirr/image_splits/split.rc2.test1.json": split,
    }


def circo() -> dict[str, object]:
    """Two queries over 60 images; test is val without positives."""
    rows = [
        {
            "reference_img_id": 3,
            "target_img_id": 7,
            "relative_caption": "is red",
            "shared_concept": "a car",
            "gt_img_ids": [7, 9],
            "id": 0,
            "semantic_aspects": ["addition", "negation"],
        },
        {
            "reference_img_id": 7,
            "target_img_id": 1,
            "relative_caption": "has no wheels",
            "shared_concept": "a car",
            "gt_img_ids": [1],
            "id": 1,
            "semantic_aspects": ["addition"],
        },
    ]
    shown = ("reference_img_id", "relative_caption", "shared_concept", "id")
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(60, 0, -1)]
    return {
        "annotations/val.json": rows,
        "annotations/test.json": [{key: row[key] for key in shown} for row in rows],
        "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json": {"images": images},
    }


def fashioniq() -> dict[str, object]:
    """Two queries a category over five images, of which each category has the first in common."""
    files: dict[str, object] = {}
    for category in ("dress", "shirt", "toptee"):
        names = ["B0COMMON", *(f"B0{category.upper()}{number}" for number in range(4))]
        files[f"image_splits/split.{category}.val.json"] = names
        files[f"captions/cap.{category}.val.json"] = [
            {"candidate": names[1], "target": names[0], "captions": [" is red.", "is long, "]},
            {"candidate": names[0], "target": names[3], "captions": ["", "has dots?"]},
        ]
    return files


def genecis() -> dict[str, object]:
    """Two queries a task over galleries of three; one lists its target twice."""
    files: dict[str, object] = {}
    for task in ("focus_object", "change_object"):
        pictures = [{"val_image_id": number} for number in range(1, 7)]
        files[f"genecis/{task}.json"] = _rows(pictures)
    for task in ("focus_attribute", "change_attribute"):
        boxes = [[3.5, 20.5, 58.0, 55.5], [90, 22, 56, 53], [0, 0, 10, 10]] * 2
        pictures = [
            {"image_id": number, "instance_bbox": box} for number, box in enumerate(boxes, 1)
        ]
        files[f"genecis/{task}.json"] = _rows(pictures)
    return files


def _rows(pictures: list[dict]) -> list[dict]:
    a, b, c, d, e, f = pictures
    return [
        {"condition": "red", "reference": a, "target": b, "gallery": [c, d, e]},
        {"condition": "wood", "reference": f, "target": c, "gallery": [c, b, e]},
    ]
