"""Ranks: the processes that share a job, as torchrun and srun start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from utils import UserError

if TYPE_CHECKING:
    import torch

# Variables of rank, world size and local rank. SLURM's count inside an srun step only: a batch
# script itself runs once, however many tasks it was given.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # where the ranks meet


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is; `local` numbers those of one machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def find_ranks(environment: Mapping[str, str]) -> Ranks:
    """The place of this process as torchrun or srun tell it; alone if neither does."""
    for names in LAUNCHERS:
        if all(name in environment for name in names):
            return Ranks(*(int(environment[name]) for name in names))
    return Ranks()


def device_index(gpu: int, ranks: Ranks) -> int:
    """The GPU asked for or, of several ranks, the one of the local rank among those it sees."""
    import torch

    if ranks.world == 1 or gpu < 0:
        return gpu
    if gpu:
        raise UserError(f"--gpu {gpu}: several ranks take a GPU each; leave it, or give -1")
    return ranks.local % max(1, torch.cuda.device_count())


class Group:
    """The ranks of a run that divide units among themselves and join what they find.

    This one is of a process alone; Together is of several.
    """

    ranks = Ranks()

    def deal(self, units: int) -> Iterator[int]:
        """The numbers of the units that fall to this rank, each taken when it is asked for."""
        yield from range(units)

    def gather(self, found: Any) -> list:
        """What every rank found, in their order, on every rank."""
        return [found]


class Together(Group):
    """Several ranks by torch.distributed: units are dealt by the store in which they met."""

    def __init__(self, ranks: Ranks, store: torch.distributed.Store):
        self.ranks = ranks
        self._store = store
        self._dealt = 0

    def deal(self, units: int) -> Iterator[int]:
        """A slow rank takes fewer. Every rank has to deal as often as the others, and alike."""
        self._dealt += 1
        key = f"units {self._dealt}"
        with _in_plain_words():
            while (number := self._store.add(key, 1) - 1) < units:
                yield number

    def gather(self, found: Any) -> list:
        """Raises UserError if a rank has ended, or is silent for longer than the timeout."""
        import torch.distributed as distributed

        everything = [None] * self.ranks.world
        with _in_plain_words():
            distributed.all_gather_object(everything, found)
        return everything


@contextlib.contextmanager
def joined_ranks(timeout: float) -> Iterator[Group]:
    """Meet the other ranks of this launch, and part from them at the end; alone without a launcher.

    timeout: seconds that a rank waits for the others, at the meeting and when it has no unit left.
    Raises UserError if they do not all come.
    """
    ranks = find_ranks(os.environ)
    if ranks.world == 1:
        yield Group()
        return
    lost = [name for name in MEETING if name not in os.environ]
    if lost:
        raise UserError(
            f"{ranks.world} ranks are started, but {lost[0]} is not set: start them with torchrun, "
            "or export MASTER_ADDR (the first machine) and MASTER_PORT (a free port there)"
        )
    import torch.distributed as distributed

    wait = timedelta(seconds=timeout)
    with _in_plain_words():
        store, _, _ = next(distributed.rendezvous("env://", ranks.rank, ranks.world, timeout=wait))
        store.set_timeout(wait)
        distributed.init_process_group(
            "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=wait
        )
    try:
        yield Together(ranks, distributed.PrefixStore("dealt", store))
    finally:
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


@contextlib.contextmanager
def _in_plain_words() -> Iterator[None]:
    """Turn what torch.distributed raises into a line for the user."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            "the ranks lost each other: one has ended, or never came (the first line of each says "
            f"why; here: {cause[:200]}); what is counted is kept, and the same command continues"
        ) from None
