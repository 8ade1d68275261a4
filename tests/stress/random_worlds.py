"""Many random worlds against the oracle: python3 tests/stress/random_worlds.py [COUNT [FIRST]]."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def main(count: int = 200, first: int = 0) -> None:
    """Check the worlds of these seeds; the first that fails ends it."""
    from test_random_worlds import check_world

    compared = decided = 0
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            found = check_world(seed, Path(folder))
        compared, decided = compared + found[0], decided + found[1]
    print(f"{count} worlds, {compared} APs: all agree; {decided} of them to 1e-6, without ties")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
