"""Commands killed at random moments and started again: what they leave, and what they end with.

A subject is a command and what it makes. Whenever it is killed, what claims to be finished is
what a run makes that nobody disturbed; and the last run, not killed, ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from captioners import save_blip
from extraction_world import (
    NATIVE,
    ROOT,
    arguments,
    environment,
    make_rows,
    make_world,
    native_bytes,
)
from native import write_native_world

Files = dict[str, bytes]


@dataclass(frozen=True)
class Subject:
    """command: its words, OUT being the folder it writes to; finished: what it claims to have made,
    None if it does not; kept: names of the files that may lie there in the end, as a pattern."""

    folder: Path
    command: list[str]
    finished: Callable[[Path], Files | None]
    kept: str

    def start(self, out: Path) -> subprocess.Popen:
        command = [word.replace("OUT", str(out)) for word in self.command]
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=environment(no_proxy="*"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, out: Path) -> float:
        """Run it to its end; the seconds it took."""
        began = time.monotonic()
        process = self.start(out)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return time.monotonic() - began


def kill_and_continue(subject: Subject, out: Path, whole: Files, seconds: float, seed: int) -> int:
    """Kill a subject one to four times, then let it end; how often it was killed at work."""
    rng, killed = random.Random(seed), 0
    for _ in range(rng.randint(1, 4)):
        process = subject.start(out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.2, 1.1) * seconds)
        killed += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate()
        claimed = subject.finished(out)
        assert claimed is None or claimed == whole, f"seed {seed}: claims to be finished"
    subject.run(out)
    assert subject.finished(out) == whole, f"seed {seed}: other bytes"
    names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    left = [name for name in names if not re.fullmatch(subject.kept, name)]
    assert not left, f"seed {seed}: left behind {left}"
    return killed


# ---------------------------------------------------------------------------------------------
# Subjects
# ---------------------------------------------------------------------------------------------


def extraction(folder: Path, clip: Path, source: str, ranks: int = 1) -> Subject:
    """create_features.py on a small data set, from files or shards, as so many ranks."""
    if not (folder / "data").exists():
        make_world(folder)
    flags = ("--icir_source", source, "--part_rows", "8", "--workers", "2")
    command = arguments(clip, *flags, "--features_dir", "OUT")
    if ranks > 1:
        command = [str(ROOT / "tests/rank_processes.py"), str(ranks), *command]

    def finished(out: Path) -> Files | None:
        found = list(out.glob("*/shop/manifest.json"))
        return native_bytes(found[0].parent) if found else None

    return Subject(folder, command, finished, rf"[^/]+/shop/({'|'.join(map(re.escape, NATIVE))})")


def retrieval(folder: Path) -> Subject:
    """run_retrieval.py with a table of rankings."""
    write_native_world(folder)
    command = [str(ROOT / "run_retrieval.py"), "--features_dir", "features", "--backbone", "clip"]
    command += ["--gpu", "-1", "--method", "sum", "--top_k", "40", "--results_dir", "OUT"]

    def finished(out: Path) -> Files | None:
        run = out / "icir/sum"
        if not (run / "mAP_table.csv").exists():
            return None
        rows = list(csv.DictReader((run / "mAP_table.csv").read_text().splitlines()))
        figures = [{row[name] for row in rows} for name in ("mAP", "mmAP", "minmAP", "queries")]
        files = {name: (run / name).read_bytes() for name in ("APs.csv", "APs.json", "top40.csv")}
        return files | {"figures": repr(figures).encode()}

    return Subject(folder, command, finished, r"icir/sum/(mAP_table|APs|top40)\.(csv|json)")


def captions(folder: Path) -> Subject:
    """create_captions.py with a small model of random weights."""
    if not (folder / "data").exists():
        make_world(folder)
    model = save_blip(folder / "blip")
    command = [str(ROOT / "create_captions.py"), "--dataset", "data/shop", "--gallery", "--gpu"]
    command += ["-1", "--captioner", str(model), "--out", "OUT", "--max_new_tokens", "6"]

    def finished(out: Path) -> Files | None:
        manifest = out / "images.json"
        if not manifest.exists() or not json.loads(manifest.read_text())["finished"]:
            return None
        return {"images.jsonl": (out / "images.jsonl").read_bytes()}

    return Subject(folder, [*command, "--batch", "4"], finished, r"images\.jsonl?")


def make_archive() -> bytes:
    """i-CIR's folder layout, in small, of bytes that do not compress."""
    file, rng = io.BytesIO(), random.Random(0)
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        files = {f"icir/query/{n}.jpg": rng.randbytes(60_000) for n in range(40)}
        rows = "".join(f"{path},{text},{label}\n" for path, text, label in make_rows()["query"])
        files |= {f"icir/{split}_files.csv": rows.encode() for split in ("query", "database")}
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@contextlib.contextmanager
def slow_server(pages: dict[str, bytes]) -> Iterator[str]:
    """Serves pages, and ranges of them, in small pieces; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            if page is None:
                return self.send_error(404)
            start = int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(page) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(page) - 1}/{len(page)}")
            self.end_headers()
            with contextlib.suppress(OSError):
                for first in range(start, len(page), 1 << 15):
                    self.wfile.write(page[first : first + (1 << 15)])
                    time.sleep(0.01)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def download(folder: Path, url: str) -> Subject:
    """data/download.py with the archive of a slow server."""
    command = [str(ROOT / "data/download.py"), "icir", "--source", "tar"]
    command += ["--archive_url", f"{url}/icir.tar.gz", "--data_dir", "OUT"]

    def finished(out: Path) -> Files | None:
        root = out / "icir"
        if not (root / "download_tar.json").exists():
            return None
        names = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in names}

    return Subject(folder, command, finished, r"icir/(download_tar\.json|\w+_files\.csv|query/.*)")


def archive_pages() -> dict[str, bytes]:
    data = make_archive()
    digest = f"{hashlib.sha256(data).hexdigest()}  icir.tar.gz\n"
    return {"/icir.tar.gz": data, "/icir.tar.gz.sha256": digest.encode()}
