"""Rows as FBGEMM, a part of PyTorch for x86, multiplies them with few vectors: of float16.

It converts them in the processor's registers, and sums in float32: a product takes little more than
it takes to read the rows from memory, half of the time of a conversion and a product of matrices. A
float32 number is packed as the sum of two of float16, which differs from it by 2^-22 of it,
or 2^-36, at most.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live.threads import share_out

if TYPE_CHECKING:
    from torch import Tensor

ROWS_PACKED = 4096  # together
DIMS_PACKED = 512  # FBGEMM's: a row is padded to a multiple of them
SHARE_OF_MEMORY = 0.25  # of what this process may have, that packed rows may take
REST = 2.0**11  # what float16 leaves of a number is as many times smaller


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A copy of rows (N, D), packed some at a time: a part of float16 ones, two of float32 ones.

    length: what products are divided by, float32 (N,); float32 rows are packed at unit length.
    """

    packs: list[tuple[Any, ...]]
    length: Tensor

    @classmethod
    def of(cls, raw: Tensor, length: Tensor) -> PackedRows | None:
        """Pack raw rows (N, D), float16 or float32, of lengths (N,).

        None where FBGEMM is not there, or the copy would take more than SHARE_OF_MEMORY.
        """
        import torch

        padded = -(-raw.shape[1] // DIMS_PACKED) * DIMS_PACKED
        if not has_fbgemm() or len(raw) * padded * raw.itemsize > SHARE_OF_MEMORY * _memory():
            return None
        packs: list[Any] = [None] * -(-len(raw) // ROWS_PACKED)
        ended = threading.Event()

        def pack(share: slice) -> None:
            room = torch.empty(2, ROWS_PACKED, raw.shape[1])  # once: new ones leave holes in memory
            half = torch.empty(ROWS_PACKED, raw.shape[1], dtype=torch.float16)
            for number, some in _steps(share):
                if ended.is_set():
                    return
                count = some.stop - some.start
                own, rest = room[:, :count]
                if raw.dtype == torch.float16:
                    packs[number] = (_pack(own.copy_(raw[some])),)
                else:
                    torch.div(raw[some], length[some][:, None], out=rest)
                    most = _pack(own.copy_(half[:count].copy_(rest)))
                    packs[number] = most, _pack(rest.sub_(own).mul_(REST))

        try:
            share_out(pack, len(raw), ROWS_PACKED)
        finally:
            ended.set()  # Ctrl-C: the threads would work on, and be waited for
        return cls(packs, length)

    def product(self, vectors: Tensor) -> Tensor:
        """V X': (V, D) -> (V, N)."""
        import torch

        times = torch.ops.quantized.linear_dynamic_fp16
        found = vectors.new_empty(len(vectors), len(self.length))

        def multiply(share: slice) -> None:
            for number, some in _steps(share):
                most, *rest = (times(vectors, own) for own in self.packs[number])
                if rest:
                    torch.add(most, rest[0], alpha=1 / REST, out=found[:, some])
                else:
                    torch.div(most, self.length[some], out=found[:, some])

        share_out(multiply, len(self.length), ROWS_PACKED)
        return found


@cache
def has_fbgemm() -> bool:
    """Whether this machine's PyTorch can multiply packed rows."""
    import torch

    try:
        torch.ops.quantized.linear_dynamic_fp16(torch.ones(1, 1), _pack(torch.ones(1, 1)))
    except (AttributeError, RuntimeError):
        return False
    return True


def _pack(rows: Tensor) -> Any:
    """Rows (n, D) of float32, which are rounded to float16."""
    import torch

    return torch.ops.quantized.linear_prepack_fp16(rows, None)


def _steps(share: slice) -> Iterator[tuple[int, slice]]:
    """The packs of some rows, from the first of a pack on, and their rows."""
    for start in range(share.start, share.stop, ROWS_PACKED):
        yield start // ROWS_PACKED, slice(start, min(start + ROWS_PACKED, share.stop))


def _memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have: the machine's, or a container's limit.

    root: below which the system tells of itself.
    """
    machine = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """The limits of this process's control group and of those around it, of version 2 or 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            groups, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif number == "0":
            groups, name = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        group = Path(place.strip("/"))
        for own in (group, *group.parents):  # a container may see its own as the topmost
            if (limit := _read(groups / own / name).strip()).isdecimal():  # no limit: "max"
                yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
