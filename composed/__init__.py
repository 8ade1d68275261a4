"""Systems with networks of their own, found by folder: a file here is a `--backbone NAME:PLACE`.

A system turns an image and a text into one query vector and an image into one gallery vector, which
are compared by their dot product. NAME is the name of the file ("bge-vl" of bge_vl.py), PLACE a
file, a folder or a model's id. A module holds a SYSTEM; nothing else knows its name. Its packages
are imported when it is loaded.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from composed.system import ComposedEncoder, Options, System
from utils import UserError
from utils_backbones import PADDED, split_composed

if TYPE_CHECKING:
    import torch


SHARED = {"blip", "system", "tensors", "texts"}  # what the systems' files share


def list_systems() -> list[str]:
    """The names of the systems there are."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return [name.replace("_", "-") for name in names if name not in SHARED]


def find_system(backbone: str) -> tuple[System, str]:
    """The system that a backbone names, and its place.

    Raises UserError if there is none of that name, or no place.
    """
    name, place = split_composed(backbone)
    if name not in list_systems():
        raise UserError(
            f"--backbone {backbone}: no system {name!r}; there are "
            f"{', '.join(f'{known}:PLACE' for known in list_systems())}"
        )
    if not place:
        raise UserError(f"--backbone {backbone}: name its file or folder, {name}:PLACE")
    if place.endswith(PADDED):
        raise UserError(f"--backbone {backbone}: a system has a preprocessing of its own")
    system: System = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").SYSTEM
    return system, place


def load_composed(
    backbone: str, options: Options, device: torch.device, precision: str
) -> ComposedEncoder:
    """Load the system of a backbone. Raises UserError if its files or packages are not there."""
    system, place = find_system(backbone)
    try:
        composer = system.load(place, options)
    except ImportError as error:
        raise UserError(
            f"--backbone {backbone}: needs a package that is not installed ({error}); "
            "pip install -r requirements-models.txt"
        ) from None
    return ComposedEncoder.of(backbone, composer, device, precision)
