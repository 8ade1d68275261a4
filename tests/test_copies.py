"""Rows are read while those before them are used, and none is overwritten too early."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from utils import UserError
from utils_copies import copied_ahead
from utils_storage import MappedRows

CPU = torch.device("cpu")
PLACES = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]


def reader(tmp_path):
    """Rows of a file in half precision, and what fills buffers with some of them."""
    rows = np.arange(13 * 3).reshape(13, 3).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    file = MappedRows(tmp_path / "rows.npy")

    def fill(place, buffers):
        found = file.read(place)
        buffers["image"][: len(found)].numpy()[:] = found
        return len(found)

    return rows, fill, {"image": (4, 3, torch.float16)}


def test_the_next_rows_are_read_while_these_are_used(tmp_path):
    rows, fill, shapes = reader(tmp_path)
    read = [threading.Event() for _ in PLACES]

    def told(place, buffers):
        count = fill(place, buffers)
        read[PLACES.index(place)].set()
        return count

    for turn, found in enumerate(copied_ahead(PLACES, told, shapes, CPU)):
        assert all(event.wait(60) for event in read[: turn + 2])
        assert not any(event.is_set() for event in read[turn + 2 :])
        assert found["image"].dtype == torch.float16
        np.testing.assert_array_equal(found["image"].numpy(), rows[PLACES[turn]])


def test_what_reading_raises_ends_the_rows(tmp_path):
    _, fill, shapes = reader(tmp_path)
    copies = copied_ahead(PLACES, fill, shapes, CPU)
    next(copies)
    (tmp_path / "rows.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"rows.npy is cut short"):
        list(copies)
