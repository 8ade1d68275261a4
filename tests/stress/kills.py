"""Commands killed at random: python3 tests/stress/kills.py [TRIALS [SEED [NAME...]]].

TRIALS of each, or of those named.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def main(trials: int = 10, seed: int = 0, *names: str) -> None:
    """Kill every command that often; the first that loses or claims something ends it."""
    from conftest import SMALL_CLIP, save_clip
    from kills import (
        archive_pages,
        captions,
        download,
        extraction,
        kill_and_continue,
        retrieval,
        slow_server,
    )

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(slow_server(archive_pages()))
        clip = save_clip(folder / "clip", SMALL_CLIP)
        subjects = {
            "download": download(folder, url),
            "retrieval": retrieval(folder / "retrieval"),
            "extraction of files": extraction(folder / "world", clip, "folder"),
            "extraction of shards": extraction(folder / "world", clip, "wds"),
            "extraction by ranks": extraction(folder / "world", clip, "wds", ranks=2),
            "captions": captions(folder / "world"),
        }
        for name in names or subjects:
            subject = subjects[name]
            out = folder / "out" / name.replace(" ", "_")
            seconds = subject.run(out / "whole")
            whole = subject.finished(out / "whole")
            seeds = range(seed, seed + trials)
            killed = [kill_and_continue(subject, out / str(s), whole, seconds, s) for s in seeds]
            print(f"{name}: {sum(killed)} kills, {trials} times the same bytes", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
