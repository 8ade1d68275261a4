"""The pictures of the page: thumbnails of the gallery, and images that a visitor brings."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from report.thumbnails import shrink
from utils import UserError, atomic_path
from utils_datasets import IMAGE_FORMATS

if TYPE_CHECKING:
    from live.searcher import Searcher

MOST_BYTES = 40 << 20  # of an image that a visitor brings
MOST_PIXELS = 100_000_000
MOST_GIVEN = 200  # such images that are kept, the latest
SIZES = {"thumb": (256, 20_000), "image": (1600, 1_500_000)}  # longest side, most bytes
ID = re.compile(r"[0-9a-f]{16}")


def check_size(data: bytes) -> None:
    """Raise UserError for an image of too many pixels, before any is decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width, height = MOST_PIXELS, MOST_PIXELS
    except Exception:  # what it is will be said by who decodes it
        return
    if width * height > MOST_PIXELS:
        raise UserError(f"this image has more than {MOST_PIXELS:,} pixels; make it smaller")


@dataclass(frozen=True)
class Given:
    """Images that visitors brought, in a folder: they are there again after a restart."""

    folder: Path

    def keep(self, name: str, data: bytes) -> None:
        """Keep an image; the oldest go."""
        with atomic_path(self.folder / name) as path:
            path.write_bytes(data)
        files = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in files[:-MOST_GIVEN]:
            path.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """The bytes of an image. Raises UserError if it is not kept."""
        try:
            if not ID.fullmatch(name):
                raise FileNotFoundError
            return (self.folder / name).read_bytes()
        except OSError:
            raise UserError("that image is not here any more; give it again") from None


def picture_of(searcher: Searcher, given: Given, key: str, size: str) -> bytes:
    """A small picture (WebP) of an image of the gallery (gROW), of the data set's queries (qNUMBER)
    or of a visitor (uHASH), as it was encoded. Raises what reading and decoding raise.
    """
    task, number = searcher.features.task, key[1:].partition("-")[0]
    box: Sequence[int] | None = None
    if key[0] == "u":
        content = given.read(key[1:])
    elif key[0] == "q":
        content = searcher.images.read("query", task.queries.images[int(number)][0])
        box = None if task.queries.box is None else task.queries.box[int(number)].tolist()
    else:
        content = searcher.images.read("database", task.gallery.path[int(number)])
        box = None if task.gallery.box is None else task.gallery.box[int(number)].tolist()
    side, most = SIZES[size]
    return shrink(
        content, side, most, tuple(box) if box and any(box) else None, searcher.features.viewed
    )
