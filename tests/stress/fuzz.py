"""Many damaged files and command lines: python3 tests/stress/fuzz.py [COUNT [SEED [LINES]]].

COUNT files of each kind, LINES command lines.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def main(count: int = 2000, seed: int = 0, lines: int = 300) -> None:
    """Damage each kind of file; the first that is neither read nor refused in a line ends it.

    So does the first command line that ends in anything but 0 or 2, or with a traceback.
    """
    from command_lines import make_folder, try_lines
    from fuzzing import SUBJECTS, fuzz

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name in SUBJECTS:
            refused = fuzz(name, Path(folder), count, seed)
            print(f"{name}: {refused} of {count} refused")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        print(f"command lines by status: {try_lines(Path(folder), lines, seed)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
