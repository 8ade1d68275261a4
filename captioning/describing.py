"""Captions of a task's images: images in, images.jsonl out, continued where it was left off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from captioning.captioner import Captioner, Sampling, load_captioner
from captioning.files import refuse_change, write_lines, write_manifest
from captioning.journal import Journal
from utils import UserError, select_device
from utils_captions import IMAGES, read_image_captions
from utils_pixels import BadImage, decode_image
from utils_task import WHOLE, Picture

if TYPE_CHECKING:
    from PIL import Image

    from captioning.source import Reader
    from utils_task import Task

MANIFEST = "images.json"
PROGRESS = "images.progress.jsonl"
ENTRY = {"image": str, "box": ([int], None), "captions": ([str], None), "cause": (str, None)}


@dataclass(frozen=True)
class Describing:
    """How images are described. captioner: a folder or a name; gallery: its images too."""

    captioner: str
    sampling: Sampling
    batch: int
    precision: str
    workers: int
    skip_bad: bool
    gallery: bool

    @property
    def identity(self) -> dict:
        """What may not change between two runs that make one file: captions depend on it."""
        made = asdict(self)
        return {name: made[name] for name in ("captioner", "precision", "batch", "sampling")}


def describe_task(
    task: Task, read: Reader, out: Path, settings: Describing, gpu: int, overwrite: bool
) -> str:
    """Write images.jsonl and images.json below out; returns a line on what was made.

    What is there already is kept: of an unfinished run, and of the queries when the gallery
    follows. Raises UserError if it was made in another way, and overwrite is not set.
    """
    path, manifest, progress = out / IMAGES, out / MANIFEST, out / PROGRESS
    device = select_device(gpu)
    load = cache(partial(load_captioner, settings.captioner, device, settings.precision))
    if overwrite:
        load()  # before what is there is lost
        for file in (path, manifest, progress):
            file.unlink(missing_ok=True)
    if path.exists() or (progress.exists() and progress.stat().st_size):
        refuse_change(manifest, settings.identity)
    groups = [[picture for own in task.queries.pictures() for picture in own]]
    groups += [task.gallery.pictures()] if settings.gallery else []
    batches = cut_batches(groups, settings.batch)
    kept = _read_finished(path)
    write_manifest(manifest, settings.identity, {"finished": False})
    with (
        Journal(progress, ENTRY) as journal,
        tqdm(total=sum(map(len, batches)), desc="describing", unit="image", disable=None) as bar,
    ):
        lines, skipped = describe(batches, read, load, settings, journal, kept, bar.update)
    named = {_picture_of(line) for line in lines}
    lines += [line for picture, line in kept.items() if picture not in named]
    write_lines(path, lines)
    facts = {"finished": True, "images": len(lines), "skipped": skipped, "task": task.name}
    write_manifest(manifest, settings.identity, facts)
    progress.unlink()
    left = f", {len(skipped)} left out, the first {skipped[0]['image']}" if skipped else ""
    return f"{len(lines)} images described{left}: {path}"


def _read_finished(path: Path) -> dict[Picture, dict]:
    """The lines of a finished file, by picture."""
    if not path.exists():
        return {}
    return {
        (image, box): _entry(image, box) | {"captions": list(captions)}
        for (image, box), captions in read_image_captions(path).items()
    }


def _entry(path: str, box: tuple[int, ...]) -> dict:
    return {"image": path} | ({"box": list(box)} if any(box) else {})


@dataclass(frozen=True)
class Pictures:
    """Loads pictures in worker processes. read: an image's file or bytes, by its path."""

    batches: Sequence[Sequence[Picture]]
    read: Reader

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[Image.Image | str]:
        """The images of a batch, or why one cannot be read."""
        return [self._read(path, box) for path, box in self.batches[number]]

    def _read(self, path: str, box: tuple[int, ...]) -> Image.Image | str:
        try:
            return decode_image(self.read(path), box)
        except FileNotFoundError:
            return "no such file"
        except BadImage as error:
            return error.cause


def cut_batches(groups: Sequence[Sequence[Picture]], size: int) -> list[list[Picture]]:
    """Batches of distinct pictures, of one group each: queries' first, then the gallery's."""
    seen: set[Picture] = set()
    batches = []
    for group in groups:
        new = [picture for picture in dict.fromkeys(group) if picture not in seen]
        seen.update(new)
        batches += [new[start : start + size] for start in range(0, len(new), size)]
    return batches


def describe(
    batches: Sequence[Sequence[Picture]],
    read: Reader,
    captioner: Callable[[], Captioner],
    settings: Describing,
    journal: Journal,
    kept: dict[Picture, dict],
    progress: Callable[[int], None],
) -> tuple[list[dict], list[dict]]:
    """The lines of images.jsonl, and {"image", "cause"} of images that were left out.

    What is kept or in the journal is not made again; each batch is added to it when it is done.
    captioner: loads the model, if there is anything to do. Raises UserError for a bad image unless
    those are skipped.
    """
    done = kept | {_picture_of(entry): entry for entry in journal.entries}
    todo = [n for n, batch in enumerate(batches) if not all(picture in done for picture in batch)]
    progress(sum(map(len, batches)) - sum(len(batches[n]) for n in todo))
    model = captioner() if todo else None
    loaded = _load([batches[n] for n in todo], read, settings.workers)
    for number, images in zip(todo, loaded, strict=True):
        entries = _caption_batch(batches[number], images, model, settings, number)
        journal.append(entries)
        done |= {_picture_of(entry): entry for entry in entries}
        progress(len(entries))
    lines = [done[picture] for batch in batches for picture in batch]
    good = [line for line in lines if "cause" not in line]
    return good, [line for line in lines if "cause" in line]


def _load(
    batches: Sequence[Sequence[Picture]], read: Reader, workers: int
) -> Iterator[list[Image.Image | str]]:
    from torch.utils.data import DataLoader

    return iter(DataLoader(Pictures(batches, read), batch_size=None, num_workers=workers))


def _caption_batch(
    batch: Sequence[Picture],
    images: Sequence[Image.Image | str],
    captioner: Captioner,
    settings: Describing,
    number: int,
) -> list[dict]:
    """The entries of a batch's pictures, those that cannot be read with the cause."""
    readable = [image for image in images if not isinstance(image, str)]
    captions = iter(captioner.caption(readable, settings.sampling, number) if readable else ())
    entries = []
    for (path, box), image in zip(batch, images, strict=True):
        entry = _entry(path, box)
        if not isinstance(image, str):
            entry["captions"] = list(next(captions))
        elif settings.skip_bad:
            entry["cause"] = image
        else:
            raise UserError(
                f"{path}: {image}; mend it, or leave it out with --on_bad_image skip; the same "
                "command continues"
            )
        entries.append(entry)
    return entries


def _picture_of(entry: dict) -> Picture:
    return entry["image"], tuple(entry.get("box", WHOLE))
