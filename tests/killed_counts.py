"""run_retrieval.py, killed while it keeps the counts of its KILLED_AT-th unit; of ranks, rank 1 is.

What another process could kill only by chance at some moment dies here at a known one.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_retrieval
from distractors.passes import Kept
from utils import run_command


def main() -> None:
    save, left = Kept.save, int(os.environ["KILLED_AT"])

    def save_or_die(*args) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args)

    if os.environ.get("RANK", "1") == "1":
        Kept.save = save_or_die
    run_command(run_retrieval.main)


if __name__ == "__main__":
    main()
