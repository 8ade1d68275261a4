"""Files damaged by their meaning: JSON values of other types, odd cells, no files at all.

A case is a file of a world and what reads it. Whatever stands there, it is read, or refused in one
line; nothing hangs, and nothing half-written is left.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing import damage

from utils import UserError

SECONDS = 60  # of one case, after which it counts as a hang
VALUES = (
    *(None, True, False, 0, -1, 7, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "nan", "\ud800", "a\nb", "\x1b[31m", "../../x", "/dev/zero", "é" * 3000),
    *([], [[]], [None], ["x"], [1, 2], {}, {"x": None}, {"x": {"x": []}}),
)
CELLS = (
    *("", " ", "nan", "-1", "1e999", "x", '"', "a\nb", "\x00", "\x1b[2J", "é" * 3000, "0 0 0"),
    *("99999999999999999999", "1 -1", "../../x", "/dev/zero", "=1+1", "\u202e", "\ufeff"),
)


@dataclass(frozen=True)
class Case:
    """A file, and what reads it."""

    path: Path
    read: Callable[[], object]


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def mutate_json(text: str, rng: random.Random) -> str:
    """JSON with one to three values replaced, removed, doubled or nested without end."""
    content = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        content = _mutate(content, rng)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.9)
    return text.replace('"DEEP"', "[" * 100_000 + "]" * 100_000)


def _mutate(content: Any, rng: random.Random) -> Any:
    places = list(_places(content))
    holder, key = rng.choice(places) if places else (None, None)
    if holder is None or rng.random() < 0.03:
        return rng.choice(VALUES)
    kind = rng.choice(("replace", "replace", "replace", "remove", "add", "deep"))
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[rng.choice(("x", "", "\ud800", *holder))] = rng.choice(VALUES)
    elif kind == "add":
        holder.insert(key, rng.choice((holder[key], rng.choice(VALUES))))
    else:
        holder[key] = "DEEP" if kind == "deep" else rng.choice(VALUES)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in JSON as (what holds it, its key)."""
    if not isinstance(content, (dict, list)):
        return
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        yield from _places(content[key])


def mutate_lines(text: str, rng: random.Random) -> str:
    """JSON lines of which one is mutated, doubled, cut or removed."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(("mutate", "mutate", "mutate", "double", "cut", "remove"))
    new = {
        "mutate": lambda: [mutate_json(lines[at], rng)],
        "double": lambda: [lines[at]] * 2,
        "cut": lambda: [lines[at][: rng.randrange(len(lines[at]))]],
        "remove": list,
    }[kind]()
    return "".join(f"{line}\n" for line in [*lines[:at], *new, *lines[at + 1 :]])


def mutate_table(text: str, rng: random.Random) -> str:
    """A CSV with a cell replaced or one too many, or a row removed or doubled."""
    lines = text.split("\n")
    at = rng.choice((0, 1, rng.randrange(len(lines)))) % len(lines)
    cells = lines[at].split(",")
    kind = rng.choice(("cell", "cell", "more", "fewer", "double", "remove"))
    if kind in ("cell", "more"):
        place = rng.randrange(len(cells))
        cells[place : place + (kind == "cell")] = [rng.choice(CELLS)]
    new = {"double": [lines[at]] * 2, "remove": [], "fewer": [",".join(cells[:-1])]}
    lines[at : at + 1] = new.get(kind, [",".join(cells)])
    return "\n".join(lines)


MUTATIONS = {".json": mutate_json, ".jsonl": mutate_lines, ".csv": mutate_table}


def spoil(path: Path, rng: random.Random) -> None:
    """Put something else in a file's place."""
    data = path.read_bytes()
    path.unlink()
    kind = rng.choice(("mean", "mean", "mean", "bytes", "bytes", "other"))
    if kind == "mean" and path.suffix in MUTATIONS:
        text = MUTATIONS[path.suffix](data.decode(), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind != "other":
        path.write_bytes(damage(data, rng))
    else:
        rng.choice(OTHERS)(path)


OTHERS = (
    os.mkfifo,
    os.mkdir,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\xff\xfe" * 50),
    lambda path: path.write_bytes(b"\0" * 1000),
    lambda path: None,
)


# ---------------------------------------------------------------------------------------------
# Trial
# ---------------------------------------------------------------------------------------------


def attempt(read: Callable[[], object]) -> str | None:
    """Call what reads a file: None, or the line that a command would say. Else AssertionError."""

    def ring(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read()
    except UserError as error:
        line = str(error)
    except TimeoutError:
        raise
    except OSError as error:
        if not error.strerror:
            raise
        line = f"{error.filename}: {error.strerror}"
    else:
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if "\n" in line.strip() or len(line) > 4000 or re.search(r"Traceback|object at 0x", line):
        raise AssertionError(line)
    return line


def try_case(case: Case, rng: random.Random, writes: Path | None = None) -> str | None:
    """Spoil a case's file, read it, and mend it. writes: where nothing half-written may be left."""
    kept = case.path.with_name(f"{case.path.name}.kept")
    shutil.copy2(case.path, kept)
    try:
        spoil(case.path, rng)
        line = attempt(case.read)
    finally:
        _remove(case.path)
        os.replace(kept, case.path)
    left = [path for path in writes.rglob("*") if ".part" in path.name] if writes else []
    if left:
        raise AssertionError(f"left half-written: {left}")
    return line


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def try_cases(cases: dict[str, Case], count: int, seed: int, writes: Path | None = None) -> int:
    """Try each case so often; how often a line was said. The first that fails is raised, named."""
    refused = 0
    for name, case in cases.items():
        for number in range(count):
            try:
                line = try_case(case, random.Random(f"{name} {seed} {number}"), writes)
            except BaseException as error:
                raise AssertionError(f"{name}, seed {seed}, number {number}: {error!r}") from error
            refused += line is not None
    return refused
