"""What strangers can't do: keys, limits of heads and bodies, slow clients, insides in answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from puna.engine.engine import Engine
from puna.serving import connection
from puna.serving.server import ListenSettings, Loading, Ready, ServerLife
from puna.serving.state import ServerSettings, host_name, is_authorized, is_local_name
from serving.conftest import Running, Serve

TEXT: dict[str, Any] = {"model": "small", "prompt": "hi", "max_tokens": 1}
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@contextmanager
def life(folder: Path, **settings: Any) -> Iterator[tuple[str, int]]:
    """A server as `puna serve` runs it, in a thread; its address and port."""
    engine = Engine.from_pretrained(str(folder))
    ready: list[Ready] = []
    came = threading.Event()

    def load(loading: Loading) -> Engine:
        loading.begin("load weights")
        return engine

    def on_ready(it: Ready) -> None:
        ready.append(it)
        came.set()

    loops: list[asyncio.AbstractEventLoop] = []
    lives: list[ServerLife] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
        it = ServerLife(ServerSettings(model_name="small", **settings), ListenSettings(port=0), load, on_ready)
        loops.append(loop)
        lives.append(it)
        await it.run()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert came.wait(60)
    try:
        yield ready[0].url, int(ready[0].url.rpartition(":")[2])
    finally:
        loops[0].call_soon_threadsafe(lives[0]._stop.set)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def quick(folder: Path) -> Iterator[tuple[str, int]]:
    """A server with little patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection.Connection, "head_timeout", 0.3)
        with life(folder, body_timeout=0.3, max_body_bytes=1000) as it:
            yield it


def exchange(port: int, sent: bytes, patience: float = 10) -> bytes:
    """What the server answers; nothing where it closes the connection without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as it:
        it.sendall(sent)
        found = b""
        while part := it.recv(65536):
            found += part
            head, end, body = found.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if end and length and len(body) == int(length[1]):
                break
        return found


def drip(it: socket.socket, what: bytes) -> None:
    """Sends it again and again, for five seconds; raises OSError once the other side has closed the connection."""
    for _ in range(500):
        it.sendall(what)
        time.sleep(0.01)


def parsed(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# ---- keys


def test_which_keys_are_good() -> None:
    keys = ("right", "also-right")
    good = [(b"Bearer right", b""), (b"bearer also-right", b""), (b"BEARER  right ", b""), (b"", b"right")]
    bad = [
        (b"", b""),
        (b"", b"wrong"),
        (b"right", b""),
        (b"Bearer", b""),
        (b"Bearer ", b""),
        (b"Bearer wrong", b""),
        (b"Bearer rig", b""),
        (b"Bearer right2", b""),
        (b"Basic right", b""),
        (b"Bearer right,also-right", b""),
        (b"Bearer wrong", b"right"),  # the one that OpenAI's clients send is the one that counts
        (b"Bearer \xff\xfe", b""),
    ]
    assert all(is_authorized(*given, keys) for given in good)
    assert not any(is_authorized(*given, keys) for given in bad)
    assert is_authorized(b"", b"", ())


def test_every_key_is_compared_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("puna.serving.state.secrets.compare_digest", compare)
    keys = ("first", "a-second-one", "3")
    for given in (b"Bearer first", b"Bearer 3", b"Bearer", b"Bearer wrong"):
        compared.clear()
        is_authorized(given, b"", keys)
        assert len(compared) == len(keys)
        assert {len(one) for pair in compared for one in pair} == {32}


def test_keys_over_http(serve: Serve) -> None:
    with serve(api_keys=("right",)) as running:
        url = f"{running.url}/v1/models"
        assert httpx.get(url, headers={"x-api-key": "right"}).status_code == 200
        assert httpx.get(url, headers={"authorization": "bEARER right"}).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            assert httpx.get(f"{running.url}{path}").status_code == 401, path
        for path in ("/health", "/ready"):
            assert httpx.get(f"{running.url}{path}").status_code == 200


# ---- names


@pytest.mark.parametrize(
    ("header", "is_good"),
    [
        (b"localhost", True),
        (b"LOCALHOST.:8000", True),
        (b"app.localhost:8000", True),
        (b"127.0.0.1:8000", True),
        (b"192.168.1.20:8000", True),
        (b"[::1]:8000", True),
        (b"[fe80::1%25eth0]:8000", True),
        (b"Box.Example:443", True),
        (b"box.example", True),
        (b"evil.example:8000", False),
        (b"sub.box.example", False),
        (b"127.0.0.1.evil.example", False),
        (b"localhost.evil.example", False),
        (b"evil.example#localhost", False),
        (b"notlocalhost", False),
        (b"\xe9vil", False),
        (b"", False),
    ],
)
def test_which_names_are_local(header: bytes, is_good: bool) -> None:
    assert is_local_name(host_name(header), {"box.example"}) is is_good


def test_a_page_of_a_name_that_points_here_gets_nothing(serve: Serve) -> None:
    """DNS rebinding: what the browser takes for evil.example is this server."""
    with serve(allowed_hosts=frozenset({"box.example"})) as running:
        for path in ("/", "/health", "/v1/models", "/nothing"):
            refused = httpx.get(f"{running.url}{path}", headers={"host": "evil.example:8000", "x-request-id": "me"})
            assert refused.status_code == 403, path
            assert refused.headers["x-request-id"] == "me"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "host_not_allowed")
            assert "'evil.example'" in error["message"]
            assert "--allowed-host" in error["message"]
        assert (
            httpx.post(f"{running.url}/v1/completions", json=TEXT, headers={"host": "evil.example"}).status_code == 403
        )
        port = running.url.rpartition(":")[2]
        for host in ("127.0.0.1", f"localhost:{port}", f"[::1]:{port}", "10.0.0.7:80", "box.example"):
            assert httpx.get(f"{running.url}/v1/models", headers={"host": host}).status_code == 200, host
        assert exchange(int(port), b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert running.client.models.list().data[0].id == "small"


# ---- bodies


def test_a_body_without_a_length_is_cut_off_at_the_limit(quick: tuple[str, int]) -> None:
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    status, error = parsed(exchange(quick[1], f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode() + chunk * 3))
    assert (status, error["code"]) == (413, "too_large")


@pytest.mark.parametrize("length", ["1001", "9999999999999999999"])
def test_a_length_above_the_limit_is_refused_before_the_body(quick: tuple[str, int], length: str) -> None:
    status, error = parsed(exchange(quick[1], f"{HEAD}content-length: {length}\r\n\r\n".encode()))
    assert (status, error["code"]) == (413, "too_large")


def test_a_body_that_does_not_come_is_not_waited_for(quick: tuple[str, int]) -> None:
    status, error = parsed(exchange(quick[1], f'{HEAD}content-length: 100\r\n\r\n{{"model"'.encode()))
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_client_that_leaves_within_its_body_is_known_as_such(
    quick: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "puna.serving"), socket.create_connection(("127.0.0.1", quick[1])) as it:
        it.sendall(f'{HEAD}x-request-id: leaves\r\ncontent-length: 100\r\n\r\n{{"model"'.encode())
        it.close()
        end = time.monotonic() + 10
        while "request_id=leaves" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.01)
    (line,) = [record.getMessage() for record in caplog.records if "request_id=leaves" in record.getMessage()]
    assert re.match(r"POST '/v1/completions' 499 .* error=client_left$", line)


# ---- heads and connections


def test_a_head_that_does_not_come_is_not_waited_for(quick: tuple[str, int]) -> None:
    assert exchange(quick[1], b"") == b""
    assert exchange(quick[1], b"GET /health HTT") == b""


def test_a_head_byte_by_byte_is_not_waited_for(quick: tuple[str, int]) -> None:
    """uvicorn's own timer begins anew with every byte."""
    with socket.create_connection(("127.0.0.1", quick[1]), timeout=10) as it:
        it.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in it.recv(65536)
        it.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"reset|pipe|abort"):
            drip(it, b"x-a: b\r\n")


def test_the_rest_of_a_refused_body_is_not_waited_for(quick: tuple[str, int]) -> None:
    with socket.create_connection(("127.0.0.1", quick[1]), timeout=10) as it:
        it.sendall(f"{HEAD}content-length: 2000\r\n\r\n".encode())
        assert b"413" in it.recv(65536)
        with pytest.raises(OSError, match=r"reset|pipe|abort"):
            drip(it, b"x")


def test_a_running_request_outlasts_the_timer_of_heads(quick: tuple[str, int]) -> None:
    body = TEXT | {"max_tokens": 200, "ignore_eos": True, "stream": True, "n": 32}
    began = time.monotonic()
    with httpx.stream("POST", f"{quick[0]}/v1/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert time.monotonic() - began > 0.3  # else this shows nothing


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 40_000,
        b"GET /" + b"a" * 40_000,
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-many: a\r\n" * 4000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS to a port without it
    ],
)
def test_heads_that_are_too_large_or_none(quick: tuple[str, int], head: bytes) -> None:
    with contextlib.suppress(ConnectionResetError):  # closed while the rest was on its way
        assert parsed(exchange(quick[1], head))[0] == (431 if len(head) > 32 * 1024 else 400)
    assert httpx.get(f"{quick[0]}/health").status_code == 200


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"nonsense\r\n\r\n", "illegal request line"),
        (b"GET /health HTTP/1.1\r\n\r\n", "Host"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nno header\r\n\r\n", "illegal header line"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", "Content-Length"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", "Transfer-Encoding"),
    ],
)
def test_what_is_no_http_gets_an_error_of_the_usual_shape(quick: tuple[str, int], sent: bytes, says: str) -> None:
    answer = exchange(quick[1], sent)
    head = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    status, error = parsed(answer)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", None)
    assert head[0] == b"http/1.1 400 bad request"
    assert says in error["message"]
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    assert any(re.fullmatch(rb"x-request-id: [0-9a-f]{32}", line) for line in head)


def test_a_body_that_is_no_http_gets_its_own_requests_id(
    quick: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    answer = exchange(quick[1], f"{HEAD}x-request-id: me\r\ntransfer-encoding: chunked\r\n\r\nnone\r\n".encode())
    assert parsed(answer)[0] == 400
    assert b"x-request-id: me\r\n" in answer.lower()
    assert any("request me refused with 400" in record.getMessage() for record in caplog.records)


def test_what_follows_a_good_request_and_is_no_http(quick: tuple[str, int]) -> None:
    """The good one has its answer before, on the same connection."""
    with socket.create_connection(("127.0.0.1", quick[1]), timeout=10) as it:
        it.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: good\r\n\r\n" + b"nonsense\r\n\r\n")
        found = b""
        while part := it.recv(65536):
            found += part
    good, bad = found.split(b"HTTP/1.1 ")[1:]
    assert good.startswith(b"200 ")
    assert bad.startswith(b"400 ")
    assert b"x-request-id: good\r\n" in good
    assert b"x-request-id: good" not in bad


def test_what_a_log_tells_of_a_broken_head_has_no_key(quick: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    answer = exchange(quick[1], b"GET /health HTTP/1.1\r\nhost: x\r\nauthorization: Bearer my-secret\x00\r\n\r\n")
    assert parsed(answer)[0] == 400
    assert "my-secret" not in caplog.text


def test_more_connections_than_descriptors_allow_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.serving.server.resource.getrlimit", lambda which: (67, 67))
    with life(folder) as (url, port), httpx.Client(base_url=url) as first:
        assert first.get("/health").status_code == 200
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        end = time.monotonic() + 10
        while (refused := httpx.get(f"{url}/health", headers={"x-request-id": "me"})).status_code != 503:
            assert time.monotonic() < end  # not all of them have been taken yet
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["x-request-id"] == "me"
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) >= 1
        assert first.get("/health").status_code == 200  # it was there before
        for one in idle:
            one.close()
        end = time.monotonic() + 10
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < end


# ---- insides


def test_an_error_in_the_server_has_its_trace_in_the_log_only(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("the insides")

    assert server.state.engine is not None
    monkeypatch.setattr(server.state.engine.parts.tokenizer, "encode", broken)
    caplog.set_level(logging.INFO)
    answer = server.http.post("/v1/completions", json=TEXT, headers={"x-request-id": "it"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "it"
    assert answer.json()["error"] == {
        "message": "the engine failed on this request",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    (failure,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert failure.getMessage() == "request it failed"
    assert failure.exc_info is not None
    end = time.monotonic() + 10
    while not (lines := [r.getMessage() for r in caplog.records if "request_id=it" in r.getMessage()]):
        assert time.monotonic() < end  # it is written when the answer is on its way
    (line,) = lines
    assert " 500 " in line
