"""Methods, found by folder: every module here that holds a METHOD or METHODS is one, or several.

A method's file holds its formula, its flags (one dataclass line each) and its preset. Nothing else
knows its name. The modules import neither torch nor PIL at the top.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache

from utils import UserError
from utils_inputs import AskedTexts, Input
from utils_retrieval import Flag, Method


@cache
def list_methods() -> dict[str, Method]:
    """Every method of this folder's files by name, file by file in alphabetical order.

    Raises UserError if two files offer one name, or declare one flag in two ways.
    """
    found: dict[str, Method] = {}
    for module in pkgutil.iter_modules(__path__):
        content = importlib.import_module(f"{__name__}.{module.name}")
        for method in getattr(content, "METHODS", None) or [getattr(content, "METHOD", None)]:
            if method is None:
                continue
            if method.name in found:
                raise UserError(f"methods/{module.name}.py: the name {method.name!r} is taken")
            found[method.name] = method
    _check_flags(found)
    return found


def find_method(name: str) -> Method:
    """The method of that name. Raises UserError if there is none, listing those there are."""
    methods = list_methods()
    if name not in methods:
        raise UserError(f"no method {name!r}: there are {', '.join(methods)}")
    return methods[name]


@dataclasses.dataclass(frozen=True)
class MethodFlag:
    """A flag of one or several methods: its default and what its line says."""

    default: bool | int | float | str
    flag: Flag
    methods: tuple[str, ...]


@cache
def list_flags() -> dict[str, MethodFlag]:
    """Every flag of the methods by name, with the methods that read it."""
    found: dict[str, MethodFlag] = {}
    for method in list_methods().values():
        for name, (default, flag) in flags_of(method).items():
            others = found[name].methods if name in found else ()
            found[name] = MethodFlag(default, flag, (*others, method.name))
    return found


def list_inputs() -> dict[str, Input | AskedTexts]:
    """Every input that a method declares, by name."""
    methods = list_methods().values()
    return {name: source for method in methods for name, source in method.inputs.items()}


def flags_of(method: Method) -> dict[str, tuple[bool | int | float | str, Flag]]:
    """A method's flags by name: default and line."""
    fields = dataclasses.fields(method.parameters)
    return {field.name: (field.default, field.metadata["flag"]) for field in fields}


def _check_flags(methods: dict[str, Method]) -> None:
    declared: dict[str, tuple] = {}
    for method in methods.values():
        for name, line in flags_of(method).items():
            if declared.setdefault(name, line) != line:
                raise UserError(f"--{name} is declared in two ways: {method.name} has another")
