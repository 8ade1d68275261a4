"""Many damaged files: python3 tests/stress/fuzz.py [COUNT [SEED]], COUNT of each kind."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def main(count: int = 2000, seed: int = 0) -> None:
    """Damage each kind of file; the first that is neither read nor refused in a line ends it."""
    from fuzzing import SUBJECTS, fuzz

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name in SUBJECTS:
            refused = fuzz(name, Path(folder), count, seed)
            print(f"{name}: {refused} of {count} refused")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
