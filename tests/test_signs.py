"""Signs of life on a terminal: each slow step here waits until the terminal shows something new."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
from extraction_world import write_rows
from test_own_dataset import make_photos

import create_features
import run_retrieval
import search
from data import download, transfer
from utils import UserError
from utils_signs import CLEAR, doing, showing_signs

PATIENCE = 20  # seconds until a sign that does not come counts as missing


class Terminal:
    """The other end of a terminal that the test's own output goes to."""

    def __init__(self):
        self.end, self.own = pty.openpty()
        fcntl.ioctl(self.own, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))

    def read(self, words: str, write: str = "") -> str:
        """What is shown from now on, up to these words. write: a text to print first.

        Raises AssertionError if they do not come.
        """
        while self._waits(0):
            os.read(self.end, 1 << 16)
        print(write, end="")
        shown, deadline = "", time.monotonic() + PATIENCE
        while words not in shown:
            if not self._waits(deadline - time.monotonic()):
                raise AssertionError(f"no {words!r}, but {shown[-200:]!r}")
            shown += os.read(self.end, 1 << 16).decode()
        return shown

    @contextlib.contextmanager
    def show(self) -> Iterator[None]:
        """Let the process's own output go here, with signs that come fast."""
        with open(os.dup(self.own), "w") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            with showing_signs(0.01):
                yield
            print("the end")

    def _waits(self, seconds: float) -> bool:
        return bool(select.select([self.end], [], [], max(0, seconds))[0])


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    os.close(terminal.end)
    os.close(terminal.own)


def slow_down(monkeypatch, terminal: Terminal, steps: dict[str, str]) -> list[str]:
    """Let the first call of each function wait for the sign that says these words; those called."""
    called: list[str] = []
    for place, words in steps.items():
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        *inner, name = name.split(".")
        for part in inner:
            owner = getattr(owner, part)
        original = getattr(owner, name)

        def wait(*given, original=original, place=place, words=words, **options):
            if place not in called:
                called.append(place)
                terminal.read(words)
            return original(*given, **options)

        monkeypatch.setattr(owner, name, wait)
    return called


def test_a_sign_says_what_is_done_and_gives_way_to_what_is_written(terminal):
    with terminal.show():
        with doing("reading the annotation"):
            assert f"{CLEAR}reading the annotation (0 s)" in terminal.read("annotation (0 s)")
            assert f"{CLEAR}a line\r\n" in terminal.read("(0 s)", "a line\n")
        terminal.read("at work (0 s)")
        with doing("loading", at_once=True), doing(""), doing("more"):
            print("served")


def test_a_bar_that_stands_still_is_drawn_again(terminal):
    from tqdm import tqdm

    with terminal.show(), tqdm(total=3, desc="images", leave=False):
        terminal.read("images:   0%")
        terminal.read("images:   0%")


def test_no_terminal_no_sign(capfd):
    with showing_signs(0.0), doing("reading", at_once=True):
        assert not hasattr(sys.stderr, "signs")
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signs")
    make_photos(folder / "photos")
    write_rows(folder / "corpora/generic_subjects.csv", [("mug",)])
    return folder


def test_every_wait_of_the_commands(photos, small_clip, terminal, monkeypatch):
    """Reading, loading, encoding, writing; ranking, drawing, comparing."""
    monkeypatch.chdir(photos)
    backbone = f"local-dir:{small_clip}"
    always = ["--dataset", "photos", "--backbone", backbone, "--gpu", "-1"]
    steps = {
        "extraction.dataset:read_dataset": "reading photos (",
        "extraction.job:load_encoder": f"loading {backbone}"[:40],
        "extraction.labelled:is_finished": "looking at what there is (",
        "extraction.reading:read_pixels": "query_image:   0%",
        "extraction.labelled:write_arrays": "putting the parts together (",
        "extraction.reference:write_pickle": "writing the reference's files (",
        "utils_storage:load_features": "loading PyTorch and the features (",
        "utils_labels:find_changed": "reading features and annotation (",
        "utils_assets:load_assets": "reading assets (",
        "utils_storage:MappedRows.read": "0",  # the bar of galleries, or words before it
        "report.page:write_plots": "drawing the report (",
        "report.thumbnails:_make_thumbnail": "drawing the report (",
        "report.compare:read_values": "at work (",
    }
    called = slow_down(monkeypatch, terminal, steps)
    with terminal.show():
        create_features.main([*always, "--workers", "0", "--format", "pkl"])
        run_retrieval.main([*always, "--method", "all", "--report"])
        runs = sorted(path.parent for path in Path("results/photos").glob("*/APs.csv"))
        run_retrieval.main(["--compare", *map(str, runs[:2])])
    assert set(called) == set(steps)


def test_a_server_that_does_not_answer(tmp_path, terminal, monkeypatch):
    def unanswered(*_: object, **__: object):
        terminal.read("laion_1m_mean_clip.pkl: 0")
        raise URLError("no route")

    monkeypatch.setattr(transfer.urllib.request, "urlopen", unanswered)
    with terminal.show(), pytest.raises(UserError, match="no route"):
        download.main(["laion_mean", "--data-dir", str(tmp_path)])


def test_search_is_quiet_while_it_serves(photos, small_clip, terminal, monkeypatch):
    monkeypatch.chdir(photos)
    called = slow_down(monkeypatch, terminal, {"live.opening:index_photos": "at work ("})

    def serve(searcher, listening, host, ready):
        assert "" in sys.stderr.signs.words

    monkeypatch.setattr("live.server.serve", serve)
    with terminal.show():
        search.main(["photos", "--backbone", f"local-dir:{small_clip}", "--gpu", "-1", "--no-open"])
    assert called
