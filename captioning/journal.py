"""A journal: what a long run has done so far, a JSON object a line, safe against being killed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from utils import UserError, naming, read_bytes
from utils_records import Form, misfit


class Journal:
    """An append-only JSONL file. A line that was cut when its writer was killed is removed."""

    def __init__(self, path: Path, form: Form = dict):
        """Open it, made if need be. form: of an entry, see misfit.

        Raises UserError if it is damaged before its last line.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.entries, end = _read(path, form)
        self._file = open(path, "ab")  # noqa: SIM115  closed by close()
        self._file.truncate(end)
        self._lock = threading.Lock()

    def append(self, entries: Iterable[dict]) -> None:
        """Add entries, which are on the disk when this returns. May be called from threads."""
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        with self._lock, naming(self.path):
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read(path: Path, form: Form) -> tuple[list[dict], int]:
    """The entries of a journal, and the byte at which the last whole one ends."""
    if not path.exists():
        return [], 0
    content = read_bytes(path)
    end = content.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            entry = json.loads(line)
            if misfit(entry, form):
                raise ValueError
            entries.append(entry)
        except (ValueError, RecursionError):
            raise UserError(
                f"{path}, line {number} is damaged; remove the line, and what it held is made again"
            ) from None
    return entries, end
