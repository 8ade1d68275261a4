"""Ranks: the processes that share a job, and their signs of life on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from utils import UserError

BEAT_SECONDS = 1.0  # between two signs of life of a rank
FIRST_SIGN_FACTOR = 5  # a rank's first sign may take longer than the others: it loads the model
POLL_SECONDS = 0.5  # between two looks at what other ranks have done


class Beat:
    """A rank's sign of life: a file rewritten every second by a thread, with a word on its state.

    No collective operation is needed, and a rank that died is known by its silence.
    """

    def __init__(self, folder: Path, rank: int):
        self._path = folder / f"{rank}.json"
        self._content = {"launch": uuid.uuid4().hex, "beat": 0, "state": "preparing", "text": ""}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._run, daemon=True).start()

    def say(self, state: str, text: str = "") -> None:
        """Tell the other ranks: ready, encoded, failed (why), finished."""
        self._content |= {"state": state, "text": text}
        self._write()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._content["beat"] += 1
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._content), encoding="utf-8")
            os.replace(temporary, self._path)


class Watch:
    """Another rank's signs of life, judged by this machine's clock."""

    def __init__(self, folder: Path, rank: int, timeout: float):
        self.rank = rank
        self._path, self._timeout = folder / f"{rank}.json", timeout
        self._first = self._last = self._read()
        self._changed = time.monotonic()

    def _read(self) -> dict:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def look(self) -> str:
        """The rank's state in this launch, "" before its first sign.

        Raises UserError if it failed, or has been silent for longer than the timeout.
        """
        now = self._read()
        if now and now != self._last:
            self._last, self._changed = now, time.monotonic()
        state = "" if self._last == self._first else self._last["state"]
        if state == "failed":
            raise UserError(f"rank {self.rank} stopped: {self._last['text']}")
        timeout = self._timeout if state else FIRST_SIGN_FACTOR * self._timeout
        if time.monotonic() - self._changed > timeout and state != "encoded":
            raise UserError(
                f"rank {self.rank} has shown no sign of life for {timeout:g} s; what is "
                "done is safe, and the same command continues, with any number of ranks"
            )
        return state


def wait_for(watches: Sequence[Watch], states: tuple[str, ...]) -> None:
    """Wait until every watched rank has come to one of the states."""
    while not all(watch.look() in states for watch in watches):
        time.sleep(POLL_SECONDS)
