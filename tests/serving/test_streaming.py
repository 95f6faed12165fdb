"""Streams on the wire: chunks that are written from a pattern, and past uvicorn's parser, are what they should be."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from hypothesis import given
from hypothesis import strategies as st

from puna.serving.errors import dumps
from puna.serving.streaming import EventStream, TextChunks
from serving.conftest import Running


@given(st.lists(st.tuples(st.integers(0, 3), st.text())), st.text())
def test_text_chunks_are_the_same_as_whole_ones(pieces: list[tuple[int, str]], name: str) -> None:
    def make(index: int, text: str) -> dict[str, Any]:
        return {"model": name, "choices": [{"index": index, "delta": {"content": text}, "logprobs": None}]}

    chunks = TextChunks(make)
    for index, text in pieces:
        assert chunks.write(index, text) == dumps(make(index, text))


def test_a_client_that_leaves_before_the_head_ends_the_work() -> None:
    """Such as one that has not read its answers before, so that the head has to wait."""
    ended: list[bool] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b""
        raise AssertionError("nobody reads this")

    async def stuck(message: Any) -> None:
        await asyncio.sleep(3600)

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    stream = EventStream(chunks(), lambda: ended.append(True))
    asyncio.run(stream({"type": "http"}, gone, stuck))
    assert ended == [True]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_streams_over_a_bare_socket(server: Running, version: str) -> None:
    """Chunks as RFC 9112 has them, read by hand; HTTP/1.0 knows none, and has the body up to the connection's end."""
    body = json.dumps(
        {"model": "small", "prompt": [5, 6], "max_tokens": 20, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    fields, _, rest = answer.partition(b"\r\n\r\n")
    assert fields.startswith(b"HTTP/1.1 200")
    assert (b"transfer-encoding: chunked" in fields.lower()) == (version == "1.1")
    text = rest
    if version == "1.1":
        text, size = b"", -1
        while size:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line, 16)
            text, rest = text + rest[:size], rest[size + 2 :]
        assert rest == b""
    *events, last = text.decode().removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    whole = server.http.post("/v1/completions", json=json.loads(body) | {"stream": False, "temperature": 0}).json()
    again = server.http.post("/v1/completions", json=json.loads(body) | {"temperature": 0}).text
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in again.split("\n\n") if line[:7] == "data: {"]
    assert "".join(pieces) == whole["choices"][0]["text"]
