"""Thumbnails of a report's images: small WebP files that several reports share."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils import atomic_path, say

if TYPE_CHECKING:
    from utils_datasets import ImageStore

# Sizes of thumbnails: the longest side in pixels, and the most bytes one may take. With ten results
# and at most six missed positives a query, a report of 1,883 queries can never pass
# 1,883 * (16 * 8,000 + 16,000) bytes = 271 MB; in practice it stays far below.
THUMBNAILS = {"query": (240, 16_000), "database": (160, 8_000)}
QUALITIES = (78, 60, 40, 20, 0)  # of WebP, tried in turn until the bytes suffice (noise needs 0)
MAX_WORKERS = 16  # threads: Pillow lets go of the interpreter's lock


class Crop(NamedTuple):
    """An image of a split ("query" or "database") and the part of it that is shown.

    box: left, upper, right, lower in pixels, cut to the image; None or zeros: the whole image.
    """

    split: str
    path: str
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Picture:
    """A thumbnail's file name or, where there is none, the cause."""

    name: str | None
    cause: str = ""


def make_thumbnails(
    images: ImageStore,
    wanted: Iterable[Crop],
    cache: Path,
    folder: Path,
    viewed: bool = False,
) -> dict[Crop, Picture]:
    """Put the thumbnails of images into a folder, making those that are not in the cache.

    A thumbnail is named by its size, its box and the hash of the image's bytes, so that one is made
    once however often the image is named, and a changed image never shows its old thumbnail.
    viewed: see shrink.
    """
    from tqdm import tqdm

    wanted = list(wanted)
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    make = partial(_make_thumbnail, images, cache, folder, viewed)
    # One image of each split comes before the threads: a store that indexes shards when it is
    # first asked does it once then, not once in every thread.
    done = {crop: make(crop) for crop in {crop.split: crop for crop in wanted}.values()}
    rest = [crop for crop in wanted if crop not in done]
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(make, rest), total=len(rest), desc="thumbnails", disable=None)
        return done | dict(zip(rest, bar, strict=True))


def _make_thumbnail(
    images: ImageStore, cache: Path, folder: Path, viewed: bool, wanted: Crop
) -> Picture:
    side, most_bytes = THUMBNAILS[wanted.split]
    box = wanted.box if wanted.box and any(wanted.box) else None
    part = "".join(f"-{word}" for word in (*(box or ()), *(["viewed"] if viewed else [])))
    try:
        content = images.read(wanted.split, wanted.path)
        name = f"{hashlib.sha1(content).hexdigest()[:20]}{part}-{side}.webp"
        known = (cache / name).exists()
        thumbnail = b"" if known else shrink(content, side, most_bytes, box, viewed)
    # Whatever is wrong with one image (Pillow raises many kinds), the page must not fail for it.
    except Exception as error:
        return Picture(None, getattr(error, "cause", f"{type(error).__name__}: {error}"))
    if not known:
        with atomic_path(cache / name) as temporary:
            temporary.write_bytes(thumbnail)
    link_thumbnail(cache / name, folder / name)
    return Picture(name)


def shrink(
    content: bytes,
    side: int,
    most_bytes: int,
    box: tuple[int, int, int, int] | None = None,
    viewed: bool = False,
) -> bytes:
    """Encode an image as WebP of at most `side` pixels a side, of at most `most_bytes` bytes.

    box: the part that is shown. The picture is what the model saw: as a viewer shows it (viewed),
    or plain, see read_pixels. Raises BadImage on other bytes.
    """
    from PIL import Image

    from utils_pixels import decode_image

    small = decode_image(content, viewed=viewed, least=0 if box else 2 * side)
    if box:
        left, upper, right, lower = box
        right, lower = min(right, small.width), min(lower, small.height)
        small = small.crop((max(left, 0), max(upper, 0), right, lower))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=quality, method=4)
        if buffer.tell() <= most_bytes:
            break
    return buffer.getvalue()


def link_thumbnail(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        shutil.copyfile(source, target)


def say_what_is_missing(pictures: dict[Crop, Picture]) -> None:
    """Say on stderr how many images have no picture, and the first of them."""
    missing = [(crop.path, own) for crop, own in pictures.items() if not own.name]
    if missing:
        path, picture = missing[0]
        say(
            f"warning: {len(missing)} of {len(pictures)} images have no picture in the report, "
            f"the first is {path} ({picture.cause})",
            error=True,
        )
