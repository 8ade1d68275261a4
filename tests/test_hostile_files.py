"""Files damaged by their meaning are read or refused in one line; tests/stress/ does many more."""

from __future__ import annotations

import pytest
from hostile_files import try_cases
from hostile_world import WORLDS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORLDS)
def test_a_world_of_damaged_files(tmp_path, name):
    assert try_cases(WORLDS[name](tmp_path), count=3, seed=5, writes=tmp_path)
