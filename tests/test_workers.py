"""Worker processes: little shared memory, and workers that die, stop or are stuck."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from extraction_world import environment

from extraction.job import in_plain_words
from extraction.parts import Unit
from extraction.reading import Chunk, load_chunks
from utils import UserError


def has_namespaces() -> bool:
    """Whether this user may mount a file system of its own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


READ = """
import sys
SIDE = int(sys.argv[2])
sys.path.insert(0, sys.argv[1])
import torch
from extraction.parts import Unit
from extraction.reading import Chunk, load_chunks

class Large:
    def __len__(self):
        return 12
    def __getitem__(self, number):
        images = [torch.full((3, SIDE, SIDE), number, dtype=torch.uint8)] * 32
        return Chunk(Unit(str(number)), ids=[number], images=images).close()

chunks = list(load_chunks(Large(), 8, 100.0))
assert [int(torch.as_tensor(chunk.images).max()) for chunk in chunks] == list(range(12))
print(len(chunks), {type(chunk.images).__name__ for chunk in chunks})
"""


@pytest.mark.skipif(not has_namespaces(), reason="no namespaces here")
@pytest.mark.parametrize(("size", "side"), [("64m", 640), ("200k", 64), ("16k", 64)])
def test_little_shared_memory(size, side):
    """Images that find no room go another way, and workers that find none are not started."""
    root = Path(__file__).resolve().parent.parent
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            mount,
            "sh",
            sys.executable,
            "-c",
            READ,
            str(root),
            str(side),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 ")
    assert ("ndarray" in done.stdout) == (size != "16k")
    said = "no shared memory for --workers 8: 0 read the images"
    assert (said in done.stderr) == (size == "16k")
    assert "Traceback" not in done.stderr


class Failing:
    """Chunks of which the fourth does something else."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> Chunk:
        if number == 3:
            self.fail()
        return Chunk(Unit(str(number)), ids=[0], images=[torch.zeros(3, 8, 8)]).close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(0)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(1000)


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (die, "a worker process died"),
        (leave, "a worker process died"),
        (stop, r"no image for 2 s.*--worker_timeout"),
        (hang, r"no image for 2 s.*--worker_timeout"),
    ],
)
def test_a_failing_worker_ends_the_run_with_one_line(fail, words):
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as caught, in_plain_words():
        list(load_chunks(Failing(fail), 3, 2.0 if fail in (stop, hang) else 100.0))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 60
    assert not multiprocessing.active_children()


def test_chunks_come_as_arrays_where_shared_memory_is_full(monkeypatch):
    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    chunks = list(load_chunks(Failing(int), 2, 100.0))
    assert [type(chunk.images).__name__ for chunk in chunks] == ["ndarray"] * 20
