"""Caption files: what was said of images, and captions rewritten as queries ask.

Ours is a folder of two JSONL files, written by create_captions.py:

    images.jsonl     {"image": path, "box": [l, u, r, b] (if it has one), "captions": [...]}
    rewritten.jsonl  {"query": key, "captions": [...], "added": "..."}

The exchange files of CIReVL and CVSI are read too, by position: the task's queries, or gallery
rows, in order, category by category where a task has several:

    {name}[_captioner]_{split}_mods_{prompt}.json     modified_captions, instruction, added_content
    {name}_{split}_target_captions.pkl                target_captions

name is cirr, circo, fashioniq_{category} or genecis_{task}, split is val or test; the folder that
--captions names holds them, or its folder precomputed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError, open_text, read_bytes, sha256_file
from utils_task import WHOLE

if TYPE_CHECKING:
    from utils_task import Picture, Task

IMAGES = "images.jsonl"
REWRITTEN = "rewritten.jsonl"
FOLDERS = ("", "precomputed")  # where the references' files may lie below --captions
STRIPPED = ".?, "  # of FashionIQ's captions, at both ends, as SEARLE, CIReVL and CVSI do
# The tag whose labels name the files of a data set's parts, by the task's prompts.
PARTS = {"fashioniq": "category", "genecis": "task"}
SHOWN = 60  # characters of a text in a message

Captions = tuple[str, ...]


@dataclass(frozen=True)
class Rewritten:
    """The rewritten captions of Q queries, at least one each, and what is to be added.

    added: Q texts, or None where the files do not say. sources: file -> SHA-256.
    """

    captions: Sequence[Captions]
    added: Sequence[str] | None
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Described:
    """The captions of N gallery rows, at least one each. sources: file -> SHA-256."""

    captions: Sequence[Captions]
    sources: Mapping[str, str]


def instructions(task: Task) -> list[str]:
    """The text of each query as CIReVL and CVSI give it to a language model.

    FashionIQ: both captions, joined.
    """
    fields = task.queries.fields
    if task.prompts != "fashioniq":
        return list(task.queries.text)
    return list(map(join_captions, fields["first"], fields["second"]))


def join_captions(first: str, second: str) -> str:
    """FashionIQ's two captions, stripped of ".?, " at both ends, as "a and b"."""
    return f"{first.strip(STRIPPED)} and {second.strip(STRIPPED)}"


# ---------------------------------------------------------------------------------------------
# Both kinds of files
# ---------------------------------------------------------------------------------------------


def read_rewritten(folder: Path, task: Task) -> Rewritten:
    """The rewritten captions of a task's queries.

    Raises UserError if files are absent or ambiguous, of another task, or without a query.
    """
    own = folder / REWRITTEN
    if own.is_file():
        return _read_own_rewritten(own, task)
    parts = [_find_mods(folder, name, task) for name in part_names(task)]
    read = [_read_mods(path) for path in parts]
    captions = [own for mods in read for own in mods.captions]
    _check_instructions(parts, read, instructions(task))
    added = [mods.added for mods in read]
    joined = None if None in added else [text for own in added for text in own]
    return Rewritten(captions, joined, {path.name: sha256_file(path) for path in parts})


def read_described(folder: Path, task: Task) -> Described:
    """The captions of a task's gallery. Raises UserError as read_rewritten, and for an image
    without captions."""
    own = folder / IMAGES
    if own.is_file():
        captions = read_image_captions(own)
        rows = [captions.get(image) for image in task.gallery.pictures()]
        _refuse_missing(own, rows, [str(path) for path in task.gallery.path], "image")
        return Described(rows, {own.name: sha256_file(own)})
    split = split_of(task)
    paths = [_find_file(folder, f"{name}_{split}_target_captions.pkl") for name in part_names(task)]
    captions = [own for path in paths for own in _read_target_captions(path)]
    _check_count(paths, len(captions), len(task.gallery), "images in the gallery")
    return Described(captions, {path.name: sha256_file(path) for path in paths})


def part_names(task: Task) -> list[str]:
    """What the references call a task's files: one name, or one for each label of a tag."""
    tag = PARTS.get(task.prompts)
    if tag is None:
        return [task.prompts or task.name]
    return [f"{task.prompts}_{label}" for label in dict.fromkeys(task.queries.tags[tag])]


def split_of(task: Task) -> str:
    """ "test" if the task's ground truth is hidden, else "val"."""
    return "test" if task.views[task.main_view].positives is None else "val"


def _refuse_missing(path: Path, rows: Sequence, names: Sequence[str], what: str) -> None:
    missing = [name for name, row in zip(names, rows, strict=True) if row is None]
    if missing:
        raise UserError(
            f"{path}: no captions of the {what} {missing[0]!r} ({len(missing)} of {len(rows)} are "
            "missing); create_captions.py continues such a file"
        )


def _check_count(paths: Sequence[Path], found: int, wanted: int, what: str) -> None:
    if found != wanted:
        names = " and ".join(path.name for path in paths)
        raise UserError(
            f"{paths[0].parent}: {names} are read by position and hold {found} rows, but the task "
            f"has {wanted} {what}; take the files of this data set and split, whole"
        )


# ---------------------------------------------------------------------------------------------
# Our JSONL
# ---------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with its place, "FILE, line N". Blank lines are passed.

    Raises UserError for a line that is no JSON object.
    """
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield place, _parse_line(line, place)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not text in UTF-8; make it again") from None


def _parse_line(line: str, place: str) -> dict:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error}); mend or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{place} holds no JSON object; mend or remove it")
    return content


def read_image_captions(path: Path) -> dict[Picture, Captions]:
    """The captions of images: (path, box) -> captions, the box WHOLE of a whole image.

    Raises UserError for a line that is not as it should be, and for an image that recurs.
    """
    found: dict[Picture, Captions] = {}
    for place, content in read_lines(path):
        image = _text(content, "image", place), _box(content, place)
        if image in found:
            raise UserError(f"{place}: {image[0]!r} is there a second time; remove one line")
        found[image] = _captions(content.get("captions"), f"{place}: 'captions'")
    return found


def _read_own_rewritten(path: Path, task: Task) -> Rewritten:
    found: dict[str, tuple[Captions, str | None]] = {}
    for place, content in read_lines(path):
        key = _text(content, "query", place)
        if key in found:
            raise UserError(f"{place}: {key!r} is there a second time; remove one line")
        added = _text(content, "added", place) if "added" in content else None
        found[key] = _captions(content.get("captions"), f"{place}: 'captions'"), added
    rows = [found.get(key) for key in task.queries.key]
    _refuse_missing(path, rows, task.queries.key, "query")
    added = [text for _, text in rows]
    return Rewritten(
        [captions for captions, _ in rows],
        None if None in added else added,
        {path.name: sha256_file(path)},
    )


def _text(content: Mapping, key: str, place: str) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise UserError(f"{place}: {key!r} is {repr(value)[:SHOWN]}, not a text")
    return value


def _box(content: Mapping, place: str) -> tuple[int, ...]:
    box = content.get("box", [])
    if not isinstance(box, list) or len(box) not in (0, 4) or not all(type(n) is int for n in box):
        raise UserError(f"{place}: 'box' is {repr(box)[:SHOWN]}, not four whole numbers")
    return tuple(box) or WHOLE


def _captions(value: object, place: str) -> Captions:
    """One text or a list of texts as a tuple. Raises UserError for anything else, and for none."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts:
        raise UserError(f"{place} is {repr(value)[:SHOWN]}, not a list of texts")
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None or None in texts:
        raise UserError(f"{place} holds {repr(wrong)[:SHOWN]}, which is no text")
    return tuple(texts)


# ---------------------------------------------------------------------------------------------
# The files of CIReVL and CVSI
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mods:
    captions: list[Captions]
    instruction: list[str] | None
    added: list[str] | None


def _find_file(folder: Path, name: str) -> Path:
    paths = [folder / inner / name for inner in FOLDERS]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise UserError(f"--captions {folder}: there is neither {IMAGES} nor {name}")
    return found


def _find_mods(folder: Path, name: str, task: Task) -> Path:
    """The one file of rewritten captions of that name, whatever its captioner and prompt."""
    split = split_of(task)
    fits = re.compile(rf"{re.escape(name)}_(?:.+_)?{split}_mods_.+\.json")
    found = [path for inner in FOLDERS for path in sorted((folder / inner).glob(f"{name}_*.json"))]
    found = [path for path in found if fits.fullmatch(path.name)]
    if not found:
        raise UserError(
            f"--captions {folder}: there is neither {REWRITTEN} nor {name}_{split}_mods_*.json"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"--captions {folder}: {len(found)} files fit {name} ({names}); keep one of them there"
        )
    return found[0]


def _read_mods(path: Path) -> _Mods:
    try:
        content = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("modified_captions"), list):
        raise UserError(f"{path} holds no list 'modified_captions'")
    rows = content["modified_captions"]
    beside = (_list_of(content, name, len(rows), path) for name in ("instruction", "added_content"))
    return _Mods(_rows_of_captions(rows, path, "modified_captions"), *beside)


def _list_of(content: Mapping, name: str, count: int, path: Path) -> list[str] | None:
    """A list of texts beside the captions, None where it is absent."""
    values = content.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise UserError(f"{path}: {name!r} is not a list of {count} texts like its captions")
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        raise UserError(f"{path}: {name!r}, row {wrong + 1} is no text")
    return values


def _rows_of_captions(rows: Sequence, path: Path, name: str) -> list[Captions]:
    return [
        _captions(value, f"{path}: {name!r}, row {number}") for number, value in enumerate(rows, 1)
    ]


def _read_target_captions(path: Path) -> list[Captions]:
    from utils_pickles import load_pickle  # with numpy, which --help does not wait for

    rows = load_pickle(path).get("target_captions")
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list 'target_captions'")
    return _rows_of_captions(rows, path, "target_captions")


def _check_instructions(
    paths: Sequence[Path], read: Sequence[_Mods], wanted: Sequence[str]
) -> None:
    """Raise UserError unless the files' rows are the task's queries, in their order."""
    _check_count(paths, sum(len(mods.captions) for mods in read), len(wanted), "queries")
    start = 0
    for path, mods in zip(paths, read, strict=True):
        own = wanted[start : start + len(mods.captions)]
        start += len(own)
        made_for = mods.instruction or own
        differ = [row for row, text in enumerate(own) if made_for[row].split() != text.split()]
        if differ:
            row = differ[0]
            raise UserError(
                f"{path}, row {row + 1}: made for {made_for[row][:SHOWN]!r}, but the task's query "
                f"is {own[row][:SHOWN]!r} ({len(differ)} of {len(own)} rows differ): such files "
                "are read by position, take those of this data set and split"
            )
