"""Processes of a command as ranks, as launchers other than torchrun start them.

python3 rank_processes.py COUNT PROGRAM FLAG... starts so many, and ends as the worst of them does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def start(command: Sequence[str], folder: Path = ROOT, **environment: str) -> subprocess.Popen:
    """A Python program and its flags, on one thread."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_ranks(
    command: Sequence[str],
    count: int,
    folder: Path = ROOT,
    names: tuple[str, ...] = TORCHRUN,
    **environment: str,
) -> list[subprocess.Popen]:
    """All ranks of a command, which meet on a free port; names: the launcher's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **environment}
    started = []
    for rank in range(count):
        own = dict(zip(names, (str(rank), str(count), str(rank)), strict=True))
        started.append(start(command, folder, **own, **places))
    return started


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and stderr of each."""
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, own) for process, own in zip(processes, said, strict=True)]


def end_stopped(process: subprocess.Popen) -> None:
    """Kill a process, which is stopped by now."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    process.kill()
    process.communicate()


if __name__ == "__main__":
    done = ended(start_ranks(sys.argv[2:], int(sys.argv[1]), Path.cwd()))
    print(*(said for _, said in done), file=sys.stderr)
    sys.exit(max(abs(status) for status, _ in done))
