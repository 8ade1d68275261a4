"""Commands in processes of their own, without the seconds that importing torch takes each time.

A server imports the large libraries once, and forks for every command. A command then runs as from
the shell: its script is the main module, and arguments, output, errors and status are its own.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def _server() -> subprocess.Popen:
    """The server of this process, which ends with it."""
    return subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_command(*command: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of the toolkit, named from there, with its arguments in a folder."""
    words = [str(word) for word in command]
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
        server = _server()
        print(json.dumps([words, str(folder), out.name, error.name]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            words, status, *(Path(file.name).read_text("utf-8") for file in (out, error))
        )


def _serve() -> tuple[list[str], str, str, str]:
    """Fork for every line of standard input; in a child, what it is to run."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return tuple(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(command: list[str], folder: str, out: str, error: str) -> None:
    for number, path in enumerate((os.devnull, out, error)):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(folder)
    sys.argv, sys.path[0] = command, str(ROOT)
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


if __name__ == "__main__":
    import pandas  # noqa: F401
    import torch  # noqa: F401

    _become(*_serve())
