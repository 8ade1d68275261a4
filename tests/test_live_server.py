"""The server of live search: who may ask, what is refused, what an answer may hold."""

import contextlib
import csv
import http.client
import io
import json
import random
import re
import socket
import stat
import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from extraction_world import draw_image, encode_jpeg
from live_world import (
    BROKEN,
    HOSTILE,
    PHOTOS,
    Server,
    World,
    add_dataset,
    add_pictures,
    make_world,
    serving,
)
from PIL import Image

pytest.importorskip("starlette", reason="starlette is not installed: no live search")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: no live search")

SECRET = "secret of this machine"


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_clip) -> World:
    world = make_world(tmp_path_factory.mktemp("live"), small_clip)
    (world.folder / "secret.txt").write_text(SECRET)
    encode = Image.new("RGB", (8, 8), "red")
    encode.save(world.folder / "outside.jpg")
    return world


@pytest.fixture(scope="module")
def server(world):
    with serving(world.folder, "photos", *world.flags()) as server:
        yield server


@pytest.fixture(scope="module")
def given(server) -> str:
    """The key of an image that was brought."""
    return server.json("/api/image", "POST", encode_jpeg(draw_image(50)))["key"]


def rank(server: Server, **query: str) -> dict:
    return server.json(f"/api/rank?{urlencode(query)}")


def refusal(server: Server, path: str, method: str = "GET", body: bytes | None = None) -> str:
    status, _, content = server.ask(path, method, body)
    assert 400 <= status < 500, (status, content)
    return json.loads(content)["error"]


# --- who may ask -------------------------------------------------------------------------------


def test_the_address_lets_in_and_is_forgotten(server):
    status, headers, _ = server.ask(f"/?token={server.token}", Cookie="")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert server.token in cookie
    assert "httponly" in cookie.lower()
    assert "samesite=strict" in cookie.lower()
    assert server.ask("/")[0] == 200


PATHS = ("/", "/page.js", "/api/state", "/api/rank?text=x", "/thumb/g0", "/export.csv?text=x")


@pytest.mark.parametrize("path", PATHS)
def test_nobody_else_is_let_in(server, path):
    port = server.port
    assert server.ask(path)[0] == 200
    for headers, status in (
        ({"Cookie": ""}, 403),
        ({"Cookie": f"live_{port}=wrong"}, 403),
        ({"Cookie": f"live_{port}=\xe9"}, 403),
        ({"Host": f"evil.example:{port}"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Host": f"127.0.0.1.evil.example:{port}"}, 421),
        ({"Host": f"10.0.0.1:{port}"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://localhost:{port + 1}"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ):
        found, _, content = server.ask(path, **headers)
        assert found == status, headers
        assert b"<" not in content
    assert server.ask(path, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert server.ask(path, Host=f"localhost:{port}")[0] == 200


def test_a_wrong_token_does_not_let_in(server):
    for token in ("", "x", server.token[:-1], quote("\u0661")):
        assert server.ask(f"/?token={token}", Cookie="")[0] == 403
    assert server.ask(f"/api/state?token={server.token}", Cookie="")[0] == 403


def test_every_answer_keeps_the_page_to_itself(server):
    for path in (*PATHS, "/absent", "/thumb/g999999", "/api/rank"):
        _, headers, _ = server.ask(path)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_the_token_is_readable_by_the_user_alone(server, world):
    [path] = world.folder.glob("features/*/*/.live/token")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == server.token


def test_it_listens_at_this_machine_alone(server):
    addresses = {row[4][0] for row in socket.getaddrinfo(socket.gethostname(), None)}
    for address in addresses - {"127.0.0.1", "::1"}:
        if not address.startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, server.port), timeout=2)


# --- answers -----------------------------------------------------------------------------------


def test_the_state_names_methods_and_what_was_left_out(server):
    state = server.json("/api/state")
    assert state["count"] == PHOTOS
    assert state["skipped"] == [{"name": BROKEN, "cause": state["skipped"][0]["cause"]}]
    assert "not an image" in state["skipped"][0]["cause"]
    methods = {method["name"]: method for method in state["methods"]}
    assert methods["basic"]["lacking"] is None
    assert "query_searle.npy" in methods["searle"]["lacking"]
    names = {parameter["name"] for parameter in methods["basic"]["parameters"]}
    assert {"harris_lambda", "aa", "do_query_expansion", "contextualize"} <= names


def test_a_ranking_has_three_columns_with_the_ranks_of_each_other(server, given):
    found = rank(server, image=given, text="at night", method="sum")
    columns = found["columns"]
    assert {name: len(rows) for name, rows in columns.items()} == dict.fromkeys(
        ("composed", "image", "text"), PHOTOS
    )
    order = {n: {r["row"]: at for at, r in enumerate(rows, 1)} for n, rows in columns.items()}
    for name, rows in columns.items():
        assert [row["score"] for row in rows] == sorted((r["score"] for r in rows), reverse=True)
        for row in rows:
            for other, at in row["ranks"].items():
                assert order[other][row["row"]] == at
        assert {other for row in rows for other in row["ranks"]} == set(columns) - {name}
    assert len(found["scatter"]["image"]) == PHOTOS
    assert len(found["scatter"]["level"]["scores"]) == 1600
    assert [*rank(server, text="at night")["columns"]] == ["text"]
    assert [*rank(server, image="g3")["columns"]] == ["image"]
    top = rank(server, image="g3")["columns"]["image"][0]
    assert (top["row"], top["score"]) == (3, pytest.approx(1, abs=1e-4))
    left = rank(server, image="g3", out="1")["columns"]["image"]
    assert 3 not in [row["row"] for row in left]
    assert len(left) == PHOTOS - 1


def test_parameters_change_the_ranking(server, given):
    low, high = (
        rank(server, image=given, text="x", method="sum", **{"p.fusion_weight": weight})
        for weight in ("0", "1")
    )
    for found, name in ((low, "image"), (high, "text")):
        rows = [row["row"] for row in found["columns"]["composed"]]
        assert rows == [row["row"] for row in found["columns"][name]]


def test_the_export_is_the_ranking(server, given):
    query = urlencode({"image": given, "text": "at night", "method": "basic", "k": 7})
    status, headers, content = server.ask(f"/export.csv?{query}")
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="ranking.csv"'
    table = list(csv.DictReader(io.StringIO(content.decode())))
    rows = server.json(f"/api/rank?{query}")["columns"]["composed"]
    assert [row["path"] for row in table] == [row["name"] for row in rows]
    assert [float(row["score"]) for row in table] == pytest.approx([r["score"] for r in rows])


def test_pictures_are_small_and_of_the_gallery(server, given):
    for key in ("g0", f"g{PHOTOS - 1}", given):
        for size, side in (("thumb", 256), ("image", 1600)):
            status, headers, content = server.ask(f"/{size}/{key}?v=1")
            assert (status, headers["content-type"]) == (200, "image/webp")
            assert "immutable" in headers["cache-control"]
            assert max(Image.open(io.BytesIO(content)).size) <= side


def test_a_turned_photograph_is_shown_as_it_is_encoded(server):
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6  # to be turned right
    Image.new("RGB", (300, 200), "red").save(file, "JPEG", exif=exif)
    key = server.json("/api/image", "POST", file.getvalue())["key"]
    sizes = [
        Image.open(io.BytesIO(server.ask(f"/{size}/{key}")[2])).size for size in ("thumb", "image")
    ]
    assert sizes == [(171, 256), (200, 300)]


def test_the_command_is_shown_without_the_places_of_this_machine(server, world, given):
    query = urlencode({"image": given, "text": "at night", "method": "sum"})
    found = server.json(f"/api/command?{query}", "POST")
    assert "--features_dir FEATURES_DIR" in found["command"]
    assert found["hidden"]
    deadline = time.monotonic() + 10
    while not any("reproduce: " in line for line in server.said):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert str(world.folder) in "".join(server.said)
    assert refusal(server, "/api/command?text=x", "POST").startswith("run_retrieval.py needs")


# --- what is refused ---------------------------------------------------------------------------


def test_uploads_are_bounded_in_bytes_and_pixels(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", "/api/image")
    connection.putheader("Cookie", server.cookie)
    connection.putheader("Content-Length", str(200 << 20))
    connection.endheaders()
    connection.send(b"\xff" * 65536)  # 200 MB need not come
    reply = connection.getresponse()
    assert reply.status == 413
    assert "40 MB" in json.loads(reply.read())["error"]
    connection.close()
    large = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(large, "PNG")
    assert "more than 100,000,000 pixels" in refusal(server, "/api/image", "POST", large.getvalue())
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    assert "pixels" in refusal(server, "/api/image", "POST", bomb.getvalue())


def test_an_upload_without_a_length_is_bounded_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", "/api/image")
    connection.putheader("Cookie", server.cookie)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with contextlib.suppress(OSError):  # it may close before all has come
        for _ in range(44):
            connection.send(piece)
        connection.send(b"0\r\n\r\n")
    with contextlib.suppress(OSError):
        assert connection.getresponse().status == 413
    connection.close()
    assert server.ask("/api/state")[0] == 200


@pytest.mark.parametrize("body", [b"", b"no image", b"<svg onload=alert(1)>", b"%!PS\n", b"GIF89a"])
def test_what_is_no_image_is_named(server, body):
    assert "cannot be read" in refusal(server, "/api/image", "POST", body)


OUTSIDE = (
    "/thumb/../secret.txt",
    "/thumb/%2e%2e%2fsecret.txt",
    "/thumb/..%2f..%2f..%2fetc%2fpasswd",
    "/image/g0/../../secret.txt",
    "/image//etc/passwd",
    "/thumb/u..%2ftoken",
    "/thumb/u0000000000000000",
    "/thumb/g-1",
    "/thumb/g99999999999999999999",
    "/thumb/q0",
    "/../secret.txt",
    "/page.py",
    "/server.py",
    "/.live/token",
    "//etc/passwd",
    "/static/../../secret.txt",
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_but_the_gallery_can_be_read(server, path):
    status, _, content = server.ask(path)
    assert status in (404, 400, 405), content
    assert SECRET.encode() not in content
    assert server.token.encode() not in content


@pytest.mark.parametrize("corpus", ["../../secret", "/etc/passwd", "generic_subjects/../x", ""])
def test_a_corpus_is_one_of_those_there_are(server, given, corpus):
    query = {"image": given, "text": "x", "method": "basic", "p.specified_corpus": corpus}
    assert "is none of" in refusal(server, f"/api/rank?{urlencode(query)}")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "choose an image, or write a text"),
        ({"text": "x" * 2001}, "longer than 2000"),
        ({"text": "x", "image": "g0", "method": "magic"}, "no method 'magic'"),
        ({"text": "x", "image": "g0", "p.x": "1"}, "no parameter 'x'"),
        ({"text": "x", "image": "g0", "p.fusion_weight": "2"}, "between 0 and 1"),
        ({"text": "x", "image": "g0", "p.fusion_weight": "nan"}, "is not finite"),
        ({"text": "x", "image": "g0", "p.fusion_weight": "1e999"}, "is not finite"),
        ({"text": "x", "image": "g0", "p.fusion_weight": "one"}, "is no number"),
        ({"text": "x", "image": "g0", "p.contextualize": "1"}, "true or false"),
        ({"text": "x", "k": "0"}, "whole number"),
        ({"text": "x", "k": "9" * 400}, "whole number"),
        ({"text": "x", "image": "g0", "method": "searle"}, "made for"),
        ({"image": "/etc/passwd"}, "no image's key"),
    ],
)
def test_a_wrong_question_is_answered_in_a_line(server, query, words):
    assert words in refusal(server, f"/api/rank?{urlencode(query)}")


def test_answers_name_no_place_of_this_machine(server, world, given):
    place, home = str(world.folder), str(Path.home())
    for path in (
        *PATHS,
        "/api/gallery",
        "/api/queries",
        f"/api/rank?image={given}&text=x&method=searle",
        f"/api/rank?image={given}&text=x&method=freedom&p.kappa=9999",
        "/api/rank?image=u0000000000000000",
        "/image/g0",
    ):
        _, headers, content = server.ask(path)
        for text in (content, repr(headers).encode()):
            assert place.encode() not in text, path
            assert home.encode() + b"/" not in text, path
            assert b"Traceback" not in text


# --- two at once, again and again --------------------------------------------------------------


def test_a_later_question_of_a_tab_replaces_an_earlier_one(server, given):
    """Those that wait are answered 409; another tab's are not touched."""

    def ask(tab: str, number: int) -> int:
        query = {"image": given, "text": f"words {number}", "method": "basic", "n": number}
        return server.ask(f"/api/rank?{urlencode(query | {'tab': tab})}")[0]

    with ThreadPoolExecutor(12) as pool:
        one = [pool.submit(ask, "one", n) for n in range(1, 9)]
        two = pool.submit(ask, "two", 1)
        statuses = [future.result() for future in one]
        assert two.result() == 200
    assert set(statuses) <= {200, 409}
    assert 200 in statuses
    assert ask("one", 3) == 409
    assert ask("one", 9) == 200


def random_text(draw: random.Random, length: int) -> str:
    kinds = (string.printable, "../\\%00", "\u0000\u202e\uffff\U0001f600", "<>&\"'`{}")
    return "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(length)))


def test_random_requests_are_answered_and_nothing_breaks(server, given):
    draw = random.Random(20)
    names = ("image", "text", "method", "k", "out", "tab", "n", "from", "find", "v", "p.aa", "p.")
    roots = ("/api/rank", "/api/gallery", "/api/queries", "/export.csv", "/thumb/", "/image/", "/")
    methods = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW")
    values = (given, "g0", "g29", "sum", "basic", "image", "5", "-1", "1e9", "")
    bodies = (None, b"", b"\x00" * 1000, encode_jpeg(draw_image(1))[:200])
    for _ in range(1000):
        query = {}
        for name in draw.sample(names, draw.randrange(6)):
            query[name] = draw.choice((draw.choice(values), random_text(draw, 40)))
        path = draw.choice(roots) + quote(random_text(draw, 12), safe="") * draw.randrange(2)
        encoded = (
            urlencode(query, errors="replace")
            if draw.random() < 0.8
            else quote(random_text(draw, 60), safe="&=%")
        )
        status, _, content = server.ask(
            f"{path}?{encoded}", draw.choice(methods), draw.choice(bodies)
        )
        assert status < 500, (path, encoded, content)
        assert SECRET.encode() not in content
    assert server.ask("/api/state")[0] == 200


def test_broken_connections_leave_the_server_at_work(server):
    for raw in (b"\x16\x03\x01", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n", b"A" * 100_000, b"\r\n"):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        with connection, contextlib.suppress(OSError):
            connection.sendall(raw)
    assert server.ask("/api/state")[0] == 200


def raw_answer(server: Server, request: bytes) -> bytes:
    """What comes back for bytes as they are, "" where the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(1 << 16)
    return b""


RAW = {
    "a websocket": b"GET /api/state HTTP/1.1\r\nHOST\r\nCOOKIE\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n\r\n",
    "huge headers": b"GET / HTTP/1.1\r\nHOST\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    "a chunk of no length": b"POST /api/image HTTP/1.1\r\nHOST\r\nCOOKIE\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n",
    "two lengths": b"POST /api/image HTTP/1.1\r\nHOST\r\nCOOKIE\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\nxx",
    "a negative length": b"POST /api/image HTTP/1.1\r\nHOST\r\nCOOKIE\r\n"
    b"Content-Length: -5\r\n\r\n",
    "two hosts": b"GET /api/state HTTP/1.1\r\nHOST\r\nHost: evil.example\r\nCOOKIE\r\n\r\n",
    "another's address": b"GET http://evil.example/api/state HTTP/1.1\r\nHOST\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHOST\r\n\r\n",
}


@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_request_of_a_page_is_refused(server, kind):
    host, cookie = f"Host: 127.0.0.1:{server.port}", f"Cookie: {server.cookie}"
    request = RAW[kind].replace(b"HOST", host.encode()).replace(b"COOKIE", cookie.encode())
    answer = raw_answer(server, request)
    status = answer[9:12]
    if kind == "a websocket":  # it is an ordinary request here
        assert (status, b"Upgrade:" in answer) == (b"200", False)
    else:
        assert not answer or status[:1] == b"4", answer
    assert server.ask("/api/state")[0] == 200


def test_bodies_that_never_end_keep_nobody_waiting(server):
    head = b"POST /api/image HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nCookie: %s\r\n"
    start = head % (server.port, server.cookie.encode()) + b"Content-Length: 99\r\n\r\nx"
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            stack.enter_context(connection).sendall(start)
        began = time.monotonic()
        assert server.ask("/api/state")[0] == 200
        assert time.monotonic() - began < 5
    assert server.ask("/api/state")[0] == 200
    assert not any("Traceback" in line for line in server.said)


def test_a_restart_keeps_the_address_and_the_images(world, server, given):
    """The token is the gallery's; an image that was brought is encoded again."""
    expected = rank(server, image=given, text="at night")["columns"]["composed"]
    with serving(world.folder, "photos", *world.flags()) as other:
        assert other.token == server.token
        found = rank(other, image=given, text="at night")["columns"]["composed"]
        assert [row["row"] for row in found] == [row["row"] for row in expected]


def test_hostile_names_are_data(server):
    names = {row["name"] for row in server.json("/api/gallery")["rows"]}
    assert {f"trip/{name}" for name in HOSTILE if not name.startswith(".")} <= names


# --- a data set --------------------------------------------------------------------------------


def test_a_data_set_lists_its_queries_and_ranks_with_their_inputs(world):
    add_dataset(world, "shots")
    add_pictures(world, "shots")
    with serving(world.folder, "--dataset", "shots", *world.flags()) as server:
        state = server.json("/api/state")
        assert (state["name"], state["queries"], state["count"]) == ("shots", 3, 120)
        assert [m["name"] for m in state["methods"] if m["lacking"]] == []
        listed = server.json("/api/queries?find=like+2")
        assert [query["key"] for query in listed["queries"]] == ["q2"]
        for method in ("searle", "cvsi", "cirevl"):
            found = rank(server, image="q1", text="in a place like 1", method=method)
            assert len(found["columns"]["composed"]) == 60
        assert server.ask("/thumb/q1")[0] == 200
        assert server.ask("/thumb/g0")[0] == 200
        assert server.ask("/thumb/g100")[0] == 404  # the file is not there


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name a folder of photographs"),
        (["photos", "--demo"], "one of them"),
        (["absent"], "is no folder"),
        (["--dataset", "absent"], "holds no features"),
        (["--dataset", "shots", "--batch", "3"], "--batch has no effect with --dataset"),
        (["--demo", "--backbone", "clip"], "--demo has a backbone of its own"),
        (["photos", "--port", "99999"], "a port is from 0"),
        (["photos", "--host", ""], "--host is empty"),
        (["photos", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: Cannot assign"),
        (["photos", "--nonsense"], "--help lists all flags"),
    ],
)
def test_a_wrong_command_is_answered_in_a_line(tmp_path, monkeypatch, flags, words):
    import search
    from utils import UserError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        search.main([*flags, "--gpu", "-1", "--no-open"])


def test_a_port_that_is_taken_is_named(world, server):
    again = serving(world.folder, "photos", *world.flags(), "--port", str(server.port))
    with pytest.raises(AssertionError, match="Address already in use"), again:
        pass
