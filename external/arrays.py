"""Arrays of other systems: embeddings and score matrices, in the formats that people write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from external.ids import (
    first_three,
    match_ids,
    read_ids,
    refuse_repeated,
    refuse_unknown,
)
from utils import UserError
from utils_pickles import map_array, read_archive, refusal_of

UNIT_TOLERANCE = 1e-3  # rows of lengths this near to 1 are of unit length


def read_embeddings(paths: Sequence[Path]) -> np.ndarray:
    """Rows of embeddings (n, D) or (n, tokens, D), float32, of files joined in numeric order.

    Raises UserError for a file that cannot be read, of another width, or with NaN or infinity.
    """
    parts = [_read_array(path) for path in sorted(paths, key=_number)]
    for path, part in zip(sorted(paths, key=_number), parts, strict=True):
        if part.ndim not in (2, 3) or part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"{path}: shape {part.shape}, where (rows, D) or (rows, tokens, D) is due"
            )
        refuse_not_finite(part.reshape(len(part), -1), path)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else -1, path.name


def refuse_not_finite(rows: np.ndarray, path: Path) -> None:
    """Raise UserError if a row holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        rows_named = first_three([int(row) + 1 for row in bad])
        raise UserError(f"{path}: {len(bad)} rows hold NaN or infinity, {rows_named}")


def _read_array(path: Path) -> np.ndarray:
    """One array of a file as float32: .npy, .npz, .safetensors, .pt."""
    if not path.is_file():
        raise UserError(f"{path} is no file")
    try:
        if path.suffix == ".npy":
            array = map_array(path)
        elif path.suffix == ".npz":
            array = _only_one(read_archive(path), path)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            array = _only_one(load_file(str(path)), path).float().numpy()
        elif path.suffix in (".pt", ".pth"):
            array = _read_tensor(path)
        else:
            raise UserError(f"{path}: .npy, .npz, .safetensors, .pt and .pth are read")
    except UserError:
        raise
    except Exception as error:  # each format's own; a pickle that would run code is one of them
        raise UserError(f"{path} cannot be read ({refusal_of(error)})") from None
    if array.dtype.kind != "f":
        raise UserError(f"{path}: numbers of type {array.dtype}, where floats are due")
    return np.asarray(array, np.float32)


def _read_tensor(path: Path) -> np.ndarray:
    """A tensor, or the one named embs of CoVR's files."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        content = content["embs"] if "embs" in content else _only_one(content, path)
    return content.float().numpy()


def _only_one(arrays: dict, path: Path):
    if len(arrays) != 1:
        raise UserError(f"{path} holds {len(arrays)} arrays ({', '.join(arrays)}); one is expected")
    return next(iter(arrays.values()))


def in_task_order(
    array: np.ndarray,
    ids: Path | None,
    known: Sequence[str],
    what: str,
    place: Path,
    blocks: Sequence[str] = (),
) -> tuple[np.ndarray, str]:
    """Rows in the data set's order, by their ids or, without ids, as they stand; and the rule.

    blocks: what an error calls the block of each known row. Raises UserError for a wrong number of
    rows, and for unknown, repeated and missing ids.
    """
    if ids is None:
        if len(array) != len(known):
            raise UserError(
                f"{place}: {len(array)} rows, but the data set has {len(known)} {what} rows; name "
                f"their ids with --{what}_ids"
            )
        return array, "in the data set's order"
    given = read_ids(ids)
    if len(given) != len(array):
        raise UserError(f"{ids} names {len(given)} ids, but {place} has {len(array)} rows")
    refuse_repeated(given, ids)
    matched = match_ids(given, known)
    refuse_unknown(matched, given, what, ids)
    row_of = np.full(len(known), -1, np.int64)
    row_of[matched.rows] = np.arange(len(given))
    lost = [known[row] for row in np.flatnonzero(row_of < 0)]
    if lost:
        whole = sorted({*blocks} - {blocks[row] for row in np.flatnonzero(row_of >= 0) if blocks})
        named = f"; whole instances have none, {first_three(whole)}" if whole else ""
        raise UserError(f"{ids}: {len(lost)} {what} ids have no row, {first_three(lost)}{named}")
    return array[row_of], matched.rule


def is_unit(rows: np.ndarray) -> bool:
    """Whether all rows (n, D) are of unit length, to UNIT_TOLERANCE."""
    with np.errstate(over="ignore"):
        return bool((np.abs(np.linalg.norm(rows, axis=1) - 1) <= UNIT_TOLERANCE).all())
