"""Annotation files as their publishers write them: JSON, checked entry by entry.

Whatever is wrong with one is a line that names the file and the entry.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UserError, read_bytes, sha256_file
from utils_records import KINDS, KeyTwice, refuse_key_twice

SHOWN = 60  # characters of a wrong value in a message


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def first_found(root: Path, names: Iterable[str]) -> Path:
    """The first of these paths below root that exists, or the first of all."""
    paths = [root / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def find_annotations(root: Path, names: Iterable[str], how_to_get: str) -> Path:
    """The first of these files below root that exists. Raises UserError if none does."""
    path = first_found(root, names)
    if not path.is_file():
        raise UserError(f"{path} does not exist; {how_to_get}")
    return path


def hash_sources(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Annotation files as a Task lists them: path below root -> SHA-256."""
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in paths}


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises UserError if it is absent, truncated or damaged, or if an object has a key twice.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=refuse_key_twice)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except KeyTwice as error:
        raise UserError(f"{path}: the key {error.args[0]!r} is there twice; mend it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from None


# ---------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An object of an annotation file. place: the file, and where in it, for messages."""

    content: Mapping[str, Any]
    place: str

    def get(self, key: str, kind: type) -> Any:
        """What stands under a key. Raises UserError if it is absent or of another kind."""
        if key not in self.content:
            raise UserError(f"{self.place} has no {key!r}; fetch the file again")
        return _checked(self.content[key], kind, f"{self.place}: {key!r}")

    def each(self, key: str, kind: type) -> list:
        """The values of the list under a key, all of one kind."""
        place = f"{self.place}: {key!r}"
        return [
            _checked(value, kind, f"{place} holds a value that") for value in self.get(key, list)
        ]

    def of(self, key: str) -> Entry:
        """The object under a key."""
        return Entry(self.get(key, dict), f"{self.place}, {key!r}")

    def entries(self, key: str) -> list[Entry]:
        """The objects of the list under a key."""
        objects = enumerate(self.each(key, dict))
        return [Entry(content, f"{self.place}, {key!r} number {i + 1}") for i, content in objects]

    def find(self, key: str, kind: type, known: Mapping[Hashable, int]) -> int:
        """The number of the name under a key. Raises UserError if it is not known."""
        return self.number(key, self.get(key, kind), known)

    def find_each(self, key: str, kind: type, known: Mapping[Hashable, int]) -> list[int]:
        """The numbers of the names in the list under a key, of which none may repeat."""
        names = self.each(key, kind)
        if len(set(names)) < len(names):
            raise UserError(f"{self.place}: {key!r} lists a name twice: {names}")
        return [self.number(key, name, known) for name in names]

    def number(self, key: str, name: Hashable, known: Mapping[Hashable, int]) -> int:
        """The number of a name that stands under a key. Raises UserError if it is not known."""
        if name not in known:
            raise UserError(
                f"{self.place}: {key!r} names {name!r}, which is not in the gallery; fetch the "
                "annotation files again, all of one version"
            )
        return known[name]


def _checked(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{place} is {repr(value)[:SHOWN]}, not {KINDS[kind]}")
    return value


def read_entries(path: Path) -> list[Entry]:
    """The objects of a JSON list, at least one; they are numbered from 1 in messages."""
    return list_entries(load_json(path), str(path))


def list_entries(content: Any, place: str) -> list[Entry]:
    """The objects of a list, at least one. Raises UserError for anything else."""
    if not isinstance(content, list) or not content:
        raise UserError(f"{place} holds no list of entries; fetch it again")
    places = [f"{place}, entry {number}" for number in range(1, len(content) + 1)]
    return [
        Entry(_checked(value, dict, place), place)
        for value, place in zip(content, places, strict=True)
    ]


def read_names(path: Path) -> dict[str, int]:
    """A JSON list of distinct names: name -> its number. Raises UserError for anything else."""
    names = Entry({"names": load_json(path)}, str(path)).each("names", str)
    return number_distinct(
        names, (f"{path}, entry {number}" for number in range(1, len(names) + 1))
    )


def number_distinct(names: Iterable[Hashable], places: Iterable[str]) -> dict[Hashable, int]:
    """name -> its number. places: where each stands. Raises UserError for one that repeats."""
    numbers: dict[Hashable, int] = {}
    for number, (name, place) in enumerate(zip(names, places, strict=True)):
        if numbers.setdefault(name, number) != number:
            raise UserError(
                f"{place}: {name!r} is there a second time (entry {numbers[name] + 1} has it too)"
            )
    return numbers


def distinct_keys(entries: list[Entry], key: str, kind: type) -> dict[Hashable, int]:
    """What each entry has under a key -> the entry's number. Raises UserError if one repeats."""
    values = (entry.get(key, kind) for entry in entries)
    return number_distinct(values, (entry.place for entry in entries))
