"""A local server that speaks OpenAI's chat protocol, well or badly, as a test tells it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reply(text: str | None, finish: str = "stop", status: int = 200) -> dict:
    """A well-formed answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    content = {"id": "1", "object": "chat.completion", "created": 0, "choices": [choice]}
    return {"status": status, "body": json.dumps(content | {"model": "m"})}


class ChatServer:
    """answer(question, number): what the number-th request gets: status, body, headers, cut.

    cut: so many bytes of the body are sent, although its whole length was promised. asked: the
    requests so far, {"path", "key", **body}.
    """

    def __init__(self, answer: Callable[[str, int], dict]):
        self.answer, self.asked, self.lock = answer, [], threading.Lock()
        handler = type("Handler", (_Handler,), {"chat": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.chat.lock:
            number = len(self.chat.asked)
            key = self.headers.get("Authorization")
            self.chat.asked.append({"path": self.path, "key": key, **body})
        answer = self.chat.answer(body["messages"][0]["content"], number)
        if answer.get("status") is None:  # nothing at all
            self.close_connection = True
            return
        data = answer["body"].encode()
        self.send_response(answer["status"])
        for name, value in answer.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: answer.get("cut", len(data))])
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(answer: Callable[[str, int], dict]) -> Iterator[ChatServer]:
    """A server in a thread of its own."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
