"""Files of captions: written whole, each with a manifest beside it that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils import UserError, atomic_path, code_version, read_json, write_json


def write_lines(path: Path, entries: Iterable[Mapping]) -> None:
    """Write a JSONL file, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def refuse_change(manifest: Path, identity: Mapping) -> None:
    """Raise UserError if a manifest says that its file is made in another way than this."""
    if not manifest.exists():
        return
    before, now = read_json(manifest).get("made"), json.loads(json.dumps(identity))
    if before == now:
        return
    before = before if isinstance(before, dict) else {}
    key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
    raise UserError(
        f"{manifest} is of captions made with another {key} ({_short(before.get(key))}, now "
        f"{_short(now.get(key))}); name another --out, or replace them with --overwrite"
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}..."


def write_manifest(path: Path, identity: Mapping, facts: Mapping) -> None:
    """Write what made a file ("made", which may not change) and what came of it."""
    write_json(path, {"made": dict(identity), **facts, "toolkit": code_version()})
