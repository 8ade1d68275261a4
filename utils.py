"""What every command shares: user errors, whole-or-nothing files, locks, hashes, the device.

torch is imported inside the functions that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TextIO

if TYPE_CHECKING:
    import torch

TIE_RULES = ("row", "best", "worst")  # of --ties; see utils_metrics.positive_ranks
CHUNK_BYTES = 1 << 20
LOCK_POLL_SECONDS = 0.01  # between two tries to lock a folder


# ---------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's: one line that names the file and row, and says what to do."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's main on sys.argv.

    A UserError, or what the system says of a file or of memory, becomes one line on stderr and
    status 2. Nothing is said where nobody reads on (a broken pipe): the status is 141, as a shell
    gives it.
    """
    from utils_signs import showing_signs

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is a line of ours
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors on huge pages: fewer faults
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that lacks a character gets its number
            stream.reconfigure(errors="backslashreplace")
    try:
        with showing_signs():
            main(sys.argv[1:])
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    except UserError as error:
        _end(error)
    except BrokenPipeError:
        # Python flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ImportError, MemoryError) as error:  # a library that finds no room, or is not there
        _end(" ".join(str(error).split()) or "no memory is left")
    except OSError as error:  # a folder that may not be written, a full disk
        name = f"{error.filename}: " if error.filename else ""
        _end(f"{name}{error.strerror or ' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(message: object) -> NoReturn:
    say(f"error: {message}", error=True)
    sys.exit(2)


def printable(text: str) -> str:
    """A text with its control characters, and what is not UTF-8, escaped: what a console shows."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def say(text: str, error: bool = False) -> None:
    """Print a line that may hold names of the user's, on stdout or stderr: see printable."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def warn(line: str) -> None:
    """Print a line on stderr, as say does."""
    say(line, error=True)


class Parser(argparse.ArgumentParser):
    """A parser with --version, whose complaint is a UserError: one line, without the usage."""

    def __init__(self, **options):
        super().__init__(**options)
        text = "print the version of the toolkit and stop"
        self.add_argument("--version", action=ShowVersion, nargs=0, help=text)

    def error(self, message: str):
        raise UserError(f"{message}{self._guess(message)} (--help lists all flags)")

    def _guess(self, message: str) -> str:
        """What may have been meant by a flag that there is none of, or by a wrong choice."""
        wrong = re.search(r"unrecognized arguments: (-\S+)", message)
        known = list(self._option_string_actions)
        if wrong is None:
            wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
            known = re.findall(r"[^\s,']+", wrong[2]) if wrong else []
        close = difflib.get_close_matches(wrong[1].partition("=")[0], known, 1) if wrong else []
        return f"; did you mean {close[0]}?" if close else ""


class ShowVersion(argparse.Action):
    """Prints the version, which takes a call of git, and ends."""

    def __call__(self, *_: object) -> None:
        print(code_version() or "unknown")
        sys.exit(0)


SWITCH = argparse.BooleanOptionalAction  # of a flag that has a --no- form


def add_flag(parser: argparse._ActionsContainer, name: str, **options) -> None:
    """Add --a_flag, also accepted as --a-flag; its value is found under a_flag."""
    dashed = name.replace("_", "-")
    spellings = dict.fromkeys((f"--{name}", f"--{dashed}"))
    parser.add_argument(*spellings, dest=name, **options)


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def not_negative(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def positive_share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def refuse_idle(idle: Iterable[str], where: str) -> None:
    """Raise UserError for the first of these flags: they were given and would change nothing.

    where: what makes them idle, "with --compare", "without --standardize_features: add it".
    """
    for name in idle:
        raise UserError(f"--{name} has no effect {where}: leave it")


def code_version() -> str | None:
    """The commit of this toolkit, "-dirty" if changed since, or None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError if it is a folder, a FIFO or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a file", str(path))


def open_text(path: str | Path, encoding: str = "utf-8", newline: str | None = "") -> TextIO:
    """Open a file to read its text, line ends as they stand. Raises OSError as open_regular."""
    return io.TextIOWrapper(open_regular(path), encoding=encoding, newline=newline)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file. Raises OSError as open_regular."""
    with open_regular(path) as file:
        return file.read()


def require_regular(path: str | Path) -> None:
    """Raise OSError as open_regular: for a library that opens the file by its name."""
    open_regular(path).close()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError of the block that names no file (a full disk, a limit on sizes) name this."""
    try:
        yield
    except OSError as error:
        error.strerror = error.strerror or f"not written whole ({error})"  # as numpy says it
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the final name only on success.

    An OSError that names no file is given the final name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    temporary.touch(exist_ok=False)  # with the rights that the user's umask leaves
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder` to build in; it takes the final name only on success."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        building, old = Path(temporary) / "new", Path(temporary) / "old"
        building.mkdir()
        with naming(folder):
            yield building
        if folder.exists():
            folder.rename(old)
        try:
            building.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


@contextlib.contextmanager
def publishing(staging: Path, folder: Path, last: str) -> Iterator[Path]:
    """Give an empty folder to write files to; they are moved to `folder` together, `last` last.

    An earlier `last` goes before any other file changes, so it never stands for a mixture.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with naming(folder):
        yield staging
    names = sorted(os.listdir(staging), key=lambda name: (name == last, name))
    for name in names:
        with open(staging / name, "rb") as file:
            os.fsync(file.fileno())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / last).unlink(missing_ok=True)
    for name in names:
        os.replace(staging / name, folder / name)
    staging.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process holds this folder, which is made if need be, and hold it.

    The system drops the lock of a process that dies. On a disk without locks nothing is held.
    """
    from filelock import lock_descriptor

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            lock_descriptor(descriptor, poll_interval=LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file, whose folder is made if need be; no waiting.

    The system drops the lock of a process that dies, and processes that were forked from it do not
    keep it. On a disk without locks nothing is held.
    Raises UserError, the folder and the refusal, if another process holds it.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, timeout=0, fallback_to_soft=False))
        except Timeout:
            raise UserError(f"{path.parent}: {refusal}") from None
        except PermissionError:  # the lock of another user
            raise
        except OSError:
            pass
        yield


def last_part(path: str | Path) -> str:
    """The last part of a path, also of "." and of one that ends in a slash."""
    return os.path.basename(os.path.abspath(path))


def require_writable(folder: Path, flag: str) -> None:
    """Raise UserError, naming the flag, unless the folder can be written or made. Makes nothing."""
    there = Path(os.path.abspath(folder))
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "may not be written" if there.is_dir() else "is not a folder"
        raise UserError(f"{flag} {folder}: {there} {problem}; name another folder")


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV with a header, quoted where needed, UTF-8, whole or not at all."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_text(path: str | Path, text: str) -> None:
    """Write a text (UTF-8), whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict | list) -> None:
    """Write JSON (UTF-8, indented; what is not UTF-8 escaped), whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
    write_text(path, f"{text}\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises UserError if the file is absent or is no JSON object.
    """
    try:
        content = json.loads(read_bytes(path).decode())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; make it again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; make it again")
    return content


def read_csv(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV (UTF-8, perhaps with a BOM) and the line each begins at, from 1.

    Blank lines are passed over. Raises UserError, naming the line, if the file is not CSV.
    """
    with open_text(path, "utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, row {line}: not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return _hash_file(path, hashlib.sha256())


def git_blob_id(path: str | Path) -> str:
    """The id git gives a file's content: SHA-1 of "blob LENGTH", a zero byte, and the bytes."""
    return _hash_file(path, hashlib.sha1(b"blob %d\0" % os.path.getsize(path)))


def _hash_file(path: str | Path, digest) -> str:
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_safe(name: str) -> str:
    """A name that every file system takes: anything but letters, digits and ._- becomes '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


# ---------------------------------------------------------------------------------------------
# Device
# ---------------------------------------------------------------------------------------------


def select_device(gpu: int, tell: Callable[[str], None] = warn) -> torch.device:
    """The CUDA device of that index, or the CPU for -1 and, which is told, where there is none.

    TF32 is switched off everywhere (matrix products and convolutions): fp32 means fp32.
    """
    import torch

    if gpu < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        tell("no CUDA device here: running on the CPU (as --gpu -1 does)")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if gpu >= count:
        raise UserError(f"--gpu {gpu}: this machine has {count} CUDA device(s), numbered from 0")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)
