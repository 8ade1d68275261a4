"""i-CIR, from the Hugging Face Hub or as an archive: installed when it is whole and right."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from tqdm.utils import CallbackIOWrapper

import data.transfer as transfer
from data.transfer import (
    CHUNK_BYTES,
    TIMEOUT,
    NotFound,
    Snapshot,
    Unreachable,
    check_files,
    download,
    progress_bar,
    read_record,
    record_path,
    refuse_wrong,
    require_digest,
    require_space,
    safe_name,
    url_name,
    write_record,
)
from utils import UserError, naming, sha256_file

ARCHIVE_URL = "https://vrg.fel.cvut.cz/icir/icir_v1.0.0.tar.gz"
HUB_DATASET = "billpsomas/icir"
STAGING = ".cache/download"  # below the data set's folder: where the Hub's files arrive

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


def first_missing(root: Path, source: str) -> Path:
    """The first of the files that make i-CIR which is not there (or the record, if all are)."""
    paths = [root / name for name in ICIR_FILES[source]]
    return next((path for path in paths if not path.exists()), record_path(root, source))


# ---------------------------------------------------------------------------------------------
# As an archive
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
    name = url_name(url)
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
            progress_bar("extracting", total=archive.stat().st_size) as bar,
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
    with naming(path), open(path, "wb") as file:
        for chunk in _chunks(source):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _chunks(source) -> Iterator[bytes]:
    """A member's bytes. Raises TarError for what a decompressor calls an error of the system."""
    try:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
    except OSError as error:
        raise tarfile.ReadError(str(error)) from None


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
# From the Hugging Face Hub
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

    for attempt in range(transfer.TRIES):
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
        if attempt + 1 == transfer.TRIES or not isinstance(failure, Unreachable):
            raise failure
        time.sleep(transfer.RETRY_WAIT * 2**attempt)


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
