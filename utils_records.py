"""What people write as JSON, a whole file or a line an object: values checked, file and line named.

Every function raises UserError, "FILE, line N: what is wrong", for the first mistake.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from utils import UserError, read_bytes, read_json

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number with a point",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class Place:
    """A value in a file; as text, the file and the first line of it that holds the value."""

    path: Path
    content: str
    value: str

    def __str__(self) -> str:
        line = find_line(self.content, self.value)
        return str(self.path) if line is None else f"{self.path}, line {line}"


Where = str | Place  # where a value stands, for messages


def find_line(content: str, value: str) -> int | None:
    """The first line, from 1, that holds a value as JSON writes it, None if there is none."""
    spellings = {json.dumps(value), json.dumps(value, ensure_ascii=False)}
    for number, line in enumerate(content.split("\n"), 1):
        if any(spelling in line for spelling in spellings):
            return number
    return None


def fail(where: Where, problem: str) -> NoReturn:
    """Raise the UserError that says what is wrong where."""
    raise UserError(f"{where}: {problem}")


def guess(word: str, known: Iterable[str], other_names: Mapping[str, str] | None = None) -> str:
    """What may have been meant by a word, or what there is.

    other_names: further words for what is known.
    """
    known = list(known)
    close = [(other_names or {}).get(word)] if word in (other_names or {}) else []
    close = close or difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}"


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fail(f"{path}, line {line}", "not UTF-8; save the file as UTF-8")


def read_object(path: Path) -> tuple[dict, Callable[[str], Place]]:
    """The JSON object that a file holds, and what gives a value's place in it."""
    content = read_utf8(path)
    return parse_object(content, path, 1), lambda value: Place(path, content, value)


def read_objects(path: Path) -> Iterator[tuple[dict, int]]:
    """The JSON objects of a file, one a line, and their lines; blank lines are passed over."""
    for line, text in enumerate(read_utf8(path).split("\n"), 1):
        if text.strip():
            yield parse_object(text, path, line), line


def parse_object(text: str, path: Path, first: int) -> dict:
    """The JSON object of a text that begins at line `first` of a file."""
    where = f"{path}, line {first}"
    try:
        content = json.loads(text, object_pairs_hook=refuse_key_twice)
    except json.JSONDecodeError as error:
        where = f"{path}, line {first + error.lineno - 1}"
        fail(where, f"not one JSON object ({error.msg}, column {error.colno})")
    except KeyTwice as error:
        line = first - 1 + (find_line(text, error.args[0]) or 1)
        fail(f"{path}, line {line}", f"the key {error.args[0]!r} stands twice in one object")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        fail(where, f"not one JSON object ({error})")
    return require(dict, content, "what stands here", where)


class KeyTwice(Exception):
    """A JSON object gives a key twice."""


def refuse_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    """An object of a JSON file, for json.loads. Raises KeyTwice for one with a key twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwice(next(key for key in keys if keys.count(key) > 1))
    return values


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


def check_keys(
    values: Mapping[str, Any],
    known: Iterable[str],
    place: Callable[[str], Where],
    other_names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values that are not null, all of known keys; place: where a key stands."""
    for key in values:
        if key not in known:
            fail(place(key), f"unknown key {key!r}; {guess(key, known, other_names)}")
    return {key: value for key, value in values.items() if value is not None}


def require(kind: type, value: Any, what: str, where: Where) -> Any:
    """A value of that JSON type: a key of KINDS."""
    if type(value) is not kind:
        example = f"; write [{json.dumps(value)}]" if kind is list and type(value) is str else ""
        fail(where, f"{what} has to be {KINDS[kind]}, not {KINDS[type(value)]}{example}")
    return value


def require_text(value: Any, what: str, where: Where) -> str:
    """A text without the blanks around it; neither empty nor with control characters."""
    text = require(str, value, what, where).strip()
    if not text:
        fail(where, f"{what} is empty")
    if UNPRINTABLE.search(text):
        fail(where, f"{what} holds a line break or another control character: {text!r}")
    return text


def require_label(value: Any, what: str, where: Where) -> str:
    """A text, or a whole number as text."""
    return str(value) if type(value) is int else require_text(value, what, where)


# ---------------------------------------------------------------------------------------------
# What the commands write themselves
# ---------------------------------------------------------------------------------------------

Form = Any  # None, a type, [form], {key: form}, {str: form}, or a tuple of these, see misfit

# What manifests may hold; a key that is absent counts as null.
MANIFEST = {
    **dict.fromkeys(("kind", "name", "backbone", "precision", "save_dtype"), (str, None)),
    "versions": (dict, None),
    "sources": (dict, None),
    "counts": ({str: int}, None),
    "skipped": (
        [{"image_path": str, "cause": (str, None), "row": (int, None), "split": (str, None)}],
        None,
    ),
    "arrays": ({str: {"unit": (bool, None)}}, None),
}


def misfit(value: Any, form: Form) -> str | None:
    """The first place ("queries.text") at which a JSON value has not its form, None if it has.

    form: null, a type, a list of one form, an object of known keys or of any (str: form), or a
    tuple of forms of which one fits.
    """
    wrong = _misfit(value, form)
    return None if wrong is None else wrong.strip(".") or "it"


def _misfit(value: Any, form: Form) -> str | None:
    """What follows the value's own place in that of its first misfit."""
    if isinstance(form, tuple):
        found = [_misfit(value, own) for own in form]
        return None if None in found else found[0]
    if isinstance(form, list) and isinstance(value, list):
        if isinstance(form[0], type) and set(map(type, value)) <= {form[0]}:
            return None  # of long lists, at once
        parts = ((item, form[0], f"[{n}]") for n, item in enumerate(value))
    elif isinstance(form, dict) and isinstance(value, dict):
        forms = dict.fromkeys(value, form[str]) if str in form else form
        parts = ((value.get(key), own, f".{key}") for key, own in forms.items())
    else:
        return None if (value is None if form is None else type(value) is form) else ""
    for item, own, place in parts:
        wrong = _misfit(item, own)
        if wrong is not None:
            return place + wrong
    return None


def check_manifest(manifest: dict, path: Path) -> dict:
    """The manifest itself. Raises UserError, naming the entry, if one is of another kind."""
    wrong = misfit(manifest, MANIFEST)
    if wrong:
        raise UserError(f"{path}: {wrong} is not what a manifest holds there; make it again")
    return manifest


def read_manifest(path: Path) -> dict:
    """Read a manifest. Raises UserError as read_json and check_manifest do."""
    return check_manifest(read_json(path), path)
