"""Files damaged at random, and the readers that have to take or refuse them in one line."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conftest import SMALL_CLIP
from extraction_world import add_member, draw_image, encode_jpeg

from extraction.reading import read_samples
from utils import UserError, read_json
from utils_assets import load_mean, mean_path
from utils_model_files import check_config
from utils_pickles import load_pickle, read_array, read_labels, read_rows
from utils_pixels import BadImage, decode_image
from utils_storage import MappedRows


def _array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((4, 6), np.float32))
    return file.getvalue()


def _archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, mean=np.ones((1, 6), np.float32), manifest=np.array("{}"))
    return file.getvalue()


def _shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(3):
            add_member(tar, f"{number}.jpg", encode_jpeg(draw_image(number)))
            label = {"img_path": f"{number}.jpg", "text": "t", "instance": "i"}
            add_member(tar, f"{number}.json", json.dumps(label).encode())
    return file.getvalue()


def _image(form: str) -> bytes:
    file = io.BytesIO()
    draw_image(3).save(file, form)
    return file.getvalue()


def _pickle(rows: object) -> bytes:
    labels = {"paths": ["a", "b"], "texts": ["t", None], "instances": ["i", "j"]}
    return pickle.dumps(labels | {"image_feats": rows})


def _read_pickle(path: Path) -> None:
    content = load_pickle(path)
    read_rows(content, "image_feats", path)
    read_labels(content, path)


def _read_mean(path: Path) -> None:
    wanted = mean_path(path.parent, "clip")
    wanted.parent.mkdir(exist_ok=True)
    wanted.write_bytes(path.read_bytes())
    load_mean(path.parent, "clip")


# What is damaged, and what reads it.
SUBJECTS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "array": (_array(), read_array),
    "mapped rows": (_array(), lambda path: MappedRows(path).read(slice(0, 1))),
    "archive": (_archive(), _read_mean),
    "pickle": (_pickle(np.ones((2, 3), np.float32)), _read_pickle),
    "pickled tensor": (_pickle(torch.ones(2, 3)), _read_pickle),
    "shard": (_shard(), lambda path: list(read_samples([path], True))),
    "configuration": (json.dumps({"model_cfg": SMALL_CLIP}).encode(), check_config),
    "manifest": (b'{"model": {"model": "x"}, "counts": {"query": 1}}', read_json),
    **{
        form: (_image(form), decode_image) for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "PPM")
    },
}


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some changed, cut out, doubled, or the end missing."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if data else 0
        length = rng.choice((1, 1, 1, 4, 64))
        kind = rng.choice(("change", "change", "cut", "double", "end"))
        if kind == "change":
            data[at : at + length] = rng.randbytes(length)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def fuzz(name: str, folder: Path, count: int, seed: int) -> int:
    """Damage a file `count` times; how often it was refused. Anything but a line is raised."""
    data, read = SUBJECTS[name]
    rng, refused = random.Random(f"{name} {seed}"), 0
    path = folder / "file.tar"
    for number in range(count):
        path.write_bytes(damage(data, rng))
        try:
            read(path)
        except (UserError, BadImage) as error:
            refused += 1
            if "\n" in str(error):
                raise AssertionError(f"{name} {seed}, {number}: {error}") from error
        except BaseException as error:
            raise AssertionError(f"{name} {seed}, {number}: {error!r}") from error
    return refused
