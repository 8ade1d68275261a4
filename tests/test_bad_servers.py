"""Servers that answer oddly: the whole file, or one line."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from data import transfer
from utils import UserError

CONTENT = bytes(range(256)) * 8


class Stalled(bytes):
    """An answer behind which the connection stays open and silent."""


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[[list[bytes]], str]]:
    """A function that starts a server of these raw answers, the last one for ever."""
    monkeypatch.setattr(transfer, "RETRY_WAIT", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/file"

    stalled = []

    def answer(answers: list[bytes]) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connection.recv(65536)
            connection.sendall(answers[0].replace(b"ADDRESS", address.encode()))
            if isinstance(answers[0], Stalled):
                stalled.append(connection)
            else:
                connection.close()
            answers[:] = answers[1:] or answers

    def start(answers: list[bytes]) -> str:
        threading.Thread(target=answer, args=(answers,), daemon=True).start()
        return address

    yield start
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def reply(status: str, body: bytes = b"", *headers: str) -> bytes:
    return (
        "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode() + body
    )


WHOLE = reply("200 OK", CONTENT, f"Content-Length: {len(CONTENT)}")


def test_another_range_starts_again(serve, tmp_path):
    wrong = reply("206 Partial Content", CONTENT[5:], "Content-Range: bytes 5-2047/2048")
    (tmp_path / "file.part").write_bytes(CONTENT[:100])
    transfer.download(serve([wrong, WHOLE]), tmp_path / "file.part", "file")
    assert (tmp_path / "file.part").read_bytes() == CONTENT


def test_what_came_before_a_stall_is_kept(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    cut = Stalled(reply("200 OK", CONTENT[:700], f"Content-Length: {len(CONTENT)}"))
    rest = reply("206 Partial Content", CONTENT[700:], "Content-Range: bytes 700-2047/2048")
    transfer.download(serve([cut, rest]), tmp_path / "file.part", "file")
    assert (tmp_path / "file.part").read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["x", "-5", "1" * 400, "1.5", ""])
def test_a_length_that_is_no_number(serve, tmp_path, length):
    odd = reply("200 OK", CONTENT, f"Content-Length: {length}")
    transfer.download(serve([odd]), tmp_path / "file.part", "file")
    assert (tmp_path / "file.part").read_bytes() == CONTENT


@pytest.mark.parametrize(("asked", "waited"), [("7", 7), ("99999", 300), ("soon", 0)])
def test_retry_after_is_honoured(serve, tmp_path, monkeypatch, asked, waited):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    busy = reply("503 Busy", b"", f"Retry-After: {asked}")
    transfer.download(serve([busy, WHOLE]), tmp_path / "file.part", "file")
    assert waits == [waited]


@pytest.mark.parametrize(
    "answer",
    [
        reply("302 Found", b"", "Location: ADDRESS"),
        reply("302 Found", b"", "Location: file:///etc/passwd"),
        b"\0" * 500,
        b"garbage\r\n\r\n" * 50,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"",
    ],
)
def test_loops_and_garbage_end_in_one_line(serve, tmp_path, answer):
    with pytest.raises((transfer.Unreachable, UserError)) as caught:
        transfer.download(serve([answer]), tmp_path / "file.part", "file")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
