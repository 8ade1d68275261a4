"""Arrays, checkpoints and pickles on disk: read before a file is known to be what it says.

The reference's pickles are read with an unpickler that admits arrays, tensors and plain containers
only. Formats: DESIGN section 2.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, open_regular

UNREADABLE = "make it readable, or extract the features again"


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """What an error says, on one line of at most `limit` characters, without memory addresses."""
    text = re.sub(" at 0x[0-9a-f]+", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def refusal_of(error: BaseException) -> str:
    """Why torch.load refuses a file, on one line, without its advice to run what is in it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "weights_only" not in line and "torch.load" not in line]
    return one_line(told[0] if told else error)


# ---------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------


def open_feature_file(path: Path):
    """Open a feature file for reading; UserError if it is absent."""
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {UNREADABLE}") from None


def read_npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an open .npy file, left at its first data byte.

    Raises ValueError for anything else.
    """
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"npy format {version} is not known")
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # a header is Python, and its parsers raise nearly anything
        raise ValueError(one_line(error)) from None
    if any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"no array has the shape {shape}")
    return shape, fortran, dtype


def parse_array(file, size: int) -> np.ndarray:
    """The array of an open .npy file of `size` bytes, whose header claims just as much.

    Raises ValueError for anything else, before memory is taken for it.
    """
    shape, fortran, dtype = read_npy_header(file)
    if dtype.hasobject:
        raise ValueError("it holds objects, not numbers")
    _check_size(size - file.tell(), dtype.itemsize * math.prod(shape))
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C").copy()


def read_array(path: Path) -> np.ndarray:
    """A whole .npy file of rows, as float32. Raises UserError if it is none."""
    with open_feature_file(path) as file:
        try:
            array = parse_array(file, path.stat().st_size)
        except (ValueError, RecursionError, MemoryError) as error:
            raise UserError(
                f"{path} is not a .npy file ({one_line(error)}); extract it again"
            ) from None
    return two_dimensional(array, str(path))


def read_archive(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of a .npz file by name: these, or all there are. Raises anything if it is none."""
    with open_regular(path) as file, zipfile.ZipFile(file) as content:
        there = [name.removesuffix(".npy") for name in content.namelist()]
        return {name: _read_member(content, name) for name in names or there}


def _read_member(content: zipfile.ZipFile, name: str) -> np.ndarray:
    member = content.getinfo(f"{name}.npy")
    with content.open(member) as file:
        return parse_array(file, member.file_size)


def map_array(path: Path) -> np.ndarray:
    """A .npy file's array, mapped; the file stays as it is. Raises ValueError unless it is one."""
    with open_regular(path) as file:
        shape, fortran, dtype = read_npy_header(file)
        if dtype.hasobject:
            raise ValueError("it holds objects, not numbers")
        offset = file.tell()
        _check_size(os.fstat(file.fileno()).st_size - offset, dtype.itemsize * math.prod(shape))
        if not math.prod(shape):
            raise ValueError(f"{shape} holds no number")
        return np.memmap(file, dtype, "c", offset, shape, "F" if fortran else "C")


def _check_size(held: int, claimed: int) -> None:
    if held > claimed:
        raise ValueError("it has bytes behind its last row")
    if held < claimed:
        raise ValueError("it has fewer bytes than its header says")


def two_dimensional(array: np.ndarray, name: str) -> np.ndarray:
    """An array as float32 rows (n, D). Raises UserError unless it is rows of floats, n, D > 0."""
    if array.ndim != 2 or array.dtype.kind != "f":
        raise UserError(f"{name}: expected rows of features, found {array.dtype} {array.shape}")
    if not array.size:
        raise UserError(f"{name}: {array.shape} holds no number; make it again")
    return array.astype(np.float32, copy=False)


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def load_checkpoint(path: Path, name: str) -> Any:
    """What a checkpoint in torch's or safetensors' format holds, tensors on the CPU.

    A large file is mapped, and only what is used of it is read. Raises UserError, which calls the
    file by `name`, if it holds anything but tensors and plain values; nothing in it is run.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a hostile or cut file may raise anything
        raise UserError(
            f"{name} is refused: only tensors are read from checkpoints, and nothing in them is "
            f"run ({refusal_of(error)})"
        ) from None


# ---------------------------------------------------------------------------------------------
# Pickles of the reference implementation
# ---------------------------------------------------------------------------------------------


def _load_storage(data: bytes):
    """torch.storage._load_from_bytes without its power to run code."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds numpy arrays, torch tensors and plain containers; refuses every other global."""

    ADMITTED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("torch._utils", "_rebuild_tensor_v2"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _load_storage(data)
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        found = super().find_class(module, name)
        if isinstance(found, type):
            return found
        return lambda *values: found(*values)  # whose attributes a pickle may set: not the real one


def load_pickle(path: str | Path) -> dict:
    """Read one of the reference's pickles: a dict, or a .npy of a 0-d object array that holds one.

    Raises UserError if the file holds anything but arrays, tensors and plain containers; nothing
    in it is run.
    """
    path = Path(path)
    with open_feature_file(path) as file:
        try:
            if path.suffix == ".npy":
                read_npy_header(file)
            content = _RestrictedUnpickler(file).load()
        except Exception as error:  # a hostile or cut file may raise anything
            raise UserError(
                f"{path} is refused: {one_line(error)}; only arrays, tensors, strings, lists and "
                "dicts are read from pickles. Fetch the file again, or extract the features anew"
            ) from None
    if isinstance(content, np.ndarray) and content.dtype == object and content.ndim == 0:
        content = content.item()
    if not isinstance(content, (dict, OrderedDict)):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of features")
    return content


def read_rows(content: dict, key: str, path: Path) -> np.ndarray:
    """One 2-d array of a reference pickle, from numpy or torch, as float32."""
    value = content.get(key)
    if value is None:
        raise UserError(f"{path} has no {key!r}; it holds {', '.join(map(str, content))}")
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # a type that numpy lacks
                value = value.float()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}, {key!r} holds no rows of numbers ({one_line(error)})") from None
    return two_dimensional(array, f"{path}, {key!r}")


def read_labels(content: dict, path: Path) -> dict[str, list[str]]:
    """The columns image_path, text and instance of a reference pickle, texts. None is no text."""
    try:
        columns = [[*content[key]] for key in ("paths", "texts", "instances")]
        columns = [["" if value is None else value for value in column] for column in columns]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: no paths, texts and instances ({one_line(error)})") from None
    if len(set(map(len, columns))) > 1:
        raise UserError(f"{path}: no paths, texts and instances of one length")
    return {
        name: [_label(value, row, path) for row, value in enumerate(column)]
        for name, column in zip(("image_path", "text", "instance"), columns, strict=True)
    }


def _label(value: object, row: int, path: Path) -> str:
    """A label as text: a string, or the number that a string was made to."""
    if not isinstance(value, str | int | float | np.generic):
        raise UserError(f"{path}: item {row} of its labels is a {type(value).__name__}, no text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: item {row} of its labels, {text!a}, is not UTF-8") from None
    return text
