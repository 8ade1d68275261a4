"""What a command says to bad input, run in this process: one line, status 2, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import create_features
from utils import run_command


def refusal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *flags: object,
    main: Callable[[list[str]], None] = create_features.main,
) -> str:
    """The line that a command ends with, started with these flags in an empty folder."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not list(folder.iterdir())
    return said.err.removeprefix("error: ").rstrip("\n")


def refused_data(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    data: Path,
    name: str,
) -> str:
    """The line that an extraction of a data set ends with; folder: an empty one, to be made."""
    flags = ("--dataset", name, "--data_dir", data, "--backbone", "tiny", "--gpu", "-1")
    return refusal(monkeypatch, capsys, folder, *flags)
