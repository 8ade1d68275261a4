"""What decoders say of an image while they read it, with the image's name."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator

from utils import say


@contextlib.contextmanager
def named_warnings(name: str) -> Iterator[None]:
    """Say what the block warns of with an image's name, each thing once.

    That is Python's warnings, and the lines that libraries in C (libtiff) write to stderr.
    """
    lines: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught, _caught_stderr(lines):
            warnings.simplefilter("always")
            yield
    finally:
        for line in dict.fromkeys([*(str(warning.message) for warning in caught), *lines]):
            say(f"{name}: {' '.join(line.split())}", error=True)


@contextlib.contextmanager
def _caught_stderr(lines: list[str]) -> Iterator[None]:
    """Add what is written to the process's standard error in the block to `lines`."""
    try:
        before, file = os.dup(2), tempfile.TemporaryFile()  # noqa: SIM115  closed below
    except OSError:  # closed by whoever started this, or no room for a file
        yield
        return
    with file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            if file.tell():  # shared with what was written
                file.seek(0)
                lines += file.read().decode(errors="replace").splitlines()
