"""Checkpoints of systems: tensors read without running anything, and what they are known by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import UserError
from utils_pickles import load_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def require_file(place: str | Path, what: str) -> Path:
    """The file of a place. Raises UserError, saying what is expected, if there is none."""
    path = Path(place)
    if not path.is_file():
        raise UserError(f"{path} is no file; {what}")
    return path


def load_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint in torch's or safetensors' format, by name.

    key: where the checkpoint has them. Only tensors and plain values are read, nothing in the file
    is run. Raises UserError for a file that is damaged or holds anything else.
    """
    import torch

    content = load_checkpoint(path, str(path))
    if isinstance(content, Mapping) and key in content:
        content = content[key]
    tensors = (
        {str(name).removeprefix("module."): value for name, value in content.items()}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no tensors by name{f' under {key!r}' if key else ''}")
    return tensors


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill a module's weights, all of them.

    Raises UserError for tensors that lack, are left over or have another shape.
    """
    own = module.state_dict()
    lost, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if lost or surplus:
        problem = f"lacks {lost[0]!r}" if lost else f"has {surplus[0]!r}, which is not known"
        raise UserError(f"{path} {problem}: it is of another network")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path}: {name!r} has the shape {tuple(tensor.shape)}, not "
                f"{tuple(own[name].shape)}: it is of another network"
            )
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over the names, shapes and bytes of tensors, whatever file they lay in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).float().numpy().data)
    return digest.hexdigest()


def count_layers(names: Iterable[str], before: str) -> int:
    """How many layers there are of names that begin with `before` and a number."""
    found = (re.match(rf"{re.escape(before)}(\d+)\b", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def shape_of(state: Mapping[str, Tensor], name: str, dims: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor. Raises UserError if there is none, or it has other dimensions."""
    if name not in state or state[name].ndim != dims:
        raise UserError(f"{path} has no {name!r} of {dims} dimensions: it is of another network")
    return tuple(state[name].shape)
