"""Rows of files on their way to the device: the next are read while these are computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils_storage import ArrayRows, MappedRows

    Buffers = Mapping[str, Tensor]

Place = TypeVar("Place")


Shapes = Mapping[str, "tuple[int, int, torch.dtype]"]  # rows, D and type, by name


def shapes_of(files: Mapping[str, MappedRows | ArrayRows], rows: int) -> Shapes:
    """Those of buffers for so many rows of files: float16 where these are, else float32."""
    import torch

    types = {np.dtype(np.float16): torch.float16}
    return {
        name: (rows, file.shape[1], types.get(file.dtype, torch.float32))
        for name, file in files.items()
    }


def copied_ahead(
    places: Sequence[Place],
    fill: Callable[[Place, Buffers], int],
    shapes: Shapes,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """The rows of every place, in order, (n, D) by name, on the device, of the type they have.

    fill(place, buffers) reads a place's rows to the beginning of the buffers and says how many they
    are; shapes: of each buffer. A thread fills one set of buffers while the rows
    of the other are used. On a GPU both are pinned and what is yielded is a copy; elsewhere it is
    the buffer itself, whose rows the next but one replace once the next are asked for.
    """
    import torch

    on_gpu = device.type == "cuda"
    buffers = [
        {
            name: torch.empty((rows, width), dtype=dtype, pin_memory=on_gpu)
            for name, (rows, width, dtype) in shapes.items()
        }
        for _ in range(2)
    ]
    copied = [torch.cuda.Event() for _ in buffers] if on_gpu else []

    def read(turn: int) -> dict[str, Tensor]:
        own = buffers[turn % 2]
        count = fill(places[turn], own)
        return {name: buffer[:count] for name, buffer in own.items()}

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0) if places else None
        for turn in range(len(places)):
            rows = ahead.result()
            if on_gpu:
                rows = {name: part.to(device, non_blocking=True) for name, part in rows.items()}
                copied[turn % 2].record(torch.cuda.current_stream(device))
                copied[(turn + 1) % 2].synchronize()  # the buffers that are filled next are free
            if turn + 1 < len(places):
                ahead = reader.submit(read, turn + 1)
            yield rows
