"""A process that is lost while it saves something, at a moment that is known."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from utils_ranks import find_ranks


def lost_while(save: Callable, spoil: Callable = lambda *given: None) -> Callable:
    """A save whose KILLED_AT-th call ends or stops the process, by SIGNAL (SIGKILL), at its start.

    spoil: called before with what is saved. Of several ranks it is rank 1, when torchrun starts it
    first; with LOST, a file, the others wait at their first save until rank 1 is lost.
    """
    left, ranks = int(os.environ["KILLED_AT"]), find_ranks(os.environ)
    lost = Path(os.environ.get("LOST", os.devnull))

    def lose(*given, **named):
        nonlocal left
        left -= 1
        if left == 0:
            spoil(*given)
            if "LOST" in os.environ:
                lost.touch()
            os.kill(os.getpid(), getattr(signal, os.environ.get("SIGNAL", "SIGKILL")))
        return save(*given, **named)

    def wait(*given, **named):
        while not lost.exists():
            time.sleep(0.01)
        return save(*given, **named)

    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return save
    return lose if ranks.world == 1 or ranks.rank == 1 else wait
