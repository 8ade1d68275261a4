"""Many files damaged by their meaning: python3 tests/stress/hostile_files.py [COUNT [SEED]]."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def main(count: int = 40, seed: int = 0) -> None:
    """Spoil every file of each world `count` times; the first that fails ends it."""
    from hostile_files import try_cases
    from hostile_world import WORLDS

    warnings.simplefilter("ignore")
    for name, make in WORLDS.items():
        with tempfile.TemporaryDirectory() as folder:
            cases = make(Path(folder))
            refused = try_cases(cases, count, seed, Path(folder))
            print(f"{name}: {len(cases)} files, {count} times each: {refused} refused", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
