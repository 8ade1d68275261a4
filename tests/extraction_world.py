"""A small data set in both of i-CIR's layouts, and the extraction command run on it."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ROOT / "create_features.py"
NATIVE = (
    *("query.csv", "query_image.npy", "query_text.npy", "query_context_text.npy"),
    *("database.csv", "database_image.npy", "manifest.json"),
)
DATABASE_ROWS = 100
SHARD_SAMPLES = 30


def draw_image(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """An image of smooth noise, another for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def make_rows() -> dict[str, list[tuple[str, str, str]]]:
    """12 composed queries of 5 images, and 100 database rows of 90 images, one row twice."""
    query = [
        (f"query/q {i % 5}.jpg", f'at "night", é{i % 4}' if i % 3 else f"text {i % 2}", f"o{i % 3}")
        for i in range(12)
    ]
    database = [
        (f"database/d{i % 90}.jpg", f"text {i % 2}" if i % 4 == 0 else "", f"o{i % 3}")
        for i in range(DATABASE_ROWS - 1)
    ]
    return {"query": query, "database": [*database, database[7]]}


def write_rows(path: Path, rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shards(root: Path, split: str, rows: list, images: dict[str, bytes]) -> None:
    """Shards in another order than the rows; paths there begin with the data set's name."""
    folder = root / "webdataset" / split
    folder.mkdir(parents=True, exist_ok=True)
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    for shard, start in enumerate(range(0, len(order), SHARD_SAMPLES)):
        with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w") as tar:
            for number in order[start : start + SHARD_SAMPLES]:
                path, text, instance = rows[number]
                label = {"img_path": f"{root.name}/{path}", "text": text or None}
                add_member(tar, f"{number:06d}.jpg", images[path])
                label = json.dumps(label | {"instance": instance})
                add_member(tar, f"{number:06d}.json", label.encode())


def make_world(folder: Path) -> Path:
    """Write the data set `shop` and two small corpora; returns the folder."""
    root = folder / "data" / "shop"
    for split, rows in make_rows().items():
        paths = sorted({row[0] for row in rows})
        images = {path: encode_jpeg(draw_image(seed)) for seed, path in enumerate(paths)}
        write_rows(root / f"{split}_files.csv", rows)
        write_rows(root / "annotations" / f"{split}_files.csv", rows)
        for path, data in images.items():
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(data)
        write_shards(root, split, rows, images)
    write_rows(folder / "corpora" / "generic_subjects.csv", [("mug",), ("cup, blue",), ("hat",)])
    write_rows(folder / "corpora" / "generic_styles.csv", [("old",), ("wet",), ("old",)])
    return folder


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, so that tests do not slow one another down."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


def arguments(clip: Path, *flags: str, dataset: str = "shop") -> list[str]:
    """The command line of an extraction on the CPU, in a world's folder."""
    always = ("--backbone", f"local-dir:{clip}", "--gpu", "-1", "--batch", "8")
    return [str(COMMAND), "--dataset", dataset, *always, *flags]


def run(
    world: Path, clip: Path, *flags: str, dataset: str = "shop", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a world's folder, with some environment variables."""
    return subprocess.run(
        [sys.executable, *arguments(clip, *flags, dataset=dataset)],
        cwd=world,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_folder(world: Path, clip: Path, features: str, dataset: str = "shop") -> Path:
    from utils_backbones import backbone_folder

    return world / features / backbone_folder(f"local-dir:{clip}") / dataset


def native_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of every finished file of a data set's features.

    The manifest's note of the toolkit's version is left out: a commit may come between two runs.
    """
    found = {name: (folder / name).read_bytes() for name in NATIVE}
    manifest = found["manifest.json"].splitlines(keepends=True)
    found["manifest.json"] = b"".join(line for line in manifest if b'"toolkit"' not in line)
    return found
