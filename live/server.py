"""The server of the page: one gallery, on this machine, for who has the address with its token.

GET  /  /page.css  /page.js  /scatter.js         the page
GET  /api/state  /api/gallery  /api/queries     what there is
POST /api/image                                 an image, its bytes as they are -> its key
GET  /api/rank  /export.csv                     a ranking; as CSV
POST /api/command                               the command that ranks the same
GET  /thumb/KEY  /image/KEY                     pictures, by row number and never by path

Tensors are one thread's: requests wait in its queue, and of one tab's the latest alone is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hmac
import io
import ipaddress
import os
import re
import secrets
import socket
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from live.answers import (
    A_PAGE,
    Hidden,
    describe_queries,
    describe_ranked,
    describe_rows,
    describe_state,
)
from live.pictures import MOST_BYTES, Given, check_size, picture_of
from live.saved import command_of, save_query
from live.searcher import Ranked, Searcher, Shown, table_of
from methods import find_method
from utils import UserError, say

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER = Path(__file__).parent
MOST_WORDS = 2000  # letters of a text
MOST_ROWS = 1000  # of a column of the page
TABS = 256  # whose latest request is remembered
KEY = re.compile(r"[gqu][0-9a-f-]{1,40}")
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
DENIED = "open the address that the terminal shows: it has a token\n"


class Refused(Exception):
    """A request that is answered by a status and a line."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status, self.words = status, words


# ---------------------------------------------------------------------------------------------
# Who may ask
# ---------------------------------------------------------------------------------------------


def keep_token(path: Path) -> str:
    """The token of a gallery's address, the same after a restart; none but the user reads it."""
    try:
        if not stat.S_IMODE(path.stat().st_mode) & 0o077:
            token = path.read_text(encoding="ascii").strip()
            if re.fullmatch(r"[\w-]{43}", token):
                return token
    except (OSError, UnicodeDecodeError):
        pass
    token = secrets.token_urlsafe(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(token)
    return token


@dataclass(frozen=True)
class Guard:
    """Lets requests through that come from the page itself. names: of this machine, lower case.

    A Host that is another name is DNS rebinding; an Origin, or what the browser says of the site
    that asks, is not to be foreign; and the token is to be there, as a cookie, or in the address of
    the page, which then sets the cookie.
    """

    app: ASGIApp
    token: str
    port: int
    names: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = self._refuse(scope)
        guarded = partial(_send_safely, send)
        await (answer or self.app)(scope, receive, guarded)

    def _refuse(self, scope: Scope) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._is_ours(host):
            return PlainTextResponse("this is another machine's address\n", 421)
        asked = QueryParams(scope["query_string"]).get("token") if path == "/" else None
        if headers.get("origin") not in (None, f"http://{host}"):
            return PlainTextResponse("another site's page asks this\n", 403)
        if asked is not None and self._is_token(asked):
            return self._welcome()
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return PlainTextResponse("another site's page asks this\n", 403)
        if not self._is_token(_cookie(headers, self._cookie)):
            return PlainTextResponse(DENIED, 403)
        return None

    @property
    def _cookie(self) -> str:
        return f"live_{self.port}"

    def _is_ours(self, host: str) -> bool:
        name, _, port = host.rpartition(":") if self.port != 80 else (host, "", "80")
        if port != str(self.port):
            return False
        if name.lower() in self.names:
            return True
        try:  # no name at all can be rebound; what address it is, who connects knows
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return "" in self.names

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    def _welcome(self) -> Response:
        """Back to the page without the token, which its address then no longer shows."""
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            self._cookie, self.token, httponly=True, samesite="strict", max_age=31536000
        )
        return answer


def _cookie(headers: Headers, name: str) -> str:
    for part in headers.get("cookie", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""


async def _send_safely(send: Send, message: Message) -> None:
    """Send an answer with the headers that keep a page to itself."""
    if message["type"] == "http.response.start":
        own = {name.lower() for name, _ in message["headers"]}
        more = {"Cache-Control": "no-store", **SAFE}
        extra = [(n.lower().encode(), v.encode()) for n, v in more.items()]
        message["headers"] = [*message["headers"], *(h for h in extra if h[0] not in own)]
    await send(message)


# ---------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A ranking that is asked for: the keys of the address."""

    image: str
    text: str
    method: str
    given: dict[str, str]
    k: int
    leave_out: bool

    @classmethod
    def of(cls, query: QueryParams, most: int) -> Asked:
        """Raises UserError for what cannot be asked."""
        image, text = query.get("image", ""), query.get("text", "").strip()
        if image and not KEY.fullmatch(image):
            raise UserError("that is no image's key; choose an image")
        if not (image or text):
            raise UserError("choose an image, or write a text")
        if len(text) > MOST_WORDS:
            raise UserError(f"the text is longer than {MOST_WORDS} letters; shorten it")
        given = {n.removeprefix("p."): v for n, v in query.items() if n.startswith("p.")}
        k = whole_number(query, "k", A_PAGE, 1, most)
        leave_out = query.get("out") == "1"
        return cls(image, text, query.get("method", "sum"), given, k, leave_out)


def whole_number(query: QueryParams, name: str, default: int, low: int, high: int) -> int:
    """A number of the address. Raises UserError if it is none, or not from low to high."""
    text = query.get(name, str(min(default, high)))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(f"{name} is a whole number from {low} to {high}, not {text[:40]!r}")
    return int(text)


@dataclass(eq=False)
class Desk:
    """The searcher with its one thread, the pictures with theirs, and what visitors brought."""

    searcher: Searcher
    given: Given
    say: Callable[[str], None]
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    painters: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    _latest: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def __post_init__(self):
        self.hide = Hidden(self.searcher)
        self.failed = ""

    def warm(self) -> None:
        """Load the backbone; why it cannot be is said where it is needed."""
        try:
            _ = self.searcher.encoder
        except UserError as error:
            self.failed = str(error)
            self.say(f"error: {error}")

    async def compute(self, work: Callable, *args: Any) -> Any:
        """work(*args) in the thread of the tensors."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, work, *args)

    async def paint(self, work: Callable, *args: Any) -> Any:
        """work(*args) in a thread of pictures."""
        return await asyncio.get_running_loop().run_in_executor(self.painters, work, *args)

    def note(self, query: QueryParams) -> Callable[[], None]:
        """What raises Refused once the same tab has asked for something else."""
        tab, number = query.get("tab", "")[:40], whole_number(query, "n", 0, 0, 999_999_999)
        if not tab:
            return lambda: None
        self._latest[tab] = max(number, self._latest.pop(tab, 0))
        while len(self._latest) > TABS:
            self._latest.popitem(last=False)

        def check() -> None:
            if self._latest.get(tab, number) > number:
                raise Refused(409, "a later question has come")

        return check

    def find(self, key: str) -> Shown | None:
        """The image of a key, encoded again where it was brought before a restart."""
        if not key:
            return None
        try:
            return self.searcher.find(key)
        except UserError:
            if key[0] != "u":
                raise
            return self.searcher.give(self.given.read(key[1:]))

    def rank(self, asked: Asked, check: Callable[[], None] = lambda: None) -> Ranked:
        """A ranking, unless it has been superseded."""
        check()
        method = find_method(asked.method)
        given = self.searcher.choices.parse(method, asked.given)
        image = self.find(asked.image)
        return self.searcher.rank(image, asked.text, asked.method, given, asked.k, asked.leave_out)

    def bring(self, data: bytes) -> dict:
        """Take an image that a visitor brings."""
        check_size(data)
        shown = self.searcher.give(data)
        self.given.keep(shown.key[1:], data)
        return {"key": shown.key}

    def command(self, asked: Asked) -> dict:
        """Save a query for run_retrieval.py, and give the command; the whole one goes to `say`."""
        ranked = self.rank(asked)
        if ranked.run is None:
            raise UserError("run_retrieval.py needs an image and a text: add the other")
        image = self.find(asked.image)
        name = save_query(self.searcher, ranked.run, image, asked.text)
        command = command_of(self.searcher, ranked.run, name, image, asked.k, asked.leave_out)
        self.say(f"reproduce: {command}")
        return {"command": self.hide(command), "hidden": self.hide(command) != command}


def write_table(searcher: Searcher, ranked: Ranked) -> bytes:
    """A ranking as CSV."""
    table, file = table_of(searcher, ranked), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.itertuples(index=False, name=None))
    return file.getvalue().encode()


# ---------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------


def make_app(desk: Desk, token: str, port: int, names: frozenset[str]) -> Guard:
    """The application. names: what this machine may be called; "" admits any IP address."""
    searcher = desk.searcher

    async def state(request: Request) -> Response:
        found = await desk.compute(describe_state, searcher, desk.hide)
        return JSONResponse(found | {"failed": desk.hide(desk.failed), "mostBytes": MOST_BYTES})

    async def gallery(request: Request) -> Response:
        shown = searcher.shown
        first = whole_number(request.query_params, "from", 0, 0, max(0, len(shown) - 1))
        rows = shown[first : first + A_PAGE].tolist()
        return JSONResponse({"from": first, "rows": describe_rows(searcher, rows)})

    async def queries(request: Request) -> Response:
        first = whole_number(request.query_params, "from", 0, 0, 10**8)
        find = request.query_params.get("find", "")[:200]
        return JSONResponse(await desk.compute(describe_queries, searcher, find, first))

    async def rank(request: Request) -> Response:
        check = desk.note(request.query_params)
        asked = Asked.of(request.query_params, MOST_ROWS)

        def work() -> dict:
            return describe_ranked(searcher, desk.rank(asked, check))

        return JSONResponse(await desk.compute(work))

    async def export(request: Request) -> Response:
        asked = Asked.of(request.query_params, len(searcher))
        content = await desk.compute(lambda: write_table(searcher, desk.rank(asked)))
        headers = {"Content-Disposition": 'attachment; filename="ranking.csv"'}
        return Response(content, media_type="text/csv; charset=utf-8", headers=headers)

    async def command(request: Request) -> Response:
        asked = Asked.of(request.query_params, MOST_ROWS)
        return JSONResponse(await desk.compute(desk.command, asked))

    async def bring(request: Request) -> Response:
        return JSONResponse(await desk.compute(desk.bring, await read_body(request)))

    async def picture(request: Request, size: str) -> Response:
        key = request.path_params["key"]
        if not KEY.fullmatch(key):
            raise Refused(404, "there is no such picture")
        try:
            content = await desk.paint(picture_of, searcher, desk.given, key, size)
        except Exception as error:  # a decoder's own; the image is at fault
            raise Refused(404, f"no picture: {type(error).__name__}") from error
        cached = FOREVER if "v" in request.query_params or key[0] == "u" else {}
        return Response(content, media_type="image/webp", headers=cached)

    def file(name: str, kind: str) -> Route:
        content = (FOLDER / name).read_bytes()

        async def answer(request: Request) -> Response:
            return Response(content, media_type=kind)

        return Route("/" if name.endswith("html") else f"/{name}", answer)

    routes = [
        file("page.html", "text/html"),
        file("page.css", "text/css"),
        file("page.js", "text/javascript"),
        file("scatter.js", "text/javascript"),
        Route("/api/state", state),
        Route("/api/gallery", gallery),
        Route("/api/queries", queries),
        Route("/api/rank", rank),
        Route("/api/image", bring, methods=["POST"]),
        Route("/api/command", command, methods=["POST"]),
        Route("/export.csv", export),
        *(Route(f"/{size}/{{key}}", partial(picture, size=size)) for size in ("thumb", "image")),
    ]
    handlers = {UserError: partial(_explain, desk.hide), Refused: _refuse}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, port, names)


async def read_body(request: Request) -> bytes:
    """The bytes of a request. Raises Refused for more than MOST_BYTES, without reading on."""
    too_large = f"an image may have {MOST_BYTES >> 20} MB; make it smaller"
    if int(request.headers.get("content-length", "0")) > MOST_BYTES:
        raise Refused(413, too_large)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise Refused(413, too_large)
            parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "the image has not come whole") from None
    return b"".join(parts)


async def _explain(hide: Hidden, request: Request, error: Exception) -> Response:
    return JSONResponse({"error": hide(str(error))}, 400)


async def _refuse(request: Request, error: Refused) -> Response:
    return JSONResponse({"error": error.words}, error.status)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; who connects waits until it is served. Raises UserError if none can.

    port: 0 for any that is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; name another") from None
    return listening


def serve(
    searcher: Searcher,
    listening: socket.socket,
    host: str,
    ready: Callable[[str], None],
    say: Callable[[str], None] = say,
) -> None:
    """Serve the page until Ctrl-C. host: as listen had it. ready: told the page's address."""
    import uvicorn

    folder = searcher.features.folder / ".live"
    port = listening.getsockname()[1]
    everywhere = host in ("0.0.0.0", "::")
    names = {"localhost", "127.0.0.1", "[::1]", host.lower()}
    names |= {socket.gethostname().lower(), ""} if everywhere else set()
    desk, token = Desk(searcher, Given(folder / "given"), say), keep_token(folder / "token")
    threading.Thread(target=desk.warm, daemon=True).start()
    shown = "127.0.0.1" if everywhere else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/?token={token}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(address)  # not before Ctrl-C is the server's to handle

    app = make_app(desk, token, port, frozenset(names))
    settings = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=2,
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):  # how it is ended
            Server(settings).run(sockets=[listening])
    finally:
        desk.worker.shutdown(wait=False, cancel_futures=True)
        desk.painters.shutdown(wait=False, cancel_futures=True)
        sys.stdout.flush()
