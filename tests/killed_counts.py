"""run_retrieval.py, lost as it keeps the counts of its KILLED_AT-th unit: see losing.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from losing import lost_while

import run_retrieval
from distractors.passes import Kept
from utils import run_command

if __name__ == "__main__":
    Kept.save = lost_while(Kept.save)
    run_command(run_retrieval.main)
