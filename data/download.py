"""Download what the published numbers need: i-CIR, LAION means, synthetic features, corpora.

    python3 data/download.py {icir,laion_mean,synthetic_data,corpora,all}
    python3 data/download.py {imagenet_r,nico,minidn,ltll,words}
    python3 data/download.py {cirr,circo,fashioniq,genecis}

The second form brings the lists of the data sets for domain conversion, says where their images
come from and which are missing, and brings FREEDOM's words. The third brings the annotation files
of four benchmarks and says the same of their images.

Every file is verified by the hash its publisher gives. Files that are there and right are kept;
wrong ones are named and left alone unless --overwrite is given. A download that was cut goes on
where it stopped (from the Hub: with the file it was at), and a file has its final name only when
it is whole and right; what --overwrite replaces stays until then.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import http.client
import os
import re
import shlex
import shutil
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

# Run as a script, Python looks for modules in data/; the shared ones lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data.annotation_files as annotation_files
import data.domain_lists as domain_lists
from benchmarks import find_folder
from benchmarks.annotations import load_json
from utils import (
    Parser,
    UserError,
    add_flag,
    git_blob_id,
    read_json,
    run_command,
    sha256_file,
    write_json,
)

COMMIT = "463cc1d4881854f9667977b6dab0e775902ea760"  # of the reference repository
ASSETS_URL = f"https://raw.githubusercontent.com/billpsomas/icir/{COMMIT}"
ARCHIVE_URL = "https://vrg.fel.cvut.cz/icir/icir_v1.0.0.tar.gz"
HUB_DATASET = "billpsomas/icir"

CORPORA_DIR = Path("corpora/reference")

STAGING = ".cache/download"  # below the data set's folder: where the Hub's files arrive

CHUNK_BYTES = 1 << 18
TIMEOUT = 60.0  # seconds without a byte from the server
TRIES = 5  # connections in a row that bring nothing, before giving up
RETRY_WAIT = 1.0  # seconds before the second try; doubled for every further one
NAMES_SHOWN = 5  # file names in one error message
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Asset:
    """One file of a publisher's repository: its path there and its git blob id, None: any JSON."""

    path: str
    blob_id: str | None

    @property
    def target(self) -> str:
        """The word of the command line that asks for it: the name of its folder."""
        return PurePosixPath(self.path).parent.name


ASSETS = (
    Asset("data/laion_mean/laion_1m_mean_clip.pkl", "1aac21d27bdb329e18f8e97f7ae33efcbfbe366d"),
    Asset("data/laion_mean/laion_1m_mean_siglip.pkl", "6466b75d0376934c8c5f063153cec0c1ad5bf6de"),
    Asset("synthetic_data/dataset_1_sd_clip.pkl.npy", "5bd67ba8e392751a46ecc7be3509b24885981b83"),
    Asset("synthetic_data/dataset_1_sd_siglip.pkl.npy", "63b62fef598d93c03e90793966e566a5f88b0972"),
    Asset("corpora/generic_styles.csv", "58f1f1e68133dc0262ad70b61ff842aaf7ca2e28"),
    Asset("corpora/generic_subjects.csv", "71b8339b64239d9c826a126d24ecadbe3bbf2444"),
)

# Files without which i-CIR is not there, in the layout of each source; the first one that is
# missing is what an error names before the publisher's own list of files is known.
ICIR_FILES = {
    "hf": (
        "annotations/query_files.csv",
        "annotations/database_files.csv",
        "webdataset/query/query-000000.tar",
        "webdataset/database/database-000000.tar",
    ),
    "tar": ("query_files.csv", "database_files.csv"),
}

CORPORA_ADVICE = """\
These are the lists behind the published figures; those in corpora/ are this toolkit's own. To
encode with them, give create_features.py the folder, for the corpora and for the data set:
    python3 create_features.py --dataset corpus --backbone clip --corpora_dir {folder}
    python3 create_features.py --dataset icir --backbone clip --corpora_dir {folder}
The first line of generic_subjects.csv, object_name, looks like a header but is one of the prompts
of the published figures, and one of the 100 that contextualise a query: leave it where it is."""


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
    with _progress_bar(_url_name(url)) as bar:
        while True:
            before = _size(part)
            try:
                _receive(url, part, bar)
                return
            except INTERRUPTIONS as error:
                cause = _cause(url, error)
                gained = _size(part) > before
            received = received or gained
            failures = 0 if gained else failures + 1
            refused = cause.startswith("no connection") and not received
            if refused or failures >= TRIES:
                raise Unreachable(missing, url, cause)
            if failures:
                time.sleep(RETRY_WAIT * 2 ** (failures - 1))


def _receive(url: str, part: Path, bar: tqdm) -> None:
    """One request: what `part` lacks, or everything where the server does not serve ranges."""
    start = _size(part)
    headers = {"User-Agent": "icir-download", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
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
            raise UserError(f"{url}: the server answered with another range than asked for")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        require_space(part.parent, int(length or 0))
        bar.reset(total=total)
        bar.update(start)
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    # http.client ends a cut body like a whole one.
    if total is not None and _size(part) < total:
        raise ConnectionError(f"cut after {_size(part)} of {total} bytes")


def _cause(url: str, error: Exception) -> str:
    """Why a request failed, in words; a refusal that another try cannot change is raised."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        status = f"HTTP status {error.code} {error.reason}"
        if error.code in TRANSIENT_STATUS:
            return status
        kind = NotFound if error.code == 404 else UserError
        raise kind(f"{url}: {status}; check the URL (--help names the flags that set it)")
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return str(error) or type(error).__name__


def _url_name(url: str) -> str:
    return PurePosixPath(urllib.parse.urlsplit(url).path).name


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _progress_bar(label: str, **options) -> tqdm:
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
# Files of the reference repository
# ---------------------------------------------------------------------------------------------


def fetch_assets(
    placed: Mapping[Path, Asset], base_url: str = ASSETS_URL, overwrite: bool = False
) -> None:
    """Download each asset to its path, verified by its blob id; say which were already right.

    Raises UserError before any download if a path holds something else and overwrite is off.
    """
    right, wrong = set(), set()
    for path, asset in placed.items():
        if path.is_file() and is_published(path, asset):
            right.add(path)
        elif path.exists():
            wrong.add(path)
    if not overwrite:
        refuse_wrong(sorted(wrong))
    for path, asset in placed.items():
        if path not in right:
            fetch_asset(asset, path, base_url)
        print(f"{'kept, already right' if path in right else 'downloaded'}: {path}")


def fetch_asset(asset: Asset, path: Path, base_url: str = ASSETS_URL) -> None:
    """Download one asset to `path`, which is replaced only by the right content."""
    url = f"{base_url.rstrip('/')}/{urllib.parse.quote(asset.path)}"
    part = path.with_name(f"{path.name}.part")
    download(url, part, path)
    if asset.blob_id is None:
        _require_json(part, url)
    else:
        require_digest(part, asset.blob_id, url)
    os.replace(part, path)


def _require_json(path: Path, url: str) -> None:
    """Raise UserError, and remove the file, unless it is whole JSON."""
    try:
        load_json(path)
    except UserError as error:
        path.unlink()
        raise UserError(f"{url}: {error}; nothing was installed") from None


def is_published(path: Path, asset: Asset) -> bool:
    """Whether a file has the content that was published, as far as that is known."""
    if asset.blob_id is not None:
        return git_blob_id(path) == asset.blob_id
    with contextlib.suppress(UserError):
        load_json(path)
        return True
    return False


# ---------------------------------------------------------------------------------------------
# Annotation files of benchmarks
# ---------------------------------------------------------------------------------------------


def fetch_annotations(
    target: str, data_dir: Path, files_url: str | None = None, overwrite: bool = False
) -> None:
    """Install a benchmark's annotation files, and say which of its images lack.

    Raises UserError and Unreachable as fetch_assets does.
    """
    repository = annotation_files.REPOSITORIES[target]
    files = annotation_files.place_annotations(target, data_dir)
    placed = {path: Asset(*published) for path, published in files.items()}
    fetch_assets(placed, files_url or repository.url, overwrite)
    print(f"{repository.name} is published under {repository.licence}")
    print("\n".join(annotation_files.describe_images(target, data_dir)))


# ---------------------------------------------------------------------------------------------
# FREEDOM's lists
# ---------------------------------------------------------------------------------------------


def fetch_lists(
    targets: Iterable[str],
    data_dir: Path,
    corpora_dir: Path,
    listing_url: str = domain_lists.LISTING_URL,
    files_url: str = domain_lists.FILES_URL,
    overwrite: bool = False,
) -> None:
    """Install the lists of data sets for domain conversion, and say which of their images lack.

    Each file is verified by the blob id that the repository's listing at the pinned commit gives;
    without a connection, by the one that an earlier run wrote down. Raises UserError and
    Unreachable.
    """
    placed = domain_lists.place_lists(targets, data_dir, corpora_dir)
    listed = _read_listing(data_dir, listing_url, next(iter(placed.values())))
    found = domain_lists.read_listing(listed, list(placed))
    fetch_assets({placed[name]: Asset(*found[name]) for name in found}, files_url, overwrite)
    lost = [name for name in placed if name not in found]
    if lost:
        raise UserError(
            f"{domain_lists.REPOSITORY} has no data/{lost[0]} at commit {domain_lists.COMMIT[:7]}: "
            f"it has to come from elsewhere, to {placed[lost[0]]}"
        )
    for name in targets:
        if name in domain_lists.LISTS:
            print(domain_lists.describe_images(name, find_folder(data_dir, name)))


def _read_listing(data_dir: Path, url: str, missing: Path) -> dict:
    """GitHub's listing of the pinned commit or, unreachable, what is written down of it."""
    record = read_record(data_dir, "freedom")
    try:
        with tempfile.TemporaryDirectory() as folder:
            download(url, Path(folder, "listing.json"), missing)
            listing = read_json(Path(folder, "listing.json"))
    except Unreachable:
        if record is None or record.commit != domain_lists.COMMIT:
            raise
        tree = [{"path": path, "type": "blob", "sha": d} for path, d in record.digests.items()]
        return {"truncated": False, "tree": tree}
    every = domain_lists.place_lists(domain_lists.TARGETS, data_dir, data_dir)
    digests = dict(domain_lists.read_listing(listing, list(every)).values())
    commit = domain_lists.COMMIT
    write_record(data_dir, Snapshot("freedom", domain_lists.REPOSITORY, commit, commit, digests))
    return listing


# ---------------------------------------------------------------------------------------------
# i-CIR: what an installed copy consists of
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


def first_missing(root: Path, source: str) -> Path:
    """The first of the files that make i-CIR which is not there (or the record, if all are)."""
    paths = [root / name for name in ICIR_FILES[source]]
    return next((path for path in paths if not path.exists()), record_path(root, source))


# ---------------------------------------------------------------------------------------------
# i-CIR as an archive
# ---------------------------------------------------------------------------------------------


def fetch_archive(
    root: Path, url: str = ARCHIVE_URL, overwrite: bool = False, keep_archive: bool = False
) -> None:
    """Install i-CIR's folder layout in root from the archive, verified by its published SHA-256.

    The archive is downloaded beside root (one that lies there already is used) and extracted to
    a temporary folder beside root, so that root never holds a part of the data set.

    Raises UserError and Unreachable.
    """
    installed = read_record(root, "tar")
    if installed and installed.origin == url:
        missing, wrong = check_files(root, installed.digests)
        if not overwrite:
            refuse_wrong(root / name for name in wrong)
        if not missing and not wrong:
            print(f"kept, already right: {root} ({len(installed.digests)} files)")
            return
    beside = root.resolve().parent
    name = _url_name(url)
    own, part = beside / name, beside / f"{name}.part"
    checksum = fetch_checksum(url, root)
    if own.exists():
        require_own_archive(own, checksum)
    else:
        print(f"downloading {url}", flush=True)
        download(url, part, first_missing(root, "tar"))
        print(f"verifying {part}", flush=True)
        require_digest(part, checksum, url)
    archive = own if own.exists() else part
    digests = install_archive(archive, root, overwrite)
    write_record(root, Snapshot("tar", url, name, checksum, digests))
    if archive == part and keep_archive:
        os.replace(part, own)
    part.unlink(missing_ok=True)
    print(f"downloaded: {root} ({len(digests)} files)")


def fetch_checksum(url: str, root: Path) -> str:
    """The SHA-256 published beside an archive, as NAME.tar.gz.sha256 or as NAME.sha256."""
    candidates = [f"{url}.sha256", re.sub(r"\.(tar\.gz|tgz|tar)$", "", url) + ".sha256"]
    for candidate in candidates:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "checksum"
            try:
                download(candidate, file, first_missing(root, "tar"))
            except NotFound:
                continue
            text = file.read_text(encoding="utf-8", errors="replace")
        match = re.match(r"\s*([0-9a-fA-F]{64})\b", text)
        if not match:
            raise UserError(f"{candidate} does not begin with a SHA-256; check --archive_url")
        return match[1].lower()
    raise UserError(
        f"neither {candidates[0]} nor {candidates[1]} exists (HTTP status 404), and without it "
        "the archive cannot be verified; check --archive_url"
    )


def require_own_archive(archive: Path, checksum: str) -> None:
    """Raise UserError if an archive that the user put there is not the published one."""
    found = sha256_file(archive)
    if found != checksum:
        raise UserError(
            f"{archive} is not the published archive (SHA-256 {found}, published {checksum}); "
            "move it away to download it"
        )


def install_archive(archive: Path, root: Path, overwrite: bool = False) -> dict[str, str]:
    """Extract beside root and move into place; return file name to SHA-256.

    Raises UserError if the archive is broken, holds anything but files and folders inside its
    own folder, or no data set, or if files in root differ and overwrite is off: root is then as
    it was.
    """
    target = root.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Images do not compress: what comes out is about as large as the archive.
    require_space(target.parent, archive.stat().st_size)
    folder = target.parent / f".{target.name}.part"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        digests = extract_archive(archive, folder)
        tree = _data_set_folder(archive, folder)
        prefix = "" if tree == folder else f"{tree.name}/"
        digests = {
            name.removeprefix(prefix): digest
            for name, digest in digests.items()
            if name.startswith(prefix)
        }
        _move_into_place(tree, root, digests, overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return digests


def extract_archive(archive: Path, folder: Path) -> dict[str, str]:
    """Write an archive's files under the folder, which is new; return file name to SHA-256.

    Raises UserError for a broken archive and for any member but a file or a folder whose name
    stays inside: absolute names, "..", links and devices are refused.
    """
    digests = {}
    try:
        with (
            open(archive, "rb") as raw,
            _progress_bar("extracting", total=archive.stat().st_size) as bar,
            tarfile.open(fileobj=CallbackIOWrapper(bar.update, raw), mode="r|*") as members,
        ):
            for member in members:
                name = PurePosixPath(safe_name(member.name)).as_posix()
                if member.isdir():
                    (folder / name).mkdir(parents=True, exist_ok=True)
                elif member.isfile():
                    digests[name] = _write_member(members.extractfile(member), folder / name)
                else:
                    raise UserError(f"refused: {member.name!r} is a link or a device")
    except UserError as error:
        raise UserError(f"{archive}: {error}; nothing was installed") from None
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is not a sound tar archive ({error})") from None
    return digests


def _write_member(source, path: Path) -> str:
    """Copy a member's bytes to a file and return their SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _data_set_folder(archive: Path, folder: Path) -> Path:
    """The folder that holds the annotations: the extracted one, or one directly in it."""
    for candidate in (folder, *sorted(folder.iterdir())):
        if all((candidate / name).is_file() for name in ICIR_FILES["tar"]):
            return candidate
    raise UserError(f"{archive} holds no {' and '.join(ICIR_FILES['tar'])}: it is not i-CIR")


def _move_into_place(tree: Path, root: Path, digests: Mapping[str, str], overwrite: bool) -> None:
    """Give root the files of tree: by one rename where root is new, else one after the other."""
    target = root.resolve()
    if not target.exists():
        os.replace(tree, target)
        return
    missing, wrong = check_files(root, digests)
    if not overwrite:
        refuse_wrong(root / name for name in wrong)
    # The annotations come last: without them, what is there is not yet a data set.
    for name in sorted({*missing, *wrong}, key=lambda name: (name in ICIR_FILES["tar"], name)):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tree / name, path)


# ---------------------------------------------------------------------------------------------
# i-CIR on the Hugging Face Hub
# ---------------------------------------------------------------------------------------------

# Where the errors of a broken connection come from, whichever HTTP library the installed
# huggingface_hub is built on.
HUB_MODULES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def fetch_hub(root: Path, revision: str = "main", overwrite: bool = False) -> None:
    """Install i-CIR's shards and annotations in root from the Hub, every file verified.

    The Hub's own environment (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) holds. Without the
    Hub, a copy that an earlier run installed is verified against that run's record.

    Raises UserError and Unreachable.
    """
    offline = None
    try:
        snapshot = hub_snapshot(revision, first_missing(root, "hf"))
    except Unreachable as error:
        offline, snapshot = error, _recorded_snapshot(root, revision)
        if snapshot is None:
            raise
    missing, wrong = check_files(root, snapshot.digests)
    if not overwrite:
        refuse_wrong((root / name for name in wrong), _revision_remedy(root, snapshot))
    lacking = [*missing, *wrong]
    if offline and lacking:
        raise Unreachable(root / lacking[0], offline.source, offline.cause)
    if lacking:
        _download_snapshot(root, snapshot, lacking)
    if not offline:
        write_record(root, snapshot)
        _remove_leftovers(root)
    verb = "downloaded" if lacking else "kept, already right"
    note = "; the Hub, which may have a newer one, was not reached" if offline else ""
    print(f"{verb}: {root} ({len(snapshot.digests)} files, commit {snapshot.commit}{note})")


def _recorded_snapshot(root: Path, revision: str) -> Snapshot | None:
    """What an earlier run installed; UserError if that was another revision."""
    installed = read_record(root, "hf")
    if installed and revision not in (installed.revision, installed.commit):
        raise UserError(
            f"{root} holds revision {installed.revision} ({installed.commit}), and the Hub cannot "
            f"be reached for {revision}: give --revision {installed.revision}, or a network"
        )
    return installed


def _revision_remedy(root: Path, snapshot: Snapshot) -> str:
    """How to keep what an earlier run installed, where the revision has moved on since."""
    installed = read_record(root, "hf")
    if installed is None or installed.commit == snapshot.commit:
        return ""
    return f" by those of {snapshot.commit}, or --revision {installed.commit} to stay with yours"


def hub_snapshot(revision: str, missing: Path) -> Snapshot:
    """What the Hub has at this revision.

    Raises Unreachable, with `missing` as the file it names, and UserError if the Hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(
            HUB_DATASET, revision=revision, files_metadata=True, timeout=TIMEOUT
        )
    except Exception as error:
        raise _hub_error(error, revision, missing) from None
    files = [file for file in info.siblings if file.rfilename != ".gitattributes"]
    if not files:
        raise UserError(f"{HUB_DATASET} holds no files at revision {revision}; check --revision")
    digests, sizes = {}, {}
    for file in files:
        name = safe_name(file.rfilename)
        # An LFS file's blob is a pointer; its content is known by its SHA-256.
        digests[name] = file.lfs["sha256"] if file.lfs else file.blob_id
        sizes[name] = file.size or 0
    return Snapshot("hf", HUB_DATASET, revision, info.sha, digests, sizes)


def _download_snapshot(root: Path, snapshot: Snapshot, names: list[str]) -> None:
    """Download these files of a snapshot, verify them, and put them in place, annotations last.

    They are downloaded beside their places: what is there stays until all of them are right.
    """
    from huggingface_hub import constants

    staging = root.resolve() / STAGING  # root may be a link to another disk
    staging.mkdir(parents=True, exist_ok=True)
    size = sum(snapshot.sizes[name] for name in names if not (staging / name).exists())
    require_space(root, size)
    print(f"downloading {len(names)} files of {HUB_DATASET} ({size / 1e9:.2f} GB)", flush=True)
    annotations = [name for name in names if name.startswith("annotations/")]
    others = [name for name in names if not name.startswith("annotations/")]
    for batch in filter(None, (others, annotations)):
        _fetch_batch(root, staging, snapshot, batch)
        # Without a connection snapshot_download may be content with what is there.
        missing, wrong = check_files(staging, {n: snapshot.digests[n] for n in batch})
        for name in wrong:
            (staging / name).unlink()
        if missing:
            raise Unreachable(root / missing[0], constants.ENDPOINT, "incomplete download")
        if wrong:
            raise UserError(
                f"{root / wrong[0]}: the Hub sent wrong content ({len(wrong)} such files were "
                "removed); run the command again"
            )
    for name in (*others, *annotations):
        path = root.resolve() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, path)


def _fetch_batch(root: Path, staging: Path, snapshot: Snapshot, names: list[str]) -> None:
    """Have huggingface_hub download these files to a folder; broken connections are opened again.

    root: the folder that an error names them in.
    """
    from huggingface_hub import snapshot_download

    for attempt in range(TRIES):
        try:
            snapshot_download(
                HUB_DATASET,
                repo_type="dataset",
                revision=snapshot.commit,
                local_dir=staging,
                allow_patterns=[glob.escape(name) for name in names],
            )
            return
        except Exception as error:
            lacking = next((name for name in names if not (staging / name).exists()), names[0])
            failure = _hub_error(error, snapshot.revision, root / lacking)
        if attempt + 1 == TRIES or not isinstance(failure, Unreachable):
            raise failure
        time.sleep(RETRY_WAIT * 2**attempt)


def _remove_leftovers(root: Path) -> None:
    """Remove what downloads that were killed, or an earlier version's, have left."""
    shutil.rmtree(root / STAGING, ignore_errors=True)
    for file in (root / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
        file.unlink()


def _hub_error(error: Exception, revision: str, missing: Path) -> Exception:
    """The error to raise for one of huggingface_hub's: the user's, the network's, or itself."""
    from huggingface_hub import constants
    from huggingface_hub.utils import HfHubHTTPError

    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    if isinstance(error, HfHubHTTPError):
        return UserError(
            f"{HUB_DATASET} at revision {revision}: {constants.ENDPOINT} answered: {line} "
            "(--revision chooses the revision, HF_TOKEN identifies you)"
        )
    module = type(error).__module__.partition(".")[0]
    if module in HUB_MODULES or isinstance(error, (ConnectionError, TimeoutError)):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else line
        return Unreachable(missing, constants.ENDPOINT, cause)
    return error


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

TARGETS = ("icir", "laion_mean", "synthetic_data", "corpora")

# The targets, and the source of i-CIR, without which a flag would do nothing.
FLAG_USES = {
    "source": (("icir",), None),
    "revision": (("icir",), "hf"),
    "archive_url": (("icir",), "tar"),
    "keep_archive": (("icir",), "tar"),
    "assets_url": (("laion_mean", "synthetic_data", "corpora"), None),
    "synthetic_dir": (("synthetic_data",), None),
    "corpora_dir": (("corpora", domain_lists.WORDS_TARGET), None),
    "listing_url": (domain_lists.TARGETS, None),
    "files_url": ((*domain_lists.TARGETS, *annotation_files.REPOSITORIES), None),
}

EPILOG = f"""\
environment:
  ICIR_ASSETS_URL      default of --assets_url
  ICIR_ARCHIVE_URL     default of --archive_url
  HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE
                       as huggingface_hub documents them (--source hf)

where files land:
  icir                 DATA_DIR/icir/{{webdataset,annotations}}/ (hf)
                       DATA_DIR/icir/{{query,database}}/ and two CSV files (tar)
  laion_mean           DATA_DIR/laion_mean/
  synthetic_data       SYNTHETIC_DIR/
  corpora, words       CORPORA_DIR/
  imagenet_r, nico, minidn, ltll
                       DATA_DIR/NAME/ (lists only: what is printed says where the images are)
  cirr, circo, fashioniq, genecis
                       DATA_DIR/NAME/ (annotations only, likewise)

i-CIR is released under CC BY-NC-SA 4.0, the other files under the MIT license. The files of
laion_mean, synthetic_data and corpora are those of commit {COMMIT[:12]} of the reference
repository, the lists those of commit {domain_lists.COMMIT[:12]} of {domain_lists.REPOSITORY}.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; flags are accepted with dashes too."""
    parser = Parser(
        prog="download.py",
        description="Download the data set and the assets of the published numbers, verified.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        choices=(*TARGETS, "all", *domain_lists.TARGETS, *annotation_files.REPOSITORIES),
        help="what to download (all: the first four)",
    )
    flag = partial(add_flag, parser)
    flag("data_dir", type=Path, default=Path("data"), help="folder of data sets (default: data)")
    flag(
        "source",
        choices=tuple(ICIR_FILES),
        help="i-CIR from the Hub or as an archive (default: hf)",
    )
    flag("revision", help="branch, tag or commit of the data set on the Hub (default: main)")
    for name, text, default in (
        ("synthetic_dir", "folder of synthetic features", "synthetic_data"),
        ("corpora_dir", "folder of the corpora", CORPORA_DIR),
    ):
        flag(name, type=Path, help=f"{text} (default: {default})")
    for name, text, default in (
        ("archive_url", "i-CIR's archive", f"$ICIR_ARCHIVE_URL, {ARCHIVE_URL}"),
        ("assets_url", "what the other files' paths follow", f"$ICIR_ASSETS_URL, {ASSETS_URL}"),
        ("listing_url", "listing of the lists' repository", domain_lists.LISTING_URL),
        ("files_url", "what the lists' paths are appended to", domain_lists.FILES_URL),
    ):
        flag(name, help=f"{text} (default: {default})")
    flag("keep_archive", action="store_true", help="keep the archive once it is extracted")
    flag("overwrite", action="store_true", help="replace files that are there but wrong")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that would do nothing."""
    args = build_parser().parse_args(argv)
    args.targets = TARGETS if args.target == "all" else (args.target,)
    _refuse_idle_flags(args)
    return args


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    for flag, (targets, source) in FLAG_USES.items():
        if not getattr(args, flag):
            continue
        if not set(targets) & set(args.targets):
            raise UserError(f"--{flag} has no effect on {args.target}; leave it out")
        if source not in (None, args.source or "hf"):
            raise UserError(f"--{flag} has no effect without --source {source}")


def place_assets(args: argparse.Namespace) -> dict[Path, Asset]:
    """Path to asset, for the targets asked for."""
    folders = {
        "laion_mean": args.data_dir / "laion_mean",
        "synthetic_data": args.synthetic_dir or Path("synthetic_data"),
        "corpora": args.corpora_dir or CORPORA_DIR,
    }
    return {
        folders[asset.target] / PurePosixPath(asset.path).name: asset
        for asset in ASSETS
        if asset.target in args.targets
    }


def main(argv: list[str]) -> None:
    """Download what the command line asks for: small files first, i-CIR last."""
    args = parse_arguments(argv)
    try:
        placed = place_assets(args)
        base_url = args.assets_url or os.environ.get("ICIR_ASSETS_URL") or ASSETS_URL
        fetch_assets(placed, base_url, args.overwrite)
        if "corpora" in args.targets:
            print(CORPORA_ADVICE.format(folder=args.corpora_dir or CORPORA_DIR))
        if "icir" in args.targets and args.source == "tar":
            url = args.archive_url or os.environ.get("ICIR_ARCHIVE_URL") or ARCHIVE_URL
            fetch_archive(args.data_dir / "icir", url, args.overwrite, args.keep_archive)
        elif "icir" in args.targets:
            fetch_hub(args.data_dir / "icir", args.revision or "main", args.overwrite)
        lists = [target for target in args.targets if target in domain_lists.TARGETS]
        for target in args.targets:
            if target in annotation_files.REPOSITORIES:
                fetch_annotations(target, args.data_dir, args.files_url, args.overwrite)
        if lists:
            fetch_lists(
                lists,
                args.data_dir,
                args.corpora_dir or CORPORA_DIR,
                args.listing_url or domain_lists.LISTING_URL,
                args.files_url or domain_lists.FILES_URL,
                args.overwrite,
            )
    except Unreachable as error:
        command = f"python3 data/download.py {shlex.join(argv)}"
        raise UserError(f"{error}; with a network, run: {command}") from None
    except OSError as error:
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from None


if __name__ == "__main__":
    run_command(main)
