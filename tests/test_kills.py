"""Commands killed at random end with the same bytes; tests/stress/kills.py does many more."""

from __future__ import annotations

from pathlib import Path

from kills import Subject, archive_pages, download, kill_and_continue, retrieval, slow_server


def check(subject: Subject, folder: Path, seeds: tuple[int, ...]) -> None:
    seconds = subject.run(folder / "whole")
    whole = subject.finished(folder / "whole")
    assert whole
    for seed in seeds:
        kill_and_continue(subject, folder / str(seed), whole, seconds, seed)


def test_retrieval(tmp_path):
    check(retrieval(tmp_path / "world"), tmp_path, (1,))


def test_download(tmp_path):
    with slow_server(archive_pages()) as url:
        check(download(tmp_path, url), tmp_path, (1,))
