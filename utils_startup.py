"""What makes a short process short, and how much of it each trick saves.

A run_retrieval of i-CIR takes about 3 seconds, of which `import torch` is a third.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


class Late:
    """A module that is imported when something of it is first used, and not for --help alone.

    numpy, which every benchmark works with, costs as much as the rest of a --help.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._name), name)
        setattr(self, name, value)
        return value


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries inside this: the garbage collector leaves their objects alone.

    They make a million objects that stay to the end. Looking through them again and again, and once
    more at the exit, is a third of what `import torch` costs a short process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def beside(work: Callable[..., Any], *given: Any) -> Iterator[Callable[[], Any]]:
    """Call work(*given) in a thread while the block imports; what is given tells its result.

    Tables that are parsed while torch is imported make a run of i-CIR 0.92 of what it was.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(work, *given).result


def quick_exit() -> NoReturn:
    """End a command that has done all its work, without taking down what it has imported.

    After quick_imports of torch that saves a sixth of a second. Nothing may be left to clean up:
    files are closed, threads and processes have ended.
    """
    if sys.stdout:  # none where a daemon has closed it
        sys.stdout.flush()
    os._exit(0)
