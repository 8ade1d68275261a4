"""Ranks: the processes that share a job, as torchrun and srun start them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from utils import UserError
from utils_signs import doing

if TYPE_CHECKING:
    import torch

# Variables of rank, world size and local rank. SLURM's count inside an srun step only: a batch
# script itself runs once, however many tasks it was given.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # where the ranks meet
TIMEOUT = 1800.0  # seconds; longer than any unit of work takes
PATIENCE = 2.0  # seconds that a question why the others are lost may take, beside these
SAFE = "what is done is kept, and the same command continues, with any number of ranks"


class LostRanks(UserError):
    """The others cannot be reached: what ended them is their own line's to say."""


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is; `local` numbers those of one machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def find_ranks(environment: Mapping[str, str]) -> Ranks:
    """The place of this process as torchrun or srun tell it; alone if neither does.

    Raises UserError for numbers that are none, or do not belong together.
    """
    for names in LAUNCHERS:
        if all(name in environment for name in names):
            given = [environment[name] for name in names]
            if not all(value.isdecimal() for value in given) or int(given[0]) >= int(given[1]):
                said = ", ".join(f"{name}={environment[name]!r}" for name in names)
                raise UserError(f"{said}: the first has to be a number below the second")
            return Ranks(*map(int, given))
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
        """What every rank found, in their order, on every rank; which waits for all of them."""
        return [found]


class Together(Group):
    """Several ranks by torch.distributed: units are dealt by the store in which they met.

    Every rank has to deal and to gather as often as the others, and alike. LostRanks is raised if
    a rank has ended, or is silent for longer than the timeout.
    """

    def __init__(self, ranks: Ranks, store: torch.distributed.Store, timeout: float):
        self.ranks = ranks
        self._store, self._timeout = store, timeout
        self._dealt = self._gathered = 0

    def deal(self, units: int) -> Iterator[int]:
        """A slow rank takes fewer."""
        self._dealt += 1
        key = f"units {self._dealt}"
        while (number := self._ask(lambda: self._store.add(key, 1), self._timeout) - 1) < units:
            yield number

    def gather(self, found: Any) -> list:
        import torch.distributed as distributed

        self._gathered += 1
        everything, began = [None] * self.ranks.world, time.monotonic()
        self._ask(lambda: self._store.set(self._place(self.ranks.rank), ""), self._timeout)
        try:
            distributed.all_gather_object(everything, found)
        except RuntimeError:
            late = time.monotonic() - began >= self._timeout
            raise LostRanks(self._ask(lambda: self._explain(late), PATIENCE)) from None
        return everything

    def tell(self, error: BaseException) -> None:
        """Let the others know why this rank ends, if they can still be reached."""
        why = f"rank {self.ranks.rank} stopped: {error or type(error).__name__}"
        with contextlib.suppress(LostRanks):
            self._ask(lambda: self._store.set(f"failed {self.ranks.rank}", why), PATIENCE)

    def _place(self, rank: int) -> str:
        """The key that is there once a rank has come to this gathering."""
        return f"gathered {self._gathered} {rank}"

    def _explain(self, late: bool) -> str:
        """Why a gathering failed: what a rank has told, else who is not there."""
        everyone = range(self.ranks.world)
        for rank in everyone:
            if self._store.check([f"failed {rank}"]):
                return f"{self._store.get(f'failed {rank}').decode()} ({SAFE})"
        absent = [rank for rank in everyone if not self._store.check([self._place(rank)])]
        who = " or ".join(f"rank {rank}" for rank in absent) or "a rank"
        if late:
            return f"{who} did not come within {self._timeout:g} s (see --rank_timeout); {SAFE}"
        return f"{who} has ended (its own first line may say why); {SAFE}"

    def _ask(self, question: Callable[[], Any], seconds: float) -> Any:
        """The store's answer."""
        try:
            return _within(seconds, question)
        except RuntimeError:
            raise LostRanks(
                "the process in which the ranks met (rank 0, or torchrun) has ended or hangs; its "
                f"own first line may say why; {SAFE}"
            ) from None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call gives; a RuntimeError if it takes longer, as its own timeout does not see to.

    A store that does not answer, because its process is stopped or is no store, holds up its calls
    for ever.
    """
    answer: futures.Future = futures.Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except futures.TimeoutError:
        raise RuntimeError(f"no answer within {seconds:g} s") from None


@contextlib.contextmanager
def joined_ranks(timeout: float) -> Iterator[Group]:
    """Meet the other ranks of this launch, and part from them at the end; alone without a launcher.

    timeout: seconds that a rank waits for the others, at the meeting and when it has no unit left.
    Raises UserError if they do not all come, or do not belong together.
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
    with doing("meeting the other ranks"):
        group = _meet(ranks, timeout)
    try:
        yield group
    except LostRanks:
        raise
    except BaseException as error:
        group.tell(error)
        raise
    finally:
        import torch.distributed as distributed

        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def _meet(ranks: Ranks, timeout: float) -> Together:
    import torch.distributed as distributed

    wait, start = timedelta(seconds=timeout), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        meeting = distributed.rendezvous("env://", ranks.rank, ranks.world, timeout=wait)
        store, _, _ = _within(timeout + PATIENCE, lambda: next(meeting))
        store.set_timeout(wait)
        _check_world(ranks, store)
        # torchrun's store outlives a restart, with all that the lost ranks have left in it.
        store = distributed.PrefixStore(f"start {start}", store)
        distributed.init_process_group(
            "gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=wait
        )
    except (RuntimeError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        place = ":".join(os.environ[name] for name in MEETING)
        raise LostRanks(
            f"{ranks.world} ranks did not meet at {place} within {timeout:g} s: one never came, or "
            f"the port is taken (rank {ranks.rank}: {cause[:200]}); {SAFE}"
        ) from None
    return Together(ranks, distributed.PrefixStore("ours", store), timeout)


def _check_world(ranks: Ranks, store: torch.distributed.Store) -> None:
    """Raise UserError if the ranks were told of different numbers of ranks; torchrun tells one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    own = str(ranks.world)
    first = _within(PATIENCE, lambda: store.compare_set("world", "", own)).decode()
    if first != own:
        raise UserError(
            f"rank {ranks.rank} was started as one of {own}, another rank as one of {first}: give "
            "all the same WORLD_SIZE"
        )
