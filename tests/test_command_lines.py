"""Random command lines end in 0 or 2, never in a traceback; tests/stress/fuzz.py does many more."""

from __future__ import annotations

from command_lines import make_folder, try_lines


def test_random_command_lines(tmp_path):
    make_folder(tmp_path)
    statuses = try_lines(tmp_path, count=15, seed=4)
    assert sum(statuses.values()) == 15
