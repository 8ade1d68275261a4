"""Damaged files are read or refused in one line; tests/stress/fuzz.py does many more."""

from __future__ import annotations

import pytest
from fuzzing import SUBJECTS, fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUBJECTS)
def test_damaged_files(tmp_path, name):
    assert fuzz(name, tmp_path, count=40, seed=1)
