"""What every command shares: user errors, whole-or-nothing files, hashes, the device, metrics.

torch is imported inside the functions that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 20


# ---------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's: one line that names the file and row, and says what to do."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's main on sys.argv; a UserError becomes one line on stderr and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the final name only on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict | list) -> None:
    """Write JSON (UTF-8, indented), whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises UserError if the file is absent or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again") from None


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return _hash_file(path, hashlib.sha256())


def git_blob_id(path: str | Path) -> str:
    """The id git gives a file's content: SHA-1 of "blob LENGTH", a zero byte, and the bytes."""
    return _hash_file(path, hashlib.sha1(b"blob %d\0" % os.path.getsize(path)))


def _hash_file(path: str | Path, digest) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_safe(name: str) -> str:
    """A name that every file system takes: anything but letters, digits and ._- becomes '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


# ---------------------------------------------------------------------------------------------
# Device
# ---------------------------------------------------------------------------------------------


def select_device(gpu: int) -> torch.device:
    """The CUDA device of that index, or the CPU for -1 and, said on stderr, where there is none.

    TF32 is switched off everywhere (matrix products and convolutions): fp32 means fp32.
    """
    import torch

    if gpu < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("no CUDA device here: running on the CPU (--gpu -1 says so quietly)", file=sys.stderr)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if gpu >= count:
        raise UserError(f"--gpu {gpu}: this machine has {count} CUDA device(s), numbered from 0")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", gpu)
