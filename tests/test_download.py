"""data/download.py against a local HTTP server: what is whole is installed, nothing else is."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import data.download as download
import data.icir_files as icir_files
import data.transfer as transfer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "download.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


# ---------------------------------------------------------------------------------------------
# A server that can break
# ---------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What the server has at a path.

    cuts: for the first requests, after how many bytes the connection is cut; statuses: for the
    first requests, the status answered instead of the content.
    """

    content: bytes
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Site:
    """The server: its URL, its pages by path, and the requests it got as (method, path, Range)."""

    url: str
    pages: dict[str, Page] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the GET requests for a path, in order."""
        return [wanted for method, at, wanted in self.requests if method == "GET" and at == path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        site = self.server.site
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        site.requests.append((self.command, path, wanted))
        page = site.pages.get(path)
        if page is None or page.statuses:
            return self._refuse(page.statuses.pop(0) if page else 404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and page.ranges else 0
        if start >= len(page.content) and start:
            return self._refuse(416, {"Content-Range": f"bytes */{len(page.content)}"})
        body = page.content[start:]
        headers = {"Content-Length": str(len(body)), **page.headers}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(page.content) - 1}/{len(page.content)}"
        self._head(206 if start else 200, headers)
        if send_body:
            cut = page.cuts.pop(0) if page.cuts else len(body)
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or cut < len(body)

    def _refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": "0", **(headers or {})})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.site = Site(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.site
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_way_out(monkeypatch):
    """No proxy between the tests and their server, and no waiting between tries."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "ICIR_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(transfer, "RETRY_WAIT", 0.0)


@pytest.fixture
def closed_url() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def run(folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a folder of its own, with everything on the network out of its reach."""
    nowhere = "http://127.0.0.1:9"  # the discard port
    defaults = {
        "HF_ENDPOINT": nowhere,
        "ICIR_ASSETS_URL": nowhere,
        "ICIR_ARCHIVE_URL": f"{nowhere}/icir_v1.0.0.tar.gz",
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        cwd=folder,
        env={**os.environ, **defaults, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Status 2, and one line on stderr that holds every part."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by relative name, but for the Hub's own bookkeeping."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if path.is_file() and not name.startswith(("hf_home/", "data/icir/.cache/"))
    }


# ---------------------------------------------------------------------------------------------
# Single files
# ---------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4000  # about 1 MB: several chunks
ASSET = download.Asset("corpora/list.csv", blob_id(CONTENT))


def test_asset_is_downloaded_and_verified(site, tmp_path, capsys):
    site.pages["/base/corpora/list.csv"] = Page(CONTENT)
    path = tmp_path / "new" / "list.csv"
    download.fetch_assets({path: ASSET}, f"{site.url}/base/")
    assert tree(tmp_path) == {"new/list.csv": CONTENT}
    assert site.requests == [("GET", "/base/corpora/list.csv", None)]
    assert capsys.readouterr().out == f"downloaded: {path}\n"


def test_cut_connection_is_resumed_where_it_broke(site, tmp_path):
    site.pages["/corpora/list.csv"] = Page(CONTENT, cuts=[300_000, 200_000])
    download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert site.ranges("/corpora/list.csv") == [None, "bytes=300000-", "bytes=500000-"]
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_next_run_goes_on_where_the_last_one_stopped(site, tmp_path):
    (tmp_path / "list.csv.part").write_bytes(CONTENT[:12345])
    site.pages["/corpora/list.csv"] = Page(CONTENT)
    download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert site.ranges("/corpora/list.csv") == ["bytes=12345-"]
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_part_that_is_already_whole_is_used(site, tmp_path):
    (tmp_path / "list.csv.part").write_bytes(CONTENT)
    site.pages["/corpora/list.csv"] = Page(CONTENT)
    download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert site.ranges("/corpora/list.csv") == [f"bytes={len(CONTENT)}-"]
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_part_longer_than_the_file_starts_again(site, tmp_path):
    (tmp_path / "list.csv.part").write_bytes(CONTENT + b"more")
    site.pages["/corpora/list.csv"] = Page(CONTENT)
    download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert site.ranges("/corpora/list.csv") == [f"bytes={len(CONTENT) + 4}-", None]
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_server_without_ranges_starts_again(site, tmp_path):
    site.pages["/corpora/list.csv"] = Page(CONTENT, ranges=False, cuts=[300_000])
    download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert site.ranges("/corpora/list.csv") == [None, "bytes=300000-"]
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_connection_that_never_brings_a_byte_is_given_up(site, tmp_path):
    site.pages["/corpora/list.csv"] = Page(CONTENT, cuts=[1000] + [0] * 20)
    with pytest.raises(transfer.Unreachable, match="cut after 1000 of 1024000 bytes"):
        download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert len(site.requests) == 1 + transfer.TRIES
    assert tree(tmp_path) == {"list.csv.part": CONTENT[:1000]}  # kept for the next run


def test_busy_server_is_asked_again(site, tmp_path):
    site.pages["/corpora/list.csv"] = Page(CONTENT, statuses=[503, 429])
    download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_wrong_hash_installs_nothing(site, tmp_path):
    site.pages["/corpora/list.csv"] = Page(CONTENT[:-1] + b"?")
    with pytest.raises(download.UserError, match=rf"{ASSET.path}: wrong content.*{ASSET.blob_id}"):
        download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert tree(tmp_path) == {}


def test_missing_on_the_server_is_named_and_not_tried_again(site, tmp_path):
    with pytest.raises(transfer.NotFound, match=r"/corpora/list\.csv: HTTP status 404"):
        download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert len(site.requests) == 1
    assert tree(tmp_path) == {}


def test_right_file_is_kept_without_a_request(site, tmp_path, capsys):
    path = tmp_path / "list.csv"
    path.write_bytes(CONTENT)
    download.fetch_assets({path: ASSET}, site.url)
    assert site.requests == []
    assert capsys.readouterr().out == f"kept, already right: {path}\n"


def test_wrong_files_are_all_named_and_refused_before_any_download(site, tmp_path):
    placed = {tmp_path / name: ASSET for name in ("a.csv", "b.csv", "c.csv")}
    (tmp_path / "b.csv").write_bytes(b"mine")
    (tmp_path / "c.csv").write_bytes(b"mine too")
    before = tree(tmp_path)
    with pytest.raises(download.UserError, match=r"b\.csv.*c\.csv.*--overwrite") as caught:
        download.fetch_assets(placed, site.url)
    assert "a.csv" not in str(caught.value)
    assert tree(tmp_path) == before
    assert site.requests == []


def test_wrong_file_is_replaced_only_by_the_right_one(site, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"mine")
    site.pages["/corpora/list.csv"] = Page(b"not what was published")
    with pytest.raises(download.UserError, match="wrong content"):
        download.fetch_assets({path: ASSET}, site.url, overwrite=True)
    assert path.read_bytes() == b"mine"
    site.pages["/corpora/list.csv"] = Page(CONTENT)
    download.fetch_assets({path: ASSET}, site.url, overwrite=True)
    assert tree(tmp_path) == {"list.csv": CONTENT}


def test_full_disk_is_foreseen(site, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    site.pages["/corpora/list.csv"] = Page(CONTENT)
    with pytest.raises(download.UserError, match="make room"):
        download.fetch_asset(ASSET, tmp_path / "list.csv", site.url)
    assert tree(tmp_path) == {}


def test_table_of_assets_is_complete():
    by_target = {target: [] for target in download.TARGETS}
    for asset in download.ASSETS:
        by_target[asset.target].append(asset.path)
        assert len(asset.blob_id) == 40
    assert {target: len(paths) for target, paths in by_target.items()} == {
        "icir": 0,
        "laion_mean": 2,
        "synthetic_data": 2,
        "corpora": 2,
    }


# ---------------------------------------------------------------------------------------------
# Single files, by the command
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ("laion_mean", "data/laion_mean/laion_1m_mean_clip.pkl"),
        ("synthetic_data", "synthetic_data/dataset_1_sd_clip.pkl.npy"),
        ("corpora", "corpora/reference/generic_styles.csv"),
    ],
)
def test_command_without_network_names_file_and_command(target, missing, tmp_path, closed_url):
    result = run(tmp_path, target, ICIR_ASSETS_URL=closed_url)
    assert_refused(result, f"{missing} is missing", f"python3 data/download.py {target}")
    assert tree(tmp_path) == {}


def test_command_refuses_wrong_content(site, tmp_path):
    site.pages["/data/laion_mean/laion_1m_mean_clip.pkl"] = Page(b"not the mean")
    result = run(tmp_path, "laion_mean", "--data-dir", "d", "--assets-url", site.url)
    assert_refused(result, "laion_1m_mean_clip.pkl: wrong content", "1aac21d27bdb329e18f8e97f7a")
    assert tree(tmp_path) == {}


def test_command_refuses_wrong_files_that_are_there(site, tmp_path):
    path = tmp_path / "lists" / "generic_subjects.csv"
    path.parent.mkdir()
    path.write_text("mine\n")
    arguments = ("corpora", "--corpora_dir", "lists", "--assets_url", site.url)
    assert_refused(run(tmp_path, *arguments), "lists/generic_subjects.csv", "--overwrite")
    assert site.requests == []
    assert path.read_text() == "mine\n"


def test_command_downloads_corpora_and_says_how_to_use_them(site, tmp_path, monkeypatch, capsys):
    pages = {f"/corpora/{name}.csv": b"a\nb\n" for name in ("generic_subjects", "generic_styles")}
    site.pages = {path: Page(content) for path, content in pages.items()}
    assets = tuple(download.Asset(path[1:], blob_id(page)) for path, page in pages.items())
    monkeypatch.setattr(download, "ASSETS", assets)
    monkeypatch.setenv("ICIR_ASSETS_URL", site.url)
    monkeypatch.chdir(tmp_path)
    download.main(["corpora"])
    names = ("corpora/reference/generic_subjects.csv", "corpora/reference/generic_styles.csv")
    assert tree(tmp_path) == dict.fromkeys(names, b"a\nb\n")
    said = capsys.readouterr().out
    assert "--corpora_dir corpora/reference" in said
    assert "object_name" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("corpora", "--revision", "main"), "--revision has no effect on corpora"),
        (("icir", "--corpora_dir", "x"), "--corpora_dir has no effect on icir"),
        (("icir", "--keep_archive"), "--keep_archive has no effect without --source tar"),
        (("icir", "--source", "tar", "--revision", "v1"), "no effect without --source hf"),
        (("corpora", "--assets_url", "file:///etc"), "must begin with http:// or https://"),
    ],
)
def test_command_refuses_flags_that_cannot_work(argv, said, tmp_path):
    assert_refused(run(tmp_path, *argv), said)
    assert tree(tmp_path) == {}


def test_script_does_not_load_torch(tmp_path):
    probe = (
        f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'open_clip', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------
# The archive
# ---------------------------------------------------------------------------------------------

ARCHIVE = "/icir/icir_v1.0.0.tar.gz"
DATA_SET = {
    "query_files.csv": b"query/a/1.jpg,at night,a\n",
    "database_files.csv": b"database/a/2.jpg,at night,a\n",
    "query/a/1.jpg": b"\xff\xd8 query",
    "database/a/2.jpg": b"\xff\xd8 database" * 5000,
    "LICENSE": b"CC BY-NC-SA 4.0\n",
}


def pack(files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> bytes:
    """A .tar.gz of the files, then of the extra members (without content)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra or []:
            archive.addfile(member)
    return packed.getvalue()


def serve_archive(site: Site, packed: bytes, checksum: str | None = None, **options) -> None:
    site.pages[ARCHIVE] = Page(packed, **options)
    digest = checksum or hashlib.sha256(packed).hexdigest()
    site.pages[f"{ARCHIVE}.sha256"] = Page(f"{digest}  icir_v1.0.0.tar.gz\n".encode())


def installed(folder: Path) -> dict[str, bytes]:
    """What the folder holds, the record of the download apart."""
    files = tree(folder)
    files.pop("data/icir/download_tar.json", None)
    return files


def in_icir(files: dict[str, bytes], prefix: str = "data/icir/") -> dict[str, bytes]:
    return {f"{prefix}{name}": content for name, content in files.items()}


def run_tar(folder: Path, site: Site, *argv: str) -> subprocess.CompletedProcess:
    return run(folder, "icir", "--source", "tar", *argv, ICIR_ARCHIVE_URL=f"{site.url}{ARCHIVE}")


def test_archive_is_installed_then_kept_without_a_request(site, tmp_path):
    serve_archive(site, pack(in_icir(DATA_SET, "icir/")), cuts=[100])
    result = run_tar(tmp_path, site)
    assert result.returncode == 0, result.stderr
    assert installed(tmp_path) == in_icir(DATA_SET)
    assert site.ranges(ARCHIVE) == [None, "bytes=100-"]
    count = len(site.requests)
    again = run_tar(tmp_path, site)
    assert again.returncode == 0
    assert "kept, already right: data/icir (5 files)" in again.stdout
    assert len(site.requests) == count


def test_a_member_whose_name_is_not_utf8_is_kept_and_known_again(site, tmp_path):
    files = {**DATA_SET, "query/a/caf\udce9.jpg": b"x"}  # Latin-1, as old archives have it
    serve_archive(site, pack(files))
    assert run_tar(tmp_path, site).returncode == 0
    assert installed(tmp_path) == in_icir(files)
    again = run_tar(tmp_path, site)
    assert again.returncode == 0, again.stderr
    assert "kept, already right: data/icir (6 files)" in again.stdout


def test_archive_without_a_folder_of_its_own(site, tmp_path):
    serve_archive(site, pack(in_icir(DATA_SET, "./")))
    icir_files.fetch_archive(tmp_path / "data" / "icir", f"{site.url}{ARCHIVE}")
    assert installed(tmp_path) == in_icir(DATA_SET)


def test_extraction_that_was_killed_leaves_nothing_behind(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    leftover = tmp_path / "data" / ".icir.part" / "query" / "old.jpg"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"old")
    icir_files.fetch_archive(tmp_path / "data" / "icir", f"{site.url}{ARCHIVE}")
    assert installed(tmp_path) == in_icir(DATA_SET)


def test_data_set_folder_may_be_a_link_to_another_disk(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    (tmp_path / "big").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "icir").symlink_to(tmp_path / "big" / "icir")
    icir_files.fetch_archive(tmp_path / "data" / "icir", f"{site.url}{ARCHIVE}")
    assert (tmp_path / "data" / "icir").is_symlink()
    assert {path.name for path in (tmp_path / "big").iterdir()} == {"icir"}
    assert tree(tmp_path / "big" / "icir").keys() >= DATA_SET.keys()


def test_checksum_beside_the_archive_may_lack_its_suffix(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    site.pages["/icir/icir_v1.0.0.sha256"] = site.pages.pop(f"{ARCHIVE}.sha256")
    icir_files.fetch_archive(tmp_path / "data" / "icir", f"{site.url}{ARCHIVE}")
    assert installed(tmp_path) == in_icir(DATA_SET)


def test_archive_already_beside_is_used_and_stays(site, tmp_path):
    packed = pack(DATA_SET)
    serve_archive(site, packed)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "icir_v1.0.0.tar.gz").write_bytes(packed)
    icir_files.fetch_archive(tmp_path / "data" / "icir", f"{site.url}{ARCHIVE}")
    assert site.ranges(ARCHIVE) == []
    assert installed(tmp_path) == {"data/icir_v1.0.0.tar.gz": packed, **in_icir(DATA_SET)}


def test_wrong_archive_already_beside_is_named(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "icir_v1.0.0.tar.gz").write_bytes(b"half of it")
    assert_refused(run_tar(tmp_path, site), "icir_v1.0.0.tar.gz is not the published archive")
    assert installed(tmp_path) == {"data/icir_v1.0.0.tar.gz": b"half of it"}


def test_keep_archive(site, tmp_path):
    packed = pack(DATA_SET)
    serve_archive(site, packed)
    url = f"{site.url}{ARCHIVE}"
    icir_files.fetch_archive(tmp_path / "data" / "icir", url, keep_archive=True)
    assert installed(tmp_path) == {"data/icir_v1.0.0.tar.gz": packed, **in_icir(DATA_SET)}


def test_archive_with_wrong_checksum(site, tmp_path):
    serve_archive(site, pack(DATA_SET), checksum="0" * 64)
    assert_refused(run_tar(tmp_path, site), f"{ARCHIVE}: wrong content", "0" * 64)
    assert installed(tmp_path) == {}


def test_archive_without_checksum(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    del site.pages[f"{ARCHIVE}.sha256"]
    assert_refused(run_tar(tmp_path, site), f"{ARCHIVE}.sha256", "404", "--archive_url")
    assert site.ranges(ARCHIVE) == []
    assert installed(tmp_path) == {}


def test_checksum_that_is_none(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    site.pages[f"{ARCHIVE}.sha256"] = Page(b"<html>moved</html>")
    with pytest.raises(download.UserError, match="does not begin with a SHA-256"):
        icir_files.fetch_archive(tmp_path / "icir", f"{site.url}{ARCHIVE}")


def test_archive_that_is_gone(site, tmp_path):
    serve_archive(site, pack(DATA_SET))
    del site.pages[ARCHIVE]
    assert_refused(run_tar(tmp_path, site), f"{ARCHIVE}: HTTP status 404")
    assert installed(tmp_path) == {}


def test_archive_without_network(tmp_path, closed_url):
    result = run(tmp_path, "icir", "--source", "tar", "--archive_url", f"{closed_url}/i.tar.gz")
    command = f"python3 data/download.py icir --source tar --archive_url {closed_url}/i.tar.gz"
    assert_refused(result, "data/icir/query_files.csv is missing", command)
    assert installed(tmp_path) == {}


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (_member("../outside.txt"), "leads out of the target folder"),
        (_member("icir/../../outside.txt"), "leads out of the target folder"),
        (_member("/tmp/outside.txt"), "leads out of the target folder"),
        (_member("..", tarfile.DIRTYPE), "leads out of the target folder"),
        (_member("icir/out", tarfile.SYMTYPE, "/tmp"), "is a link or a device"),
        (_member("icir/out", tarfile.SYMTYPE, "query_files.csv"), "is a link or a device"),
        (_member("icir/out", tarfile.LNKTYPE, "icir/LICENSE"), "is a link or a device"),
        (_member("icir/pipe", tarfile.FIFOTYPE), "is a link or a device"),
        (_member("icir/null", tarfile.CHRTYPE), "is a link or a device"),
    ],
)
def test_member_that_tries_to_leave_the_target(member, said, tmp_path):
    archive = tmp_path / "work" / "icir.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(pack(in_icir(DATA_SET, "icir/"), [member]))
    with pytest.raises(download.UserError, match=said):
        icir_files.install_archive(archive, tmp_path / "work" / "icir")
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "icir.tar.gz"]


def test_command_refuses_a_member_that_tries_to_leave(site, tmp_path):
    serve_archive(site, pack(in_icir(DATA_SET, "icir/"), [_member("icir/../../../outside")]))
    folder = tmp_path / "inner"
    folder.mkdir()
    assert_refused(run_tar(folder, site), "'icir/../../../outside' leads out of the target")
    assert not (tmp_path / "outside").exists()
    assert not (folder / "data" / "icir").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"this is no archive", "not a sound tar archive"),
        (pack({**DATA_SET, "1.jpg": os.urandom(50_000)})[:30_000], "not a sound tar archive"),
        (pack({"icir/LICENSE": b"text"}), "is not i-CIR"),
    ],
    ids=("no archive", "cut short", "other content"),
)
def test_archive_that_holds_no_data_set(content, said, tmp_path):
    archive = tmp_path / "icir.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(download.UserError, match=said):
        icir_files.install_archive(archive, tmp_path / "icir")
    assert tree(tmp_path) == {"icir.tar.gz": content}


def test_damaged_copy_is_named_then_repaired(site, tmp_path):
    serve_archive(site, pack(in_icir(DATA_SET, "icir/")))
    assert run_tar(tmp_path, site).returncode == 0
    image = tmp_path / "data/icir/query/a/1.jpg"
    image.write_bytes(b"damaged")
    (tmp_path / "data/icir/LICENSE").unlink()
    count = len(site.requests)
    assert_refused(run_tar(tmp_path, site), "data/icir/query/a/1.jpg", "--overwrite")
    assert len(site.requests) == count
    assert image.read_bytes() == b"damaged"
    assert run_tar(tmp_path, site, "--overwrite").returncode == 0
    assert installed(tmp_path) == in_icir(DATA_SET)


def test_files_of_ones_own_in_the_folder_are_not_touched(site, tmp_path):
    serve_archive(site, pack(in_icir(DATA_SET, "icir/")))
    mine = tmp_path / "data/icir/LICENSE"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"my notes")
    (tmp_path / "data/icir/notes.txt").write_bytes(b"more notes")
    assert_refused(run_tar(tmp_path, site), "data/icir/LICENSE", "--overwrite")
    assert tree(tmp_path / "data/icir") == {"LICENSE": b"my notes", "notes.txt": b"more notes"}
    mine.unlink()
    result = run_tar(tmp_path, site)
    assert result.returncode == 0, result.stderr
    assert installed(tmp_path) == {**in_icir(DATA_SET), "data/icir/notes.txt": b"more notes"}
    # The archive had been kept from the refused run: its bytes were not asked for again.
    size = len(site.pages[ARCHIVE].content)
    assert site.ranges(ARCHIVE) == [None, f"bytes={size}-"]


# ---------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------

HUB = "billpsomas/icir"
SHARDS = {
    "annotations/query_files.csv": b"query/a/1.jpg,at night,a\n",
    "annotations/database_files.csv": b"database/a/2.jpg,at night,a\n",
    "webdataset/query/query-000000.tar": pack({"1.jpg": b"query"}),
    "webdataset/database/database-000000.tar": os.urandom(50_000),
    "LICENSE": b"CC BY-NC-SA 4.0\n",
}


def serve_hub(site: Site, files: dict[str, bytes], commit: str = COMMIT) -> None:
    """The part of the Hub's API that a snapshot is downloaded with; tar files are LFS files."""
    siblings, entries = [], []
    for name, content in {**files, ".gitattributes": b"*.tar filter=lfs\n"}.items():
        facts = {"size": len(content)}
        etag = blob_id(content)
        if name.endswith(".tar"):
            etag = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"sha256": etag, "size": len(content), "pointerSize": 130}
        siblings.append({"rfilename": name, "blobId": blob_id(content), **facts})
        lfs = {"lfs": {"oid": etag, "size": len(content), "pointerSize": 130}}
        entry = {"type": "file", "path": name, "oid": blob_id(content), "size": len(content)}
        entries.append({**entry, **(lfs if "lfs" in facts else {})})
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        site.pages[f"/datasets/{HUB}/resolve/{commit}/{name}"] = Page(content, headers=headers)
    info = {"id": HUB, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
    json_type = {"Content-Type": "application/json"}
    for path, answer in {
        f"revision/{commit}": info,
        "revision/main": info,
        f"tree/{commit}": entries,
    }.items():
        page = Page(json.dumps(answer).encode(), headers=json_type)
        site.pages[f"/api/datasets/{HUB}/{path}"] = page


def resolve(name: str, commit: str = COMMIT) -> str:
    return f"/datasets/{HUB}/resolve/{commit}/{name}"


def run_hub(folder: Path, site: Site, *argv: str, **environment: str):
    return run(folder, "icir", *argv, **{"HF_ENDPOINT": site.url, **environment})


def installed_shards(folder: Path) -> dict[str, bytes]:
    files = tree(folder)
    files.pop("data/icir/download_hf.json", None)
    return files


def test_hub_snapshot_is_installed_then_kept(site, tmp_path):
    serve_hub(site, SHARDS)
    result = run_hub(tmp_path, site)
    assert result.returncode == 0, result.stderr
    assert f"downloaded: data/icir (5 files, commit {COMMIT})" in result.stdout
    assert installed_shards(tmp_path) == in_icir(SHARDS)
    fetched = [path for method, path, _ in site.requests if method == "GET" and "resolve" in path]
    last = {path.removeprefix(resolve("")) for path in fetched[-2:]}
    assert last == {"annotations/query_files.csv", "annotations/database_files.csv"}
    site.requests.clear()
    again = run_hub(tmp_path, site)
    assert again.returncode == 0, again.stderr
    assert "kept, already right: data/icir (5 files" in again.stdout
    assert [path for _, path, _ in site.requests] == [f"/api/datasets/{HUB}/revision/main"]


def test_hub_download_that_was_cut_is_tried_again(site, tmp_path):
    serve_hub(site, SHARDS)
    name = "webdataset/database/database-000000.tar"
    site.pages[resolve(name)].cuts = [20_000]
    result = run_hub(tmp_path, site)
    assert result.returncode == 0, result.stderr
    assert len(site.ranges(resolve(name))) == 2
    assert installed_shards(tmp_path) == in_icir(SHARDS)


def test_hub_files_that_are_there_are_not_downloaded_again(site, tmp_path):
    serve_hub(site, SHARDS)
    present = "webdataset/database/database-000000.tar"
    path = tmp_path / "data/icir" / present
    path.parent.mkdir(parents=True)
    path.write_bytes(SHARDS[present])
    leftover = tmp_path / "data/icir/.cache/huggingface/download/webdataset/xyz.incomplete"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"of a run that was killed")
    assert run_hub(tmp_path, site).returncode == 0
    assert not leftover.exists()
    assert resolve(present) not in [path for _, path, _ in site.requests]
    assert installed_shards(tmp_path) == in_icir(SHARDS)


def test_hub_files_that_are_wrong_are_named_then_replaced(site, tmp_path):
    serve_hub(site, SHARDS)
    assert run_hub(tmp_path, site).returncode == 0
    shard = tmp_path / "data/icir/webdataset/query/query-000000.tar"
    shard.write_bytes(b"damaged")
    assert_refused(run_hub(tmp_path, site), "query-000000.tar", "--overwrite")
    assert shard.read_bytes() == b"damaged"
    assert run_hub(tmp_path, site, "--overwrite").returncode == 0
    assert installed_shards(tmp_path) == in_icir(SHARDS)


def test_hub_files_stay_until_their_replacement_is_verified(site, tmp_path):
    """Whatever goes wrong on the way; and the next run goes on with what has come."""
    serve_hub(site, SHARDS)
    assert run_hub(tmp_path, site).returncode == 0
    old = installed_shards(tmp_path)
    names = ("webdataset/query/query-000000.tar", "annotations/query_files.csv")
    newer = {**SHARDS, **{name: b"newer " + SHARDS[name] for name in names}}
    serve_hub(site, newer, NEWER_COMMIT)
    page = site.pages[resolve(names[1], NEWER_COMMIT)]
    page.content = page.content[:-1] + b"?"
    result = run_hub(tmp_path, site, "--overwrite")
    assert result.returncode == 2
    assert f"data/icir/{names[1]}: the Hub sent wrong content" in result.stderr.splitlines()[-1]
    assert installed_shards(tmp_path) == old
    site.requests.clear()
    page.content = newer[names[1]]
    assert run_hub(tmp_path, site, "--overwrite").returncode == 0
    assert installed_shards(tmp_path) == in_icir(newer)
    fetched = [path for method, path, _ in site.requests if method == "GET" and "resolve" in path]
    assert fetched == [resolve(names[1], NEWER_COMMIT)]
    assert not (tmp_path / "data/icir/.cache/download").exists()


def test_hub_that_sends_wrong_content(site, tmp_path):
    serve_hub(site, SHARDS)
    name = "webdataset/query/query-000000.tar"
    page = site.pages[resolve(name)]
    page.content = page.content[:-1] + b"?"
    result = run_hub(tmp_path, site)
    assert result.returncode == 2
    assert f"data/icir/{name}: the Hub sent wrong content" in result.stderr.splitlines()[-1]
    left = installed_shards(tmp_path)
    assert f"data/icir/{name}" not in left
    assert not any("annotations" in path for path in left)  # so that it is not yet a data set


def test_hub_revision_that_moved_on(site, tmp_path):
    serve_hub(site, SHARDS)
    assert run_hub(tmp_path, site).returncode == 0
    newer = {**SHARDS, "annotations/query_files.csv": b"query/a/1.jpg,by day,a\n"}
    serve_hub(site, newer, NEWER_COMMIT)
    result = run_hub(tmp_path, site)
    assert_refused(result, "query_files.csv", f"--revision {COMMIT}", NEWER_COMMIT)
    assert run_hub(tmp_path, site, "--revision", COMMIT).returncode == 0
    assert installed_shards(tmp_path) == in_icir(SHARDS)
    assert run_hub(tmp_path, site, "--overwrite").returncode == 0
    assert installed_shards(tmp_path) == in_icir(newer)


def test_hub_revision_that_does_not_exist(site, tmp_path):
    serve_hub(site, SHARDS)
    result = run_hub(tmp_path, site, "--revision", "v9")
    assert_refused(result, f"{HUB} at revision v9", "404", "--revision")
    assert tree(tmp_path) == {}


def test_hub_file_name_that_leads_out(site, tmp_path):
    serve_hub(site, {**SHARDS, "../../outside.txt": b"x"})
    assert_refused(run_hub(tmp_path, site), "'../../outside.txt' leads out of the target folder")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("offline", [True, False])
def test_hub_out_of_reach(offline, site, tmp_path, closed_url):
    environment = {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": closed_url}
    cause = "HF_HUB_OFFLINE is set" if offline else "refused"
    result = run_hub(tmp_path, site, "--data_dir", "d", **environment)
    command = "python3 data/download.py icir --data_dir d"
    missing = "d/icir/annotations/query_files.csv is missing"
    assert_refused(result, missing, cause, command)
    assert site.requests == []
    assert tree(tmp_path) == {}


def test_hub_out_of_reach_with_an_installed_copy(site, tmp_path):
    serve_hub(site, SHARDS)
    assert run_hub(tmp_path, site).returncode == 0
    kept = run_hub(tmp_path, site, HF_HUB_OFFLINE="1")
    assert kept.returncode == 0, kept.stderr
    assert "kept, already right: data/icir" in kept.stdout
    assert "not reached" in kept.stdout
    other = run_hub(tmp_path, site, "--revision", "v2", HF_HUB_OFFLINE="1")
    assert_refused(other, f"holds revision main ({COMMIT})", "--revision main")
    (tmp_path / "data/icir/webdataset/query/query-000000.tar").unlink()
    gone = run_hub(tmp_path, site, HF_HUB_OFFLINE="1")
    missing = "data/icir/webdataset/query/query-000000.tar is missing"
    assert_refused(gone, missing, "HF_HUB_OFFLINE is set", "python3 data/download.py icir")
