"""Signs of life: whatever a command waits for, something moves on the terminal within two seconds.

Where nothing has been written for a second, a line says what is being done and for how long; a bar
that stands still is drawn again, with its time. Nothing is said where there is no terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

QUIET_SECONDS = 1.0  # of silence before a sign, and between two
CLEAR = "\r\x1b[K"  # of a terminal: back to the line's beginning, and erase it


class Signs:
    """What is being done, and since when nothing was written to the terminal.

    Shared by the thread that shows signs, which takes no lock: processes are forked beside it.
    descriptor: of the terminal, of its own, for standard error is led elsewhere at times.
    """

    def __init__(self, descriptor: int, seconds: float = QUIET_SECONDS):
        self.words: list[str] = []  # the innermost last; "": nothing is to be shown
        self._descriptor, self._seconds = descriptor, seconds
        self._since = time.monotonic()
        self._shown = self._open_line = False
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Show signs while the block runs."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.clear()

    @contextlib.contextmanager
    def during(self, words: str, at_once: bool) -> Iterator[None]:
        """Let signs say these words, the first one at once or after the time of silence."""
        self.words.append(words)
        self._since = time.monotonic()
        try:
            if at_once:
                self._show()
            yield
        finally:
            self.words.pop()
            self._since = time.monotonic()

    def clear(self) -> None:
        """Take the sign away: a text is about to be written, or all is done."""
        if self._shown:
            self._shown = False
            self._write(CLEAR)

    def note(self, text: str) -> None:
        """A text was written to the terminal."""
        if text:
            self._since, self._open_line = time.monotonic(), text[-1] not in "\r\n"

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            if time.monotonic() - self._since >= self._seconds:
                self._show()

    def _show(self) -> None:
        if "" in self.words:
            return
        if self._open_line:
            _draw_bars()
        else:
            self._shown = True
            words = self.words[-1] if self.words else "at work"
            self._write(f"{CLEAR}{words} ({time.monotonic() - self._since:.0f} s)")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="backslashreplace"))


def _draw_bars() -> None:
    """Draw every bar again, with the time that has passed."""
    from tqdm import tqdm

    with tqdm.get_lock():
        bars = list(getattr(tqdm, "_instances", ()))
    for bar in bars:
        bar.refresh()


class _Noted:
    """A stream to the terminal: what is written replaces the sign."""

    def __init__(self, stream: TextIO, signs: Signs):
        self._stream, self.signs = stream, signs

    def write(self, text: str) -> int:
        self.signs.clear()
        written = self._stream.write(text)
        self.signs.note(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def showing_signs(seconds: float = QUIET_SECONDS) -> Iterator[None]:
    """Show signs on the terminal while the block runs, if there is one."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    before = sys.stdout, sys.stderr
    descriptor = os.dup(sys.stderr.fileno())
    signs = Signs(descriptor, seconds)
    sys.stdout, sys.stderr = (
        _Noted(stream, signs) if stream is not None and stream.isatty() else stream
        for stream in before
    )
    try:
        with signs.watch():
            yield
    finally:
        sys.stdout, sys.stderr = before
        os.close(descriptor)


def doing(words: str, at_once: bool = False) -> contextlib.AbstractContextManager[None]:
    """Let signs say what the block does; "": nobody waits for it, and nothing is shown.

    at_once: without a second of silence before, where large libraries that are loaded may keep
    every other thread waiting.
    """
    signs = getattr(sys.stderr, "signs", None)
    return signs.during(words, at_once) if signs else contextlib.nullcontext()
