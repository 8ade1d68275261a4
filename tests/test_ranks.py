"""The processes that share a job: how they meet, and what the others say when one is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils import UserError
from utils_ranks import Ranks, find_ranks, joined_ranks

FATES = Path(__file__).with_name("rank_fates.py")
SECONDS = 4
SAFE = "what is done is kept, and the same command continues, with any number of ranks"
NOTHING = ""
MET = rf"error: the process in which the ranks met \(.*\) has ended or hangs; .*; {SAFE}"
ENDED = rf"error: (rank \d or )?rank 1( or rank 2)? has ended \(its own first line .*; {SAFE}"
LATE = rf"error: rank 1 did not come within {SECONDS} s \(see --rank_timeout\); {SAFE}"
TOLD = rf"error: rank 2 stopped: q\.jpg: not an image \({SAFE}\)"
ALONE = rf"error: 3 ranks did not meet at localhost:\d+ within {SECONDS} s: one never .*{SAFE}"
DEALT = "0 1 2 3 4 5 6 0 1 2 3 4 5 6"

# Fate -> how each rank ends, and the one line that it says.
EXPECTED = {
    "none": [(0, DEALT), (0, NOTHING), (0, NOTHING)],
    "killed": [(2, ENDED), (-9, NOTHING), (2, f"{ENDED}|{MET}")],
    "the meeting killed": [(-9, NOTHING), (2, MET), (2, MET)],
    "stopped": [(2, LATE), ("stopped", NOTHING), (2, f"{LATE}|{MET}")],
    "the meeting stopped": [("stopped", NOTHING), (2, MET), (2, MET)],
    "failed": [(2, TOLD), (2, f"{TOLD}|{MET}"), (2, r"error: q\.jpg: not an image")],
    "missing": [(2, ALONE), (2, ALONE)],
    "port taken": [(2, ALONE)] * 3,
}


@pytest.fixture(scope="module")
def fates(tmp_path_factory) -> dict[str, list[tuple[int | str, str]]]:
    """How the ranks of every fate ended, and all that each said."""
    folder = tmp_path_factory.mktemp("fates")
    command = [sys.executable, str(FATES), str(folder), str(SECONDS), *EXPECTED, "another world"]
    subprocess.run(command, check=True, timeout=200)
    return {
        fate: [(end, (folder / f"{fate}.{rank}").read_text()) for rank, end in enumerate(ends)]
        for fate, ends in json.loads((folder / "statuses.json").read_text()).items()
    }


@pytest.mark.parametrize("fate", EXPECTED)
def test_every_rank_ends_with_one_line(fates, fate):
    assert [end for end, _ in fates[fate]] == [end for end, _ in EXPECTED[fate]]
    for (_, said), (_, expected) in zip(fates[fate], EXPECTED[fate], strict=True):
        assert re.fullmatch(f"(?:{expected})\n?", said), said


def test_ranks_of_different_launches(fates):
    """Whoever comes first is right; each of the others says that it was told another number."""
    assert [end for end, _ in fates["another world"]] == [2, 2, 2]
    said = [own for _, own in fates["another world"]]
    assert all(re.fullmatch("error: .*\n", own) for own in said)
    assert any(
        re.search(r"as one of (3|4), another rank as one of (3|4): give", own) for own in said
    )


def test_launchers():
    torch_names = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert find_ranks(torch_names) == Ranks(3, 8, 1)
    step = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
    assert find_ranks(step) == Ranks(2, 4, 0)
    assert find_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == Ranks()


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "")])
def test_numbers_that_are_none(rank, world):
    with pytest.raises(UserError, match=f"RANK='{rank}', WORLD_SIZE='{world}'"):
        find_ranks({"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": "0"})


def test_a_meeting_without_a_place(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR is not set: .* torchrun, or export"):
        joined_ranks(1).__enter__()
