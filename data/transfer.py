"""Files from a server: transfer that goes on where it was cut, verification, and its record."""

from __future__ import annotations

import http.client
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError

from tqdm import tqdm

from utils import UserError, git_blob_id, naming, read_json, sha256_file, write_json

CHUNK_BYTES = 1 << 18
TIMEOUT = 60.0  # seconds without a byte from the server
TRIES = 5  # connections in a row that bring nothing, before giving up
RETRY_WAIT = 1.0  # seconds before the second try; doubled for every further one
LONGEST_WAIT = 300.0  # seconds that a server may ask for (Retry-After)
NAMES_SHOWN = 5  # file names in one error message
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class NotFound(UserError):
    """The server says that it has no such file."""


class Unreachable(Exception):
    """No connection, or none that lasts: the file that stays missing, the source, the cause."""

    def __init__(self, missing: str | Path, source: str, cause: object) -> None:
        self.missing, self.source, self.cause = missing, source, cause
        super().__init__(f"{missing} is missing and {source} cannot be reached ({cause})")


# ---------------------------------------------------------------------------------------------
# Transfer
# ---------------------------------------------------------------------------------------------

INTERRUPTIONS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


def download(url: str, part: Path, missing: str | Path) -> None:
    """Complete `part` to the whole content of url, going on after the bytes it already holds.

    A connection that breaks is opened again from where it broke, as long as each brings bytes;
    after TRIES that bring none, and at once where not even the first one can be opened, it gives
    up. The bytes received stay in `part`, for the next run.

    Raises Unreachable, with `missing` as the file it names, NotFound (404) and UserError (any
    other refusal by the server, an unfit URL, a full disk).
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: a URL must begin with http:// or https://")
    part.parent.mkdir(parents=True, exist_ok=True)
    received, failures = False, 0
    with progress_bar(url_name(url)) as bar:
        while True:
            before = _size(part)
            try:
                _receive(url, part, bar)
                return
            except INTERRUPTIONS as error:
                cause, asked = _cause(url, error), _seconds_asked(error)
                gained = _size(part) > before
            received = received or gained
            failures = 0 if gained else failures + 1
            refused = cause.startswith("no connection") and not received
            if refused or failures >= TRIES:
                raise Unreachable(missing, url, cause)
            if failures:
                time.sleep(max(asked, RETRY_WAIT * 2 ** (failures - 1)))


def _receive(url: str, part: Path, bar: tqdm) -> None:
    """One request: what `part` lacks, or everything where the server does not serve ranges."""
    start = _size(part)
    headers = {"User-Agent": "icir-download", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
    except HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing lies beyond what we have: it is whole, or it is the rest of another file.
        if error.headers.get("Content-Range") in (None, f"bytes */{start}"):
            return
        part.unlink()
        raise ConnectionError(f"{part.name} was longer than the file; starting again") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError("another range than asked for came; starting again")
        start = start if resumed else 0
        length = _content_length(response.headers)
        total = None if length is None else start + length
        require_space(part.parent, length or 0)
        bar.reset(total=total)
        bar.update(start)
        with naming(part), open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read1(CHUNK_BYTES):  # what came is kept when the rest stalls
                file.write(chunk)
                bar.update(len(chunk))
    # http.client ends a cut body like a whole one.
    if total is not None and _size(part) < total:
        raise ConnectionError(f"cut after {_size(part)} of {total} bytes")


def _content_length(headers: Mapping[str, str]) -> int | None:
    """The bytes that a server announces, None if it announces none, or no number."""
    length = headers.get("Content-Length") or ""
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _seconds_asked(error: Exception) -> float:
    """How long the server asks to wait before the next try (Retry-After), within reason."""
    asked = error.headers.get("Retry-After") if isinstance(error, HTTPError) else None
    return min(float(asked), LONGEST_WAIT) if re.fullmatch("[0-9]{1,9}", asked or "") else 0.0


def _cause(url: str, error: Exception) -> str:
    """Why a request failed, in words; a refusal that another try cannot change is raised."""
    if isinstance(error, HTTPError):
        error.close()
        status = " ".join(f"HTTP status {error.code} {error.reason}".split())
        if error.code in TRANSIENT_STATUS:
            return status
        kind = NotFound if error.code == 404 else UserError
        raise kind(f"{url}: {status}; check the URL (--help names the flags that set it)")
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return " ".join(str(error).split())[:200] or type(error).__name__


def url_name(url: str) -> str:
    return PurePosixPath(urllib.parse.urlsplit(url).path).name


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def progress_bar(label: str, **options) -> tqdm:
    """A bar of bytes on stderr, silent where stderr is no terminal."""
    return tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None, **options)


def require_space(folder: Path, size: int) -> None:
    """Raise UserError unless `size` more bytes fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on this "
            "disk; make room, or name a folder on another disk"
        )


# ---------------------------------------------------------------------------------------------
# Verification
# ---------------------------------------------------------------------------------------------


def digest_like(path: Path, digest: str) -> str:
    """The file's hash of the digest's kind: SHA-256 (64 hex digits) or git blob id (40)."""
    return sha256_file(path) if len(digest) == 64 else git_blob_id(path)


def require_digest(path: Path, digest: str, url: str) -> None:
    """Raise UserError, and remove the file, unless its content has this hash."""
    found = digest_like(path, digest)
    if found != digest:
        path.unlink()
        raise UserError(
            f"{url}: wrong content (hash {found}, published {digest}); it was removed and nothing "
            "was installed: run the command again, and check the URL if it comes back"
        )


def check_files(root: Path, digests: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The names under root that are missing and those whose content is wrong.

    Raises UserError for a name that leads out of root.
    """
    missing, wrong = [], []
    for name, digest in tqdm(digests.items(), desc="verifying", unit="file", disable=None):
        path = root / safe_name(name)
        if not path.exists():
            missing.append(name)
        elif not path.is_file() or digest_like(path, digest) != digest:
            wrong.append(name)
    return missing, wrong


def refuse_wrong(paths: Iterable[Path], remedy: str = "") -> None:
    """Raise UserError naming the files, if there are any."""
    names = [str(path) for path in paths]
    if names:
        shown = ", ".join(names[:NAMES_SHOWN])
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise UserError(
            f"already there, but not as published: {shown}{more}; nothing was changed: move them "
            f"away, or give --overwrite to replace them{remedy}"
        )


def safe_name(name: str) -> str:
    """The name itself, relative and inside the folder it is joined to; else UserError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"refused: the file name {name!r} leads out of the target folder")
    return name


# ---------------------------------------------------------------------------------------------
# What was installed
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """The files of one published state of i-CIR.

    origin: dataset on the Hub or archive URL; revision: as asked for; commit: what it stood for
    (commit of the Hub, SHA-256 of the archive); digests: file name to SHA-256 or git blob id.
    """

    source: str
    origin: str
    revision: str
    commit: str
    digests: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)


def record_path(root: Path, source: str) -> Path:
    """The file in the data set's folder that says what was installed there."""
    return root / f"download_{source}.json"


def write_record(root: Path, snapshot: Snapshot) -> None:
    """Write down what was installed, so that it can be verified without a network."""
    names = ("source", "origin", "revision", "commit")
    content = {name: getattr(snapshot, name) for name in names}
    write_json(record_path(root, snapshot.source), {**content, "files": snapshot.digests})


def read_record(root: Path, source: str) -> Snapshot | None:
    """What was installed there from this source, or None."""
    path = record_path(root, source)
    if not path.exists():
        return None
    content = read_json(path)
    try:
        names = ("source", "origin", "revision", "commit", "files")
        return Snapshot(*(content[name] for name in names))
    except (KeyError, TypeError):
        raise UserError(f"{path} is not a record of a download; remove it") from None
