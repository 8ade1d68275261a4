"""Make the tiny data set: `python3 data/tiny/make_split.py [--seed N] [--out DIR]`.

Writes i-CIR's two layouts side by side, images in folders with their CSV files and WebDataset
shards. Every image has a seed of its own, a hash of what it is, so that changing one kind of
image leaves the others as they were. A split that is already there is left alone, that of another
seed is replaced with --overwrite alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from captions import describe
from PIL import Image
from render import FAMILIES, SCENES, STYLES, Thing, draw_thing, render

HERE = Path(__file__).resolve().parent

# The difficulty of the split. It was set before any method was run on it.
INSTANCES = 24
QUERY_IMAGES = 4
TEXTS = 3
POSITIVES = 4  # per text: the thing itself, as the text says
VISUAL = 24  # the thing itself, in styles of no query text
TEXTUAL = 12  # per text: a thing of another family, as the text says
COMPOSED = 10  # per text: another thing of the same family, as the text says
RANDOM = 48  # another family, in styles of no query text
COMPOSED_DIFFERS = 2  # attributes at least, the main colour always one of them

SHARD_SAMPLES = 1000
STAMP = "annotations/split.json"
OUTPUTS = ("query", "database", "webdataset", "annotations")


@dataclass(frozen=True)
class Picture:
    """One image to render; `text` as its row of the annotation says (none for most negatives)."""

    path: str
    thing: Thing
    style: str
    seed: int
    text: str = ""


@dataclass(frozen=True)
class Instance:
    name: str
    thing: Thing
    texts: dict[str, str]  # query text by style
    queries: list[Picture]
    database: list[Picture]


def _seed(*parts: object) -> int:
    """The seed that belongs to a name: the same on every machine, unlike any other name's."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") | 1 << 50  # apart from the training world's


def _other_family(rng: np.random.Generator, thing: Thing) -> Thing:
    family = str(rng.choice([f for f in FAMILIES if f != thing.family]))
    return draw_thing(rng, held_out=True, family=family)


def _look_alike(rng: np.random.Generator, thing: Thing) -> Thing:
    while True:
        other = draw_thing(rng, held_out=True, family=thing.family)
        pairs = zip(other.combination, thing.combination, strict=True)
        if other.colour != thing.colour and sum(a != b for a, b in pairs) >= COMPOSED_DIFFERS:
            return other


def plan_instance(seed: int, number: int, family: str) -> Instance:
    """Decide everything about one instance and its database, without rendering."""
    name = f"{number:02d}_{family.replace(' ', '_')}"
    rng = np.random.default_rng(_seed(seed, name, "instance"))
    thing = draw_thing(rng, held_out=True, family=family)
    targets = [str(s) for s in rng.choice(list(STYLES), TEXTS, replace=False)]
    texts = {style: str(rng.choice(STYLES[style].phrases)) for style in targets}
    others = [style for style in STYLES if style not in targets]
    places = [style for style in SCENES if style not in targets]

    def picture(split: str, kind: str, index: int, style: str | None) -> Picture:
        """Draw one image's thing, style and text from that image's own seed."""
        own = _seed(seed, name, kind, style or "", index)
        draw = np.random.default_rng(own)
        text = ""
        if kind == "positive":
            shown, text = thing, texts[style]
        elif kind in ("query", "visual"):
            shown = thing
        elif kind == "composed":
            shown = _look_alike(draw, thing)
        else:
            shown = _other_family(draw, thing)
        if style is None:
            style = str(draw.choice(others))
        if kind in ("textual", "composed"):  # a negative with a text of its own
            text = f"{describe(shown, draw)[0]}, {draw.choice(STYLES[style].phrases)}"
        count = f"{targets.index(style) if style in targets else 0}{index:02d}"
        return Picture(f"{split}/{name}/{kind}_{count}.png", shown, style, own, text)

    scenes = [str(s) for s in rng.choice(places, QUERY_IMAGES, replace=False)]
    queries = [picture("query", "query", i, style) for i, style in enumerate(scenes)]
    per_text = (("positive", POSITIVES), ("textual", TEXTUAL), ("composed", COMPOSED))
    database = [
        picture("database", kind, i, style)
        for kind, count in per_text
        for style in targets
        for i in range(count)
    ]
    for kind, count in (("visual", VISUAL), ("random", RANDOM)):
        database += [picture("database", kind, i, None) for i in range(count)]
    order = np.random.default_rng(_seed(seed, name, "order")).permutation(len(database))
    return Instance(name, thing, texts, queries, [database[i] for i in order])


def plan_split(seed: int) -> list[Instance]:
    """The instances of a split, one family each."""
    rng = np.random.default_rng(_seed(seed, "families"))
    families = [str(f) for f in rng.permutation(list(FAMILIES))[:INSTANCES]]
    return [plan_instance(seed, i, family) for i, family in enumerate(families)]


def _render_pictures(pictures: Sequence[Picture]) -> list[tuple[bytes, bytes]]:
    """PNG bytes and SHA-256 of the raw pixels of each picture."""
    made = []
    for picture in pictures:
        pixels = render(picture.thing, picture.style, picture.seed)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=3)
        made.append((file.getvalue(), hashlib.sha256(pixels.tobytes()).digest()))
    return made


def _write_csv(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(
    folder: Path, split: str, rows: Sequence[tuple[str, str, str]], images: dict[str, bytes]
) -> None:
    """Write the rows as WebDataset samples, in an order of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(_seed(split, "shards")).permutation(len(rows))
    for start in range(0, len(order), SHARD_SAMPLES):
        shard = folder / f"{split}-{start // SHARD_SAMPLES:06d}.tar"
        with tarfile.open(shard, "w") as tar:
            for row in order[start : start + SHARD_SAMPLES]:
                path, text, instance = rows[row]
                content = {"img_path": path, "text": text, "instance": instance}
                _add_member(tar, f"{row:06d}.png", images[path])
                _add_member(tar, f"{row:06d}.json", json.dumps(content).encode())


def _source_hash() -> str:
    digest = hashlib.sha256()
    for name in ("render.py", "captions.py", "make_split.py"):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def _read_stamp(out: Path) -> dict | None:
    try:
        return json.loads((out / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _write_stamp(out: Path, stamp: dict) -> None:
    (out / STAMP).parent.mkdir(parents=True, exist_ok=True)
    (out / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def is_made(out: Path, seed: int) -> bool:
    """Whether this very split is in `out`, whole as far as its count of files tells."""
    stamp = _read_stamp(out)
    if not stamp or not stamp["complete"] or stamp["seed"] != seed:
        return False
    files = sum(1 for split in ("query", "database") for _ in (out / split).glob("*/*.png"))
    shards = len(list((out / "webdataset").glob("*/*.tar")))
    tables = all((out / f"{split}_files.csv").is_file() for split in ("query", "database"))
    return (
        stamp["source"] == _source_hash()
        and tables
        and (files, shards) == (stamp["images"], stamp["shards"])
    )


def make_split(out: Path, seed: int, workers: int) -> dict:
    """Render the split into `out`, in both layouts; gives the stamp that is left beside it."""
    stamp = {"seed": seed, "source": _source_hash(), "complete": False}
    for name in OUTPUTS:
        shutil.rmtree(out / name, ignore_errors=True)
    _write_stamp(out, stamp)
    instances = plan_split(seed)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        made = list(pool.map(_render_pictures, [[*i.queries, *i.database] for i in instances]))
    images, pixels = {}, hashlib.sha256()
    for instance, results in zip(instances, made, strict=True):
        (out / "query" / instance.name).mkdir(parents=True)
        (out / "database" / instance.name).mkdir(parents=True)
        pictures = [*instance.queries, *instance.database]
        for picture, (png, digest) in zip(pictures, results, strict=True):
            (out / picture.path).write_bytes(png)
            images[picture.path] = png
            pixels.update(digest)
    rows = {
        "query": [
            (p.path, text, i.name)
            for i in instances
            for p in i.queries
            for text in i.texts.values()
        ],
        "database": [(p.path, p.text, i.name) for i in instances for p in i.database],
    }
    for split, table in rows.items():
        _write_csv(out / f"{split}_files.csv", table)
        _write_csv(out / "annotations" / f"{split}_files.csv", table)
        write_shards(out / "webdataset" / split, split, table, images)
    stamp |= {
        "complete": True,
        "images": len(images),
        "shards": len(list((out / "webdataset").glob("*/*.tar"))),
        "pixels": pixels.hexdigest(),
    }
    _write_stamp(out, stamp)
    return stamp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="another seed is another split")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the split of another seed"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that render")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers: at least one renders")
    if is_made(args.out, args.seed):
        print(f"{args.out}: the split of seed {args.seed} is already there")
        return
    stamp = _read_stamp(args.out)
    foreign = args.out.resolve() != HERE and args.out.exists() and any(args.out.iterdir())
    if foreign and stamp is None:
        parser.error(f"{args.out} holds something else; give --out a new or an empty folder")
    if stamp and stamp.get("seed") != args.seed and not args.overwrite:
        parser.error(
            f"{args.out} holds the split of seed {stamp.get('seed')}; give --out another folder, "
            "or --overwrite to replace it"
        )
    if stamp:
        print(f"{args.out}: the split there is replaced, as it is another or not whole")
    stamp = make_split(args.out, args.seed, args.workers)
    print(f"{args.out}: {stamp['images']} images, pixels {stamp['pixels'][:16]}")


if __name__ == "__main__":
    main()
