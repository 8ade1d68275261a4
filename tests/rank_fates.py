"""Ranks that meet a fate: python3 rank_fates.py FOLDER SECONDS FATE... forks the ranks of each.

What rank R of a fate says goes to FOLDER/FATE.R, how all have ended to FOLDER/statuses.json. torch
is imported once, for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, run_command
from utils_ranks import Group, joined_ranks

UNITS = 7
WORLD = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise UserError("q.jpg: not an image")


# What befalls a rank once all have met: fate -> (rank, what).
BEFALLS = {
    "none": (0, lambda: None),
    "killed": (1, die),
    "the meeting killed": (0, die),
    "stopped": (1, stop),
    "the meeting stopped": (0, stop),
    "failed": (2, fail),
}


def work(group: Group, fate: str) -> None:
    """Deal units among the ranks, and join what they took; the first rank says what came of it."""
    assert group.gather(group.ranks.rank) == list(range(WORLD))
    rank, befall = BEFALLS.get(fate, BEFALLS["none"])
    if group.ranks.rank == rank:
        befall()
    taken = group.gather(list(group.deal(UNITS)))
    again = group.gather(list(group.deal(UNITS)))
    if group.ranks.rank == 0:
        print(*sorted(chain(*taken)), *sorted(chain(*again)))


def places(fate: str, port: int) -> list[dict[str, str]]:
    """The variables of the ranks that are started."""
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(WORLD)} for rank in range(WORLD)
    ]
    for own in ranks:
        own |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if fate == "missing":
        ranks.pop()
    if fate == "another world":
        ranks[1]["WORLD_SIZE"] = "4"
    return ranks


def start(own: dict[str, str], fate: str, said: Path, seconds: float) -> int:
    """Fork a rank; its process id."""
    if pid := os.fork():
        return pid
    os.environ.update(own)
    signal.alarm(60)  # whatever should hang
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)

    def main(_: list[str]) -> None:
        with joined_ranks(seconds) as group:
            work(group, fate)

    try:
        run_command(main)
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code)


def end_of(pid: int) -> int | str:
    """How a rank ended, "stopped" of one that did not, which is killed then."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def main(folder: str, seconds: str, *fates: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as commands set it, before torch is imported
    import torch.distributed  # noqa: F401

    started = {}
    with contextlib.ExitStack() as sockets:
        for fate in fates:
            port = sockets.enter_context(socket.socket())
            port.bind(("localhost", 0))
            number = port.getsockname()[1]
            if fate == "port taken":
                port.listen()
            else:
                port.close()
            started[fate] = [
                start(own, fate, Path(folder) / f"{fate}.{own['RANK']}", float(seconds))
                for own in places(fate, number)
            ]
        ends = {fate: [end_of(pid) for pid in pids] for fate, pids in started.items()}
    for fate, pids in started.items():
        for pid, end in zip(pids, ends[fate], strict=True):
            if end == "stopped":
                os.kill(pid, signal.SIGKILL)
    (Path(folder) / "statuses.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
